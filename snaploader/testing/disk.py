"""The embedded server's content on disk, kept across restarts.

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
import hashlib
import itertools
import os
import stat
import urllib.parse

from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.filecache.trash import remove_tree
from snaploader.folders import (
    Access,
    OddEntry,
    make_inside,
    open_inner,
    open_new,
    open_private,
    open_regular,
    open_root,
    open_written,
)
from snaploader.testing.storage import BlobReader, CheckedBytes, StagedBlob, check_bytes

_BLOB_MODE = 0o400
_CHECKSUM_BYTES = 32
_MAX_RESULT_BYTES = 256 << 20
"""A cut result fails its checksum and so counts as absent."""


class _FileReader:
    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        os.close(self._descriptor)


class _StagedFile:
    def __init__(self, partition: DiskPartition, digest: Digest, path: str, *, verify: bool) -> None:
        self._partition = partition
        self._digest = digest
        self._path = path
        self._check = CheckedBytes(digest, verify=verify)
        self._file: int | None = open_new(path, 0o600, os.O_WRONLY)

    def write(self, data: Buffer) -> None:
        if self._file is None:
            raise FailedPrecondition(f"the upload of {self._digest} is over")
        self._check.update(data)
        _write_all(self._file, data)

    def commit(self) -> None:
        if self._file is None:
            raise FailedPrecondition(f"the upload of {self._digest} is over")
        self._check.check()
        os.fchmod(self._file, _BLOB_MODE)
        self._close()
        self._partition.publish(self._path, self._partition.blob_path(self._digest))

    def discard(self) -> None:
        self._close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _publish(staged: str, path: str, base: str) -> None:
    """Move a file to its place, making its folder below `base` when it is the first there."""
    try:
        os.rename(staged, path)
    except FileNotFoundError:
        make_inside(base, os.path.dirname(path), Access())
        os.rename(staged, path)


class DiskPartition:
    """One instance's content in a folder."""

    def __init__(self, folder: str, staging: str, numbers: itertools.count[int]) -> None:
        self._folder = folder
        self._staging = staging
        self._numbers = numbers

    def publish(self, staged: str, path: str) -> None:
        """Move a staged file to its place."""
        _publish(staged, path, os.path.dirname(self._staging))

    def blob_path(self, digest: Digest) -> str:
        """Where a blob lies."""
        function = digest.function.name.lower()
        return f"{self._folder}/blobs/{function}/{digest.hash[:2]}/{digest.hash[2:]}"

    def _result_path(self, key: str) -> str:
        return f"{self._folder}/results/{key.partition('-')[2][:2]}/{key}"

    def _staged_path(self) -> str:
        return f"{self._staging}/{next(self._numbers)}"

    def contains(self, digest: Digest) -> bool:
        try:
            status = os.stat(self.blob_path(digest), follow_symlinks=False)
            return stat.S_ISREG(status.st_mode) and status.st_size == digest.size_bytes
        except FileNotFoundError:
            return False

    def open(self, digest: Digest) -> BlobReader | None:
        try:
            descriptor, status = open_regular(self.blob_path(digest))
        except (FileNotFoundError, OddEntry):
            return None
        size = status.st_size
        if size != digest.size_bytes:
            os.close(descriptor)
            return None
        return _FileReader(descriptor, size)

    def stage(self, digest: Digest, *, verify: bool = True) -> StagedBlob:
        return _StagedFile(self, digest, self._staged_path(), verify=verify)

    def put(self, digest: Digest, data: Buffer, *, verify: bool = True) -> None:
        check_bytes(digest, data, verify=verify)
        self._write_file(self.blob_path(digest), data, _BLOB_MODE)

    def delete(self, digest: Digest) -> bool:
        try:
            os.unlink(self.blob_path(digest))
        except FileNotFoundError:
            return False
        return True

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
            descriptor, _ = open_regular(self._result_path(key))
        except (FileNotFoundError, OddEntry):
            return None
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(_MAX_RESULT_BYTES)
        data = content[_CHECKSUM_BYTES:]
        return data if hashlib.sha256(data).digest() == content[:_CHECKSUM_BYTES] else None

    def put_result(self, key: str, data: bytes) -> None:
        self._write_file(self._result_path(key), hashlib.sha256(data).digest() + data, 0o600)

    def delete_result(self, key: str) -> bool:
        try:
            os.unlink(self._result_path(key))
        except FileNotFoundError:
            return False
        return True

    def results(self) -> list[str]:
        return sorted(
            entry.name for shard in _entries(f"{self._folder}/results") for entry in _entries(shard.path)
        )

    def _write_file(self, path: str, data: Buffer, mode: int) -> None:
        staged = self._staged_path()
        descriptor = open_new(staged, mode, os.O_WRONLY)
        try:
            try:
                _write_all(descriptor, data)
            finally:
                os.close(descriptor)
            self.publish(staged, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            raise


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
            self._lock: int | None = _lock(os.path.join(self._base, "lock"))
            try:
                base = open_root(self._base, Access(), "the server's folder")
                try:
                    remove_tree("tmp", dir_fd=base)
                    for name in ("tmp", "instances"):
                        os.close(open_inner(name, base, Access(), os.path.join(self._base, name)))
                finally:
                    os.close(base)
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


def _lock(path: str) -> int:
    descriptor = open_written(path, os.O_RDWR, Access())
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPrecondition(f"another server uses {os.path.dirname(path)}: stop it first") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
