"""Finishing a rollback, once the workspace's state was replaced: from there the way leads on, never back."""

from __future__ import annotations

import logging
from typing import Any

from snaploader.errors import Cancelled, SnaploaderError
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


log = logging.getLogger(__name__)


def finish_rollback(
    work: Work, target: SnapshotRecord, kept: SnapshotRecord | None, *, until_ready: bool = True
) -> Workspace:
    """Start and record. A workspace that cannot be started, or is not ready, is rolled back, and stopped.

    Args:
        target: The snapshot that was gone back to.
        kept: What was captured of the state before, if that was wanted.
        until_ready: Whether to wait until it is ready.
    """
    problem = _start(work, until_ready=until_ready)
    with work.recording() as tx:
        payload: dict[str, Any] = {"version": work.operation.version, "snapshot": target.name}
        if kept is not None:
            tx.put_snapshot(completed(kept))
            version = tx.add_version(work.workspace_id, kept.name, kept.created_at, kept.display_name)
            payload |= {"kept_snapshot": kept.name, "kept_version": version.number}
        is_stopped = problem is not None and not isinstance(problem, Cancelled)
        state = WorkspaceState.STOPPED if is_stopped else work.workspace.state
        work.go_on_from(tx, target, state=state)
        work.event(tx, VERSION_ROLLBACK, **payload)
        if is_stopped:
            work.run(tx, RunTransition.START, error=str(problem))
        workspace = tx.workspace(work.workspace_id)
    work.clean_up()
    if problem is not None:
        how = "stopped" if is_stopped else "may not be ready yet"
        problem.add_note(f"workspace {work.workspace_id!r} is rolled back, and {how}")
        raise problem
    return workspace


def _start(work: Work, *, until_ready: bool) -> Exception | None:
    """Start what ran before; why it does not run now. Cancelled: it runs, and nobody waited for more."""
    if not work.was_running:
        return None
    try:
        work.start()
    except Exception as error:  # noqa: BLE001 - whatever it is, the rollback is recorded first
        if not runs_nevertheless(work.services, work.workspace_id):
            return error
    try:
        if until_ready:
            work.wait_ready()
    except Cancelled as error:
        return error
    except Exception as error:  # noqa: BLE001 - as above
        try:
            work.stop()
        except SnaploaderError:
            log.warning("workspace %r is left to recovery to stop", work.workspace_id, exc_info=True)
        return error
    return None


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
    finish_rollback(work, target, kept, until_ready=False)
