"""A manager whose operations only write their outcome to a real catalog, and can be told to fail or wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from lifecycle_values import CREATED, NOW, workspace

from snaploader.workspace.catalog import Catalog, Reader
from snaploader.workspace.model import Run, RunStatus, RunTransition, Workspace, WorkspaceState

RUNNING, STOPPED, PAUSED, DELETED = (
    WorkspaceState.RUNNING,
    WorkspaceState.STOPPED,
    WorkspaceState.PAUSED,
    WorkspaceState.DELETED,
)


class FakeManager:
    """Holds workspaces by locks of this process.

    Attributes:
        calls: (operation, workspace id, reason) in the order of their beginning.
        failures: Errors to raise, by workspace id.
        during: Called with (operation, workspace id) within each operation.
        now: Of the runs it writes.
        notes_failures: Whether an operation that fails writes a failed run, as the real manager may.
    """

    host = "here"

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.calls: list[tuple[str, str, str]] = []
        self.failures: dict[str, BaseException] = {}
        self.during: Callable[[str, str], None] = lambda operation, workspace_id: None
        self.now = NOW
        self.notes_failures = False
        self.most_at_once = 0
        self._at_once = 0
        self._mutex = threading.Lock()
        self._held: set[str] = set()

    @contextmanager
    def try_hold(self, workspace_id: str) -> Iterator[FakeHeld | None]:
        with self._mutex:
            is_free = workspace_id not in self._held
            if is_free:
                self._held.add(workspace_id)
        try:
            yield FakeHeld(self, workspace_id) if is_free else None
        finally:
            if is_free:
                with self._mutex:
                    self._held.discard(workspace_id)

    def is_held(self, workspace_id: str) -> bool:
        with self._mutex:
            return workspace_id in self._held

    @contextmanager
    def operation(self, name: str, workspace_id: str, reason: str) -> Iterator[None]:
        with self._mutex:
            self.calls.append((name, workspace_id, reason))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.during(name, workspace_id)
            yield
        finally:
            with self._mutex:
                self._at_once -= 1


class FakeHeld:
    def __init__(
        self, manager: FakeManager, workspace_id: str, guard: Callable[[Reader], None] = lambda reader: None
    ) -> None:
        self._manager = manager
        self._id = workspace_id
        self._guard = guard

    def guarded(self, guard: Callable[[Reader], None]) -> FakeHeld:
        return FakeHeld(self._manager, self._id, guard)

    def settle(self) -> None:
        with self._manager.operation("settle", self._id, ""), self._manager.catalog.transaction() as changes:
            operation = changes.workspace(self._id).operation
            assert operation is not None
            changes.end_operation(self._id, operation.token)

    def start(self, *, reason: str) -> Workspace:
        return self._do("start", reason, RunTransition.START, STOPPED, RUNNING)

    def resume(self, *, reason: str) -> Workspace:
        return self._do("resume", reason, RunTransition.START, PAUSED, RUNNING)

    def stop(self, *, reason: str) -> Workspace:
        return self._do("stop", reason, RunTransition.STOP, RUNNING, STOPPED)

    def pause(self, *, reason: str) -> None:
        self._do("pause", reason, RunTransition.STOP, RUNNING, PAUSED)

    def delete(self, *, reason: str) -> Workspace:
        return self._do("delete", reason, RunTransition.DELETE, None, DELETED)

    def _do(
        self,
        name: str,
        reason: str,
        transition: RunTransition,
        expected: WorkspaceState | None,
        state: WorkspaceState,
    ) -> Workspace:
        catalog = self._manager.catalog
        with catalog.transaction() as changes:
            self._guard(changes)
        with self._manager.operation(name, self._id, reason):
            error = self._manager.failures.get(self._id)
            if error is not None:
                if self._manager.notes_failures:
                    with catalog.transaction() as changes:
                        run = changes.add_run(self._id, transition, self._manager.now, reason)
                        changes.finish_run(run.id, RunStatus.FAILED, self._manager.now, f"manager: {error}")
                raise error
            with catalog.transaction() as changes:
                assert expected is None or changes.lock_workspace(self._id).state is expected
                run = changes.add_run(self._id, transition, self._manager.now, reason)
                changes.finish_run(run.id, RunStatus.SUCCEEDED, self._manager.now)
                return changes.update_workspace(self._id, state=state)


def add(
    catalog: Catalog,
    workspace_id: str,
    state: WorkspaceState = RUNNING,
    *,
    transition: RunTransition | None = RunTransition.START,
    status: RunStatus = RunStatus.SUCCEEDED,
    started_at: datetime = CREATED,
    deadline: datetime | None = None,
    **values: Any,
) -> None:
    """Add a workspace with one run; without `transition` it has none."""
    with catalog.transaction() as changes:
        changes.add_workspace(workspace(state, workspace_id=workspace_id, **values))
        if transition is not None:
            run = changes.add_run(workspace_id, transition, started_at, "user", deadline)
            changes.finish_run(run.id, status, started_at)


def state_of(catalog: Catalog, workspace_id: str) -> Workspace:
    with catalog.reading() as reader:
        return reader.workspace(workspace_id)


def runs_of(catalog: Catalog, workspace_id: str) -> list[Run]:
    with catalog.reading() as reader:
        return reader.runs(workspace_id)
