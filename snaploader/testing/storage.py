"""Where the embedded server keeps content: the interface, in memory, and in a folder across restarts.

The folder:

    ROOT/v1/lock                                     held (flock) by the one server that uses the folder
    ROOT/v1/tmp/                                     bytes on their way in; emptied at start
    ROOT/v1/instances/=NAME/blobs/FUNCTION/2 HEX/62 HEX      a blob, read-only
    ROOT/v1/instances/=NAME/results/2 HEX/KEY                 SHA-256 of the rest (32 bytes), ActionResult

NAME is percent-encoded. Files appear by rename, whole or not at all. Nothing is fsynced: after a power cut a
blob may be short and then counts as absent, as does a result that fails its checksum. Blobs and results
may be deleted by hand at any time, also while the server runs; nothing else evicts them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import stat
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.files import (
    Access,
    OddEntry,
    closing_fd,
    lock_new,
    lstat,
    make_inside,
    open_folder,
    open_new,
    open_private,
    open_regular,
    read_regular,
    remove_tree,
    write_all,
)

_BLOB_MODE = 0o400
_CHECKSUM_BYTES = 32
_MAX_RESULT_BYTES = 256 << 20
"""A cut result fails its checksum and so counts as absent."""


@dataclass(frozen=True, slots=True)
class BlobReader:
    """An open blob. It stays readable when the blob is deleted meanwhile."""

    size: int
    read: Callable[[int, int], bytes]
    """From an offset, up to so many bytes; fewer only at the end."""
    close: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, data: bytes) -> BlobReader:
        """A blob in memory."""
        return cls(len(data), lambda offset, size: data[offset : offset + size])


class StagedBlob:
    """Bytes on their way in, invisible until `commit`. Used by one thread at a time.

    Args:
        verify: Whether the bytes must have the digest's hash; they always must have its size.
        write: Takes the bytes.
        publish: Makes them a blob.
        close: Lets go of them, published or not.
    """

    def __init__(
        self,
        digest: Digest,
        verify: bool,
        *,
        write: Callable[[Buffer], object],
        publish: Callable[[], object],
        close: Callable[[], object],
    ) -> None:
        self._digest = digest
        self._hasher = digest.function.hasher() if verify else None
        self._size = 0
        self._is_over = False
        self._write, self._publish, self._close = write, publish, close

    def write(self, data: Buffer) -> None:
        """Add bytes. DataLoss as soon as there are too many."""
        self._check_open()
        self._size += len(data)
        if self._size > self._digest.size_bytes:
            raise DataLoss(f"more bytes came than the digest {self._digest} says")
        if self._hasher is not None:
            self._hasher.update(data)
        self._write(data)

    def commit(self) -> None:
        """Make the blob visible. DataLoss, and nothing visible, when the bytes do not match the digest."""
        self._check_open()
        if self._size != self._digest.size_bytes:
            raise DataLoss(f"{self._size} bytes came for the digest {self._digest}")
        if self._hasher is not None and self._hasher.hexdigest() != self._digest.hash:
            raise DataLoss(f"the bytes that came do not have the digest {self._digest}")
        self._publish()
        self.discard()

    def discard(self) -> None:
        """Forget the bytes. No effect after commit or a second time."""
        if not self._is_over:
            self._is_over = True
            self._close()

    def _check_open(self) -> None:
        if self._is_over:
            raise FailedPrecondition(f"the upload of {self._digest} is over")


class Partition(Protocol):
    """The content of one instance. Thread-safe."""

    def contains(self, digest: Digest) -> bool:
        """Whether a blob is there; the empty one always is."""

    def open(self, digest: Digest) -> BlobReader | None:
        """The blob, or None when absent."""

    def load(self, digest: Digest) -> bytes | None:
        """A whole blob, for those known to be small, or None when absent."""
        reader = self.open(digest)
        if reader is None:
            return None
        with contextlib.closing(reader):
            return reader.read(0, reader.size)

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        """Begin to store a blob; without `verify`, its size is compared and its hash is not."""

    def put(self, digest: Digest, data: Buffer, *, verify: bool = True) -> None:
        """Store a small blob at once, as by `stage`."""
        staged = self.stage(digest, verify=verify)
        try:
            staged.write(data)
            staged.commit()
        finally:
            staged.discard()

    def delete(self, digest: Digest) -> bool:
        """Drop a blob; whether it was there."""

    def blobs(self) -> list[Digest]:
        """Every blob, sorted."""

    def get_result(self, key: str) -> bytes | None:
        """The action result under a key."""

    def put_result(self, key: str, data: bytes) -> None: ...

    def delete_result(self, key: str) -> bool: ...

    def results(self) -> list[str]:
        """The keys of all action results, sorted."""


class Storage(Protocol):
    """Partitions by instance name. Thread-safe."""

    def partition(self, instance_name: str) -> Partition: ...

    def close(self) -> None: ...


def result_key(digest: Digest, *, has_size: bool) -> str:
    """The key of an action result in a partition, safe as a file name."""
    size = f"-{digest.size_bytes}" if has_size else ""
    return f"{digest.function.name.lower()}-{digest.hash}{size}"


def parse_result_key(key: str) -> Digest:
    """The digest behind a key made by `result_key`; size 0 where the key has none."""
    function, hash_, *size = key.split("-")
    return Digest(hash_, int(size[0]) if size else 0, DigestFunction.parse(function))


class MemoryPartition(Partition):
    """One instance's content in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs: dict[Digest, bytes] = {}
        self._results: dict[str, bytes] = {}

    def contains(self, digest: Digest) -> bool:
        return digest.size_bytes == 0 or digest in self._blobs

    def open(self, digest: Digest) -> BlobReader | None:
        data = b"" if digest.size_bytes == 0 else self._blobs.get(digest)
        return None if data is None else BlobReader.of(data)

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        pieces: list[bytes] = []

        def publish() -> None:
            with self._lock:
                self._blobs[digest] = b"".join(pieces)

        return StagedBlob(
            digest, verify, write=lambda data: pieces.append(bytes(data)), publish=publish, close=pieces.clear
        )

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
        """Keep all: content stays until the object goes."""


