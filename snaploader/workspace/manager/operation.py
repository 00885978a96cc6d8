"""One operation on one workspace: how it begins in the catalog, and how it is recorded.

An operation is a first transaction that says what is under way, work that may take long, and a last
transaction that makes all of its outcome visible at once. In between the workspace's lock keeps others out,
and no transaction is open: SQLite has one writer. When the work fails, it is taken back; when its process is
killed, the next operation or a recovery finishes it or takes it back.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

from snaploader._environment import HostEnvironment
from snaploader.errors import FailedPrecondition, NotFound, SnaploaderError
from snaploader.loader import Snapshot
from snaploader.workspace.catalog import Catalog, Reader, Transaction
from snaploader.workspace.deadlines import deadline_of_start
from snaploader.workspace.events import add_event
from snaploader.workspace.host import SlotPool
from snaploader.workspace.manager.snapshots import Saved, SnapshotContent, find_snapshot, let_go
from snaploader.workspace.model import (
    NO_CHECK,
    Operation,
    OperationKind,
    Run,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotStatus,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecords
from snaploader.workspace.runtime.protocol import Runtime, StopOutcome

log = logging.getLogger(__name__)


ON_HOST = (WorkspaceState.RUNNING, WorkspaceState.STOPPED)
"""States in which a workspace's files are on its host."""

ALIVE = (*ON_HOST, WorkspaceState.PAUSED)

_HINTS = {
    WorkspaceState.RUNNING: "it is running: stop or pause it first",
    WorkspaceState.STOPPED: "it is stopped: start it first",
    WorkspaceState.PAUSED: "it is paused: resume it first",
    WorkspaceState.DELETED: "it was deleted",
}


def check_state(workspace: Workspace, kind: str, allowed: Collection[WorkspaceState]) -> None:
    """FailedPrecondition when an operation cannot be done in the workspace's state."""
    if workspace.state not in allowed:
        raise FailedPrecondition(
            f"workspace {workspace.id!r}: no {kind} is possible, because {_HINTS[workspace.state]}"
        )


