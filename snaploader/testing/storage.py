"""Where the embedded server keeps content: the interface, and the one in memory."""

from __future__ import annotations

import threading
from typing import Protocol

from snaploader.digest import Buffer, Digest, DigestFunction, Hasher
from snaploader.errors import DataLoss


class BlobReader(Protocol):
    """An open blob. It stays readable when the blob is deleted meanwhile."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; less only at the end."""
        ...

    def close(self) -> None: ...


class StagedBlob(Protocol):
    """Bytes on their way in, invisible until `commit`. Used by one thread at a time."""

    def write(self, data: Buffer) -> None: ...

    def commit(self) -> None:
        """Make the blob visible. DataLoss, and nothing visible, when the bytes do not match the digest."""
        ...

    def discard(self) -> None:
        """Forget the bytes. No effect after commit or a second time."""
        ...


class Partition(Protocol):
    """The content of one instance. Thread-safe."""

    def contains(self, digest: Digest) -> bool: ...

    def open(self, digest: Digest) -> BlobReader | None:
        """The blob, or None when absent."""
        ...

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        """Begin to store a blob; without `verify`, its size is compared and its hash is not."""
        ...

    def put(self, digest: Digest, data: Buffer, *, verify: bool = True) -> None:
        """Store a small blob at once. DataLoss when the size differs, or with `verify` the hash."""
        ...

    def delete(self, digest: Digest) -> bool:
        """Drop a blob; whether it was there."""
        ...

    def blobs(self) -> list[Digest]:
        """Every blob, sorted."""
        ...

    def get_result(self, key: str) -> bytes | None:
        """The action result under a key."""
        ...

    def put_result(self, key: str, data: bytes) -> None: ...

    def delete_result(self, key: str) -> bool: ...

    def results(self) -> list[str]:
        """The keys of all action results, sorted."""
        ...


class Storage(Protocol):
    """Partitions by instance name. Thread-safe."""

    def partition(self, instance_name: str) -> Partition: ...

    def close(self) -> None: ...


class CheckedBytes:
    """The running size, and with `verify` the hash, of bytes that must turn out to have a digest."""

    def __init__(self, digest: Digest, *, verify: bool) -> None:
        self._digest = digest
        self._hasher: Hasher | None = digest.function.hasher() if verify else None
        self._size = 0

    def update(self, data: Buffer) -> None:
        """Add bytes. DataLoss as soon as there are too many."""
        self._size += len(data)
        if self._size > self._digest.size_bytes:
            raise DataLoss(f"more bytes came than the digest {self._digest} says")
        if self._hasher is not None:
            self._hasher.update(data)

    def check(self) -> None:
        """DataLoss unless exactly the bytes of the digest came."""
        if self._size != self._digest.size_bytes:
            raise DataLoss(f"{self._size} bytes came for the digest {self._digest}")
        if self._hasher is not None and self._hasher.hexdigest() != self._digest.hash:
            raise DataLoss(f"the bytes that came do not have the digest {self._digest}")


def check_bytes(digest: Digest, data: Buffer, *, verify: bool = True) -> None:
    """DataLoss unless `data` has this digest; without `verify`, unless it has its size."""
    check = CheckedBytes(digest, verify=verify)
    check.update(data)
    check.check()


def result_key(digest: Digest, *, has_size: bool) -> str:
    """The key of an action result in a partition, safe as a file name."""
    size = f"-{digest.size_bytes}" if has_size else ""
    return f"{digest.function.name.lower()}-{digest.hash}{size}"


class _MemoryReader:
    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        pass


class _MemoryStaged:
    def __init__(self, partition: MemoryPartition, digest: Digest, *, verify: bool) -> None:
        self._partition = partition
        self._digest = digest
        self._check = CheckedBytes(digest, verify=verify)
        self._pieces: list[bytes] = []

    def write(self, data: Buffer) -> None:
        self._check.update(data)
        self._pieces.append(bytes(data))

    def commit(self) -> None:
        self._check.check()
        self._partition.put(self._digest, b"".join(self._pieces), verify=False)
        self.discard()

    def discard(self) -> None:
        self._pieces = []


class MemoryPartition:
    """One instance's content in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs: dict[Digest, bytes] = {}
        self._results: dict[str, bytes] = {}

    def contains(self, digest: Digest) -> bool:
        return digest in self._blobs

    def open(self, digest: Digest) -> BlobReader | None:
        data = self._blobs.get(digest)
        return None if data is None else _MemoryReader(data)

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        return _MemoryStaged(self, digest, verify=verify)

    def put(self, digest: Digest, data: Buffer, *, verify: bool = True) -> None:
        check_bytes(digest, data, verify=verify)
        with self._lock:
            self._blobs[digest] = bytes(data)

    def delete(self, digest: Digest) -> bool:
        with self._lock:
            return self._blobs.pop(digest, None) is not None

    def blobs(self) -> list[Digest]:
        with self._lock:
            return sorted(self._blobs)

    def get_result(self, key: str) -> bytes | None:
        return self._results.get(key)

    def put_result(self, key: str, data: bytes) -> None:
        with self._lock:
            self._results[key] = data

    def delete_result(self, key: str) -> bool:
        with self._lock:
            return self._results.pop(key, None) is not None

    def results(self) -> list[str]:
        with self._lock:
            return sorted(self._results)


class MemoryStorage:
    """Content that ends with the object. It may be shared by servers one after the other, or at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partitions: dict[str, MemoryPartition] = {}

    def partition(self, instance_name: str) -> MemoryPartition:
        with self._lock:
            return self._partitions.setdefault(instance_name, MemoryPartition())

    def close(self) -> None:
        """Nothing to do: content stays until the object goes."""


def parse_result_key(key: str) -> Digest:
    """The digest behind a key made by `result_key`; size 0 where the key has none."""
    function, hash_, *size = key.split("-")
    return Digest(hash_, int(size[0]) if size else 0, DigestFunction.parse(function))
