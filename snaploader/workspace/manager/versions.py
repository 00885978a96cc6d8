"""Numbered snapshots: taking one, and going back to one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from snaploader.errors import Cancelled, InvalidArgument, SnaploaderError
from snaploader.workspace.manager.operation import ON_HOST, Services, Work, runs_nevertheless
from snaploader.workspace.manager.snapshots import completed, load_state, new_record
from snaploader.workspace.model import (
    MAX_VERSION,
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    SnapshotSource,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
)

log = logging.getLogger(__name__)


SNAPSHOT_CREATE = "snapshot_create"
VERSION_CREATE = "version_create"
VERSION_ROLLBACK = "version_rollback"


@dataclass(frozen=True, slots=True)
class VersionRequest:
    """What a version is to be."""

    event: str = VERSION_CREATE
    source: SnapshotSource = SnapshotSource.PRE_EXEC
    scope: Scope = Scope.FULL
    display_name: str = ""


def take(services: Services, workspace_id: str, request: VersionRequest) -> SnapshotResult:
    """Stop, capture, continue, start, record: a new version. See `WorkspaceManager.create_snapshot`."""
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.SNAPSHOT,
        allowed=ON_HOST,
        prepare=lambda tx, workspace: new_record(
            tx,
            services,
            workspace,
            SnapshotKind.VERSION,
            request.scope,
            source=request.source,
            display_name=request.display_name,
        ),
    )
    with work:
        work.stop()
        saved = work.capture()
        work.continue_on(saved.record)
        work.start_again()
        record = completed(saved.record)
        with work.recording() as tx:
            tx.put_snapshot(record)
            version = tx.add_version(workspace_id, record.name, record.created_at, record.display_name)
            work.go_on_from(tx, record)
            work.record_event(
                tx,
                request.event,
                snapshot=record.name,
                version=version.number,
                source=record.source.value,
                scope=record.scope.value,
            )
    work.clean_up()
    return saved.result(version.display_name, version.number)


def rollback(services: Services, workspace_id: str, number: int, *, keep_current: bool) -> Workspace:
    """Stop, replace, start, record: back to a version. See `WorkspaceManager.rollback`."""
    check_number(number)
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        name = reader.version(workspace_id, number).snapshot_name
    # Before anything is stopped: what cannot be loaded cannot be gone back to.
    target, snapshot, base = load_state(services, workspace, name)
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.ROLLBACK,
        allowed=ON_HOST,
        prepare=(
            lambda tx, workspace: new_record(
                tx, services, workspace, SnapshotKind.VERSION, Scope.FULL, source=SnapshotSource.ROLLBACK
            )
        )
        if keep_current
        else None,
        target=target.name,
        version=number,
    )
    with work:
        work.stop()
        kept = work.capture().record if keep_current else None
        if kept is not None:
            services.content.file_cache.sync()  # what it was taken of is replaced
        work.place(snapshot, base)
    return finish_rollback(work, target, kept)


def check_number(number: int) -> int:
    """Return `number` if a version can have it. InvalidArgument otherwise."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_VERSION:
        raise InvalidArgument(f"{number!r} is no version: versions are whole numbers from 1 to {MAX_VERSION}")
    return number


def finish_rollback(
    work: Work, target: SnapshotRecord, kept: SnapshotRecord | None, *, until_ready: bool = True
) -> Workspace:
    """Start and record. A workspace that cannot be started, or is not ready, is rolled back, and stopped.

    `kept` is what was captured of the state before, if that was wanted.
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
        work.record_event(tx, VERSION_ROLLBACK, **payload)
        if is_stopped:
            work.record_run(tx, RunTransition.START, error=str(problem))
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
