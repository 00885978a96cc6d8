"""Putting one workspace right: what was interrupted is settled, and what is here is as the catalog says.

Also what a recovery finds and does, as it is noted and as it is told in the end.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from snaploader.errors import DataLoss, FailedPrecondition, NotFound, SnaploaderError
from snaploader.policy import ReadPolicy
from snaploader.workspace.host import WorkspaceLocks
from snaploader.workspace.manager.lifetime import START, STOP, bring_back
from snaploader.workspace.manager.operation import Services, Work, runs_nevertheless
from snaploader.workspace.manager.snapshots import let_go
from snaploader.workspace.manager.undo import undo
from snaploader.workspace.model import (
    Operation,
    RunStatus,
    RunTransition,
    SnapshotKind,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
    is_workspace_id,
)
from snaploader.workspace.records import PausedRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was found, and what was done about it."""

    name: str
    """A workspace's id, or the name of what was found."""
    reason: str


@dataclass(frozen=True, slots=True)
class RecoverySummary:
    """What one `recover` did, each in the order in which it was done."""

    restored: tuple[str, ...] = ()
    """Ids of the workspaces that are paused: whole, with their slots."""
    adopted: tuple[str, ...] = ()
    """Those among them that the catalog had lost."""
    repaired: tuple[Note, ...] = ()
    """Workspaces with an operation that had been interrupted, or that did not run as they should."""
    pruned: tuple[Note, ...] = ()
    """Leftovers that were removed."""
    trashed: tuple[Note, ...] = ()
    """Records of paused workspaces that were renamed aside; the next start removes them."""
    unknown: tuple[Note, ...] = ()
    """What lies among the records of paused workspaces and is none: it was left alone."""
    busy: tuple[str, ...] = ()
    """Ids of workspaces that somebody else is working on: they were left alone."""
    problems: tuple[Note, ...] = ()
    """What could not be put right. The next recovery tries again."""


