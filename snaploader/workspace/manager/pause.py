"""Pausing a workspace into a snapshot and a record, and resuming it.

All of it is local: the remote cache is not asked for anything.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from snaploader.workspace.manager.operation import ON_HOST, USER, Services, Work, with_slot
from snaploader.workspace.manager.snapshots import completed, load_state, new_record
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotResult,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecord

log = logging.getLogger(__name__)


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
    with work:
        work.stop()
        saved = work.capture()
        services.content.file_cache.sync()  # its files, the only other copy, are removed
        record = completed(saved.record)
        paused = replace(
            work.workspace, current_snapshot=record.name, state=WorkspaceState.PAUSED, paused_at=work.now
        )
        if reason == USER:
            paused = replace(paused, last_used_at=work.now, dormant_at=None, deleting_at=None)
        with services.catalog.reading() as reader:
            kept = PausedRecord.of(reader, paused, record)
        services.records.write(kept)
        work.reach("kept")
        with work.recording() as tx:
            tx.put_snapshot(record)
            work.go_on_from(tx, record, state=paused.state, paused_at=paused.paused_at)
            work.record_run(tx, RunTransition.STOP)
            work.record_event(tx, PAUSE, snapshot=record.name, scope=record.scope.value)
    work.afterwards("its files", lambda: services.runtime.remove(workspace_id))
    work.clean_up()
    return saved.result()


def resume(
    services: Services, workspace_id: str, reason: str = USER, *, ready_timeout_s: float | None = None
) -> Workspace:
    """Place the snapshot, start, wait until it is ready, record. See `WorkspaceManager.resume`."""
    work = Work.begin(
        services, workspace_id, OperationKind.RESUME, allowed=[WorkspaceState.PAUSED], reason=reason
    )
    with work:
        current, snapshot, base = load_state(services, work.workspace, work.workspace.current_snapshot)
        work.place(snapshot, base)
        work.start()
        if current.scope is Scope.DATA or not services.runtime.keeps_memory:
            work.wait_ready(ready_timeout_s)
        with work.recording() as tx:
            work.record_run(tx, RunTransition.START)
            work.record_event(tx, RESUME, snapshot=current.name, scope=current.scope.value)
            workspace = tx.update_workspace(workspace_id, state=WorkspaceState.RUNNING, paused_at=None)
    work.afterwards("its record as paused", lambda: services.records.remove(workspace_id))
    work.clean_up()
    return workspace
