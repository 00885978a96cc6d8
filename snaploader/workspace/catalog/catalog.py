"""`Catalog`: the database of workspaces, and what keeps it whole when the process forks.

SQLite notes the locks of its files per process, in memory that a child inherits although it does not
inherit the locks. A child that opens a file which its parent had open at that moment works without them, and
what it commits can be lost ("How To Corrupt An SQLite Database File", section 2.6). So there must be no
connection at all when a fork is made: a fork waits for the blocks that are open in other threads, and all
idle connections are closed before it. Connections to PostgreSQL stay, and the child leaves them alone.

Programs that are started with `subprocess` are no matter: no code of this process runs in their child.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from snaploader.errors import DeadlineExceeded, FailedPrecondition
from snaploader.workspace.catalog import engines
from snaploader.workspace.catalog.engines import translate_database_errors
from snaploader.workspace.catalog.migrate import upgrade
from snaploader.workspace.catalog.reader import Reader
from snaploader.workspace.catalog.transaction import Transaction

_CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for transactions of other threads."""
_FORK_TIMEOUT_S = 30.0
"""How long a fork waits for open blocks. Nothing holds a database for longer without being wrong."""

_abandoned: list[Engine] = []
"""Engines of the parent process, whose connections must be neither used nor closed here."""


class Catalog:
    """What is known of workspaces, in SQLite or PostgreSQL. Made by `Catalog.open`; a context manager.

    Safe to use from many threads and, with one catalog each, from many processes. After a fork, the child's
    copy makes connections of its own.

    Attributes:
        url: Where it is, without passwords.
        dialect: "sqlite" or "postgresql".
    """

    def __init__(self, url: URL) -> None:
        self.url = engines.shown(url)
        self.dialect = url.get_backend_name()
        self._address = url
        self._where = f"catalog {self.url}"
        self._is_closed = False
        self._connect_anew()
        _catalogs.add(self)

    @classmethod
    def open(cls, address: str | os.PathLike[str]) -> Self:
        """Open the catalog at an address. A new one is made, and an older schema is brought up to date.

        Args:
            address: A path, `sqlite:///PATH` or `postgresql://USER@HOST/NAME`. An SQLite file must lie on a
                local file system; its folder must be there.

        Raises:
            InvalidArgument: `address` names no database for a catalog.
            NotFound: the folder of the file, or the PostgreSQL database, is not there.
            FailedPrecondition: the schema is newer than this library, or psycopg is not installed.
            DataLoss: the file is no database, or damaged.
            Other errors: as `transaction`.
        """
        catalog = cls(engines.parse_address(address))
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
        """Open a block of changes: all of them hold once the block ends, and none if it raises.

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
        """Open a block that reads one state, the newest at its first query. Errors as `transaction`."""
        with self._counted(), self._connected(engines.reading) as connection:
            yield Reader(connection, self._where)

    def lock(
        self, workspace_id: str, *, wait_s: float | None, cancelled: threading.Event | None = None
    ) -> AbstractContextManager[bool]:
        """Hold the lock of a workspace between hosts; the block is told whether it is held.

        With SQLite there are no other hosts: it is held at once, and the lock between processes is another's
        business. Not reentrant.

        Args:
            wait_s: How long to wait for it; 0: not at all; None: for ever.
            cancelled: Ends the waiting when set; the lock is not held then.
        """
        if self._locks is None:
            return contextlib.nullcontext(True)
        return engines.advisory_lock(
            self._locks, workspace_id, self._where, wait_s=wait_s, cancelled=cancelled
        )

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

    def _connect_anew(self) -> None:
        """Begin with no connection, no lock held and no block open: at first, and in the child of a fork."""
        self._engine = engines.make_engine(self._address)
        self._locks = engines.make_lock_engine(self._address) if self.dialect == engines.POSTGRESQL else None
        self._writer = threading.Lock()
        self._blocks = _OpenBlocks()
        self._writing = threading.local()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A block that forks and `close` wait for."""
        with _all_blocks.one(), self._blocks.one():
            if self._is_closed:
                raise FailedPrecondition(f"{self._where} is closed")
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One transaction a thread; with SQLite one in this process, so that they queue up fairly."""
        if getattr(self._writing, "now", False):
            raise FailedPrecondition(f"{self._where}: this thread has a transaction already: use that one")
        queue = self._writer if self.dialect == engines.SQLITE else None
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
                try:
                    if self._engine.pool is not pool:  # which was done away with meanwhile
                        connection.invalidate()
                    connection.close()
                except SQLAlchemyError:
                    # Rolling back failed since the database is gone, and what was not committed with it.
                    connection.invalidate()
                    connection.close()


class _OpenBlocks:
    """Counts blocks that are open, each thread's own too."""

    def __init__(self) -> None:
        self._own = threading.local()
        self.begin_anew()

    def begin_anew(self) -> None:
        """Have no blocks but those of this thread: at first, and in the child of a fork."""
        self._changed = threading.Condition()
        self._count = self.own
        self._is_forking = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """A block. It waits for a fork that another thread makes, unless it lies within another block."""
        own = self.own
        with self._changed:
            if own == 0:
                self._changed.wait_for(lambda: not self._is_forking)
            self._count += 1
        self._own.count = own + 1
        try:
            yield
        finally:
            self._own.count = own
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    @property
    def own(self) -> int:
        """How many this thread has open."""
        count: int = getattr(self._own, "count", 0)
        return count

    def wait_for_none(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._count <= self.own, timeout_s)

    def begin_fork(self) -> None:
        """Let no other thread open a block until `end_fork`, and wait for theirs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._is_forking = True
        self.wait_for_none(_FORK_TIMEOUT_S)

    def end_fork(self) -> None:
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


_catalogs: weakref.WeakSet[Catalog] = weakref.WeakSet()
_all_blocks = _OpenBlocks()
"""Blocks of all catalogs, during which other threads do not fork."""


def _before_fork() -> None:
    _all_blocks.begin_fork()
    for catalog in list(_catalogs):
        if catalog.dialect == engines.SQLITE:
            catalog._engine.dispose()  # closes idle connections


def _after_fork_in_child() -> None:
    _all_blocks.begin_anew()
    for catalog in list(_catalogs):
        _abandoned.extend(engine for engine in (catalog._engine, catalog._locks) if engine is not None)
        catalog._connect_anew()


os.register_at_fork(
    before=_before_fork, after_in_parent=_all_blocks.end_fork, after_in_child=_after_fork_in_child
)
