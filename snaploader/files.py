"""Files, folders and locks: how this library opens, reads, copies, replaces, flushes, locks and removes them.

One copy of each of these steps is here for all packages but `cow`, which stands alone. Functions that read,
write or copy content raise OSError; what takes long ends with the call that runs (`snaploader.context`).

Another user may have made a folder of content before, or may write to it, and may have put a symbolic link, a
pipe or a file of somebody else's where this library expects a file of its own. So a folder or file is opened
first, never through a link in its last component and without waiting for anyone, and it is judged by its
descriptor: what it is, who owns it, who may write to it. See open(2), path_resolution(7) and symlink(7).
Folders above the root are taken as they are: whoever may rename the root can put another in its place.

A forked child shares descriptors, and so locks, with its parent. So whatever unlocks or removes something in
a block that a child may leave too asks first whose it is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from snaploader.context import current
from snaploader.digest import Buffer, DigestFunction, Hasher
from snaploader.errors import Cancelled, FailedPrecondition, InvalidArgument, PermissionDenied

BUFFER_BYTES = 1 << 20
PIECE_BYTES = 4 << 20
"""No more is hashed, read, written or copied in one step, so that a call can be called off between two."""
_LOOK_S = 0.02
"""How often a call that waits for a lock looks whether it was called off."""
_FIRST_TRY_S = 0.0005
"""How soon a lock that another process holds is tried again; then half as often each time."""
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_NO_COPY_RANGE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)
PRIVATE = 0o700
"""Mode of folders that only their owner may use."""
_ANY_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER = _ANY_FOLDER | os.O_NOFOLLOW
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_REMOVAL_DESCRIPTORS = 3
"""Of the folder that is emptied, of one in it, and to list that."""
_ODD_ERRNOS = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV})
"""What open(2) says of a link, a socket or pipe, a folder to be written, and a device without driver."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class OddEntry(FailedPrecondition):
    """Where a regular file should be lies something else: a folder, link, pipe, socket or device."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a folder and what is in it.

    InvalidArgument where the owner could not use such a folder, or another could only half use it.
    """

    mode: int = PRIVATE
    """Permission bits of folders: 0o770 and 0o2770 are for a group too, 0o755, 0o775, 0o777 for everyone."""
    option: str = ""
    """What the user calls the mode, for messages; empty where it cannot be chosen."""

    def __post_init__(self) -> None:
        classes = {self.mode >> 3 & 7, self.mode & 7}
        if self.mode & ~0o2077 != PRIVATE or not classes <= {0, 5, 7}:
            raise InvalidArgument(
                f"{self.option or 'mode'} {self.mode:#o} is no mode of folders: 0700 is for the owner alone, "
                "2770 for a group, 0755 lets everyone read, 0777 lets everyone write"
            )

    @property
    def file_mode(self) -> int:
        """Permission bits of files."""
        return self.mode & 0o666

    @property
    def readonly_mode(self) -> int:
        """Permission bits of files that are never written again."""
        return self.mode & 0o444

    def check(self, status: os.stat_result, path: str) -> None:
        """Raise PermissionDenied when the owner of a folder or file is not to be trusted.

        To be trusted are this user and root, and in a shared folder its group's members or everyone.
        """
        if status.st_uid in (0, os.geteuid()):
            return
        if self.mode & stat.S_IWOTH:
            return
        if self.mode & stat.S_IWGRP and status.st_gid in {os.getegid(), *os.getgroups()}:
            return
        raise PermissionDenied(
            f"{path!r} belongs to user {status.st_uid}, and this is user {os.geteuid()}: use another folder, "
            f"or chown it{self._remedy()}"
        )

    def apply(self, fd: int, status: os.stat_result, wanted: int) -> None:
        """Give a folder or file of this user's these permissions. Only a shared one gets more than it had."""
        mode = stat.S_IMODE(status.st_mode)
        wanted = wanted | mode & stat.S_ISVTX if self.mode & _OTHERS else mode & wanted
        if status.st_uid == os.geteuid() and mode != wanted:
            os.fchmod(fd, wanted)

    def apply_to_folder(self, fd: int, path: str, *, is_root: bool) -> None:
        """Check an open folder, and put its permissions right if it is this user's.

        A root may hold other things too, so nobody's right to read it is taken away, and a place for all,
        like /tmp, with its sticky bit, is left as it is.
        """
        status = os.fstat(fd)
        self.check(status, path)
        mode = stat.S_IMODE(status.st_mode)
        too_open = mode & _OTHERS_WRITE & ~self.mode and not mode & stat.S_ISVTX
        if status.st_uid != os.geteuid():
            if too_open:
                raise PermissionDenied(
                    f"{path!r} belongs to user {status.st_uid} and others may write to it (mode {mode:04o}): "
                    f"use a folder of your own{self._remedy()}"
                )
        elif not is_root:
            self.apply(fd, status, self.mode)
        elif self.mode & _OTHERS and not mode & stat.S_ISVTX:
            self.apply(fd, status, mode & ~(_OTHERS_WRITE & ~self.mode) | self.mode)
        elif too_open:
            os.fchmod(fd, mode & ~_OTHERS_WRITE)

    def _remedy(self) -> str:
        return (
            f"; if its users trust each other, give all of them the same {self.option}" if self.option else ""
        )


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def closing_fd_on_error(fd: int) -> Iterator[int]:
    """Close a descriptor when the block raises, and leave it open when it ends well."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def check_path(path: str, what: str) -> None:
    """Raise InvalidArgument for a path that no system call takes: Python says ValueError of it."""
    try:
        is_taken = "\0" not in path and os.fsencode(path) is not None
    except UnicodeEncodeError:
        is_taken = False
    if not is_taken:
        raise InvalidArgument(
            f"{what} {path!r} has a character in its name that no path can have, such as NUL"
        )


def open_folder(path: str, access: Access, what: str = "the folder", *, parent: int | None = None) -> int:
    """Open a folder, made if absent, after checking what it is; return its descriptor.

    A folder without a `parent`, which is open, is one that the user named: those above it are made too, and
    things of others may be in it. FailedPrecondition when it is a symbolic link, and PermissionDenied when it
    belongs to somebody unexpected or is writable for others.
    """
    check_path(path, what)
    if parent is None:
        path = name = os.path.abspath(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
    else:
        name = os.path.basename(path)
    made = False
    try:
        fd = os.open(name, _FOLDER, dir_fd=parent)
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(name, PRIVATE, dir_fd=parent)
            made = True
        fd = os.open(name, _FOLDER, dir_fd=parent)
    except NotADirectoryError:
        if not stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise
        raise FailedPrecondition(
            f"{what} {path!r} is a symbolic link: "
            + (
                f"if its target is meant, give that instead: {os.path.realpath(path)!r}"
                if parent is None
                else f"remove it (it leads to {os.readlink(name, dir_fd=parent)!r})"
            )
        ) from None
    with closing_fd_on_error(fd):
        if made:
            os.fchmod(fd, access.mode)
        access.apply_to_folder(fd, path, is_root=parent is None and not made)
    return fd


def make_inside(root: str, path: str, access: Access) -> None:
    """Make a folder, and those above it up to `root`, each by its mode whatever the umask says.

    NotADirectoryError, with its path, when something else is in the way.
    """
    if path == root:
        return
    make_inside(root, os.path.dirname(path), access)
    try:
        os.mkdir(path, PRIVATE)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return
    with closing_fd(os.open(path, _FOLDER)) as fd:
        os.fchmod(fd, access.mode)


def open_private(root: str, what: str, *names: str) -> None:
    """Make a folder for this user alone, with folders of these names in it. Errors as `open_folder`."""
    access = Access()
    with closing_fd(open_folder(root, access, what)) as fd:
        for name in names:
            os.close(open_folder(os.path.join(root, name), access, parent=fd))


def open_new(path: str, mode: int, flags: int = os.O_RDWR) -> int:
    """Make a file with these permissions, whatever the umask says; return its descriptor. FileExistsError."""
    fd = os.open(path, flags | _FILE | os.O_CREAT | os.O_EXCL, 0o600)
    with closing_fd_on_error(fd):
        os.fchmod(fd, mode)
    return fd


def open_regular(
    path: str, flags: int = os.O_RDONLY, *, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    """Open a regular file; return its descriptor and status. OddEntry when it is something else."""
    try:
        fd = os.open(path, flags | _FILE, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in _ODD_ERRNOS:
            raise
        with suppress(FileNotFoundError):
            _check_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=False), path)
        raise
    with closing_fd_on_error(fd):
        status = os.fstat(fd)
        _check_regular(status, path)
    return fd, status


def read_regular(path: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file, at most one more than `max_bytes`."""
    with closing_fd(open_regular(path)[0]) as fd:
        return read_file(fd, max_bytes)


