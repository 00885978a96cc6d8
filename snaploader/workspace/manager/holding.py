"""Workspaces under their locks, and the threads that work on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from snaploader.errors import Cancelled, FailedPrecondition, NotFound, SnaploaderError
from snaploader.workspace.locks import HeldLock, WorkspaceLocks
from snaploader.workspace.manager.held import HeldWorkspace
from snaploader.workspace.manager.home import HostHome
from snaploader.workspace.manager.queries import WorkspaceQueries
from snaploader.workspace.manager.sections import CriticalSections
from snaploader.workspace.manager.services import Services
from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.names import check_workspace_id


class WorkspaceHolder(WorkspaceQueries):
    """The part of `WorkspaceManager` that is about locks and closing. Thread-safe; a context manager."""

    def __init__(
        self,
        services: Services,
        locks: WorkspaceLocks,
        sections: CriticalSections,
        home: HostHome,
        lock_timeout_s: float,
    ) -> None:
        super().__init__(services, locks)
        self._home = home
        self._sections = sections
        self._lock_timeout_s = lock_timeout_s
        self._closing = services.closing

    @contextmanager
    def hold(
        self,
        workspace_id: str,
        *,
        timeout_s: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> Iterator[HeldWorkspace]:
        """The workspace under its lock, for several operations in a row with nothing in between.

        An operation that is under way when the block is left goes on under the lock.

        Args:
            timeout_s: How long to wait for the lock, in seconds. Default: `lock_timeout_s`.
            cancelled: Set from elsewhere to call the waiting off.

        Raises:
            NotFound: there is no such workspace.
            FailedPrecondition: it was deleted.
            DeadlineExceeded: the lock was not had in time.
            Cancelled: the waiting was called off, or the manager is closed.
        """
        self._check_alive(workspace_id)
        with self._locked(workspace_id, timeout_s, cancelled) as lock:
            yield HeldWorkspace(self._services, self._sections, lock)

    @contextmanager
    def try_hold(self, workspace_id: str) -> Iterator[HeldWorkspace | None]:
        """The same without waiting; None when somebody else has the lock."""
        self._check_open()
        self._check_alive(workspace_id)
        self._home.claim()
        lock = self._locks.try_acquire(workspace_id)
        if lock is None:
            yield None
            return
        with self._releasing(lock):
            yield HeldWorkspace(self._services, self._sections, lock)

    @contextmanager
    def _locked(
        self, workspace_id: str, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> Iterator[HeldLock]:
        self._check_open()
        self._home.claim()
        lock = self._locks.acquire(
            workspace_id,
            timeout_s=self._lock_timeout_s if timeout_s is None else timeout_s,
            cancelled=cancelled or self._closing,
        )
        with self._releasing(lock):
            yield lock

    @contextmanager
    def _releasing(self, lock: HeldLock) -> Iterator[None]:
        """Release a lock at the end. A workspace that turned out to be gone leaves no lock file.

        That of one which only this catalog does not know is left alone, as all else of it.
        """
        try:
            yield
        except SnaploaderError:
            with suppress(SnaploaderError):
                workspace_id = lock.workspace_id
                if not self._is_alive(workspace_id) and not self._services.has_traces_of(workspace_id):
                    lock.remove_file()
            raise
        finally:
            lock.release()

    def close(self) -> None:
        """Wait for the operations under way, and end the manager's threads. Idempotent.

        Workspaces go on running. Whoever waits for a lock or for readiness gets Cancelled.
        """
        self._closing.set()
        self._sections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_alive(self, workspace_id: str) -> None:
        """What does not exist, or not any more, gets no lock file."""
        if self.workspace(check_workspace_id(workspace_id)).state is WorkspaceState.DELETED:
            raise FailedPrecondition(f"workspace {workspace_id!r} was deleted")

    def _is_alive(self, workspace_id: str) -> bool:
        try:
            return self.workspace(workspace_id).state is not WorkspaceState.DELETED
        except NotFound:
            return False

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise Cancelled("the manager of the workspaces was closed")