class DiskPartition(Partition):
    """One instance's content in a folder."""

    def __init__(self, folder: str, staging: str, numbers: itertools.count[int]) -> None:
        self._folder = folder
        self._staging = staging
        self._numbers = numbers

    def _publish(self, staged: str, path: str) -> None:
        """Move a staged file to its place, making the folder when it is the first there."""
        try:
            os.rename(staged, path)
        except FileNotFoundError:
            make_inside(os.path.dirname(self._staging), os.path.dirname(path), Access())
            os.rename(staged, path)

    def blob_path(self, digest: Digest) -> str:
        """Where a blob lies."""
        function = digest.function.name.lower()
        return f"{self._folder}/blobs/{function}/{digest.hash[:2]}/{digest.hash[2:]}"

    def _result_path(self, key: str) -> str:
        return f"{self._folder}/results/{key.partition('-')[2][:2]}/{key}"

    def _staged_path(self) -> str:
        return f"{self._staging}/{next(self._numbers)}"

    def contains(self, digest: Digest) -> bool:
        if digest.size_bytes == 0:
            return True
        status = lstat(self.blob_path(digest))
        return status is not None and stat.S_ISREG(status.st_mode) and status.st_size == digest.size_bytes

    def open(self, digest: Digest) -> BlobReader | None:
        if digest.size_bytes == 0:
            return BlobReader.of(b"")
        try:
            descriptor, status = open_regular(self.blob_path(digest))
        except (FileNotFoundError, OddEntry):
            return None
        if status.st_size != digest.size_bytes:
            os.close(descriptor)
            return None
        return BlobReader(
            status.st_size,
            lambda offset, size: os.pread(descriptor, size, offset),
            functools.partial(os.close, descriptor),
        )

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        path = self._staged_path()
        descriptor = open_new(path, _BLOB_MODE, os.O_WRONLY)

        def close() -> None:
            os.close(descriptor)
            _unlink(path)

        return StagedBlob(
            digest,
            verify,
            write=functools.partial(write_all, descriptor),
            publish=lambda: self._publish(path, self.blob_path(digest)),
            close=close,
        )

    def delete(self, digest: Digest) -> bool:
        return _unlink(self.blob_path(digest))

    def blobs(self) -> list[Digest]:
        found = []
        for function in DigestFunction:
            for shard in _entries(f"{self._folder}/blobs/{function.name.lower()}"):
                for entry in _entries(shard.path):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(Digest(shard.name + entry.name, entry.stat().st_size, function))
        return sorted(found)

    def get_result(self, key: str) -> bytes | None:
        try:
            content = read_regular(self._result_path(key), _MAX_RESULT_BYTES)
        except (FileNotFoundError, OddEntry):
            return None
        data = content[_CHECKSUM_BYTES:]
        return data if hashlib.sha256(data).digest() == content[:_CHECKSUM_BYTES] else None

    def put_result(self, key: str, data: bytes) -> None:
        staged = self._staged_path()
        try:
            with closing_fd(open_new(staged, 0o600, os.O_WRONLY)) as descriptor:
                write_all(descriptor, hashlib.sha256(data).digest() + data)
            self._publish(staged, self._result_path(key))
        except BaseException:
            _unlink(staged)
            raise

    def delete_result(self, key: str) -> bool:
        return _unlink(self._result_path(key))

    def results(self) -> list[str]:
        return sorted(
            entry.name for shard in _entries(f"{self._folder}/results") for entry in _entries(shard.path)
        )


def _unlink(path: str) -> bool:
    """Remove a file; whether it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


class DiskStorage:
    """Content in a folder, made when absent. One server at a time: FailedPrecondition for a second."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._base = os.path.join(os.path.abspath(root), "v1")
        self._staging = os.path.join(self._base, "tmp")
        self._numbers = itertools.count()
        self._pid = os.getpid()
        with translate_os_errors("cannot use the server's folder"):
            open_private(os.path.dirname(self._base), "the server's folder", "v1")
            try:
                self._lock: int | None = lock_new(os.path.join(self._base, "lock"), wait=False)
            except BlockingIOError:
                raise FailedPrecondition(f"another server uses {self._base}: stop it first") from None
            try:
                with closing_fd(open_folder(self._base, Access(), "the server's folder")) as base:
                    remove_tree("tmp", dir_fd=base)
                open_private(self._base, "the server's folder", "tmp", "instances")
            except BaseException:
                self.close()
                raise

    def partition(self, instance_name: str) -> DiskPartition:
        encoded = "=" + urllib.parse.quote(instance_name, safe="")
        if len(encoded) > 255:
            raise InvalidArgument(f"the instance name {instance_name[:80]!r}… is too long")
        return DiskPartition(os.path.join(self._base, "instances", encoded), self._staging, self._numbers)

    def close(self) -> None:
        """Leave the folder to others. Content stays. Idempotent."""
        if self._lock is not None:
            # Unlocked, not only closed: a forked child may hold a copy of the descriptor, whose own
            # closing leaves the lock to its parent.
            if os.getpid() == self._pid:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None