def open_written(path: str, flags: int, access: Access) -> int:
    """Open a regular file that is written in place, made if absent; return its descriptor.

    OddEntry when it is something else, PermissionDenied when it belongs to somebody unexpected or has another
    name elsewhere.
    """
    fd, status = open_regular(path, flags | os.O_CREAT)
    with closing_fd_on_error(fd):
        access.check(status, path)
        if status.st_nlink > 1:
            raise PermissionDenied(
                f"{path!r} has {status.st_nlink} names, so that writing to it would change another file: "
                "remove that name while nobody uses the folder"
            )
        access.apply(fd, status, access.file_mode)
    return fd


def kind_of(status: os.stat_result) -> str:
    """Say in words what kind of thing is no regular file."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "something else")


def _check_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OddEntry(f"{path!r} is {kind_of(status)} and no regular file: move it away")


def open_source(path: str) -> tuple[int, int]:
    """Open a file to be read as a whole; return its descriptor and size. InvalidArgument when it is none."""
    # Not to wait for the writer of a FIFO, which is refused then.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise InvalidArgument(f"{path!r} is not a regular file")
    return fd, status.st_size


class ThreadBuffers(threading.local):
    """A buffer for each thread that asks for one: a fresh one each time would cost its page faults.

    They live as long as this object does.
    """

    _view = memoryview(b"")

    def get(self, size: int) -> memoryview:
        """This thread's buffer, cut to `size` bytes. What it was given before is overwritten."""
        if len(self._view) < size:
            self._view = memoryview(bytearray(size))
        return self._view[:size]