def utc_now() -> datetime:
    """The time, as the catalog keeps it."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Services:
    """What all operations of one manager share. Immutable, and made of what is thread-safe."""

    catalog: Catalog
    runtime: Runtime
    content: SnapshotContent
    records: PausedRecords
    slots: SlotPool
    host: str
    clock: Callable[[], datetime]
    environment: HostEnvironment
    stop_timeout_s: float
    closing: threading.Event
    """Set when the manager closes: nothing waits for readiness any more."""
    undo: Callable[[Work, BaseException], None]
    """Takes back an operation that failed, and never raises."""
    guard: Callable[[Reader], None] | None = None
    """Called in the transaction that begins an operation; what it raises calls the operation off."""

    def stop(self, workspace_id: str) -> StopOutcome:
        """Stop what runs in a workspace, by force if it takes too long."""
        return self.runtime.stop(workspace_id, timeout_s=self.stop_timeout_s, force=True)

    def find_workspace(self, workspace_id: str) -> Workspace | None:
        with self.catalog.reading() as reader, suppress(NotFound):
            return reader.workspace(workspace_id)
        return None

    def place(self, spec: WorkspaceSpec, snapshot: Snapshot, base: Snapshot | None, token: str) -> None:
        """Replace a workspace's state by a snapshot's; the token says afterwards that it was done."""
        self.runtime.place(spec, self.content.loader, snapshot, base=base, token=token)

    def has_traces_of(self, workspace_id: str) -> bool:
        """Whether this host has files of a workspace, or a record of it as paused, whole or not."""
        return self.records.exists(workspace_id) or self.runtime.status(workspace_id).exists


USER = "user"
"""The reason of what somebody asked for. Only that counts as a use of the workspace."""

RECOVERY = "recovery"
"""The reason of what nobody asked for."""

ENDING = frozenset({OperationKind.STOP, OperationKind.PAUSE, OperationKind.DELETE})
"""After these nothing runs any more."""

Prepare = Callable[["Transaction", Workspace], SnapshotRecord]
"""Makes the record of the snapshot that an operation is about to take."""


class Work:
    """An operation that is under way. For one thread, under the workspace's lock.

    As a context manager it is taken back when the block raises; the error goes on to the caller.
    """

    def __init__(
        self,
        services: Services,
        workspace: Workspace,
        operation: Operation,
        *,
        pending: SnapshotRecord | None = None,
        reason: str = USER,
    ) -> None:
        self.services = services
        self.workspace = workspace
        """The workspace as it was when the operation began."""
        self.workspace_id = workspace.id
        self.was_running = workspace.state is WorkspaceState.RUNNING
        self.operation = operation
        self.pending = pending
        """The snapshot that is being taken, if any."""
        self.reason = reason
        self.now = services.clock()
        """When the workspace was used, if this counts as a use."""
        self.may_be_recorded = False
        """Whether the last transaction was begun. One that failed may have been made all the same."""
        self.was_restarted = False
        """Whether the runtime was started again, or that was tried, because the operation failed."""
        self._left_behind: list[SnapshotRecord] = []
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A child that was forked in the middle leaves through here as well, and the work is its parent's.
        if error is not None and os.getpid() == self._pid:
            self.services.undo(self, error)

    @classmethod
    def begin(
        cls,
        services: Services,
        workspace_id: str,
        kind: OperationKind,
        *,
        allowed: Collection[WorkspaceState],
        reason: str = USER,
        prepare: Prepare | None = None,
        target: str = "",
        version: int | None = None,
    ) -> Work:
        """Say in the catalog what is under way. FailedPrecondition where that cannot be done.

        Args:
            prepare: Makes the record of the snapshot to be taken.
            target: Name of the snapshot to go back to, of this `version`.
        """
        with services.catalog.transaction() as tx:
            workspace = tx.lock_workspace(workspace_id)
            if services.guard is not None:
                services.guard(tx)
            if workspace.host != services.host:
                raise FailedPrecondition(
                    f"workspace {workspace_id!r} lives on host {workspace.host!r}, and this is host "
                    f"{services.host!r}: work on it there"
                )
            check_state(workspace, kind, allowed)
            pending = None if prepare is None else prepare(tx, workspace)
            if pending is not None and workspace.state in ON_HOST:
                _check_scope(services, workspace_id, kind, pending.scope)
            operation = new_operation(
                services, kind, pending.name if pending is not None and not target else target, version
            )
            tx.begin_operation(workspace_id, operation)
            if pending is not None:
                tx.put_snapshot(pending)
        work = cls(services, workspace, operation, pending=pending, reason=reason)
        work.reach("begun")
        return work

    def reach(self, step: str) -> None:
        """Tell that a step was done."""
        self.services.environment.after_step(f"{self.operation.kind}.{step}")

    # Steps

    def stop(self) -> None:
        """Stop the runtime, by force if need be; one that does not run is fine."""
        self.services.stop(self.workspace_id)
        self.reach("stopped")

    def capture(self) -> Saved:
        """Save the workspace's state as the pending snapshot, in the local cache."""
        assert self.pending is not None
        with self.services.runtime.capture(self.workspace.spec, self.pending.scope) as captured:
            saved = self.services.content.save(self.pending, captured)
        self.reach("captured")
        return saved

    def continue_on(self, record: SnapshotRecord) -> None:
        """Let the workspace go on, on top of what was captured."""
        self.services.runtime.continue_on(self.workspace.spec, record.runtime_name)
        self.reach("continued")

    def start(self) -> None:
        """Start the runtime; it may not be ready yet."""
        self.services.runtime.start(self.workspace.spec)
        self.reach("started")

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until what was started afresh is ready. One without a readiness check is so at once."""
        if self.workspace.spec.readiness.kind == NO_CHECK:
            return
        self.services.runtime.wait_ready(self.workspace.spec, timeout_s, self.services.closing)
        self.reach("ready")

    def start_again(self) -> None:
        """Start the runtime if it ran before, and wait until it is ready."""
        if self.was_running:
            self.start()
            self.wait_ready()

    def place(self, snapshot: Snapshot, base: Snapshot | None) -> None:
        """Replace the workspace's state by a snapshot's."""
        self.services.place(self.workspace.spec, snapshot, base, self.operation.token)
        self.reach("placed")

    @contextmanager
    def recording(self) -> Iterator[Transaction]:
        """The last transaction: everything in the block becomes visible at once, and the operation ends."""
        self.may_be_recorded = True
        with self.services.catalog.transaction() as tx:
            used_at = self.now if self.reason == USER else None
            tx.end_operation(self.workspace_id, self.operation.token, used_at=used_at)
            yield tx
        self.reach("recorded")

    # What recordings are made of

    def go_on_from(self, tx: Transaction, record: SnapshotRecord, **changes: Any) -> None:
        """The workspace's state goes on from this snapshot now; what only the one before needed may go."""
        tx.update_workspace(self.workspace_id, current_snapshot=record.name, **changes)
        before = find_snapshot(tx, self.workspace.current_snapshot)
        if before is None or before.name == record.name:
            return
        if before.kind is SnapshotKind.PAUSE:
            tx.set_snapshot_status(before.name, SnapshotStatus.DELETING)
        self._left_behind.append(before)

    def record_event(self, tx: Transaction, event_type: str, **payload: Any) -> None:
        """Record what happened, with why when nobody asked for it."""
        if self.reason != USER:
            payload["reason"] = self.reason
        add_event(tx, self.workspace_id, event_type, payload, self.services.clock())

    def record_run(self, tx: Transaction, transition: RunTransition, error: str = "") -> Run:
        """Record a start, stop or delete that this operation was: it succeeded, unless there is an error."""
        deadline, now = None, self.services.clock()
        if transition is RunTransition.START and not error:
            workspace = tx.lock_workspace(self.workspace_id)
            deadline = deadline_of_start(workspace, tx.policy(workspace.policy), now)
        run = tx.add_run(self.workspace_id, transition, self.operation.started_at, self.reason, deadline)
        status = RunStatus.FAILED if error else RunStatus.SUCCEEDED
        return tx.finish_run(run.id, status, now, error)

    def afterwards(self, what: str, action: Callable[[], object]) -> None:
        """Remove something that the recording made needless. If that fails, the next recovery does it."""
        try:
            action()
        except SnaploaderError as error:
            log.warning("%s of workspace %r: left to recovery: %s", what, self.workspace_id, error)
        self.reach("cleaned")

    def clean_up(self) -> None:
        """Let go of the snapshots that the recording made needless."""
        for record in self._left_behind:
            self.afterwards(f"snapshot {record.name!r}", partial(let_go, self.services, record))


