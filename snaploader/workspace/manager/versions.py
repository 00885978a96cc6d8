"""Numbered snapshots: taking one, and going back to one."""

from __future__ import annotations

from dataclasses import dataclass

from snaploader.errors import InvalidArgument
from snaploader.workspace.manager.content import Saved
from snaploader.workspace.manager.placed import finish_rollback
from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.snapshots import base_of, completed, new_record
from snaploader.workspace.manager.states import ON_HOST
from snaploader.workspace.manager.undo import undone_on_failure
from snaploader.workspace.manager.work import Work
from snaploader.workspace.model import (
    MAX_VERSION,
    OperationKind,
    Scope,
    SnapshotKind,
    SnapshotResult,
    SnapshotSource,
    Workspace,
)

SNAPSHOT_CREATE = "snapshot_create"
VERSION_CREATE = "version_create"


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
    with undone_on_failure(work):
        work.stop()
        saved = work.capture()
        work.continue_on(saved.record)
        work.start_again()
        record = completed(saved.record)
        with work.recording() as tx:
            tx.put_snapshot(record)
            version = tx.add_version(workspace_id, record.name, record.created_at, record.display_name)
            work.go_on_from(tx, record)
            work.event(
                tx,
                request.event,
                snapshot=record.name,
                version=version.number,
                source=record.source.value,
                scope=record.scope.value,
            )
    work.clean_up()
    return result_of(saved, version.display_name, version.number)


def rollback(services: Services, workspace_id: str, number: int, *, keep_current: bool) -> Workspace:
    """Stop, replace, start, record: back to a version. See `WorkspaceManager.rollback`."""
    check_number(number)
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        target = reader.snapshot(reader.version(workspace_id, number).snapshot_name)
        base = base_of(reader, workspace, target)
    # Before anything is stopped: what cannot be loaded cannot be gone back to.
    snapshot = services.content.find(target)
    base_snapshot = None if base is None else services.content.find(base)
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
    with undone_on_failure(work):
        work.stop()
        kept = work.capture().record if keep_current else None
        if kept is not None:
            services.content.flush()  # what it was taken of is replaced
        work.place(snapshot, base_snapshot)
    return finish_rollback(work, target, kept)


def check_number(number: int) -> int:
    """`number` if a version can have it, else InvalidArgument."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_VERSION:
        raise InvalidArgument(f"{number!r} is no version: versions are whole numbers from 1 to {MAX_VERSION}")
    return number


def result_of(saved: Saved, display_name: str = "", version: int | None = None) -> SnapshotResult:
    """What the caller of an operation that took a snapshot gets."""
    record = saved.record
    return SnapshotResult(
        record.workspace_id,
        record.name,
        record.runtime_name,
        display_name or record.display_name,
        version,
        record.created_at,
        record.scope,
        saved.read_bytes,
        saved.stored_bytes,
        saved.uploaded_bytes,
    )
