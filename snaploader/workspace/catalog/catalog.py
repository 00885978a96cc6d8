"""`Catalog`: the database of workspaces."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from snaploader.errors import DeadlineExceeded, FailedPrecondition
from snaploader.workspace.catalog import engines
from snaploader.workspace.catalog.address import POSTGRESQL, SQLITE, parse_address, shown
from snaploader.workspace.catalog.advisory import advisory_lock
from snaploader.workspace.catalog.faults import translate_database_errors
from snaploader.workspace.catalog.forks import OpenBlocks, fork_gate
from snaploader.workspace.catalog.migrate import upgrade
from snaploader.workspace.catalog.reader import Reader
from snaploader.workspace.catalog.transaction import Transaction

_CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for transactions of other threads."""


class Catalog:
    """What is known of workspaces, in SQLite or PostgreSQL. Made by `Catalog.open`; a context manager.

    Safe to use from many threads and, with one catalog each, from many processes. After a fork, the child's
    copy makes connections of its own.

    Attributes:
        url: Where it is, without passwords.
        dialect: "sqlite" or "postgresql".
    """

    def __init__(self, url: URL) -> None:
        self.url = shown(url)
        self.dialect = url.get_backend_name()
        self._address = url
        self._where = f"catalog {self.url}"
        self._is_closed = False
        self._connect_anew()
        fork_gate.add(self)

    @classmethod
    def open(cls, address: str | os.PathLike[str]) -> Self:
        """The catalog there; a new one is made, and an older schema is brought up to date.

        Args:
            address: A path, `sqlite:///PATH` or `postgresql://USER@HOST/NAME`. An SQLite file must lie on a
                local file system; its folder must be there.

        Raises:
            InvalidArgument: `address` names no database for a catalog.
            NotFound: the folder of the file, or the PostgreSQL database, is not there.
            FailedPrecondition: the schema is newer than this library, or psycopg is not installed.
            DataLoss: the file is no database, or damaged.
            And what `transaction` raises.
        """
        catalog = cls(parse_address(address))
        try:
            with translate_database_errors(catalog._where):
                engines.prepare_database(catalog._engine)
                upgrade(catalog._engine)
        except BaseException:
            catalog.close()
            raise
        return catalog

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A block of changes: all of them, once the block ends; none, if it raises.

        What it committed survives a crash and a power loss. Keep it short: with SQLite, all other writers
        wait.

        Raises:
            FailedPrecondition: the catalog is closed, or this thread has a transaction already; the database
                refused what breaks one of its constraints.
            DeadlineExceeded: others held the database, or a row, for 30 s.
            Unavailable: PostgreSQL cannot be reached, restarts or broke a deadlock: try the block again. When
                the connection was lost at the very end, the changes may have been made.
            ResourceExhausted: the disk is full, or all connections are in use.
            PermissionDenied: the database may not be written.
            Unauthenticated: PostgreSQL does not accept the user.
            DataLoss: the database is damaged.
            InvalidArgument: a value cannot be kept.
        """
        process = os.getpid()
        with self._counted(), self._alone(), self._connected(engines.writing) as connection:
            transaction = Transaction(connection, self._where)
            yield transaction
            if os.getpid() != process:
                raise FailedPrecondition(
                    f"{self._where}: a child forked within a transaction cannot commit it"
                )
            transaction.settle()
            with translate_database_errors(self._where):
                connection.commit()

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A block that reads one consistent state, the newest at its first query. Raises as `transaction`."""
        with self._counted(), self._connected(engines.reading) as connection:
            yield Reader(connection, self._where)

    def lock(
        self, workspace_id: str, *, wait_s: float | None, cancelled: threading.Event | None = None
    ) -> AbstractContextManager[bool]:
        """Hold the lock of a workspace between hosts; whether it is held.

        With SQLite there are no other hosts: it is held at once, and the lock between processes is another's
        business. Not reentrant.

        Args:
            wait_s: How long to wait for it; 0: not at all; None: for ever.
            cancelled: Ends the waiting when set; the lock is not held then.

        Raises:
            Unavailable: PostgreSQL cannot be reached.
        """
        if self._locks is None:
            return contextlib.nullcontext(True)
        return advisory_lock(self._locks, workspace_id, self._where, wait_s=wait_s, cancelled=cancelled)

    def close(self) -> None:
        """Close all connections, once the transactions of other threads have ended. Idempotent."""
        self._is_closed = True
        self._blocks.wait_for_none(_CLOSE_TIMEOUT_S)
        self._engine.dispose()
        if self._locks is not None:
            self._locks.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close_idle_connections(self) -> None:
        """Called before the process forks."""
        if self.dialect == SQLITE:
            self._engine.dispose()

    def forget_connections(self) -> None:
        """Called in the child of a fork."""
        _abandoned.extend(engine for engine in (self._engine, self._locks) if engine is not None)
        self._connect_anew()

    def _connect_anew(self) -> None:
        """Begin with no connection, no lock held and no block open: at first, and in the child of a fork."""
        self._engine = engines.make_engine(self._address)
        self._locks = engines.make_lock_engine(self._address) if self.dialect == POSTGRESQL else None
        self._writer = threading.Lock()
        self._blocks = OpenBlocks()
        self._writing = threading.local()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A block that forks and `close` wait for."""
        with fork_gate.passed(), self._blocks.one():
            if self._is_closed:
                raise FailedPrecondition(f"{self._where} is closed")
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One transaction a thread; with SQLite one in this process, so that they queue up fairly."""
        if getattr(self._writing, "now", False):
            raise FailedPrecondition(f"{self._where}: this thread has a transaction already: use that one")
        queue = self._writer if self.dialect == SQLITE else None
        if queue is not None and not queue.acquire(timeout=engines.BUSY_TIMEOUT_S):
            raise DeadlineExceeded(
                f"{self._where} was held by others for {engines.BUSY_TIMEOUT_S:.0f} s: try again"
            )
        self._writing.now = True
        try:
            yield
        finally:
            self._writing.now = False
            if queue is not None:
                queue.release()

    @contextmanager
    def _connected(self, connect: Callable[[Engine], Connection]) -> Iterator[Connection]:
        """A connection with a transaction, rolled back unless the block commits it."""
        process = os.getpid()
        pool = self._engine.pool
        with translate_database_errors(self._where):
            connection = connect(self._engine)
        try:
            with translate_database_errors(self._where):
                connection.begin()
            yield connection
        finally:
            # A child that was forked within the block leaves it too; the connection is its parent's.
            if os.getpid() == process:
                _give_back(connection, is_wanted=self._engine.pool is pool)


def _give_back(connection: Connection, *, is_wanted: bool) -> None:
    """Give a connection back to its pool, or close it if that was done away with meanwhile."""
    try:
        if not is_wanted:
            connection.invalidate()
        connection.close()
    except SQLAlchemyError:
        # Rolling back failed since the database is gone, and what was not committed with it.
        connection.invalidate()
        connection.close()


_abandoned: list[Engine] = []
"""Engines of the parent process, whose connections must be neither used nor closed here."""
