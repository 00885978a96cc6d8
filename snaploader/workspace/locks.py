"""One lock per workspace: between threads and processes of a host, and between hosts where the catalog can.

On a host it is flock(2) on a small file, which a process that dies gives up; between hosts it is whatever
`Catalog.lock` takes, on a connection of its own. Whoever waits looks again after short, growing pauses, so
that waiting can be called off, and at once when the lock is released within this process.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Protocol

from snaploader.errors import Cancelled, DeadlineExceeded, translate_os_errors
from snaploader.files import open_private
from snaploader.locks import lock_new
from snaploader.workspace.names import check_workspace_id

FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.05

_SUFFIX = ".lock"


class HostsLock(Protocol):
    """What the catalog offers: a lock between the hosts that share it."""

    def lock(
        self, workspace_id: str, *, wait_s: float | None, cancelled: threading.Event | None = None
    ) -> AbstractContextManager[bool]:
        """Hold a workspace's lock while the context is open. The context is False when the time ran out."""
        ...


class HeldLock:
    """A workspace's lock that is held, by everyone who shares it together. Thread-safe."""

    def __init__(self, workspace_id: str, path: str, let_go: Callable[[], None]) -> None:
        self.workspace_id = workspace_id
        self._path = path
        self._let_go = let_go
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._holders = 1
        self.turn = threading.Lock()
        """Held by whoever of those who share it works on the workspace: one after the other."""

    def share(self) -> HeldLock:
        """Hold it once more: it is let go when everyone has released it."""
        with self._mutex:
            if not self._holders:
                raise Cancelled(f"the lock of workspace {self.workspace_id!r} was released already")
            self._holders += 1
        return self

    def release(self) -> None:
        """Give up one share; the last one lets the lock go."""
        with self._mutex:
            self._holders -= 1
            is_last = self._holders == 0
        if is_last:
            self._let_go()

    def remove_file(self) -> None:
        """Remove the lock's file, for a workspace that is gone. Others that wait for it notice.

        In a forked child it does nothing: its parent holds the lock.
        """
        if os.getpid() != self._pid:
            return
        with suppress(FileNotFoundError), translate_os_errors(f"cannot remove {self._path!r}"):
            os.unlink(self._path)


class WorkspaceLocks:
    """Takes the locks of workspaces. Thread-safe.

    Args:
        folder: Holds the lock files; made if absent. The same for all processes of the host.
        between_hosts: The catalog, where it is shared by hosts; None where the host's own lock suffices.
    """

    def __init__(self, folder: str | os.PathLike[str], between_hosts: HostsLock | None = None) -> None:
        self._folder = os.fspath(folder)
        self._hosts = between_hosts
        self._released = threading.Condition()
        with translate_os_errors(f"cannot make {self._folder!r}"):
            parent, name = os.path.split(os.path.abspath(self._folder))
            open_private(parent, "the state directory", name)

    def acquire(
        self, workspace_id: str, *, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> HeldLock:
        """The lock of a workspace, after waiting for it.

        Args:
            timeout_s: How long to wait, in seconds; None: for ever.
            cancelled: Set from elsewhere to call the waiting off.

        Raises:
            DeadlineExceeded: Somebody else held it all the time.
            Cancelled: The waiting was called off.
        """
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        path = self._path(workspace_id)
        with ExitStack() as undo, translate_os_errors(f"cannot lock workspace {workspace_id!r}"):
            undo.callback(self._wake)
            undo.callback(_unlock, self._wait(workspace_id, path, give_up_at, cancelled), os.getpid())
            if self._hosts is not None:
                wait_s = None if give_up_at is None else max(0.0, give_up_at - time.monotonic())
                got = undo.enter_context(self._hosts.lock(workspace_id, wait_s=wait_s, cancelled=cancelled))
                if not got:
                    _raise_if(cancelled, workspace_id)
                    raise _late(workspace_id, "another host")
            return HeldLock(workspace_id, path, undo.pop_all().close)

    def try_acquire(self, workspace_id: str) -> HeldLock | None:
        """The lock of a workspace if it can be had without waiting."""
        try:
            return self.acquire(workspace_id, timeout_s=0)
        except DeadlineExceeded:
            return None

    def ids(self) -> list[str]:
        """The ids of all workspaces that have a lock file, sorted."""
        with translate_os_errors(f"cannot list {self._folder!r}"):
            names = os.listdir(self._folder)
        return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))

    def _wait(
        self, workspace_id: str, path: str, give_up_at: float | None, cancelled: threading.Event | None
    ) -> int:
        pause_s = FIRST_PAUSE_S
        while True:
            _raise_if(cancelled, workspace_id)
            # The condition is held while looking, so that no release in between goes unheard.
            with self._released:
                fd = _try_lock(path)
                if fd is not None:
                    return fd
                left_s = pause_s if give_up_at is None else give_up_at - time.monotonic()
                if left_s <= 0:
                    raise _late(workspace_id, "another operation")
                self._released.wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _wake(self) -> None:
        with self._released:
            self._released.notify_all()

    def _path(self, workspace_id: str) -> str:
        return f"{self._folder}/{check_workspace_id(workspace_id)}{_SUFFIX}"


def _try_lock(path: str) -> int | None:
    """The descriptor that holds the lock; None when someone else does."""
    try:
        return lock_new(path, wait=False)
    except BlockingIOError:
        return None


def _unlock(fd: int, pid: int) -> None:
    """Let the lock go at once, even if a child that was forked meanwhile has the descriptor too.

    In such a child the lock is left to its parent, the process of this `pid`.
    """
    try:
        if os.getpid() == pid:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _late(workspace_id: str, holder: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"workspace {workspace_id!r} is still locked by {holder}: try again later")


def _raise_if(cancelled: threading.Event | None, workspace_id: str) -> None:
    if cancelled is not None and cancelled.is_set():
        raise Cancelled(f"waiting for the lock of workspace {workspace_id!r} was called off")
