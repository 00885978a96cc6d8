"""Reading the catalog: every query there is, each with an index that serves it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import Connection, Executable, Row, Select, and_, func, select

from snaploader.errors import NotFound
from snaploader.workspace.catalog import tables
from snaploader.workspace.catalog.engines import translate_database_errors, when_free
from snaploader.workspace.model import (
    MAX_VERSION,
    Event,
    OwnerStatus,
    Run,
    SnapshotRecord,
    SnapshotStatus,
    Version,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.policy import DEFAULT_POLICY, Policy, Situation
from snaploader.workspace.templates import Template, TemplateVersion

MAX_EVENTS = 1000
"""Most events of one listing, unless told otherwise."""

_NO_LABELS: Mapping[str, str] = MappingProxyType({})
_UNFINISHED = (SnapshotStatus.PENDING, SnapshotStatus.DELETING, SnapshotStatus.ORPHANED)


_SNAPSHOTS = select(*tables.SNAPSHOT_COLUMNS).select_from(tables.explained_snapshots)
_LATEST_RUN = (
    select(func.max(tables.runs.c.id))
    .where(tables.runs.c.workspace_id == tables.workspaces.c.id)
    .correlate(tables.workspaces)
    .scalar_subquery()
)
_DECIDED_BY = (
    select(
        tables.workspaces,
        tables.policies.c.settings,
        tables.owner_status.label("owner_status"),
        *(column.label(f"run_{column.name}") for column in tables.runs.c),
    )
    .join(tables.policies)
    .outerjoin(tables.owners)
    .outerjoin(tables.dormant_owners, tables.dormant_owners.c.name == tables.owners.c.name)
    .outerjoin(tables.runs, tables.runs.c.id == _LATEST_RUN)
)
"""Workspaces, and all else that `Situation` has."""
_BATCH = 500
"""Situations read at once: a policy may have ten thousand, and databases limit a query's parameters."""


class DueWorkspace(NamedTuple):
    """A workspace that may need a transition."""

    id: str
    base: str


class HostState(NamedTuple):
    """The state directory that a host works with."""

    host: str
    state_id: str
    state_directory: str
    """Its path, for messages."""
    place: Mapping[str, Any] | None = None
    """Where it lies: whatever tells it from a copy, as the manager says; None: not known yet."""


