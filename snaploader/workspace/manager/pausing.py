"""Pausing a workspace into a snapshot and a record, and resuming it from there. All of it is local."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.snapshots import base_of, completed, new_record
from snaploader.workspace.manager.states import ON_HOST
from snaploader.workspace.manager.undo import undone_on_failure
from snaploader.workspace.manager.versions import result_of
from snaploader.workspace.manager.work import USER, Work, with_slot
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.recordformat import KeptVersion, PausedRecord

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Reader

PAUSE = "workspace_pause"
RESUME = "workspace_resume"


def pause(services: Services, workspace_id: str, reason: str = USER) -> SnapshotResult:
    """Stop, capture, keep a record, record, remove the files. See `WorkspaceManager.pause`."""
    with_slot(services, workspace_id)
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.PAUSE,
        allowed=ON_HOST,
        reason=reason,
        prepare=lambda tx, workspace: new_record(
            tx, services, workspace, SnapshotKind.PAUSE, tx.policy(workspace.policy).scopes.on_pause
        ),
    )
    with undone_on_failure(work):
        work.stop()
        saved = work.capture()
        services.content.flush()  # its files, the only other copy, are removed
        record = completed(saved.record)
        paused = replace(
            work.as_used, current_snapshot=record.name, state=WorkspaceState.PAUSED, paused_at=work.now
        )
        with services.catalog.reading() as reader:
            kept = record_of(reader, paused, record)
        services.records.write(kept)
        work.reach("kept")
        with work.recording() as tx:
            tx.put_snapshot(record)
            work.go_on_from(tx, record, state=paused.state, paused_at=paused.paused_at)
            work.run(tx, RunTransition.STOP)
            work.event(tx, PAUSE, snapshot=record.name, scope=record.scope.value)
    work.afterwards("its files", lambda: services.runtime.remove(workspace_id))
    work.clean_up()
    return result_of(saved)


def resume(
    services: Services, workspace_id: str, reason: str = USER, *, ready_timeout_s: float | None = None
) -> Workspace:
    """Place the snapshot, start, wait until it is ready, record. See `WorkspaceManager.resume`."""
    work = Work.begin(
        services, workspace_id, OperationKind.RESUME, allowed=[WorkspaceState.PAUSED], reason=reason
    )
    with undone_on_failure(work):
        with services.catalog.reading() as reader:
            current = reader.snapshot(work.workspace.current_snapshot)
            base = base_of(reader, work.workspace, current)
        work.place(services.content.find(current), None if base is None else services.content.find(base))
        work.start()
        if current.scope is Scope.DATA or not services.runtime.keeps_memory:
            work.wait_ready(ready_timeout_s)
        with work.recording() as tx:
            tx.update_workspace(workspace_id, state=WorkspaceState.RUNNING, paused_at=None)
            work.run(tx, RunTransition.START)
            work.event(tx, RESUME, snapshot=current.name, scope=current.scope.value)
            workspace = tx.workspace(workspace_id)
    work.afterwards("its record as paused", lambda: services.records.remove(workspace_id))
    work.clean_up()
    return workspace


def record_of(reader: Reader, workspace: Workspace, new: SnapshotRecord | None = None) -> PausedRecord:
    """The record of a paused workspace, with the snapshot that is about to be complete."""
    snapshots = [
        # Of pauses only the one that it is paused as counts: an earlier one is on its way out.
        snapshot
        for snapshot in reader.snapshots(workspace.id)
        if snapshot.kind is not SnapshotKind.PAUSE or snapshot.name == workspace.current_snapshot
    ]
    versions = tuple(
        KeptVersion(version.number, version.snapshot_name, version.display_name)
        for version in reader.versions(workspace.id)
    )
    return PausedRecord(
        replace(workspace, operation=None, last_version=0),
        reader.policy(workspace.policy),
        tuple(snapshots if new is None else [*snapshots, new]),
        versions,
    )
