"""Workspaces, snapshots and what happens to them, as JSON records and as words."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from snaploader.workspace.model import (
    Event,
    Operation,
    Run,
    SnapshotInfo,
    SnapshotResult,
    Version,
    Workspace,
)
from snaploader.workspace.sizes import WorkspaceSize


def time_record(time: datetime | None) -> str | None:
    """A time in ISO 8601, in UTC."""
    return None if time is None else time.isoformat()


def time_words(time: datetime | None) -> str:
    """A time to the minute, in UTC."""
    return "-" if time is None else f"{time:%Y-%m-%d %H:%M}"


def exit_words(exit_code: int) -> str:
    """How a command ended: its exit status, or the negative number of the signal."""
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def workspace_record(workspace: Workspace) -> dict[str, Any]:
    """All that the catalog knows of a workspace itself."""
    spec = workspace.spec
    return {
        "id": workspace.id,
        "state": str(workspace.state),
        "host": workspace.host,
        "owner": workspace.owner,
        "base": workspace.base,
        "policy": workspace.policy,
        "autostart_schedule": workspace.autostart_schedule,
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "volumes": [{"name": volume.name, "durable_dir": volume.durable_dir} for volume in spec.volumes],
        "readiness": {
            "kind": spec.readiness.kind,
            "target": spec.readiness.target,
            "interval_s": spec.readiness.interval_s,
            "timeout_s": spec.readiness.timeout_s,
        },
        "slot": workspace.slot,
        "last_version": workspace.last_version,
        "current_snapshot": workspace.current_snapshot,
        "base_snapshot": workspace.base_snapshot,
        "created_at": time_record(workspace.created_at),
        "last_used_at": time_record(workspace.last_used_at),
        "paused_at": time_record(workspace.paused_at),
        "dormant_at": time_record(workspace.dormant_at),
        "deleting_at": time_record(workspace.deleting_at),
        "operation": _operation_record(workspace.operation),
    }


def _operation_record(operation: Operation | None) -> dict[str, Any] | None:
    if operation is None:
        return None
    return {
        "kind": str(operation.kind),
        "host": operation.host,
        "started_at": time_record(operation.started_at),
        "snapshot_name": operation.snapshot_name,
        "version": operation.version,
    }


def size_record(size: WorkspaceSize) -> dict[str, int]:
    """What a workspace takes on this host."""
    return {
        "exclusive_bytes": size.exclusive_bytes,
        "shared_bytes": size.shared_bytes,
        "snapshots": size.snapshots,
    }


def snapshot_record(info: SnapshotInfo) -> dict[str, Any]:
    """A snapshot of a workspace; one that the catalog does not manage has little more than its name."""
    record = info.record
    values: dict[str, Any] = {
        "runtime_name": info.runtime_name,
        "is_managed": info.is_managed,
        "is_local": info.is_local,
        "version": info.version,
        "display_name": info.display_name,
    }
    if record is not None:
        values |= {
            "name": record.name,
            "kind": str(record.kind),
            "scope": str(record.scope),
            "source": str(record.source),
            "created_at": time_record(record.created_at),
            "parent": record.parent,
            "is_remote": record.is_remote,
            "size_bytes": record.size_bytes,
        }
    return values


def result_record(result: SnapshotResult) -> dict[str, Any]:
    """What taking a snapshot returned."""
    return {
        "workspace_id": result.workspace_id,
        "snapshot_name": result.snapshot_name,
        "runtime_name": result.runtime_name,
        "display_name": result.display_name,
        "version": result.version,
        "created_at": time_record(result.created_at),
        "scope": str(result.scope),
        "read_bytes": result.read_bytes,
        "stored_bytes": result.stored_bytes,
        "uploaded_bytes": result.uploaded_bytes,
    }


def version_record(version: Version) -> dict[str, Any]:
    """A version."""
    return {
        "id": version.id,
        "number": version.number,
        "display_name": version.display_name,
        "source": str(version.source),
        "snapshot_name": version.snapshot_name,
        "runtime_name": version.runtime_name,
        "created_at": time_record(version.created_at),
    }


def run_record(run: Run | None) -> dict[str, Any] | None:
    """The latest start, stop or delete."""
    if run is None:
        return None
    return {
        "transition": str(run.transition),
        "status": str(run.status),
        "reason": run.reason,
        "created_at": time_record(run.created_at),
        "completed_at": time_record(run.completed_at),
        "deadline": time_record(run.deadline),
        "error": run.error,
    }


def event_record(event: Event) -> dict[str, Any]:
    """An event."""
    return {
        "id": event.id,
        "workspace_id": event.workspace_id,
        "type": event.type,
        "payload": dict(event.payload),
        "created_at": time_record(event.created_at),
    }


def event_records(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events, as they come."""
    return [event_record(event) for event in events]
