"""A workspace whose lock is held: what can be done to it, and the threads on which that is done."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Concatenate, Final, ParamSpec, TypeVar

from snaploader.errors import Cancelled, FailedPrecondition, translate_thread_errors
from snaploader.workspace.catalog import Reader
from snaploader.workspace.host import HeldLock
from snaploader.workspace.manager import lifetime, undo, versions
from snaploader.workspace.manager.operation import USER, Services
from snaploader.workspace.model import Scope, SnapshotResult, SnapshotSource, Workspace, check_display_name

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_WORKERS = 16
"""Most operations of a manager at one time."""


class HeldWorkspace:
    """Operations on one workspace, under a lock that is held already. Made by `WorkspaceManager.hold`.

    Each runs to its end, even when waiting for it is interrupted: the lock is held until then. `reason` is
    kept with the run and the event; only what has the reason "user" counts as a use of the workspace. What
    each does and raises is described by the method of that name of `WorkspaceManager`, whose own operations
    would wait for this lock in vain. Thread-safe; one operation waits for the other.
    """

    def __init__(
        self, services: Services, sections: CriticalSections, lock: HeldLock, *, is_settled: bool = False
    ) -> None:
        self._services = services
        self._sections = sections
        self._lock = lock
        self.workspace_id: Final = lock.workspace_id
        self._is_settled = is_settled
        """Whether it was seen, under this lock, that nothing is under way. It holds for one operation."""

    def guarded(self, guard: Callable[[Reader], None]) -> HeldWorkspace:
        """The same, under a condition: `guard` is called in the transaction that begins an operation.

        What it raises calls the operation off, and goes on to the caller.
        """
        return HeldWorkspace(replace(self._services, guard=guard), self._sections, self._lock)

    def settle(self) -> None:
        """Finish or take back what a process that died left in the middle, as every operation does first."""
        self._sections.run_to_end(self._lock, partial(undo.settle, self._services, self.workspace_id))

    def create_snapshot(
        self, name: str = "", source: str = SnapshotSource.MANUAL, *, scope: Scope | str | None = None
    ) -> SnapshotResult:
        """As `WorkspaceManager.create_snapshot`."""
        holds = None if scope is None else Scope.parse(scope)
        kept = SnapshotSource.parse(source), holds, check_display_name(name)
        return self._complete(versions.take, versions.SNAPSHOT_CREATE, *kept)

    def create_version(self) -> SnapshotResult:
        """As `WorkspaceManager.create_version`."""
        return self._complete(versions.take)

    def rollback(self, version: int, *, keep_current: bool = False) -> Workspace:
        """As `WorkspaceManager.rollback`."""
        return self._complete(versions.rollback, version, keep_current=keep_current)

    def pause(self, *, reason: str = USER) -> SnapshotResult:
        """As `WorkspaceManager.pause`."""
        return self._complete(lifetime.pause, reason)

    def resume(self, *, reason: str = USER, ready_timeout_s: float | None = None) -> Workspace:
        """As `WorkspaceManager.resume`."""
        return self._complete(lifetime.resume, reason, ready_timeout_s=ready_timeout_s)

    def commit(self, name: str = "") -> SnapshotResult:
        """As `WorkspaceManager.commit`."""
        return self._complete(versions.commit, check_display_name(name))

    def start(self, *, reason: str = USER, update: bool = False) -> Workspace:
        """As `WorkspaceManager.start`."""
        return self._complete(lifetime.start, reason, update=update)

    def stop(self, *, reason: str = USER) -> Workspace:
        """As `WorkspaceManager.stop`."""
        return self._complete(lifetime.stop, reason)

    def delete(self, *, reason: str = USER, forget_remote: bool = False) -> Workspace:
        """As `WorkspaceManager.delete`."""
        return self._complete(lifetime.delete, self._lock, reason, without_remote=forget_remote)

    def _complete(
        self, operation: Callable[Concatenate[Services, str, P], T], *args: P.args, **how: P.kwargs
    ) -> T:
        def settled() -> T:
            is_settled, self._is_settled = self._is_settled, False
            if not is_settled:
                undo.settle(self._services, self.workspace_id)
            return operation(self._services, self.workspace_id, *args, **how)

        return self._sections.run_to_end(self._lock, settled)


class CriticalSections:
    """Threads on which operations run to their end, whatever becomes of who asked for them. Thread-safe.

    An operation stops a workspace, works and starts it again: it must not be left in the middle because its
    caller was interrupted. So it runs on a thread of the manager, which shares the workspace's lock, while
    the caller only waits for the result. Under one lock they follow one another. When all `workers` are at
    work, further operations wait, holding their locks.
    """

    def __init__(self, workers: int = DEFAULT_WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="snaploader-workspace")
        self._pid = os.getpid()

    def run_to_end(self, hold: HeldLock, work: Callable[[], T]) -> T:
        """The result of `work`. Cancelled when the manager was closed; nothing was done then."""
        if os.getpid() != self._pid:
            raise FailedPrecondition("this manager was made before a fork: make another one in the child")
        hold.share()
        unclaimed = threading.Lock()

        def run() -> T:
            if not unclaimed.acquire(blocking=False):
                raise Cancelled("the operation was called off before it began")
            try:
                # Whoever gave up waiting for one operation may ask for the next under the same lock.
                with hold.turn:
                    return work()
            finally:
                hold.release()

        try:
            with translate_thread_errors("the manager of the workspaces was closed"):
                future = self._pool.submit(run)
        except BaseException:
            if unclaimed.acquire(blocking=False):
                hold.release()  # it has not begun, and never will
            raise
        return future.result()

    def close(self) -> None:
        """Wait for all operations under way, and end the threads. Idempotent; nothing in a forked child."""
        if os.getpid() == self._pid:
            self._pool.shutdown(wait=True)
