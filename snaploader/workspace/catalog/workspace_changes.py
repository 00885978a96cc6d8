"""Changes of workspaces and of what is under way on them."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import TypedDict, Unpack

from sqlalchemy import delete, insert, select, update

from snaploader.errors import FailedPrecondition, NotFound
from snaploader.workspace.catalog import rows, tables
from snaploader.workspace.catalog.writer import Writer, renewed_deletion
from snaploader.workspace.model import Operation, OwnerStatus, SnapshotStatus, Workspace, WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY


class WorkspaceChanges(TypedDict, total=False):
    """What of a workspace can change; meanings as in `Workspace`."""

    host: str
    state: WorkspaceState
    owner: str
    base: str
    policy: str
    autostart_schedule: str
    slot: int | None
    current_snapshot: str
    base_snapshot: str
    last_used_at: datetime
    paused_at: datetime | None
    dormant_at: datetime | None
    deleting_at: datetime | None


_DORMANCY = {"dormant_at", "deleting_at"}


class WorkspaceWriter(Writer):
    """The part of `Transaction` that changes workspaces."""

    def add_workspace(self, workspace: Workspace) -> None:
        """Add a workspace, with all that it says of itself.

        Raises:
            FailedPrecondition: its id was used before, or its slot on its host is another's.
            NotFound: there is no such policy.
        """
        known = self._first(select(tables.workspaces).where(tables.workspaces.c.id == workspace.id))
        if known is not None:
            raise self._used_before(rows.workspace_of(known))
        self._use_policy(workspace.policy)
        self._use_owner(workspace.owner)
        self._check_slot(workspace)
        self._run(insert(tables.workspaces), rows.workspace_values(workspace))
        self._locked[workspace.id] = workspace
        self._touched.add(workspace.id)

    def update_workspace(
        self, workspace_id: str, *, now: datetime | None = None, **changes: Unpack[WorkspaceChanges]
    ) -> Workspace:
        """Change a workspace; what it is then.

        The state `DELETED` takes its versions away, and marks its snapshots for removal. Another policy sets
        anew when a dormant one is to be deleted, as `deletion_time` says.

        Args:
            now: From when on another policy holds. Default: by the clock of this host.

        Raises:
            NotFound: there is no such workspace or policy.
            FailedPrecondition: the slot is another's, or a deleted one is to live again.
            TypeError: no such field, or one that never changes.
        """
        unknown = changes.keys() - WorkspaceChanges.__annotations__.keys()
        if unknown:
            raise TypeError(f"{min(unknown)!r} of a workspace cannot be changed")
        if "policy" in changes:
            self._use_policy(changes["policy"])
        if "owner" in changes:
            self._use_owner(changes["owner"])
        before = self.lock_workspace(workspace_id)
        if changes.get("policy", before.policy) != before.policy and not _DORMANCY & changes.keys():
            policies = self.policy(before.policy), self.policy(changes["policy"])
            changes["deleting_at"] = renewed_deletion(before, *policies, now)
        after = dataclasses.replace(before, **changes)
        if before.state is WorkspaceState.DELETED and after.state is not before.state:
            raise FailedPrecondition(f"workspace {workspace_id!r} was deleted, which is for ever")
        if not changes:
            return after
        if after.slot is not None and (after.host, after.slot) != (before.host, before.slot):
            self._check_slot(after)
        table = tables.workspaces
        self._run(update(table).where(table.c.id == workspace_id), changes)
        if after.state is not before.state and after.state is WorkspaceState.DELETED:
            self._drop_history(workspace_id)
        self._locked[workspace_id] = after
        self._touched.add(workspace_id)
        return after

    def forget_workspace(self, workspace_id: str) -> None:
        """Forget a workspace and all that belongs to it, its events too, as if there had never been one.

        For a creation that failed; a deleted workspace keeps its row and its events. NotFound as `workspace`.
        """
        self.lock_workspace(workspace_id)
        for table in (tables.versions, tables.snapshots, tables.runs, tables.events):
            self._run(delete(table).where(table.c.workspace_id == workspace_id))
        self._run(delete(tables.workspaces).where(tables.workspaces.c.id == workspace_id))
        self._locked.pop(workspace_id, None)
        self._touched.discard(workspace_id)

    def begin_operation(self, workspace_id: str, operation: Operation) -> Workspace:
        """Record what is under way on a workspace.

        Raises:
            NotFound: there is no such workspace.
            FailedPrecondition: it was deleted, or something is under way already.
        """
        workspace = self._alive(workspace_id)
        under_way = workspace.operation
        if under_way is not None:
            raise FailedPrecondition(
                f"workspace {workspace_id!r}: a {under_way.kind} is under way on {under_way.host!r} "
                f"since {under_way.started_at:%Y-%m-%d %H:%M:%S} UTC: wait for it, or run recovery there"
            )
        return self._set_operation(workspace, operation, {})

    def end_operation(self, workspace_id: str, token: str, *, used_at: datetime | None = None) -> Workspace:
        """Record that an operation is no longer under way.

        Args:
            used_at: When it has used the workspace, which also ends its dormancy; None: it has not.

        Raises:
            NotFound: there is no such workspace.
            FailedPrecondition: the operation of that token is not under way: somebody else ended it.
        """
        workspace = self.lock_workspace(workspace_id)
        if workspace.operation is None or workspace.operation.token != token:
            raise FailedPrecondition(
                f"workspace {workspace_id!r}: the operation was ended by somebody else, so its lock was lost"
            )
        used: WorkspaceChanges = {}
        if used_at is not None:
            used = {"last_used_at": used_at, "dormant_at": None, "deleting_at": None}
            self._touched.add(workspace_id)
        return self._set_operation(workspace, None, used)

    def _set_operation(
        self, workspace: Workspace, operation: Operation | None, changes: WorkspaceChanges
    ) -> Workspace:
        table = tables.workspaces
        values = {**rows.operation_values(operation), **changes}
        self._run(update(table).where(table.c.id == workspace.id), values)
        after = dataclasses.replace(workspace, operation=operation, **changes)
        self._locked[workspace.id] = after
        return after

    def _drop_history(self, workspace_id: str) -> None:
        versions, snapshots = tables.versions, tables.snapshots
        self._run(delete(versions).where(versions.c.workspace_id == workspace_id))
        self._run(
            update(snapshots).where(snapshots.c.workspace_id == workspace_id),
            {"status": SnapshotStatus.DELETING},
        )

    def _used_before(self, workspace: Workspace) -> FailedPrecondition:
        used = f"since {workspace.created_at:%Y-%m-%d %H:%M} UTC"
        if workspace.state is WorkspaceState.DELETED:
            run = self.latest_run(workspace.id)
            used += " until it was deleted"
            if run is not None and run.completed_at is not None:
                used += f" at {run.completed_at:%Y-%m-%d %H:%M} UTC"
        return FailedPrecondition(
            f"workspace id {workspace.id!r} was used before, {used}: ids are never used again, choose another"
        )

    def _use_policy(self, name: str) -> None:
        # Shared with others who use it: who changes it waits, and then sees this workspace.
        policy = select(tables.policies.c.name).where(tables.policies.c.name == name)
        if self._first(policy.with_for_update(read=True)) is None:
            raise NotFound(f"there is no policy {name!r}: add it first, or use {DEFAULT_POLICY!r}")

    def _use_owner(self, name: str) -> None:
        if not name:
            return
        known = {"name": name, "status": OwnerStatus.ACTIVE}
        self._run(self._insert(tables.owners).on_conflict_do_nothing(), known)
        owner = select(tables.owners.c.name).where(tables.owners.c.name == name)
        self._only(owner.with_for_update(read=True))

    def _check_slot(self, workspace: Workspace) -> None:
        if workspace.slot is None:
            return
        table = tables.workspaces
        holder = self._first(
            select(table.c.id).where(
                table.c.host == workspace.host, table.c.slot == workspace.slot, table.c.id != workspace.id
            )
        )
        if holder is not None:
            raise FailedPrecondition(
                f"slot {workspace.slot} of host {workspace.host!r} is held by workspace {holder.id!r}"
            )
