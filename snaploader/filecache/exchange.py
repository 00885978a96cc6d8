"""Bytes in and files out: blobs that are added whole, from files or in pieces, and put at other places.

Files share their bytes with the cache where that is safe.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from types import TracebackType
from typing import Self

from snaploader import files
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.filecache.blobs import BlobSpace
from snaploader.files import suppress_errnos


class BlobWriter:
    """A writer of one blob, which adds it when all its bytes came, in order. For one thread.

    A context manager; leaving it without `commit` drops what was written.
    """

    def __init__(self, blobs: BlobSpace, digest: Digest) -> None:
        blobs.check_fits(digest.size_bytes)
        self._blobs = blobs
        self._digest = digest
        self._hasher = digest.function.hasher()
        self._size = 0
        with translate_os_errors(f"cannot write blob {digest}"):
            self._staged = blobs.stage(digest)

    def write(self, data: Buffer) -> None:
        """Append bytes. DataLoss when they are more than the digest says."""
        self._check_open()
        self._size += len(memoryview(data).cast("B"))
        if self._size > self._digest.size_bytes:
            raise DataLoss(f"blob {self._digest}: more bytes came than its digest says")
        self._hasher.update(data)
        with translate_os_errors(f"cannot write blob {self._digest}"):
            files.write_all(self._staged.fd, data)

    def commit(self) -> bool:
        """Add the blob; return False when it was here. DataLoss when the bytes do not have the digest."""
        self._check_open()
        if self._size != self._digest.size_bytes:
            raise DataLoss(f"blob {self._digest}: only {self._size} bytes came")
        found = self._hasher.hexdigest()
        if found != self._digest.hash:
            raise DataLoss(f"blob {self._digest}: the bytes that came have the hash {found}")
        with translate_os_errors(f"cannot add blob {self._digest}"):
            self._blobs.step_done("blob.written")
            added = not self._blobs.present(self._digest) and self._blobs.publish(
                self._digest, self._staged.fd, self._staged.link
            )
        self.close()
        return added

    def close(self) -> None:
        """Drop what was written, unless it was committed. Again is fine."""
        self._staged.close()

    def _check_open(self) -> None:
        if self._staged.fd < 0:
            raise FailedPrecondition(f"the writer of blob {self._digest} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_NO_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EACCES})
"""Why a link may be refused where a copy works; see link(2)."""
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Not to wait for the writer of a FIFO, which is refused then."""
WRITABLE_MODE = 0o600


def put_bytes(blobs: BlobSpace, digest: Digest, data: Buffer) -> bool:
    """Add bytes whose hash was checked; return False when the blob was here."""
    blobs.check_fits(digest.size_bytes)
    with translate_os_errors(f"cannot add blob {digest}"):
        if blobs.present(digest):
            return False
        with blobs.stage(digest) as staged:
            files.write_all(staged.fd, data)
            blobs.step_done("blob.written")
            return blobs.publish(digest, staged.fd, staged.link)


def put_file(blobs: BlobSpace, digest: Digest, path: str, *, move: bool, link: bool, verify: bool) -> bool:
    """See `FileCache.put_file`."""
    blobs.check_fits(digest.size_bytes)
    with translate_os_errors(f"cannot add {path!r} as blob {digest}"):
        fd = os.open(path, _READ)
        try:
            _check_regular(fd, path)
            size = os.fstat(fd).st_size
            if size != digest.size_bytes:
                raise DataLoss(f"{path!r} has {size} bytes, so it is not blob {digest}")
            if blobs.present(digest):
                added = False
            elif not (move or link):
                return _put_copy(blobs, digest, fd, path, verify=verify)
            else:
                if verify and files.hash_file(fd, digest.function)[0] != digest.hash:
                    raise DataLoss(f"{path!r} does not have the digest {digest}")
                added = _put_link(blobs, digest, fd, path)
        finally:
            os.close(fd)
        if move:
            os.unlink(path)
        return added


def _put_link(blobs: BlobSpace, digest: Digest, fd: int, path: str) -> bool:
    with suppress_errnos(_NO_LINK):
        # The time of last write is the time of adding: it tells what a power failure may have damaged.
        os.utime(fd)
        return blobs.publish(digest, fd, lambda target: os.link(path, target))
    return _put_copy(blobs, digest, fd, path, verify=False)


def _put_copy(blobs: BlobSpace, digest: Digest, source: int, name: str, *, verify: bool) -> bool:
    with blobs.stage(digest) as staged:
        if verify:
            hasher = digest.function.hasher()
            size = files.copy_hashing(source, staged.fd, hasher, digest.size_bytes)
            if size != digest.size_bytes or hasher.hexdigest() != digest.hash:
                raise DataLoss(f"{name!r} does not have the digest {digest}")
        else:
            files.copy_content(source, staged.fd, digest.size_bytes)
        blobs.step_done("blob.written")
        return blobs.publish(digest, staged.fd, staged.link)


def add_file(blobs: BlobSpace, path: str, function: DigestFunction) -> tuple[Digest, bool]:
    """See `FileCache.add_file`."""
    with translate_os_errors(f"cannot add {path!r} to the file cache"):
        source = os.open(path, _READ)
        try:
            _check_regular(source, path)
            blobs.check_fits(os.fstat(source).st_size)
            with blobs.stage() as staged:
                hasher = function.hasher()
                size = files.copy_hashing(source, staged.fd, hasher)
                digest = Digest(hasher.hexdigest(), size, function)
                blobs.step_done("blob.written")
                if blobs.present(digest):
                    return digest, False
                return digest, blobs.publish(digest, staged.fd, staged.link)
        finally:
            os.close(source)


def materialize(
    blobs: BlobSpace, digest: Digest, destination: str, *, writable: bool, mode: int | None
) -> None:
    """See `FileCache.materialize`."""
    fd = blobs.open(digest)
    try:
        with translate_os_errors(f"cannot put blob {digest} at {destination!r}"):
            try:
                if mode is None:
                    mode = WRITABLE_MODE if writable else blobs.mode
                # A link shows the mode of the blob, which the cache and other links share.
                if writable or mode != blobs.mode or not _link_out(blobs, digest, fd, destination):
                    _copy_out(fd, digest.size_bytes, destination, mode)
            except FileExistsError:
                raise FailedPrecondition(
                    f"{destination!r} exists and is not overwritten: remove it or choose another place"
                ) from None
    finally:
        os.close(fd)


def _link_out(blobs: BlobSpace, digest: Digest, fd: int, destination: str) -> bool:
    """Link the verified file to its destination; return False when only a copy will do."""
    source = blobs.path(digest)
    # Evicted between opening and linking, or on another file system, or linked too often already.
    with suppress_errnos(_NO_LINK | {errno.ENOENT}):
        os.link(source, destination)
        if os.stat(destination, follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
            return True
        # Evicted and added again: this file is another one, which was not verified.
        os.unlink(destination)
    return False


def _copy_out(source: int, size: int, destination: str, mode: int) -> None:
    """Copy to a new file that gets its name in one step when it is whole, and never before."""
    folder, name = os.path.split(destination)
    folder = folder or "."
    with files.NamelessFile(folder, lambda: f"{folder}/.{name[:100]}.{secrets.token_hex(8)}") as copy:
        files.copy_content(source, copy.fd, size)
        os.fchmod(copy.fd, mode)
        copy.link(destination)


def _check_regular(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise InvalidArgument(f"{path!r} is not a regular file")
