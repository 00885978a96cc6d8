"""Finishing a rollback, once the workspace's state was replaced: from there the way leads on, never back."""

from __future__ import annotations

from typing import Any

from snaploader.workspace.manager.snapshots import completed
from snaploader.workspace.manager.work import Work, runs_nevertheless
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    SnapshotRecord,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
)

VERSION_ROLLBACK = "version_rollback"


def finish_rollback(work: Work, target: SnapshotRecord, kept: SnapshotRecord | None) -> Workspace:
    """Start and record. A workspace that cannot be started is rolled back, and stopped.

    Args:
        target: The snapshot that was gone back to.
        kept: What was captured of the state before, if that was wanted.
    """
    problem: Exception | None = None
    try:
        work.start_again()
    except Exception as error:  # noqa: BLE001 - whatever it is, the rollback is recorded first
        if not runs_nevertheless(work.services, work.workspace_id):
            problem = error
    with work.recording() as tx:
        payload: dict[str, Any] = {"version": work.operation.version, "snapshot": target.name}
        if kept is not None:
            tx.put_snapshot(completed(kept))
            version = tx.add_version(work.workspace_id, kept.name, kept.created_at, kept.display_name)
            payload |= {"kept_snapshot": kept.name, "kept_version": version.number}
        state = WorkspaceState.STOPPED if problem is not None else work.workspace.state
        work.go_on_from(tx, target, state=state)
        work.event(tx, VERSION_ROLLBACK, **payload)
        if problem is not None:
            work.run(tx, RunTransition.START, error=str(problem))
        workspace = tx.workspace(work.workspace_id)
    work.clean_up()
    if problem is not None:
        problem.add_note(f"workspace {work.workspace_id!r} is rolled back, and stopped")
        raise problem
    return workspace


def is_placed(work: Work) -> bool:
    """Whether a rollback has replaced the workspace's state."""
    if work.operation.kind is not OperationKind.ROLLBACK:
        return False
    return work.services.runtime.status(work.workspace_id).placed == work.operation.token


def carry_on(work: Work) -> None:
    """Finish a rollback of which only the catalog and the runtime know."""
    content = work.services.content
    with work.services.catalog.reading() as reader:
        target = reader.snapshot(work.operation.snapshot_name)
        pending = reader.snapshots(work.workspace_id, statuses=[SnapshotStatus.PENDING])
    kept = next((record for record in pending if content.is_pinned(record)), None)
    if kept is not None:
        kept = content.as_saved(kept)
    finish_rollback(work, target, kept)
