"""What events say: names and ids, so that whoever reads one need not ask for more.

docs/workspaces.md has a table of the types with what each says beside what all do.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from snaploader.workspace.model import Event, SnapshotRecord, Version

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Transaction

ABOUT_ALL = ("workspace", "host", "owner", "base", "template")
"""What every event says of its workspace, as it is after what happened: its id, where it lives, whose it is,
its `base`, and the template, which is the base of one that was made from a version of it. What is empty is
left out."""

EVENT_TYPES = (
    "deadline_extend",
    "dormancy_mark",
    "operation_failed",
    "operation_recovered",
    "remote_orphan",
    "snapshot_create",
    "version_create",
    "version_rollback",
    "workspace_adopt",
    "workspace_change",
    "workspace_commit",
    "workspace_create",
    "workspace_delete",
    "workspace_fork",
    "workspace_pause",
    "workspace_restore",
    "workspace_resume",
    "workspace_start",
    "workspace_stop",
    "workspace_update",
)
"""All there are, each with its row in docs/workspaces.md."""


def add_event(
    tx: Transaction, workspace_id: str, event_type: str, payload: Mapping[str, Any], now: datetime
) -> Event:
    """Record what happened to a workspace, with what events say of all."""
    workspace = tx.lock_workspace(workspace_id)
    template = "" if workspace.template_version is None else workspace.base
    values = (workspace.id, workspace.host, workspace.owner, workspace.base, template)
    about = {name: value for name, value in zip(ABOUT_ALL, values, strict=True) if value}
    return tx.add_event(workspace_id, event_type, {**about, **payload}, now)


def about_snapshot(record: SnapshotRecord, version: Version | None = None) -> dict[str, Any]:
    """What an event says of a snapshot, and of the version that it is."""
    about: dict[str, Any] = {
        "snapshot": record.name,
        "runtime_name": record.runtime_name,
        "scope": record.scope.value,
    }
    name = record.display_name if version is None else version.display_name
    if name:
        about["display_name"] = name
    if version is not None:
        about |= {"version": version.number, "version_id": version.id, "source": record.source}
    return about
