"""The column `due_at`: when the lifecycle may next have something to do with a workspace.

The one place that sets it, at the end of every transaction. It is the earliest tick at which
`snaploader.workspace.policy.Situation.decide` says something, so a workspace whose `due_at` is later, or
NULL, need not be read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, bindparam, func, or_, select, update

from snaploader.workspace.catalog import tables
from snaploader.workspace.model import OwnerStatus, Workspace, WorkspaceState
from snaploader.workspace.policy import Policy, Situation, deletion_time

_BATCH = 500
"""Workspaces read at once: a policy may have ten thousand, and databases limit the parameters of a query."""

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
        tables.owners.c.status.label("owner_status"),
        *(column.label(f"run_{column.name}") for column in tables.runs.c),
    )
    .join(tables.policies)
    .outerjoin(tables.owners)
    .outerjoin(tables.runs, tables.runs.c.id == _LATEST_RUN)
)
"""Workspaces, and all else that `decide` goes by."""


def settle_due(
    connection: Connection, workspaces: Collection[str], policies: Collection[str], owners: Collection[str]
) -> None:
    """Bring `due_at` up to date for these workspaces, and for all of these policies and owners.

    Args:
        workspaces: Their rows are locked. The others' are locked here, in the order of their ids, before
            anything is read of them, so that nobody works from what this replaces.
    """
    table = tables.workspaces
    ids = set(workspaces)
    followers = [
        column.in_(values)
        for column, values in ((table.c.policy, policies), (table.c.owner, owners))
        if values
    ]
    if followers:
        locked = select(table.c.id).where(or_(*followers)).order_by(table.c.id).with_for_update()
        ids.update(connection.scalars(locked))
    ordered = sorted(ids)
    for start in range(0, len(ordered), _BATCH):
        _settle(connection, ordered[start : start + _BATCH])


def _settle(connection: Connection, workspaces: Sequence[str]) -> None:
    table = tables.workspaces
    changes = []
    for row in connection.execute(_DECIDED_BY.where(table.c.id.in_(workspaces))):
        due = None
        if row.state is not WorkspaceState.DELETED:
            run = None if row.run_id is None else tables.run_of(row, "run_")
            policy = Policy.from_mapping(row.policy, row.settings)
            owner = row.owner_status or OwnerStatus.ACTIVE
            due = Situation(tables.workspace_of(row), run, policy, owner).earliest_due()
        if due != row.due_at:
            changes.append({"changed": row.id, "due": due})
    if changes:
        statement = update(table).where(table.c.id == bindparam("changed")).values(due_at=bindparam("due"))
        connection.execute(statement, changes)


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