_buffers = ThreadBuffers()


def hash_file(fd: int, function: DigestFunction) -> tuple[str, int]:
    """Return the hash of a whole file and the number of bytes hashed. The file's position stays."""
    view = _buffers.get(BUFFER_BYTES)
    hasher = function.hasher()
    size = 0
    while count := os.preadv(fd, [view], size):
        current().check()
        hasher.update(view[:count])
        size += count
    return hasher.hexdigest(), size


def hash_bytes(data: Buffer, function: DigestFunction) -> str:
    """Return the hash of bytes, of any number of them."""
    view = memoryview(data).cast("B")
    if len(view) <= PIECE_BYTES:
        return function.hash(view)
    hasher = function.hasher()
    for piece in pieces(view):
        hasher.update(piece)
    return hasher.hexdigest()


def pieces(view: memoryview) -> Iterator[memoryview]:
    """Yield bytes in pieces that one step may take."""
    for start in range(0, len(view), PIECE_BYTES):
        current().check()
        yield view[start : start + PIECE_BYTES]


def read_file(fd: int, size: int) -> bytes:
    """Return the bytes of a file, at most one more than `size`."""
    piece = PIECE_BYTES if current().is_bounded else size + 1
    data = os.pread(fd, min(size + 1, piece), 0)
    done = len(data)
    whole: io.BytesIO | None = None
    while data and done <= size and (part := os.pread(fd, min(size + 1 - done, piece), done)):
        current().check()
        if whole is None:
            whole = io.BytesIO()
            whole.write(data)
        whole.write(part)
        done += len(part)
    # `getvalue` hands out what it holds without copying it.
    return data if whole is None else whole.getvalue()


def write_all(fd: int, data: Buffer) -> None:
    """Write all of `data` at the file's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view[:PIECE_BYTES]) :]
        if view:
            current().check()


def copy_hashing(source: int, target: int, hasher: Hasher, limit: int | None = None) -> int:
    """Append the whole of `source` to `target` and to the hash; return the number of bytes copied.

    What is hashed is what was written, even when `source` changes meanwhile. Stops after `limit` + 1 bytes.
    """
    view = _buffers.get(BUFFER_BYTES)
    size = 0
    while (limit is None or size <= limit) and (count := os.preadv(source, [view], size)):
        current().check()
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
    try:
        while done < end and (
            count := os.copy_file_range(source, target, min(end - done, PIECE_BYTES), done, done)
        ):
            current().check()
            done += count
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    view = _buffers.get(BUFFER_BYTES)
    while done < end:
        current().check()
        count = os.preadv(source, [view[: end - done]], done)
        if not count:
            raise OSError(errno.EIO, f"the file ended at byte {done} of {end} while it was copied")
        os.lseek(target, done, os.SEEK_SET)
        write_all(target, view[:count])
        done += count


_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What open(2) says where the file system knows no O_TMPFILE."""


