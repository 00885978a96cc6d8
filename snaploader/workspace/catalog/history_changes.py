"""Changes of a workspace's history: its snapshots, versions, events and runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select, text, update

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from snaploader.workspace.catalog import rows, tables
from snaploader.workspace.catalog.writer import Writer
from snaploader.workspace.model import (
    MAX_VERSION,
    Event,
    Run,
    RunStatus,
    RunTransition,
    SnapshotRecord,
    SnapshotStatus,
    Version,
    Workspace,
)

_EVENT_LOCK = 0x536E61705F657674
"""Key of the advisory lock that orders events on PostgreSQL: "Snap_evt"."""


class HistoryWriter(Writer):
    """The part of `Transaction` that changes snapshots, versions, events and runs."""

    def put_snapshot(self, record: SnapshotRecord) -> None:
        """Add a snapshot, or replace what is known of it.

        Raises:
            NotFound: there is no such workspace.
            FailedPrecondition: its name is another workspace's, or its runtime name another snapshot's.
        """
        self.lock_workspace(record.workspace_id)
        if not self._upsert(tables.snapshots, rows.snapshot_values(record), key="name", same="workspace_id"):
            owner = self.snapshot(record.name).workspace_id
            raise FailedPrecondition(f"snapshot {record.name!r} belongs to workspace {owner!r}")

    def set_snapshot_status(self, name: str, status: SnapshotStatus) -> None:
        """Change how far a snapshot has come. NotFound when there is none of that name."""
        self.lock_workspace(self.snapshot(name).workspace_id)
        table = tables.snapshots
        self._run(update(table).where(table.c.name == name), {"status": status})

    def remove_snapshot(self, name: str) -> None:
        """Forget a snapshot, and the version that it is; its number is not used again. Idempotent."""
        try:
            self.lock_workspace(self.snapshot(name).workspace_id)
        except NotFound:
            return
        self._run(delete(tables.snapshots).where(tables.snapshots.c.name == name))

    def add_version(
        self, workspace_id: str, snapshot_name: str, created_at: datetime, display_name: str = ""
    ) -> Version:
        """Give a snapshot the next number of its workspace. Two transactions never get one number.

        Raises:
            NotFound: there is no such workspace or snapshot.
            FailedPrecondition: the snapshot is another workspace's, not complete, or a version already.
            ResourceExhausted: the last number was given.
        """
        workspace = self._alive(workspace_id)
        number = workspace.last_version + 1
        if number > MAX_VERSION:
            raise ResourceExhausted(f"workspace {workspace_id!r} has had {MAX_VERSION} versions: fork it")
        record = self.snapshot(snapshot_name)
        if record.workspace_id != workspace_id or record.status is not SnapshotStatus.COMPLETE:
            raise FailedPrecondition(
                f"snapshot {snapshot_name!r} of workspace {record.workspace_id!r} is {record.status}: only a "
                f"complete one of workspace {workspace_id!r} can be its version"
            )
        if self._has(tables.versions.c.snapshot_name, snapshot_name):
            raise FailedPrecondition(f"snapshot {snapshot_name!r} is a version already")
        self._set_last_version(workspace, number)
        self._run(
            insert(tables.versions),
            {
                "workspace_id": workspace_id,
                "number": number,
                "snapshot_name": snapshot_name,
                "display_name": display_name,
                "created_at": created_at,
            },
        )
        return self.version(workspace_id, number)

    def reserve_versions(self, workspace_id: str, last: int) -> None:
        """Never give the numbers up to `last`: they were given before this catalog knew of the workspace.

        Raises:
            NotFound: there is no such workspace.
        """
        workspace = self._alive(workspace_id)
        if last > workspace.last_version:
            self._set_last_version(workspace, last)

    def _set_last_version(self, workspace: Workspace, number: int) -> None:
        table = tables.workspaces
        self._run(update(table).where(table.c.id == workspace.id), {"last_version": number})
        self._locked[workspace.id] = dataclasses.replace(workspace, last_version=number)

    def add_event(
        self, workspace_id: str, event_type: str, payload: Mapping[str, Any], created_at: datetime
    ) -> Event:
        """Record that something happened to a workspace, a deleted one too.

        Ids rise in the order in which events become visible, so writers of events follow one another.

        Raises:
            NotFound: there is no such workspace.
            InvalidArgument: the payload is no JSON.
        """
        self.lock_workspace(workspace_id)
        if self._is_postgresql:
            self._run(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _EVENT_LOCK})
        values = {
            "workspace_id": workspace_id,
            "type": event_type,
            "payload": payload,
            "created_at": created_at,
        }
        return rows.event_of(self._inserted(tables.events, values))

    def add_run(
        self,
        workspace_id: str,
        transition: RunTransition,
        created_at: datetime,
        reason: str,
        deadline: datetime | None = None,
    ) -> Run:
        """Record that a start, stop or delete of a workspace begins. NotFound as `workspace`."""
        self.lock_workspace(workspace_id)
        values = {
            "workspace_id": workspace_id,
            "transition": transition,
            "status": RunStatus.RUNNING,
            "created_at": created_at,
            "deadline": deadline,
            "reason": reason,
            "error": "",
        }
        self._touched.add(workspace_id)
        return rows.run_of(self._inserted(tables.runs, values))

    def finish_run(self, run_id: int, status: RunStatus, completed_at: datetime, error: str = "") -> Run:
        """Record how a run ended.

        Raises:
            NotFound: there is no such run.
            InvalidArgument: `status` is no end.
            FailedPrecondition: it has ended before.
        """
        if status is RunStatus.RUNNING:
            raise InvalidArgument("a run ends as succeeded or failed")
        table = tables.runs
        row = self._first(select(table.c.workspace_id).where(table.c.id == run_id))
        if row is None:
            raise NotFound(f"there is no run {run_id}")
        self.lock_workspace(row.workspace_id)
        run = rows.run_of(self._only(select(table).where(table.c.id == run_id)))
        if run.status is not RunStatus.RUNNING:
            raise FailedPrecondition(f"run {run_id} of workspace {run.workspace_id!r} has ended before")
        changes = {"status": status, "completed_at": completed_at, "error": error}
        self._run(update(table).where(table.c.id == run_id), changes)
        self._touched.add(run.workspace_id)
        return dataclasses.replace(run, status=status, completed_at=completed_at, error=error)