class Reader:
    """One consistent state of the catalog. Made by `Catalog.reading`; for one thread, inside its block.

    Every method may raise what `Catalog.reading` names.
    """

    def __init__(self, connection: Connection, where: str) -> None:
        self._connection = connection
        self._where = where

    # Workspaces

    def workspace(self, workspace_id: str) -> Workspace:
        """Return the workspace of that id, even when it was deleted. NotFound when there never was one."""
        query = select(tables.workspaces).where(tables.workspaces.c.id == workspace_id)
        return tables.workspace_of(self._known(query, f"workspace {workspace_id!r}"))

    def workspaces(
        self,
        *,
        host: str | None = None,
        state: WorkspaceState | None = None,
        owner: str | None = None,
        labels: Mapping[str, str] = _NO_LABELS,
        include_deleted: bool = False,
        after: str = "",
        limit: int | None = None,
    ) -> list[Workspace]:
        """List workspaces, sorted by id.

        Args:
            labels: Only those that have all of these labels, with these values. They are looked for in each
                workspace that all else finds.
            host: Only those of this host.
            state: Only those in this state; `DELETED` shows deleted ones.
            owner: Only those of this owner.
            include_deleted: Deleted ones too.
            after: Only ids that sort behind this one, for listing page by page.
            limit: At most so many.
        """
        table = tables.workspaces
        query = select(table).where(table.c.id > after).order_by(table.c.id)
        query = query if labels else query.limit(limit)
        if host is not None:
            query = query.where(table.c.host == host)
        if state is not None:
            query = query.where(table.c.state == state)
        elif not include_deleted:
            query = query.where(table.c.state != WorkspaceState.DELETED)
        if owner is not None:
            query = query.where(table.c.owner == owner if owner else table.c.owner.is_(None))
        found = (tables.workspace_of(row) for row in self._all(query))
        return list(islice((each for each in found if labels.items() <= each.spec.labels.items()), limit))

    def workspaces_with_operation(self, host: str) -> list[Workspace]:
        """List workspaces on which an operation of that host is under way, sorted by id."""
        table = tables.workspaces
        query = select(table).where(table.c.operation_host == host).order_by(table.c.id)
        return [tables.workspace_of(row) for row in self._all(query)]

    def due(self, tick: datetime, *, host: str, limit: int | None = None) -> list[DueWorkspace]:
        """List workspaces of `host` that `Situation.decide` may want changed at `tick`, longest due first.

        One query on an index: those that are not due cost nothing.
        """
        table = tables.workspaces
        query = (
            select(table.c.id, table.c.base)
            .where(table.c.host == host, table.c.due_at <= tick)
            .order_by(table.c.due_at)
            .limit(limit)
        )
        return [DueWorkspace(row.id, row.base) for row in self._all(query)]

    def situation(self, workspace_id: str) -> Situation:
        """Return all that the lifecycle decides by. NotFound when there is no workspace of that id."""
        found = self.situations([workspace_id])
        if not found:
            raise NotFound(f"there is no workspace {workspace_id!r}")
        return found[workspace_id]

    def situations(self, workspace_ids: Collection[str]) -> dict[str, Situation]:
        """Return the same of several workspaces, by id."""
        return {situation.workspace.id: situation for situation, _ in self._situations(workspace_ids)}

    def _situations(self, workspace_ids: Collection[str]) -> Iterator[tuple[Situation, datetime | None]]:
        """Situations, each with the time that is written down as its earliest due one."""
        ordered = sorted(workspace_ids)
        for start in range(0, len(ordered), _BATCH):
            batch = tables.workspaces.c.id.in_(ordered[start : start + _BATCH])
            for row in self._all(_DECIDED_BY.where(batch)):
                run = None if row.run_id is None else tables.run_of(row, "run_")
                policy = Policy.from_mapping(row.policy, row.settings)
                owner = row.owner_status or OwnerStatus.ACTIVE
                yield Situation(tables.workspace_of(row), run, policy, owner), row.due_at

    # Snapshots and versions

    def snapshot(self, name: str) -> SnapshotRecord:
        """Return the snapshot of that name, whatever its status. NotFound when there is none."""
        query = _SNAPSHOTS.where(tables.snapshots.c.name == name)
        return tables.snapshot_of(self._known(query, f"snapshot {name!r} in the catalog"))

    def snapshots(
        self, workspace_id: str, *, statuses: Collection[SnapshotStatus] = (SnapshotStatus.COMPLETE,)
    ) -> list[SnapshotRecord]:
        """List snapshots of a workspace, oldest first: the complete ones unless `statuses` says otherwise."""
        table = tables.snapshots
        query = _SNAPSHOTS.where(table.c.workspace_id == workspace_id, table.c.status.in_(statuses)).order_by(
            table.c.created_at, table.c.name
        )
        return [tables.snapshot_of(row) for row in self._all(query)]

    def unfinished_snapshots(self, host: str) -> list[SnapshotRecord]:
        """List snapshots of a host's workspaces that are pending, orphaned or being deleted, oldest first."""
        table = tables.snapshots
        query = (
            _SNAPSHOTS.join(tables.workspaces, tables.workspaces.c.id == table.c.workspace_id)
            .where(table.c.status.in_(_UNFINISHED), tables.workspaces.c.host == host)
            .order_by(table.c.created_at, table.c.name)
        )
        return [tables.snapshot_of(row) for row in self._all(query)]

    def version(self, workspace_id: str, number: int) -> Version:
        """Return a workspace's version of that number. NotFound when it has none."""
        query = _versions_of(workspace_id).where(tables.versions.c.number == number)
        # Beyond these bounds a database may refuse to compare.
        row = self._first(query) if 1 <= number <= MAX_VERSION else None
        if row is None:
            raise NotFound(f"workspace {workspace_id!r} has no version {number}")
        return tables.version_of(row, row.runtime_name, row.source)

    def versions(self, workspace_id: str) -> list[Version]:
        """List the versions of a workspace, sorted by number."""
        query = _versions_of(workspace_id).order_by(tables.versions.c.number)
        return [tables.version_of(row, row.runtime_name, row.source) for row in self._all(query)]

    # Events and runs

    def events(
        self,
        workspace_id: str = "",
        *,
        after: int = 0,
        types: Collection[str] = (),
        limit: int | None = MAX_EVENTS,
        newest: bool = False,
    ) -> list[Event]:
        """List events in the order in which they became visible.

        Args:
            workspace_id: Only those of this workspace; empty: of all.
            after: Only events after the one of this id. A caller that passes the last id it saw misses none.
            types: Only events of these types; empty: all.
            limit: At most so many; None: all.
            newest: When there are more than `limit`, leave out the oldest and not the newest.
        """
        table = tables.events
        order = table.c.id.desc() if newest else table.c.id
        query = select(table).where(table.c.id > after).order_by(order).limit(limit)
        if workspace_id:
            query = query.where(table.c.workspace_id == workspace_id)
        if types:
            query = query.where(table.c.type.in_(types))
        found = [tables.event_of(row) for row in self._all(query)]
        return found[::-1] if newest else found

    def latest_run(self, workspace_id: str) -> Run | None:
        """Return the run of a workspace that began last, or None when it has none."""
        row = self._first(_runs_of(workspace_id).order_by(tables.runs.c.id.desc()).limit(1))
        return None if row is None else tables.run_of(row)

    def runs(self, workspace_id: str) -> list[Run]:
        """List the runs of a workspace, oldest first."""
        return [tables.run_of(row) for row in self._all(_runs_of(workspace_id).order_by(tables.runs.c.id))]

    # Policies, templates, owners and hosts

    def policy(self, name: str = DEFAULT_POLICY) -> Policy:
        """Return the policy of that name; the default one always exists. NotFound when there is none."""
        row = self._known(select(tables.policies).where(tables.policies.c.name == name), f"policy {name!r}")
        return Policy.from_mapping(row.name, row.settings)

    def policies(self) -> list[Policy]:
        """List all policies, sorted by name."""
        query = select(tables.policies).order_by(tables.policies.c.name)
        return [Policy.from_mapping(row.name, row.settings) for row in self._all(query)]

    def template(self, name: str) -> Template:
        """Return the template of that name. NotFound when there is none."""
        query = select(tables.templates).where(tables.templates.c.name == name)
        return Template(**self._known(query, f"template {name!r}")._mapping)

    def templates(self) -> list[Template]:
        """List all templates, sorted by name."""
        query = select(tables.templates).order_by(tables.templates.c.name)
        return [Template(**row._mapping) for row in self._all(query)]

    def template_version(self, name: str, number: int) -> TemplateVersion:
        """Return that version of a template. NotFound when it has none."""
        table = tables.template_versions
        query = select(table).where(table.c.template == name, table.c.number == number)
        # Beyond these bounds a database may refuse to compare.
        row = self._first(query) if 1 <= number <= MAX_VERSION else None
        if row is None:
            raise NotFound(f"there is no version {number} of a template {name!r}")
        return tables.template_version_of(row)

    def template_versions(self, name: str) -> list[TemplateVersion]:
        """List the versions of a template, sorted by number."""
        table = tables.template_versions
        query = select(table).where(table.c.template == name).order_by(table.c.number)
        return [tables.template_version_of(row) for row in self._all(query)]

    def owner_status(self, owner: str) -> OwnerStatus:
        """Tell whether that owner may use workspaces; an owner that nobody named yet is active."""
        known = select(tables.owner_status.label("status")).select_from(tables.known_owners)
        row = self._first(known.where(tables.owners.c.name == owner))
        return OwnerStatus.ACTIVE if row is None else row.status

    def host_state(self, host: str) -> HostState | None:
        """Return the state directory that a host works with, or None when it has not done anything yet."""
        hosts, places = tables.hosts.c, tables.host_places.c
        # A library that knows no places may have given the host another state directory since.
        its_own = and_(places.host == hosts.name, places.state_id == hosts.state_id)
        query = select(tables.hosts, places.place).outerjoin(tables.host_places, its_own)
        row = self._first(query.where(hosts.name == host))
        return None if row is None else HostState(row.name, row.state_id, row.state_directory, row.place)

    # Statements

    def _all(self, query: Executable) -> Sequence[Row[Any]]:
        with self._guarded():
            # An SQLite database that is being recovered keeps readers waiting too.
            return when_free(lambda: self._connection.execute(query)).all()

    def _first(self, query: Executable) -> Row[Any] | None:
        return next(iter(self._all(query)), None)

    def _known(self, query: Executable, what: str) -> Row[Any]:
        row = self._first(query)
        if row is None:
            raise NotFound(f"there is no {what}")
        return row

    def _guarded(self) -> AbstractContextManager[None]:
        return translate_database_errors(self._where)


def _versions_of(workspace_id: str) -> Select[Any]:
    snapshots = tables.snapshots.c
    versions = (
        select(tables.versions, snapshots.runtime_name, tables.why.label("source"))
        .select_from(tables.explained_snapshots)
        .join(tables.versions, tables.versions.c.snapshot_name == snapshots.name)
    )
    return versions.where(
        tables.versions.c.workspace_id == workspace_id, snapshots.status == SnapshotStatus.COMPLETE
    )


def _runs_of(workspace_id: str) -> Select[Any]:
    return select(tables.runs).where(tables.runs.c.workspace_id == workspace_id)
