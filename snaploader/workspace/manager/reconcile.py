"""Bringing one workspace to where the catalog says it is: its process, its files, its slot, its record."""

from __future__ import annotations

import logging
import uuid

from snaploader.errors import DataLoss, NotFound, SnaploaderError
from snaploader.policy import ReadPolicy
from snaploader.workspace.manager.lifetime import START, STOP, bring_back
from snaploader.workspace.manager.pausing import record_of
from snaploader.workspace.manager.repair import RECOVERY
from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.snapshots import let_go
from snaploader.workspace.manager.summary import Findings, Note
from snaploader.workspace.manager.work import runs_nevertheless
from snaploader.workspace.model import (
    RunStatus,
    RunTransition,
    SnapshotKind,
    Workspace,
    WorkspaceState,
)

log = logging.getLogger(__name__)


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
    findings.repaired.append(Note(workspace.id, f"its slot {slot} is not to be had, so it has none"))
    with services.catalog.transaction() as tx:
        return tx.update_workspace(workspace.id, slot=None)


def _settle_paused(services: Services, workspace: Workspace, findings: Findings) -> Workspace:
    """A paused workspace has a record and a slot, and nothing else here; without them it is stopped."""
    status = services.runtime.status(workspace.id)
    if status.exists:
        services.runtime.stop(workspace.id, timeout_s=services.stop_timeout_s, force=True)
        services.runtime.remove(workspace.id)
        findings.pruned.append(Note(workspace.id, "files of a paused workspace"))
    with services.catalog.reading() as reader:
        expected = record_of(reader, workspace)
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
        services.runtime.stop(workspace.id, timeout_s=services.stop_timeout_s, force=True)
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
