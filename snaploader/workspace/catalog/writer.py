"""What all changes to the catalog stand on: locks on rows, statements, and the end of a transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Executable, Row, Table, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from snaploader.errors import FailedPrecondition, NotFound, SnaploaderError
from snaploader.workspace.catalog import rows, tables
from snaploader.workspace.catalog.address import POSTGRESQL
from snaploader.workspace.catalog.due import settle_due
from snaploader.workspace.catalog.reader import Reader
from snaploader.workspace.decide import deletion_time
from snaploader.workspace.model import Workspace, WorkspaceState
from snaploader.workspace.policy import Policy


class Writer(Reader):
    """A transaction without its changes: `Transaction` has them, and says what holds for all.

    A change of a workspace adds its id to `_touched`, one of a policy or owner its name to theirs.
    """

    def __init__(self, connection: Connection, where: str) -> None:
        super().__init__(connection, where)
        self._is_postgresql = connection.dialect.name == POSTGRESQL
        self._locked: dict[str, Workspace] = {}
        """Workspaces whose rows are locked, as they are now: nobody else changes them."""
        self._touched: set[str] = set()
        self._touched_policies: set[str] = set()
        self._touched_owners: set[str] = set()
        self._refusal: SnaploaderError | None = None

    def lock_workspace(self, workspace_id: str) -> Workspace:
        """The workspace, which nobody else changes until the end of the block. NotFound as `workspace`."""
        if workspace_id in self._locked:
            return self._locked[workspace_id]
        table = tables.workspaces
        row = self._first(select(table).where(table.c.id == workspace_id).with_for_update())
        if row is None:
            raise NotFound(f"there is no workspace {workspace_id!r}")
        self._locked[workspace_id] = rows.workspace_of(row)
        return self._locked[workspace_id]

    def settle(self) -> None:
        """Bring `due_at` of all that was touched up to date. Called by the catalog before it commits.

        Raises:
            FailedPrecondition: the database refused a change before, and the error was caught in the block.
        """
        if self._refusal is not None:
            raise FailedPrecondition(
                f"nothing was written, because of an earlier error: {self._refusal.message}"
            ) from self._refusal
        with self._guarded():
            settle_due(self._connection, self._touched, self._touched_policies, self._touched_owners)

    def _alive(self, workspace_id: str) -> Workspace:
        workspace = self.lock_workspace(workspace_id)
        if workspace.state is WorkspaceState.DELETED:
            raise FailedPrecondition(f"workspace {workspace_id!r} was deleted")
        return workspace

    def _has(self, column: Any, value: str) -> bool:
        return self._first(select(column).where(column == value)) is not None

    def _insert(self, table: Table) -> Any:
        return (postgresql if self._is_postgresql else sqlite).insert(table)

    def _upsert(self, table: Table, values: Mapping[str, Any], *, key: str, same: str = "") -> bool:
        """Add a row, or replace the one of that key; False: there is one with another value of `same`."""
        statement = self._insert(table)
        changes = {name: statement.excluded[name] for name in values if name != key}
        condition = table.c[same] == statement.excluded[same] if same else None
        upsert = statement.on_conflict_do_update(index_elements=[key], set_=changes, where=condition)
        with self._guarded():
            return self._connection.execute(upsert.returning(table.c[key]), values).first() is not None

    def _inserted(self, table: Table, values: Mapping[str, Any]) -> Row[Any]:
        with self._guarded():
            return self._connection.execute(insert(table).returning(table), values).one()

    def _only(self, query: Executable) -> Row[Any]:
        return self._all(query)[0]

    def _run(
        self, statement: Executable, values: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        with self._guarded():
            self._connection.execute(statement, values)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with super()._guarded():
                yield
        except SnaploaderError as error:
            self._refusal = error
            raise


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
