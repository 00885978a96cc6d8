"""Records of snapshots: of one about to be taken, and of those that a workspace goes on from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from snaploader.errors import NotFound
from snaploader.workspace.manager.services import Services
from snaploader.workspace.model import (
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    SnapshotStatus,
    Workspace,
)
from snaploader.workspace.names import new_snapshot_name, runtime_name

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Reader


def new_record(
    tx: Reader,
    services: Services,
    workspace: Workspace,
    kind: SnapshotKind,
    scope: Scope,
    *,
    source: SnapshotSource = SnapshotSource.MANUAL,
    display_name: str = "",
) -> SnapshotRecord:
    """The record of a snapshot that is about to be taken.

    Its parent is the snapshot that the workspace's state goes on from. A pause is temporary, so that its
    own parent stands for it.
    """
    now = services.clock()
    parent = find_snapshot(tx, workspace.current_snapshot)
    if parent is not None and parent.kind is SnapshotKind.PAUSE:
        parent = find_snapshot(tx, parent.parent)
    name = new_snapshot_name(workspace.id, now)
    return SnapshotRecord(
        name,
        workspace.id,
        runtime_name(workspace.id, name),
        kind,
        scope,
        source,
        now,
        SnapshotStatus.PENDING,
        display_name,
        "" if parent is None else parent.name,
    )


def completed(record: SnapshotRecord, **changes: Any) -> SnapshotRecord:
    """The same record, complete."""
    return replace(record, status=SnapshotStatus.COMPLETE, **changes)


def find_snapshot(tx: Reader, name: str) -> SnapshotRecord | None:
    """The snapshot of that name; None when the name is empty or there is none."""
    if not name:
        return None
    try:
        return tx.snapshot(name)
    except NotFound:
        return None


def base_of(tx: Reader, workspace: Workspace, record: SnapshotRecord) -> SnapshotRecord | None:
    """Where all but the durable directories comes from under a Data snapshot; None: there is nothing else."""
    if record.scope is Scope.FULL:
        return None
    base = find_snapshot(tx, workspace.base_snapshot)
    return base if base is not None and base.scope is Scope.FULL else None


def let_go(services: Services, record: SnapshotRecord) -> None:
    """Give up what this host keeps of a snapshot that the workspace has gone on from.

    A pause is removed. A commit is in the remote cache, and may be evicted here. Versions stay.
    """
    if record.kind is SnapshotKind.PAUSE:
        services.content.drop(record)
        with services.catalog.transaction() as tx:
            tx.remove_snapshot(record.name)
    elif record.kind is SnapshotKind.COMMIT and record.is_remote:
        services.content.unpin(record)
