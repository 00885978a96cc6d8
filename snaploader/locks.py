"""Locks between processes, by flock(2) on a small file, and blocks that clean up in their own process only.

A lock belongs to an open file description, so it goes when the process does, however it does, and two
caches in one process exclude each other like two processes. See flock(2). A forked child shares the file
description, so whatever unlocks or removes something asks first whose it is.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from snaploader.errors import Cancelled
from snaploader.files import OddEntry, open_regular

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class ProcessExitStack(ExitStack):
    """An ExitStack that cleans up in the process that made it, and in no other.

    A forked child that leaves the block, by sys.exit say, forgets the callbacks: the files, locks and leases
    that they would remove are its parent's.
    """

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
    """A lock among threads and processes. Not reentrant. In a forked child it counts as closed.

    Args:
        fd: Of the lock file, which is never removed. It is closed with the lock.
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
            with self._threads:
                if not self.closed:
                    fcntl.flock(self.fd, fcntl.LOCK_EX)
                    try:
                        yield
                    finally:
                        self._unlock()
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
                self._unlock()
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

    def _unlock(self) -> None:
        # A child that was forked within the block leaves it too; the lock is its parent's.
        if os.getpid() == self._pid:
            fcntl.flock(self.fd, fcntl.LOCK_UN)


def lock_new(path: str, *, wait: bool = True, mode: int = 0o600) -> int:
    """Lock a file that is made if absent and that others may remove; return its descriptor.

    Args:
        mode: Its permissions if it is this user's, whatever the umask says.

    Raises:
        BlockingIOError: Another holds it, and there is to be no waiting.
    """
    while True:
        fd = os.open(path, _FLAGS, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if status.st_nlink:
                if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != mode:
                    os.fchmod(fd, mode)
                return fd
        except BaseException:
            os.close(fd)
            raise
        # Whoever held it, or took it for a dead one, removed it between the two calls.
        os.close(fd)


def exists(path: str, *, dir_fd: int | None = None) -> bool:
    """Tell whether anything is there, be it a link that leads nowhere."""
    return _lstat(path, dir_fd) is not None


def is_odd(path: str, *, dir_fd: int | None = None) -> bool:
    """Tell whether something is there that is no regular file, so that it is nobody's lock."""
    status = _lstat(path, dir_fd)
    return status is not None and not stat.S_ISREG(status.st_mode)


def _lstat(path: str, dir_fd: int | None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def is_dead(path: str, *, dir_fd: int | None = None) -> bool:
    """Tell whether nobody holds a lock file: its owner ended, or it is gone. An unreadable one is held."""
    fd = try_lock(path, dir_fd=dir_fd)
    if fd is None:
        return not exists(path, dir_fd=dir_fd) or is_odd(path, dir_fd=dir_fd)
    os.close(fd)
    return True


def try_lock(path: str, *, dir_fd: int | None = None) -> int | None:
    """Lock an existing lock file; return its descriptor, or None when another holds it or it is gone.

    Also None when it may not be read (another user made it, who may hold it) or is no regular file.
    """
    try:
        fd = open_regular(path, dir_fd=dir_fd)[0]
    except (FileNotFoundError, PermissionError, NotADirectoryError, OddEntry):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
