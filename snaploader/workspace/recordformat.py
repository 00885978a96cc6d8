"""The format of a paused workspace's record: a JSON object, `"format": 1`.

Times are ISO 8601 in UTC; names and values are those of the fields in `snaploader.workspace.model`, and a
policy is spelled as `Policy.to_mapping` does. What is read may be anything: `decode` raises ValueError,
TypeError or LookupError for what is no record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from snaploader.workspace.model import (
    MAX_VERSION,
    Readiness,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.names import check_workspace_id
from snaploader.workspace.policy import Policy
from snaploader.workspace.volumes import check_volumes

FORMAT = 1
"""Never to be given to anything else."""


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """A version as a record keeps it; the snapshot's name leads to the rest."""

    number: int
    snapshot_name: str
    display_name: str


@dataclass(frozen=True, slots=True)
class PausedRecord:
    """A paused workspace, as far as a catalog must know it to resume it and to go on with its history."""

    workspace: Workspace
    """Paused, with its slot."""
    policy: Policy
    snapshots: tuple[SnapshotRecord, ...]
    """All complete ones, the one it is paused as among them."""
    versions: tuple[KeptVersion, ...] = ()
    """In the order of their numbers."""


def encode(record: PausedRecord) -> dict[str, Any]:
    """The values to be written as JSON."""
    return {
        "format": FORMAT,
        "workspace": _workspace(record.workspace),
        "policy": {"name": record.policy.name, "values": record.policy.to_mapping()},
        "snapshots": [_snapshot(snapshot) for snapshot in record.snapshots],
        "versions": [
            {
                "number": version.number,
                "snapshot_name": version.snapshot_name,
                "display_name": version.display_name,
            }
            for version in record.versions
        ],
    }


def decode(values: Any) -> PausedRecord:
    """The record in parsed JSON."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"this is no record of format {FORMAT}")
    workspace = _read_workspace(values["workspace"])
    snapshots = tuple(_read_snapshot(workspace.id, each) for each in values["snapshots"])
    names = {snapshot.name for snapshot in snapshots}
    if workspace.current_snapshot not in names:
        raise ValueError("the snapshot that the workspace is paused as is not among its snapshots")
    versions = tuple(
        KeptVersion(_number(each["number"]), _text(each["snapshot_name"]), _text(each["display_name"]))
        for each in values["versions"]
    )
    numbers = [0, *(version.number for version in versions)]
    if any(number >= following for number, following in pairwise(numbers)) or numbers[-1] > MAX_VERSION:
        raise ValueError("the numbers of the versions do not rise")
    if not names.issuperset(version.snapshot_name for version in versions):
        raise ValueError("a version names a snapshot that is not there")
    policy = Policy.from_mapping(_text(values["policy"]["name"]), values["policy"]["values"])
    return PausedRecord(workspace, policy, snapshots, versions)


def _workspace(workspace: Workspace) -> dict[str, Any]:
    spec = workspace.spec
    return {
        "workspace_id": workspace.id,
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "volumes": [{"name": each.name, "durable_dir": each.durable_dir} for each in spec.volumes],
        "readiness": {
            "kind": spec.readiness.kind,
            "target": spec.readiness.target,
            "interval_s": spec.readiness.interval_s,
            "timeout_s": spec.readiness.timeout_s,
        },
        "host": workspace.host,
        "created_at": _stamp(workspace.created_at),
        "last_used_at": _stamp(workspace.last_used_at),
        "owner": workspace.owner,
        "base": workspace.base,
        "policy": workspace.policy,
        "autostart_schedule": workspace.autostart_schedule,
        "slot": workspace.slot,
        "current_snapshot": workspace.current_snapshot,
        "base_snapshot": workspace.base_snapshot,
        "paused_at": _stamp(workspace.paused_at),
        "dormant_at": _stamp(workspace.dormant_at),
        "deleting_at": _stamp(workspace.deleting_at),
    }


def _read_workspace(values: Mapping[str, Any]) -> Workspace:
    readiness = values["readiness"]
    if values["slot"] is None:
        raise ValueError("it lacks its slot")
    spec = WorkspaceSpec(
        check_workspace_id(values["workspace_id"]),
        tuple(map(_text, values["command"])),
        {_text(name): _text(value) for name, value in values["environment"].items()},
        check_volumes(Volume(_text(each["name"]), _text(each["durable_dir"])) for each in values["volumes"]),
        Readiness(
            _text(readiness["kind"]),
            _text(readiness["target"]),
            float(readiness["interval_s"]),
            float(readiness["timeout_s"]),
        ),
    )
    return Workspace(
        spec,
        host=_text(values["host"]),
        state=WorkspaceState.PAUSED,
        created_at=_time(values["created_at"]),
        last_used_at=_time(values["last_used_at"]),
        owner=_text(values["owner"]),
        base=_text(values["base"]),
        policy=_text(values["policy"]),
        autostart_schedule=_text(values["autostart_schedule"]),
        slot=_number(values["slot"]),
        current_snapshot=_text(values["current_snapshot"]),
        base_snapshot=_text(values["base_snapshot"]),
        paused_at=_time_if_any(values["paused_at"]),
        dormant_at=_time_if_any(values["dormant_at"]),
        deleting_at=_time_if_any(values["deleting_at"]),
    )


def _snapshot(snapshot: SnapshotRecord) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "runtime_name": snapshot.runtime_name,
        "kind": snapshot.kind.value,
        "scope": snapshot.scope.value,
        "source": snapshot.source.value,
        "created_at": _stamp(snapshot.created_at),
        "display_name": snapshot.display_name,
        "parent": snapshot.parent,
        "manifest_ref": snapshot.manifest_ref,
        "is_remote": snapshot.is_remote,
        "size_bytes": snapshot.size_bytes,
    }


def _read_snapshot(workspace_id: str, values: Mapping[str, Any]) -> SnapshotRecord:
    return SnapshotRecord(
        name=_text(values["name"]),
        workspace_id=workspace_id,
        runtime_name=_text(values["runtime_name"]),
        kind=SnapshotKind(values["kind"]),
        scope=Scope(values["scope"]),
        source=SnapshotSource(values["source"]),
        created_at=_time(values["created_at"]),
        display_name=_text(values["display_name"]),
        parent=_text(values["parent"]),
        manifest_ref=_text(values["manifest_ref"]),
        is_remote=bool(values["is_remote"]),
        size_bytes=_number(values["size_bytes"]),
    )


def _stamp(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat(timespec="microseconds")


def _time(text: Any) -> datetime:
    time = datetime.fromisoformat(_text(text))
    if time.tzinfo is None:
        raise ValueError(f"the time {text!r} has no time zone")
    return time.astimezone(UTC)


def _time_if_any(text: Any) -> datetime | None:
    return None if text is None else _time(text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number from 0")
    return value