class NamelessFile:
    """A new empty file without a name, open for reading and writing, mode 0600; dropped unless it was linked.

    Nothing is left of it when the process is killed (O_TMPFILE, see open(2)), except where the file system
    knows no such files: there it has the name that `temporary_path` gives.
    """

    def __init__(self, folder: str, temporary_path: Callable[[], str]) -> None:
        self._path: str | None = None
        self._pid = os.getpid()
        self.fd = -1
        try:
            self.fd = os.open(folder, os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
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

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def replacing(path: str | os.PathLike[str], *, mode: int = 0o600) -> Iterator[int]:
    """Open a new file that takes the place of `path`, in one step, when the block ends well.

    Until then it has a temporary name beside `path`. If the block raises, what stood at `path` still stands.
    Nothing is flushed to disk.
    """
    pid = os.getpid()
    fd, temporary = tempfile.mkstemp(prefix=".snaploader-", dir=os.path.dirname(path) or ".")
    try:
        with closing_fd(fd):
            yield fd
            os.fchmod(fd, mode)
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
    with closing_fd(os.open(path, _ANY_FOLDER)) as fd:
        os.fsync(fd)


def flush_file_system(path: str) -> None:
    """Flush all that was written to the file system of a folder to disk; see syncfs(2)."""
    with closing_fd(os.open(path, _ANY_FOLDER)) as fd:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)


