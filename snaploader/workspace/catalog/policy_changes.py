"""Changes that concern many workspaces: of policies, of owners, and of what is known of a host."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, select, update

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.catalog import rows, tables
from snaploader.workspace.catalog.writer import Writer, renewed_deletion
from snaploader.workspace.decide import Ticks
from snaploader.workspace.model import OwnerStatus, WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY, Policy


class PolicyWriter(Writer):
    """The part of `Transaction` that changes policies, owners and hosts."""

    def put_policy(self, policy: Policy, *, now: datetime | None = None) -> None:
        """Add a policy, or replace the one of its name, for all workspaces that follow it.

        When those that are dormant are to be deleted is set anew, as `deletion_time` says.

        Args:
            now: From when on it holds. Default: by the clock of this host.

        Raises:
            InvalidArgument: a duration is too long to be kept.
        """
        settings = policy.to_mapping()
        if Policy.from_mapping(policy.name, settings) != policy:
            raise InvalidArgument(f"a duration of policy {policy.name!r} cannot be kept to the microsecond")
        before = self._first(
            select(tables.policies).where(tables.policies.c.name == policy.name).with_for_update()
        )
        self._upsert(tables.policies, {"name": policy.name, "settings": settings}, key="name")
        self._touched_policies.add(policy.name)
        if before is not None:
            self._renew_deletions(Policy.from_mapping(before.name, before.settings), policy, now)

    def _renew_deletions(self, before: Policy, after: Policy, now: datetime | None) -> None:
        if before.delete_after_dormant == after.delete_after_dormant:
            return
        table = tables.workspaces
        dormant = (
            select(table)
            .where(table.c.policy == after.name, table.c.dormant_at.is_not(None))
            .where(table.c.state != WorkspaceState.DELETED)
            .order_by(table.c.id)
            .with_for_update()
        )
        changes = [
            {"changed": workspace.id, "deleting": renewed_deletion(workspace, before, after, now)}
            for workspace in map(rows.workspace_of, self._all(dormant))
        ]
        if changes:
            statement = update(table).where(table.c.id == bindparam("changed"))
            self._run(statement.values(deleting_at=bindparam("deleting")), changes)
            self._locked.clear()

    def remove_policy(self, name: str) -> None:
        """Forget a policy. Deleted workspaces that followed it follow the default one then.

        Raises:
            NotFound: there is no such policy.
            FailedPrecondition: it is the default, or a workspace follows it.
        """
        if name == DEFAULT_POLICY:
            raise FailedPrecondition(f"policy {name!r} exists always: change it instead")
        if (
            self._first(select(tables.policies).where(tables.policies.c.name == name).with_for_update())
            is None
        ):
            raise NotFound(f"there is no policy {name!r}")
        table = tables.workspaces
        deleted = table.c.state == WorkspaceState.DELETED
        follower = self._first(select(table.c.id).where(table.c.policy == name, ~deleted).limit(1))
        if follower is not None:
            raise FailedPrecondition(
                f"policy {name!r} is followed by workspace {follower.id!r}: give its workspaces another first"
            )
        self._run(update(table).where(table.c.policy == name, deleted), {"policy": DEFAULT_POLICY})
        self._locked.clear()
        self._run(delete(tables.policies).where(tables.policies.c.name == name))

    def claim_host(
        self,
        host: str,
        state_id: str,
        state_directory: str,
        place: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Say which state directory a host works with.

        Args:
            state_id: The directory's.
            state_directory: Its path, for people.
            place: What tells it from a copy.
            replace: Also when the host has another one.

        Raises:
            FailedPrecondition: the host has another one, or this one is another host's.
        """
        table = tables.hosts
        shown = state_directory.encode(errors="backslashreplace").decode().replace("\0", "")
        owner = self._first(select(table).where(table.c.state_id == state_id, table.c.name != host))
        if owner is not None:
            raise FailedPrecondition(
                f"state directory {state_directory!r} is that of host {owner.name!r}, and this is host "
                f"{host!r}: use that name for this host"
            )
        known = self._first(select(table).where(table.c.name == host).with_for_update())
        if known is not None and known.state_id != state_id and not replace:
            raise FailedPrecondition(
                f"host {host!r} has its workspaces in state directory {known.state_directory!r}, and not in "
                f"{state_directory!r}: use that one, or another name for this host. If it is lost for good, "
                "recover with --rebind-state (or recover(rebind_state=True)) to go on without it"
            )
        row = {"name": host, "state_id": state_id, "state_directory": shown, "state_place": place}
        self._upsert(table, row, key="name")

    def note_tick(self, host: str, tick: datetime) -> Ticks:
        """Write down that the lifecycle of a host has come to `tick`; its two latest ticks."""
        table = tables.ticks
        row = self._first(select(table).where(table.c.host == host).with_for_update())
        before = Ticks(tick) if row is None else Ticks(row.latest_at, row.previous_at)
        now = before.advanced(tick)
        if row is None or now != before:
            values = {"host": host, "latest_at": now.latest, "previous_at": now.previous}
            self._upsert(table, values, key="host")
        return now

    def set_owner_status(self, owner: str, status: OwnerStatus) -> None:
        """Say whether an owner may use workspaces. InvalidArgument for one without a name."""
        if not owner:
            raise InvalidArgument("workspaces without an owner cannot be suspended: name the owner")
        self._upsert(tables.owners, {"name": owner, "status": status}, key="name")
        self._touched_owners.add(owner)