def _check_scope(services: Services, workspace_id: str, kind: str, scope: Scope) -> None:
    if scope not in services.runtime.scopes:
        raise FailedPrecondition(
            f"workspace {workspace_id!r}: no {kind} of scope {scope} is possible, because the runtime of "
            f"this host captures {' and '.join(sorted(services.runtime.scopes))} alone"
        )


def widest_scope(services: Services) -> Scope:
    """The scope that holds the most of what the runtime can capture."""
    return Scope.FULL if Scope.FULL in services.runtime.scopes else Scope.DATA


def text_of(error: BaseException) -> str:
    """What of an error is written down for others to read."""
    return error.message if isinstance(error, SnaploaderError) else repr(error)


def runs_nevertheless(services: Services, workspace_id: str) -> bool:
    """Whether a workspace runs although starting it failed: the failure may have come after the effect."""
    try:
        is_running = services.runtime.status(workspace_id).is_running
    except SnaploaderError:
        return False
    if is_running:
        log.warning("workspace %r runs, although starting it failed", workspace_id)
    return is_running


def new_operation(
    services: Services, kind: OperationKind, snapshot_name: str = "", version: int | None = None
) -> Operation:
    return Operation(kind, uuid.uuid4().hex, services.host, services.clock(), snapshot_name, version)


def with_slot(services: Services, workspace_id: str) -> None:
    """Give the workspace a slot if it lost its own: another workspace may have won it at a recovery."""
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
    if workspace.slot is not None or workspace.host != services.host or workspace.state not in ALIVE:
        return
    slot = services.slots.acquire(workspace_id)
    try:
        with services.catalog.transaction() as tx:
            tx.update_workspace(workspace_id, slot=slot)
    except BaseException:
        give_slot_back(services, slot, workspace_id)
        raise


def give_slot_back(services: Services, slot: int, workspace_id: str) -> None:
    """Free a slot that could not be recorded as the workspace's, unless it may have been all the same.

    Recovery frees it then, and until then nobody else must get it.
    """
    try:
        workspace = services.find_workspace(workspace_id)
    except SnaploaderError:
        log.warning("slot %d of workspace %r is left to recovery", slot, workspace_id, exc_info=True)
        return
    if workspace is None or (workspace.host, workspace.slot) != (services.host, slot):
        services.slots.release(slot, workspace_id)
