"""Writing the catalog: each block of changes becomes true at once, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, Unpack

from sqlalchemy import (
    Connection,
    Executable,
    Row,
    Select,
    Table,
    TypeDecorator,
    bindparam,
    delete,
    insert,
    or_,
    select,
    text,
    update,
)

from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
)
from snaploader.workspace.catalog import tables
from snaploader.workspace.catalog.engines import POSTGRESQL
from snaploader.workspace.catalog.reader import HostState, Reader
from snaploader.workspace.deadlines import bumped_deadline
from snaploader.workspace.model import (
    MAX_VERSION,
    Event,
    Operation,
    OwnerStatus,
    Run,
    RunStatus,
    RunTransition,
    SnapshotRecord,
    SnapshotSource,
    SnapshotStatus,
    Version,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.policy import DEFAULT_POLICY, Policy, Situation, Ticks, deletion_time
from snaploader.workspace.templates import Template, TemplateVersion

_EVENT_LOCK = 0x536E61705F657674
"""Key of the advisory lock that orders events on PostgreSQL: "Snap_evt"."""


class WorkspaceChanges(TypedDict, total=False):
    """The fields of a workspace that can change; they mean what they do in `Workspace`."""

    host: str
    state: WorkspaceState
    owner: str
    base: str
    policy: str
    autostart_schedule: str
    ttl: timedelta | None
    spec: WorkspaceSpec
    template_version: int | None
    automatic_updates: bool
    slot: int | None
    current_snapshot: str
    base_snapshot: str
    last_used_at: datetime
    paused_at: datetime | None
    dormant_at: datetime | None
    deleting_at: datetime | None


class Transaction(Reader):
    """Changes to the catalog. Made by `Catalog.transaction`; for one thread, inside its block.

    It reads what it wrote. Before it changes anything of a workspace, it locks that workspace's row, so what
    it read of it under the lock holds until the end. Every method may raise what `Catalog.transaction` names,
    and NotFound for a workspace, snapshot, run or policy that is not there. When the database refuses a
    change, the whole block fails, even if the error is caught within it.
    """

    def __init__(self, connection: Connection, where: str) -> None:
        super().__init__(connection, where)
        self._is_postgresql = connection.dialect.name == POSTGRESQL
        self._locked: dict[str, Workspace] = {}
        """Workspaces whose rows are locked, as they are now: nobody else changes them."""
        self._unwritten: dict[str, dict[str, Any]] = {}
        """Changed columns of theirs that are not in the database yet; they are before anything is read."""
        self._touched: set[str] = set()
        """Workspaces that may be due at another time now; in the next two, policies and owners whose are."""
        self._touched_policies: set[str] = set()
        self._touched_owners: set[str] = set()
        self._used: dict[str, datetime] = {}
        """When workspaces were used, whose deadlines may move for it."""
        self._refusal: SnaploaderError | None = None

    # Workspaces

    def lock_workspace(self, workspace_id: str) -> Workspace:
        """Return a workspace that nobody else changes until the block ends."""
        if workspace_id not in self._locked:
            query = select(tables.workspaces).where(tables.workspaces.c.id == workspace_id).with_for_update()
            row = self._known(query, f"workspace {workspace_id!r}")
            self._locked[workspace_id] = tables.workspace_of(row)
        return self._locked[workspace_id]

    def add_workspace(self, workspace: Workspace) -> None:
        """Add a workspace. FailedPrecondition: its id was used before, or its slot is another's."""
        known = self._first(select(tables.workspaces).where(tables.workspaces.c.id == workspace.id))
        if known is not None:
            raise self._used_before(tables.workspace_of(known))
        self._use_policy(workspace.policy)
        self._use_owner(workspace.owner)
        self._check_slot(workspace)
        self._execute(insert(tables.workspaces), tables.workspace_values(workspace))
        self._locked[workspace.id] = workspace
        self._touched.add(workspace.id)

    def update_workspace(
        self, workspace_id: str, *, now: datetime | None = None, **changes: Unpack[WorkspaceChanges]
    ) -> Workspace:
        """Change a workspace, and return it as it is then.

        The state `DELETED` takes its versions away, and marks its snapshots for removal. Another policy sets
        anew, from `now` on, when a dormant one is to be deleted, as `deletion_time` says.

        Raises:
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
        sets_dormancy = not changes.keys().isdisjoint({"dormant_at", "deleting_at"})
        if changes.get("policy", before.policy) != before.policy and not sets_dormancy:
            policies = self.policy(before.policy), self.policy(changes["policy"])
            changes["deleting_at"] = _renewed_deletion(before, *policies, now)
        after = dataclasses.replace(before, **changes)
        if before.state is WorkspaceState.DELETED and after.state is not before.state:
            raise FailedPrecondition(f"workspace {workspace_id!r} was deleted, which is for ever")
        if not changes:
            return after
        if after.slot is not None and (after.host, after.slot) != (before.host, before.slot):
            self._check_slot(after)
        if after.state is not before.state and after.state is WorkspaceState.DELETED:
            versions, snapshots = tables.versions, tables.snapshots
            self._execute(delete(versions).where(versions.c.workspace_id == workspace_id))
            its_own = update(snapshots).where(snapshots.c.workspace_id == workspace_id)
            self._execute(its_own, {"status": SnapshotStatus.DELETING})
        self._touched.add(workspace_id)
        if "last_used_at" in changes:
            self._used[workspace_id] = after.last_used_at
        return self._change(after, tables.changed_values(after, changes.keys()))

    def forget_workspace(self, workspace_id: str) -> None:
        """Forget a workspace and all that belongs to it, its events too, as if there had never been one.

        For a creation that failed; a deleted workspace keeps its row and its events.
        """
        self.lock_workspace(workspace_id)
        snapshots, sources = tables.snapshots.c, tables.snapshot_sources
        its_own = select(snapshots.name).where(snapshots.workspace_id == workspace_id)
        self._execute(delete(sources).where(sources.c.name.in_(its_own)))
        for table in (tables.versions, tables.snapshots, tables.runs, tables.events):
            self._execute(delete(table).where(table.c.workspace_id == workspace_id))
        self._execute(delete(tables.workspaces).where(tables.workspaces.c.id == workspace_id))
        self._locked.pop(workspace_id, None)
        self._unwritten.pop(workspace_id, None)
        self._touched.discard(workspace_id)

    def begin_operation(self, workspace_id: str, operation: Operation) -> Workspace:
        """Record what is under way on a workspace. FailedPrecondition: it was deleted, or something is."""
        workspace = self._alive(workspace_id)
        under_way = workspace.operation
        if under_way is not None:
            raise FailedPrecondition(
                f"workspace {workspace_id!r}: a {under_way.kind} is under way on {under_way.host!r} "
                f"since {under_way.started_at:%Y-%m-%d %H:%M:%S} UTC: wait for it, or run recovery there"
            )
        after = dataclasses.replace(workspace, operation=operation)
        return self._change(after, tables.operation_values(operation))

    def end_operation(self, workspace_id: str, token: str, *, used_at: datetime | None = None) -> Workspace:
        """Record that an operation is no longer under way. FailedPrecondition: somebody else ended it.

        If it has used the workspace, at `used_at`, that also ends its dormancy.
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
            self._used[workspace_id] = used_at
        after = dataclasses.replace(workspace, operation=None, **used)
        return self._change(after, {**tables.operation_values(None), **used})

    # Snapshots and versions, events and runs

    def put_snapshot(self, record: SnapshotRecord) -> None:
        """Add a snapshot, or replace what is known of it. Why it was taken, in words, stays what it was.

        FailedPrecondition: its name is another workspace's, or its runtime name another snapshot's.
        """
        self.lock_workspace(record.workspace_id)
        values = dataclasses.asdict(record)
        is_well_known = isinstance(SnapshotSource.parse(record.source), SnapshotSource)
        if not is_well_known:
            values["source"] = SnapshotSource.MANUAL  # for an earlier release, which knows no other words
        if not self._upsert(tables.snapshots, values, key="name", same="workspace_id"):
            owner = self.snapshot(record.name).workspace_id
            raise FailedPrecondition(f"snapshot {record.name!r} belongs to workspace {owner!r}")
        if not is_well_known:
            words = {"name": record.name, "source": record.source}
            self._upsert(tables.snapshot_sources, words, key="name")

    def set_snapshot_status(self, name: str, status: SnapshotStatus) -> None:
        """Change how far a snapshot has come."""
        self.lock_workspace(self.snapshot(name).workspace_id)
        table = tables.snapshots
        self._execute(update(table).where(table.c.name == name), {"status": status})

    def remove_snapshot(self, name: str) -> None:
        """Forget a snapshot, and its version if it is one, whose number is not used again. Idempotent."""
        try:
            self.lock_workspace(self.snapshot(name).workspace_id)
        except NotFound:
            return
        for table in (tables.snapshots, tables.snapshot_sources):
            self._execute(delete(table).where(table.c.name == name))

    def add_version(
        self, workspace_id: str, snapshot_name: str, created_at: datetime, display_name: str = ""
    ) -> Version:
        """Give a snapshot the next number of its workspace. Two transactions never get one number.

        Raises:
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
        values = {
            "workspace_id": workspace_id,
            "number": number,
            "snapshot_name": snapshot_name,
            "display_name": display_name,
            "created_at": created_at,
        }
        statement = self._insert(tables.versions).on_conflict_do_nothing(index_elements=["snapshot_name"])
        added = self._execute(statement.returning(tables.versions), values)
        if not added:
            raise FailedPrecondition(f"snapshot {snapshot_name!r} is a version already")
        self._change(dataclasses.replace(workspace, last_version=number), {"last_version": number})
        return tables.version_of(added[0], record.runtime_name, record.source)

    def reserve_versions(self, workspace_id: str, last: int) -> None:
        """Never give the numbers up to `last`: they were given before this catalog knew of the workspace."""
        workspace = self._alive(workspace_id)
        if last > workspace.last_version:
            self._change(dataclasses.replace(workspace, last_version=last), {"last_version": last})

    def add_event(
        self, workspace_id: str, event_type: str, payload: Mapping[str, Any], created_at: datetime
    ) -> Event:
        """Record that something happened to a workspace, a deleted one too.

        Ids rise in the order in which events become visible, so writers of events follow one another.
        InvalidArgument: the payload is no JSON.
        """
        self.lock_workspace(workspace_id)
        if self._is_postgresql:
            self._execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _EVENT_LOCK})
        values = {
            "workspace_id": workspace_id,
            "type": event_type,
            "payload": payload,
            "created_at": created_at,
        }
        return tables.event_of(self._execute(insert(tables.events).returning(tables.events), values)[0])

    def add_run(
        self,
        workspace_id: str,
        transition: RunTransition,
        created_at: datetime,
        reason: str,
        deadline: datetime | None = None,
    ) -> Run:
        """Record that a start, stop or delete of a workspace begins."""
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
        return tables.run_of(self._execute(insert(tables.runs).returning(tables.runs), values)[0])

    def finish_run(self, run_id: int, status: RunStatus, completed_at: datetime, error: str = "") -> Run:
        """Record how a run ended. InvalidArgument: `status` is no end. FailedPrecondition: it has ended."""
        if status is RunStatus.RUNNING:
            raise InvalidArgument("a run ends as succeeded or failed")
        table = tables.runs
        row = self._known(select(table.c.workspace_id).where(table.c.id == run_id), f"run {run_id}")
        self.lock_workspace(row.workspace_id)
        changes = {"status": status, "completed_at": completed_at, "error": error}
        running = update(table).where(table.c.id == run_id, table.c.status == RunStatus.RUNNING)
        ended = self._execute(running.values(changes).returning(table))
        if not ended:
            raise FailedPrecondition(f"run {run_id} of workspace {row.workspace_id!r} has ended before")
        self._touched.add(row.workspace_id)
        return tables.run_of(ended[0])

    def set_deadline(self, run_id: int, deadline: datetime) -> Run:
        """Change when what a run has started is to be stopped."""
        table = tables.runs
        row = self._known(select(table.c.workspace_id).where(table.c.id == run_id), f"run {run_id}")
        self.lock_workspace(row.workspace_id)
        changed = update(table).where(table.c.id == run_id).values(deadline=deadline)
        self._touched.add(row.workspace_id)
        return tables.run_of(self._execute(changed.returning(table))[0])

    # Policies, templates, owners and hosts

    def put_policy(self, policy: Policy, *, now: datetime | None = None) -> None:
        """Add a policy, or replace the one of its name, for all workspaces that follow it.

        The time at which dormant ones are deleted is set anew, as `deletion_time` says. It holds from `now`
        on; by default, by the clock of this host.
        """
        settings = policy.to_mapping()
        if Policy.from_mapping(policy.name, settings) != policy:
            raise InvalidArgument(f"a duration of policy {policy.name!r} cannot be kept to the microsecond")
        before = self._first(_locking_policy(policy.name))
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
            {"changed": workspace.id, "deleting": _renewed_deletion(workspace, before, after, now)}
            for workspace in map(tables.workspace_of, self._all(dormant))
        ]
        if changes:
            statement = update(table).where(table.c.id == bindparam("changed"))
            self._execute(statement.values(deleting_at=bindparam("deleting")), changes)
            self._locked.clear()

    def remove_policy(self, name: str) -> None:
        """Forget a policy. Deleted workspaces that followed it follow the default one from then on.

        FailedPrecondition: it is the default, or a workspace follows it, or a template names it.
        """
        if name == DEFAULT_POLICY:
            raise FailedPrecondition(f"policy {name!r} exists always: change it instead")
        self._known(_locking_policy(name), f"policy {name!r}")
        versions = tables.template_versions.c
        user = self._first(select(versions.template).where(versions.policy == name).limit(1))
        if user is not None:
            raise FailedPrecondition(
                f"policy {name!r} is that of a version of template {user.template!r}: remove that first"
            )
        table = tables.workspaces
        deleted = table.c.state == WorkspaceState.DELETED
        follower = self._first(select(table.c.id).where(table.c.policy == name, ~deleted).limit(1))
        if follower is not None:
            raise FailedPrecondition(
                f"policy {name!r} is followed by workspace {follower.id!r}: give its workspaces another first"
            )
        self._execute(update(table).where(table.c.policy == name, deleted), {"policy": DEFAULT_POLICY})
        self._locked.clear()
        self._execute(delete(tables.policies).where(tables.policies.c.name == name))

    def add_template_version(self, version: TemplateVersion) -> TemplateVersion:
        """Add a version, and its template if there is none; it is returned with its number.

        The first one becomes the active one. Two transactions never get one number.
        """
        self._use_policy(version.policy)
        table = tables.templates
        first = {"name": version.template, "active_version": 1, "last_version": 0}
        added = {**first, "requires_active_version": False}
        self._execute(self._insert(table).on_conflict_do_nothing(), added)
        named = update(table).where(table.c.name == version.template)
        count = named.values(last_version=table.c.last_version + 1).returning(table.c.last_version)
        [(number,)] = self._execute(count)
        numbered = dataclasses.replace(version, number=number)
        self._execute(insert(tables.template_versions), tables.template_version_values(numbered))
        return numbered

    def change_template(
        self,
        name: str,
        *,
        active_version: int | None = None,
        requires_active_version: bool | None = None,
    ) -> Template:
        """Change a template, and return it as it is then. NotFound: there is no such template, or version."""
        given = {"active_version": active_version, "requires_active_version": requires_active_version}
        changes = {name: value for name, value in given.items() if value is not None}
        if active_version is not None:
            self._use_policy(self.template_version(name, active_version).policy)
        if changes:
            self._execute(update(tables.templates).where(tables.templates.c.name == name), changes)
        return self.template(name)

    def remove_template(self, name: str) -> None:
        """Forget a template and its versions.

        FailedPrecondition: a workspace that is not deleted was made from it.
        """
        self._known(
            select(tables.templates).where(tables.templates.c.name == name).with_for_update(),
            f"template {name!r}",
        )
        table = tables.workspaces
        alive = table.c.state != WorkspaceState.DELETED
        for workspace in map(
            tables.workspace_of, self._all(select(table).where(table.c.base == name, alive))
        ):
            if workspace.template_version is not None:
                raise FailedPrecondition(
                    f"workspace {workspace.id!r} was made from template {name!r}: delete its workspaces first"
                )
        self._execute(delete(tables.template_versions).where(tables.template_versions.c.template == name))
        self._execute(delete(tables.templates).where(tables.templates.c.name == name))

    def claim_host(self, claim: HostState, *, replace: bool = False) -> None:
        """Say which state directory a host works with.

        FailedPrecondition: the host has another one, unless that is to be replaced, or it is another host's.
        """
        table = tables.hosts
        host, state_id, state_directory, place = claim
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
        row = {"name": host, "state_id": state_id, "state_directory": shown}
        self._upsert(table, row, key="name")
        if place is None:
            places = tables.host_places
            self._execute(delete(places).where(places.c.host == host))
        else:
            where = {"host": host, "state_id": state_id, "place": place}
            self._upsert(tables.host_places, where, key="host")

    def note_tick(self, host: str, tick: datetime) -> Ticks:
        """Record that the lifecycle of a host has come to `tick`, and return its two latest ticks."""
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
            raise InvalidArgument(f"nobody's workspaces cannot be made {status}: name the owner")
        dormant, is_dormant = tables.dormant_owners, status is OwnerStatus.DORMANT
        known = OwnerStatus.ACTIVE if is_dormant else status
        self._upsert(tables.owners, {"name": owner, "status": known}, key="name")
        self._execute(delete(dormant).where(dormant.c.name == owner))
        if is_dormant:
            self._execute(insert(dormant), {"name": owner})
        self._touched_owners.add(owner)

    # The end

    def settle(self) -> None:
        """Bring deadlines and `due_at` of all that was touched up to date. Called before it commits.

        Uses move deadlines, as `bumped_deadline` says. `due_at` is the earliest tick at which
        `Situation.decide` says something.

        Raises:
            FailedPrecondition: the database refused a change before, and the error was caught in the block.
        """
        if self._refusal is not None:
            raise FailedPrecondition(
                f"nothing was written, because of an earlier error: {self._refusal.message}"
            ) from self._refusal
        self._write_changes()
        table = tables.workspaces
        ids = set(self._touched)
        touched = ((table.c.policy, self._touched_policies), (table.c.owner, self._touched_owners))
        followers = [column.in_(values) for column, values in touched if values]
        if followers:
            # Locked in the order of their ids, before anything is read of them.
            locked = select(table.c.id).where(or_(*followers)).order_by(table.c.id).with_for_update()
            ids.update(row.id for row in self._execute(locked))
        changes = []
        for situation, due_at in self._situations(ids):
            workspace = situation.workspace
            if workspace.id in self._used:
                situation = self._bumped(situation, self._used[workspace.id])
            due = None if workspace.state is WorkspaceState.DELETED else situation.earliest_due()
            if due != due_at:
                changes.append({"changed": workspace.id, "due": due})
        if changes:
            statement = update(table).where(table.c.id == bindparam("changed"))
            self._execute(statement.values(due_at=bindparam("due")), changes)

    def _bumped(self, situation: Situation, used_at: datetime) -> Situation:
        """The situation after the deadline was moved because of a use, if it was."""
        run, table = situation.run, tables.runs
        if situation.deadline is None or run is None:
            return situation
        deadline = bumped_deadline(run, situation.policy, used_at)
        if deadline == run.deadline:
            return situation
        self._execute(update(table).where(table.c.id == run.id), {"deadline": deadline})
        return situation._replace(run=dataclasses.replace(run, deadline=deadline))

    # What the methods above have in common

    def _change(self, after: Workspace, columns: Mapping[str, Any]) -> Workspace:
        """Change columns of a locked workspace, which is `after` then."""
        with self._guarded():  # what writing a value that is none would raise is raised at once
            for name, value in columns.items():
                kind = tables.workspaces.c[name].type
                if isinstance(kind, TypeDecorator):
                    kind.process_bind_param(value, self._connection.dialect)
        self._unwritten.setdefault(after.id, {}).update(columns)
        self._locked[after.id] = after
        return after

    def _write_changes(self) -> None:
        table = tables.workspaces
        while self._unwritten:
            workspace_id, columns = self._unwritten.popitem()
            self._execute(update(table).where(table.c.id == workspace_id), columns)

    def _all(self, query: Executable) -> Sequence[Row[Any]]:
        self._write_changes()
        return super()._all(query)

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
        missing = f"policy {name!r}: add it first, or use {DEFAULT_POLICY!r}"
        self._known(policy.with_for_update(read=True), missing)

    def _use_owner(self, name: str) -> None:
        if not name:
            return
        known = {"name": name, "status": OwnerStatus.ACTIVE}
        self._execute(self._insert(tables.owners).on_conflict_do_nothing(), known)
        owner = select(tables.owners.c.name).where(tables.owners.c.name == name)
        self._first(owner.with_for_update(read=True))

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

    def _alive(self, workspace_id: str) -> Workspace:
        workspace = self.lock_workspace(workspace_id)
        if workspace.state is WorkspaceState.DELETED:
            raise FailedPrecondition(f"workspace {workspace_id!r} was deleted")
        return workspace

    def _insert(self, table: Table) -> Any:
        # The dialect's own, imported when it is used: that of PostgreSQL is big.
        if self._is_postgresql:
            from sqlalchemy.dialects.postgresql import insert as postgresql_insert

            return postgresql_insert(table)
        from sqlalchemy.dialects.sqlite import insert

        return insert(table)

    def _upsert(self, table: Table, values: Mapping[str, Any], *, key: str, same: str = "") -> bool:
        """Add a row, or replace the one of that key; False: there is one with another value of `same`."""
        statement = self._insert(table)
        changes = {name: statement.excluded[name] for name in values if name != key}
        condition = table.c[same] == statement.excluded[same] if same else None
        upsert = statement.on_conflict_do_update(index_elements=[key], set_=changes, where=condition)
        return bool(self._execute(upsert.returning(table.c[key]), values))

    def _execute(
        self, statement: Executable, values: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> Sequence[Row[Any]]:
        """Execute a statement, with changes still unwritten; returns the rows that it gives."""
        with self._guarded():
            result = self._connection.execute(statement, values)
            return result.all() if result.returns_rows else ()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with super()._guarded():
                yield
        except SnaploaderError as error:
            self._refusal = error
            raise


def _locking_policy(name: str) -> Select[Any]:
    return select(tables.policies).where(tables.policies.c.name == name).with_for_update()


def _renewed_deletion(
    workspace: Workspace, before: Policy, after: Policy, now: datetime | None
) -> datetime | None:
    """When a workspace is to be deleted once another policy holds for it; None: never."""
    if workspace.dormant_at is None:
        return None
    # What an earlier policy announced, and a later one took back, is no announcement any more.
    announced = None if before.delete_after_dormant is None else workspace.deleting_at
    return deletion_time(
        workspace.dormant_at, announced, after.delete_after_dormant, now or datetime.now(UTC)
    )