@dataclass(slots=True)
class Findings:
    """The summary while it is made. For one thread."""

    restored: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    repaired: list[Note] = field(default_factory=list)
    pruned: list[Note] = field(default_factory=list)
    trashed: list[Note] = field(default_factory=list)
    unknown: list[Note] = field(default_factory=list)
    busy: dict[str, None] = field(default_factory=dict)
    problems: list[Note] = field(default_factory=list)

    @contextmanager
    def guarding(self, name: str, log: Callable[..., None]) -> Iterator[None]:
        """Let nothing that goes wrong with one thing stop the others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a recovery never raises
            log("recovery of %r failed", name, exc_info=True)
            text = error.message if isinstance(error, SnaploaderError) else repr(error)
            self.problems.append(Note(name, text))

    def under_lock(self, locks: WorkspaceLocks, workspace_id: str, action: Callable[[], object]) -> bool:
        """Do something with one workspace, unless somebody else works on it; whether it was done.

        One lock at a time: each takes a descriptor, and with PostgreSQL a connection.
        """
        if not is_workspace_id(workspace_id):
            action()  # no workspace can have this name, so nobody works on it
            return True
        lock = locks.try_acquire(workspace_id)
        if lock is None:
            self.busy[workspace_id] = None
            return False
        try:
            action()
        finally:
            lock.release()
        return True

    def summary(self) -> RecoverySummary:
        """What it came to."""
        return RecoverySummary(**{each.name: tuple(getattr(self, each.name)) for each in fields(self)})


RECOVERY = "recovery"
"""The reason of what nobody asked for."""


def settle(services: Services, workspace_id: str) -> Operation | None:
    """Finish or take back what is under way on a workspace, whose lock proves that nobody is doing it.

    Returns:
        What was under way; None: nothing was.

    Raises:
        NotFound: There is no such workspace.
        FailedPrecondition: It is under way on another host.
    """
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        operation = workspace.operation
        if operation is None:
            return None
        pending = reader.snapshots(workspace_id, statuses=[SnapshotStatus.PENDING])
    if operation.host != services.host:
        raise FailedPrecondition(
            f"workspace {workspace_id!r}: a {operation.kind} on host {operation.host!r} did not end: "
            "run recovery there"
        )
    log.warning("workspace %r: a %s did not end; it is put right", workspace_id, operation.kind)
    undo(Work(services, workspace, operation, pending=next(iter(pending), None), reason=RECOVERY))
    return operation


def reconcile(services: Services, workspace_id: str, findings: Findings) -> None:
    """Put one workspace right, under its lock, on which nothing is under way."""
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
    if workspace.operation is not None or workspace.host != services.host:
        return
    workspace = _settle_slot(services, workspace, findings)
    if workspace.state is WorkspaceState.PAUSED:
        workspace = _settle_paused(services, workspace, findings)
    else:
        if services.records.remove(workspace.id):
            findings.pruned.append(Note(workspace.id, "a record of it as paused"))
    if workspace.state is WorkspaceState.RUNNING:
        _settle_running(services, workspace, findings)
    elif workspace.state is WorkspaceState.STOPPED:
        _settle_stopped(services, workspace, findings)
    _let_commits_go(services, workspace)


def _settle_slot(services: Services, workspace: Workspace, findings: Findings) -> Workspace:
    """The slot that the catalog says; without one when another workspace has it."""
    slot = workspace.slot
    if slot is None or services.slots.reserve(slot, workspace.id):
        return workspace
    findings.repaired.append(Note(workspace.id, f"its slot {slot} is taken by others, so it has none"))
    with services.catalog.transaction() as tx:
        return tx.update_workspace(workspace.id, slot=None)


def _settle_paused(services: Services, workspace: Workspace, findings: Findings) -> Workspace:
    """A paused workspace has a record and a slot, and nothing else here; without them it is stopped."""
    status = services.runtime.status(workspace.id)
    if status.exists:
        services.stop(workspace.id)
        services.runtime.remove(workspace.id)
        findings.pruned.append(Note(workspace.id, "files of a paused workspace"))
    with services.catalog.reading() as reader:
        expected = PausedRecord.of(reader, workspace)
        current = reader.snapshot(workspace.current_snapshot)
    try:
        if workspace.slot is not None:
            if services.records.read(workspace.id) != expected:
                # Policies change, and touching a workspace does not write its record.
                services.records.write(expected)
            return workspace
    except (NotFound, DataLoss):
        log.info("workspace %r is paused without a record", workspace.id)
    if workspace.slot is None:
        return _give_up_pause(services, workspace, findings, NotFound("it has lost its slot"))
    try:
        services.content.find(current, ReadPolicy.LOCAL_ONLY)
        services.records.write(expected)
    except NotFound as error:
        return _give_up_pause(services, workspace, findings, error)
    findings.repaired.append(Note(workspace.id, "its record as paused was written again"))
    if workspace.id not in findings.restored:
        findings.restored.append(workspace.id)
    return workspace


def _give_up_pause(
    services: Services, workspace: Workspace, findings: Findings, error: SnaploaderError
) -> Workspace:
    findings.repaired.append(Note(workspace.id, f"paused without a record, now stopped: {error.message}"))
    return _mark_stopped(services, workspace, error)


def _settle_running(services: Services, workspace: Workspace, findings: Findings) -> None:
    status = services.runtime.status(workspace.id)
    if status.is_running:
        return
    try:
        if not status.exists:
            bring_back(services, workspace, uuid.uuid4().hex)
        services.runtime.start(workspace.spec)
    except SnaploaderError as error:
        if not runs_nevertheless(services, workspace.id):
            log.warning("workspace %r cannot be started", workspace.id, exc_info=True)
            reason = f"it did not run and is now stopped: {error.message}"
            findings.repaired.append(Note(workspace.id, reason))
            _mark_stopped(services, workspace, error)
            return
    with services.catalog.transaction() as tx:
        tx.add_event(workspace.id, START, {"reason": RECOVERY}, services.clock())
    findings.repaired.append(Note(workspace.id, "it did not run, and was started"))


def _settle_stopped(services: Services, workspace: Workspace, findings: Findings) -> None:
    status = services.runtime.status(workspace.id)
    if status.is_running:
        services.stop(workspace.id)
        findings.repaired.append(Note(workspace.id, "it ran, and was stopped"))
    if not status.exists:
        bring_back(services, workspace, uuid.uuid4().hex)
        findings.repaired.append(Note(workspace.id, "its files were gone, and its snapshot took their place"))


def _mark_stopped(services: Services, workspace: Workspace, error: SnaploaderError) -> Workspace:
    """Let the catalog say that it is stopped, because starting it or keeping it paused failed."""
    with services.catalog.transaction() as tx:
        now = services.clock()
        if workspace.state is WorkspaceState.RUNNING:
            run = tx.add_run(workspace.id, RunTransition.START, now, RECOVERY)
            tx.finish_run(run.id, RunStatus.FAILED, now, error.message)
        tx.add_event(workspace.id, STOP, {"reason": RECOVERY, "error": error.message}, now)
        return tx.update_workspace(workspace.id, state=WorkspaceState.STOPPED, paused_at=None)


def _let_commits_go(services: Services, workspace: Workspace) -> None:
    """Commits that the workspace has gone on from need not stay on this host."""
    with services.catalog.reading() as reader:
        commits = [
            record
            for record in reader.snapshots(workspace.id)
            if record.kind is SnapshotKind.COMMIT and record.name != workspace.current_snapshot
        ]
    for record in commits:
        let_go(services, record)
