"""Files as this library reads, copies, replaces, flushes and removes them. All functions raise OSError.

One copy of each of these steps is here for all packages but `cow`, which stands alone. How folders and files
are opened that another user may have tampered with is in `snaploader.folders`, locks between processes are in
`snaploader.locks`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from snaploader.digest import Buffer, DigestFunction, Hasher
from snaploader.folders import open_new

BUFFER_BYTES = 1 << 20
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_NO_COPY_RANGE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)
_local = threading.local()


def buffer() -> memoryview:
    """Return this thread's buffer of BUFFER_BYTES. A fresh one would cost its page faults each time."""
    view: memoryview | None = getattr(_local, "view", None)
    if view is None:
        view = _local.view = memoryview(bytearray(BUFFER_BYTES))
    return view


def hash_file(fd: int, function: DigestFunction) -> tuple[str, int]:
    """Return the hash of a whole file and the number of bytes hashed. The file's position stays."""
    view = buffer()
    count = os.preadv(fd, [view], 0)
    if count < len(view):
        # Most blobs end here: one read and one hash.
        rest = os.preadv(fd, [view[count:]], count) if count else 0
        if not rest:
            return function.hash(view[:count]), count
        count += rest
    hasher = function.hasher()
    size = 0
    while count:
        hasher.update(view[:count])
        size += count
        count = os.preadv(fd, [view], size)
    return hasher.hexdigest(), size


def read_file(fd: int, size: int) -> bytes:
    """Return the bytes of a file, at most one more than `size`."""
    parts = []
    done = 0
    while done <= size:
        part = os.pread(fd, size + 1 - done, done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(fd: int, data: Buffer) -> None:
    """Write all of `data` at the file's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def copy_hashing(source: int, target: int, hasher: Hasher, limit: int | None = None) -> int:
    """Append the whole of `source` to `target` and to the hash; return the number of bytes copied.

    What is hashed is what was written, even when `source` changes meanwhile. Stops after `limit` + 1 bytes.
    """
    view = buffer()
    size = 0
    while limit is None or size <= limit:
        count = os.preadv(source, [view], size)
        if not count:
            break
        hasher.update(view[:count])
        write_all(target, view[:count])
        size += count
    return size


def copy_content(source: int, target: int, size: int) -> None:
    """Make the empty file `target` hold the bytes of `source`, sharing its blocks where the disk can."""
    with suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    copy_range(source, target, 0, size)


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy the bytes from `start` up to `end` to the same place. OSError when `source` ends before."""
    done = start
    with suppress_errnos(_NO_COPY_RANGE):
        while done < end:
            count = os.copy_file_range(source, target, end - done, done, done)
            if not count:
                break
            done += count
    view = buffer()
    while done < end:
        count = os.preadv(source, [view[: end - done]], done)
        if not count:
            raise OSError(errno.EIO, f"the file ended at byte {done} of {end} while it was copied")
        os.lseek(target, done, os.SEEK_SET)
        write_all(target, view[:count])
        done += count


NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What open(2) says where the file system knows no O_TMPFILE."""


class NamelessFile:
    """A new empty file without a name, open for reading and writing, mode 0600. For one thread.

    Nothing is left of it when the process is killed (O_TMPFILE, see open(2)), except where the file system
    knows no such files: there it has a temporary name. A context manager that drops what was not linked.

    Args:
        folder: Where the file will be.
        temporary_path: Gives a new path on the same file system, for file systems without O_TMPFILE.
    """

    def __init__(self, folder: str, temporary_path: Callable[[], str]) -> None:
        self._path: str | None = None
        self._pid = os.getpid()
        self.fd = -1
        with suppress_errnos(NO_TMPFILE):
            self.fd = os.open(folder, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
            return
        path = temporary_path()
        self.fd = open_new(path, 0o600)
        self._path = path

    def link(self, target: str) -> None:
        """Give the file a name, in one step. FileExistsError when that is taken."""
        if self._path is not None:
            os.link(self._path, target)
        else:
            # A descriptor among the arguments makes this linkat(2), which follows the symbolic link.
            os.link(f"/proc/self/fd/{self.fd}", target, src_dir_fd=self.fd, follow_symlinks=True)

    def close(self) -> None:
        """Drop the file, unless it was linked. Again is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            # A forked child leaves the temporary name to its parent.
            if self._path is not None and os.getpid() == self._pid:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def replacing(path: str | os.PathLike[str], *, mode: int = 0o600) -> Iterator[int]:
    """Open a new file that takes the place of `path`, in one step, when the block ends well.

    Gives its descriptor. Until then it has a temporary name beside `path`. If the block raises, that is
    removed, and what stood at `path` still stands. A forked child that leaves the block does neither. Nothing
    is flushed to disk.

    Args:
        mode: Permission bits of the file, whatever the umask says.
    """
    pid = os.getpid()
    fd, temporary = tempfile.mkstemp(prefix=".snaploader-", dir=os.path.dirname(path) or ".")
    try:
        try:
            yield fd
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
        if os.getpid() == pid:
            os.replace(temporary, path)
    except BaseException:
        if os.getpid() == pid:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        raise


def replace_file(path: str | os.PathLike[str], data: Buffer) -> None:
    """Give a file, of mode 0600, new content: whoever reads it sees all of the old or all of the new."""
    with replacing(path) as fd:
        write_all(fd, data)


def flush_folder(path: str) -> None:
    """Flush the names in a folder to disk; see fsync(2)."""
    with _opened(path) as fd:
        os.fsync(fd)


def flush_file_system(path: str) -> None:
    """Flush all that was written to the file system of a folder to disk; see syncfs(2)."""
    with _opened(path) as fd:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_tree(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> None:
    """Remove a file or folder as far as possible, even when others do so too or its modes forbid it.

    No symbolic link is followed, even if somebody puts one in the place of a folder meanwhile.

    Args:
        dir_fd: Of the folder that a relative path is in.
    """
    try:
        os.unlink(path, dir_fd=dir_fd)
        return
    except IsADirectoryError:
        pass
    except OSError:
        # Gone already, or another user's.
        return
    shutil.rmtree(path, ignore_errors=True, dir_fd=dir_fd)
    with suppress(OSError):
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        # Entries can be neither found in a folder nor unlinked from it without permission.
        _permit(path, dir_fd)
        for _, names, _, folder in os.fwalk(path, dir_fd=dir_fd):
            for name in names:
                with suppress(OSError):
                    _permit(name, folder)
        shutil.rmtree(path, ignore_errors=True, dir_fd=dir_fd)


def _permit(path: str | os.PathLike[str], dir_fd: int | None) -> None:
    """Give a folder's owner all permissions. OSError when it is no folder, or another user's."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IRWXU)
    finally:
        os.close(fd)


class suppress_errnos:  # noqa: N801  (reads like contextlib.suppress)
    """Ignore an OSError with one of these codes, and end the block there."""

    def __init__(self, codes: frozenset[int]) -> None:
        self._codes = codes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and error.errno in self._codes
