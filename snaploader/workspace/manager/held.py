"""A workspace whose lock is held, and what can be done to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from snaploader.workspace.locks import HeldLock
from snaploader.workspace.manager import commits, lifetime, pausing, repair, versions
from snaploader.workspace.manager.sections import CriticalSections
from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.work import USER
from snaploader.workspace.model import SnapshotResult, Workspace

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Reader

T = TypeVar("T")


class HeldWorkspace:
    """Operations on one workspace, under a lock that is held already. Made by `WorkspaceManager.hold`.

    Each runs to its end, also when waiting for it is interrupted: the lock is held until then. `reason` is
    kept with the run and the event; only what has the reason "user" counts as a use of the workspace. What
    each does and raises is described by the method of that name of `WorkspaceManager`, whose own operations
    would wait for this lock in vain. Thread-safe; one operation waits for the other.
    """

    def __init__(self, services: Services, sections: CriticalSections, lock: HeldLock) -> None:
        self._services = services
        self._sections = sections
        self._lock = lock

    @property
    def workspace_id(self) -> str:
        """Of the workspace."""
        return self._lock.workspace_id

    def guarded(self, guard: Callable[[Reader], None]) -> HeldWorkspace:
        """The same, under a condition: `guard` is called in the transaction that begins an operation.

        What it raises calls the operation off, and goes on to the caller.
        """
        return HeldWorkspace(replace(self._services, guard=guard), self._sections, self._lock)

    def settle(self) -> None:
        """Finish or take back what a process that died left in the middle, as every operation does first."""
        self._sections.run(self._lock, partial(repair.settle, self._services, self.workspace_id))

    def take_version(self, request: versions.VersionRequest) -> SnapshotResult:
        """Capture the workspace as its next version."""
        return self._run(partial(versions.take, request=request))

    def rollback(self, version: int, *, keep_current: bool = False) -> Workspace:
        """Go back to a version."""
        return self._run(partial(versions.rollback, number=version, keep_current=keep_current))

    def pause(self, *, reason: str = USER) -> SnapshotResult:
        """Park the workspace."""
        return self._run(partial(pausing.pause, reason=reason))

    def resume(self, *, reason: str = USER, ready_timeout_s: float | None = None) -> Workspace:
        """Bring a paused workspace back."""
        return self._run(partial(pausing.resume, reason=reason, ready_timeout_s=ready_timeout_s))

    def commit(self, name: str = "") -> SnapshotResult:
        """Put the workspace's state into the remote cache."""
        return self._run(partial(commits.commit, display_name=name))

    def start(self, *, reason: str = USER) -> Workspace:
        """Start a stopped workspace."""
        return self._run(partial(lifetime.start, reason=reason))

    def stop(self, *, reason: str = USER) -> Workspace:
        """Stop a running workspace."""
        return self._run(partial(lifetime.stop, reason=reason))

    def delete(self, *, reason: str = USER, forget_remote: bool = False) -> Workspace:
        """Delete the workspace."""
        return self._run(partial(self._delete, reason=reason, forget_remote=forget_remote))

    def _delete(self, services: Services, workspace_id: str, reason: str, forget_remote: bool) -> Workspace:
        workspace = lifetime.delete(services, workspace_id, reason, without_remote=forget_remote)
        # Ids are never used again, so nobody needs the lock any more.
        self._lock.remove_file()
        return workspace

    def _run(self, operation: Callable[[Services, str], T]) -> T:
        def settled() -> T:
            repair.settle(self._services, self.workspace_id)
            return operation(self._services, self.workspace_id)

        return self._sections.run(self._lock, settled)
