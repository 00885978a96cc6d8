"""The column `due_at`: when the lifecycle may next have something to do with a workspace.

The one place that sets it, at the end of every transaction. It is the earliest tick at which
`snaploader.workspace.decide` says something, so a workspace whose `due_at` is later, or NULL, need not be
read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, func, or_, select, update

from snaploader.workspace.catalog import tables
from snaploader.workspace.decide import deletion_time, earliest_due
from snaploader.workspace.model import OwnerStatus, Workspace, WorkspaceState
from snaploader.workspace.policy import Policy

_BATCH = 500
"""Workspaces read at once: a policy may have ten thousand, and databases limit the parameters of a query."""


def settle_due(
    connection: Connection, workspaces: Collection[str], policies: Collection[str], owners: Collection[str]
) -> None:
    """Bring `due_at` up to date for these workspaces, and for all of these policies and owners.

    Locks their rows, in the order of their ids, so that nobody works from what it replaces.
    """
    table = tables.workspaces
    concerned = [
        column.in_(values)
        for column, values in ((table.c.id, workspaces), (table.c.policy, policies), (table.c.owner, owners))
        if values
    ]
    if not concerned:
        return
    locked = select(table).where(or_(*concerned)).order_by(table.c.id).with_for_update()
    found = connection.execute(locked).all()
    for start in range(0, len(found), _BATCH):
        _settle(connection, found[start : start + _BATCH])


def _settle(connection: Connection, found: Sequence[Row[Any]]) -> None:
    runs = _latest_runs(connection, [row.id for row in found])
    policies = _policies(connection, {row.policy for row in found})
    suspended = _suspended(connection, {row.owner for row in found})
    changes = []
    for row in found:
        owner = OwnerStatus.SUSPENDED if row.owner in suspended else OwnerStatus.ACTIVE
        due = None
        if row.state is not WorkspaceState.DELETED:
            due = earliest_due(tables.workspace_of(row), runs.get(row.id), policies[row.policy], owner)
        if due != row.due_at:
            changes.append({"changed": row.id, "due": due})
    if changes:
        table = tables.workspaces
        statement = update(table).where(table.c.id == bindparam("changed")).values(due_at=bindparam("due"))
        connection.execute(statement, changes)


def _latest_runs(connection: Connection, workspaces: list[str]) -> dict[str, Any]:
    table = tables.runs
    latest = (
        select(func.max(table.c.id))
        .where(table.c.workspace_id.in_(workspaces))
        .group_by(table.c.workspace_id)
    )
    found = connection.execute(select(table).where(table.c.id.in_(latest)))
    return {row.workspace_id: tables.run_of(row) for row in found}


def _policies(connection: Connection, names: set[str]) -> dict[str, Policy]:
    table = tables.policies
    found = connection.execute(select(table).where(table.c.name.in_(names)))
    return {row.name: Policy.from_mapping(row.name, row.settings) for row in found}


def _suspended(connection: Connection, owners: set[str]) -> set[str]:
    table = tables.owners
    if not owners - {""}:
        return set()
    is_one: ColumnElement[bool] = table.c.name.in_(owners - {""})
    found = connection.execute(select(table.c.name).where(is_one, table.c.status == OwnerStatus.SUSPENDED))
    return {row.name for row in found}


def renewed_deletion(
    workspace: Workspace, before: Policy, after: Policy, now: datetime | None
) -> datetime | None:
    """When a workspace is to be deleted once another policy holds for it; None: never.

    Args:
        now: Default: by the clock of this host.
    """
    if workspace.dormant_at is None:
        return None
    # What an earlier policy announced, and a later one took back, is no announcement any more.
    announced = None if before.delete_after_dormant is None else workspace.deleting_at
    return deletion_time(
        workspace.dormant_at, announced, after.delete_after_dormant, now or datetime.now(UTC)
    )
