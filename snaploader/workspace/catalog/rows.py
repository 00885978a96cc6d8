"""Rows of the tables to the values of the model, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row

from snaploader.workspace.model import (
    Event,
    Operation,
    Readiness,
    Run,
    SnapshotRecord,
    Version,
    Volume,
    Workspace,
    WorkspaceSpec,
)

_SAME_IN_WORKSPACE = (
    "host",
    "state",
    "owner",
    "base",
    "policy",
    "autostart_schedule",
    "slot",
    "current_snapshot",
    "base_snapshot",
    "last_version",
    "created_at",
    "last_used_at",
    "paused_at",
    "dormant_at",
    "deleting_at",
)
_SNAPSHOT = tuple(SnapshotRecord.__dataclass_fields__)
_RUN = tuple(Run.__dataclass_fields__)


def workspace_values(workspace: Workspace) -> dict[str, Any]:
    """Columns of a workspace; `due_at` is not part of it."""
    values = {name: getattr(workspace, name) for name in _SAME_IN_WORKSPACE}
    return {
        "id": workspace.id,
        "spec": spec_document(workspace.spec),
        **values,
        **operation_values(workspace.operation),
    }


def workspace_of(row: Row[Any]) -> Workspace:
    """The workspace of a row."""
    fields: Mapping[str, Any] = row._asdict()
    values = {name: fields[name] for name in _SAME_IN_WORKSPACE}
    return Workspace(spec=spec_of(fields["id"], fields["spec"]), operation=_operation_of(fields), **values)


def operation_values(operation: Operation | None) -> dict[str, Any]:
    """Columns of what is under way on a workspace; all None for nothing."""
    return {
        "operation_kind": operation and operation.kind,
        "operation_token": operation and operation.token,
        "operation_host": operation and operation.host,
        "operation_started_at": operation and operation.started_at,
        "operation_snapshot": operation and operation.snapshot_name,
        "operation_version": operation and operation.version,
    }


def _operation_of(fields: Mapping[str, Any]) -> Operation | None:
    if fields["operation_kind"] is None:
        return None
    return Operation(
        kind=fields["operation_kind"],
        token=fields["operation_token"],
        host=fields["operation_host"],
        started_at=fields["operation_started_at"],
        snapshot_name=fields["operation_snapshot"] or "",
        version=fields["operation_version"],
    )


def spec_document(spec: WorkspaceSpec) -> dict[str, Any]:
    """A spec as plain values; its id is kept beside it."""
    return {
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "volumes": [asdict(volume) for volume in spec.volumes],
        "readiness": asdict(spec.readiness),
    }


def spec_of(workspace_id: str, document: Mapping[str, Any]) -> WorkspaceSpec:
    """The spec of what `spec_document` made."""
    return WorkspaceSpec(
        workspace_id=workspace_id,
        command=tuple(document["command"]),
        environment=document["environment"],
        volumes=tuple(Volume(**volume) for volume in document["volumes"]),
        readiness=Readiness(**document["readiness"]),
    )


def snapshot_values(record: SnapshotRecord) -> dict[str, Any]:
    """Columns of a snapshot."""
    return {name: getattr(record, name) for name in _SNAPSHOT}


def snapshot_of(row: Row[Any]) -> SnapshotRecord:
    """The snapshot of a row."""
    return SnapshotRecord(**{name: row._mapping[name] for name in _SNAPSHOT})


def version_of(row: Row[Any]) -> Version:
    """The version of a row of versions joined with its snapshot's `runtime_name` and `source`."""
    return Version(
        id=row.id,
        workspace_id=row.workspace_id,
        number=row.number,
        snapshot_name=row.snapshot_name,
        runtime_name=row.runtime_name,
        display_name=row.display_name or f"Version {row.number}",
        source=row.source,
        created_at=row.created_at,
    )


def event_of(row: Row[Any]) -> Event:
    """The event of a row."""
    return Event(row.id, row.workspace_id, row.type, row.payload, row.created_at)


def run_of(row: Row[Any]) -> Run:
    """The run of a row."""
    return Run(**{name: row._mapping[name] for name in _RUN})