def remove_tree(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> None:
    """Remove a file or folder as far as possible, even when others do so too or its modes forbid it.

    No symbolic link is followed, even if somebody puts one in the place of a folder meanwhile.
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
        # Without permission entries can be neither found in a folder nor unlinked from it.
        _permit(path, dir_fd)
        with closing_fd(os.open(path, _FOLDER, dir_fd=dir_fd)) as fd:
            _remove_entries(fd)
        os.rmdir(path, dir_fd=dir_fd)


def spare_descriptors() -> ExitStack:
    """Set aside as many descriptors as `remove_tree` needs, until this is closed; OSError without."""
    spare = ExitStack()
    with ExitStack() as undo:
        undo.callback(spare.close)
        for _ in range(_REMOVAL_DESCRIPTORS):
            spare.callback(os.close, os.open("/", os.O_PATH | os.O_CLOEXEC))
        undo.pop_all()
    return spare


def _remove_entries(folder: int) -> None:
    """Empty a folder as far as possible, in few descriptors, where `rmtree` takes one for each level.

    What is further down is moved up into the folder itself first.
    """
    names = os.listdir(folder)
    while names:
        name = names.pop()
        with suppress(OSError):
            if _is_unlinked(name, folder):
                continue
            _permit(name, folder)
            with closing_fd(os.open(name, _FOLDER, dir_fd=folder)) as inner:
                for entry in os.listdir(inner):
                    with suppress(OSError):
                        if _is_unlinked(entry, inner):
                            continue
                        _permit(entry, inner)  # else it cannot be moved, as it names the folder it is in
                        moved = f".removed-{secrets.token_hex(8)}"
                        os.rename(entry, moved, src_dir_fd=inner, dst_dir_fd=folder)
                        names.append(moved)
            os.rmdir(name, dir_fd=folder)


def _is_unlinked(name: str, folder: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        return False
    return True


def _permit(path: str | os.PathLike[str], dir_fd: int | None) -> None:
    """Give a folder's owner all permissions. OSError when it is no folder, or another user's."""
    with closing_fd(os.open(path, os.O_PATH | _FOLDER, dir_fd=dir_fd)) as fd:
        os.chmod(f"/proc/self/fd/{fd}", stat.S_IRWXU)


class ProcessExitStack(ExitStack):
    """An ExitStack that cleans up in the process that made it. A forked child forgets the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool:
        if os.getpid() != self._pid:
            self.pop_all()
            return False
        return bool(super().__exit__(kind, error, trace))


class FileLock:
    """A lock among threads and processes, by flock(2) on a file that is never removed. Not reentrant.

    It goes when the process does, however it does. Two caches in one process exclude each other like two
    processes. In a forked child it counts as closed. Waiting for it ends with the call that runs.
    """

    def __init__(self, fd: int) -> None:
        self._threads = threading.Lock()
        self._pid = os.getpid()
        self.fd = fd

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, waiting for it first. Cancelled after `close`."""
        # A child's thread lock may be held for ever, so that it is not even waited for.
        if not self.closed:
            with held_in_call(self._threads):
                if not self.closed:
                    _wait_for_lock(self.fd)
                    try:
                        yield
                    finally:
                        unlock(self.fd, self._pid)
                    return
        raise Cancelled("the file cache was closed while it was used")

    @contextmanager
    def held_now(self) -> Iterator[bool]:
        """Hold the lock if that needs no waiting; tell whether it is held."""
        held = self._threads.acquire(blocking=False)
        try:
            if held:
                try:
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._threads.release()
                    held = False
            yield held
        finally:
            if held:
                unlock(self.fd, self._pid)
                self._threads.release()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a child of the process that made it."""
        return self.fd < 0 or os.getpid() != self._pid

    def close(self) -> None:
        """Give up the descriptor. Waits for the thread that holds the lock, which a forked child lacks."""
        if os.getpid() != self._pid:
            self._threads = threading.Lock()
        with self._threads:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def held_in_call(lock: threading.Lock) -> AbstractContextManager[object]:
    """Hold a lock of this process's threads. Waiting for it ends with the call that runs."""
    # No signal can come between taking the lock itself and entering the block. A function in Python can be
    # interrupted on its way out, with the lock taken.
    return _held_in_call(lock) if current().is_bounded else lock


@contextmanager
def _held_in_call(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        while not lock.acquire(timeout=_LOOK_S):
            current().check()
    try:
        yield
    finally:
        lock.release()


def _wait_for_lock(fd: int) -> None:
    """Take the lock of a file; see flock(2). Waiting for it ends with the call that runs."""
    if not current().is_bounded:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return
    # Nothing ends a wait in the kernel, so that it is tried again and again.
    pause_s = _FIRST_TRY_S
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        current().sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_S)


def lock_new(path: str, *, wait: bool = True, mode: int = 0o600) -> int:
    """Lock a file that is made if absent and that others may remove; return its descriptor.

    BlockingIOError when another holds it and there is to be no waiting. If it is this user's, it gets the
    mode whatever the umask says.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _FILE, mode)
        with closing_fd_on_error(fd):
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if status.st_nlink:
                if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != mode:
                    os.fchmod(fd, mode)
                return fd
        # Whoever held it, or took it for a dead one, removed it between the two calls.
        os.close(fd)


def unlock(fd: int, pid: int) -> None:
    """Let a lock go at once, even if a child that was forked meanwhile has the descriptor too.

    Such a child leaves the lock to its parent, the process of this `pid`.
    """
    if os.getpid() == pid:
        fcntl.flock(fd, fcntl.LOCK_UN)


def try_lock(path: str, *, dir_fd: int | None = None) -> int | None:
    """Lock an existing lock file; return its descriptor, or None when another holds it or it is gone.

    Also None when it may not be read (another user made it, who may hold it) or is no regular file.
    """
    try:
        fd = open_regular(path, dir_fd=dir_fd)[0]
    except (FileNotFoundError, PermissionError, NotADirectoryError, OddEntry):
        return None
    with closing_fd_on_error(fd), suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    os.close(fd)
    return None


def is_dead(path: str, *, dir_fd: int | None = None) -> bool:
    """Tell whether nobody holds a lock file: its owner ended, or it is gone. An unreadable one is held."""
    fd = try_lock(path, dir_fd=dir_fd)
    if fd is None:
        return lstat(path, dir_fd=dir_fd) is None or is_odd(path, dir_fd=dir_fd)
    os.close(fd)
    return True


def is_odd(path: str, *, dir_fd: int | None = None) -> bool:
    """Tell whether something is there that is no regular file, so that it is nobody's lock."""
    status = lstat(path, dir_fd=dir_fd)
    return status is not None and not stat.S_ISREG(status.st_mode)


def lstat(path: str, *, dir_fd: int | None = None) -> os.stat_result | None:
    """Return the status of what is there, be it a link that leads nowhere; None when nothing is."""
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
