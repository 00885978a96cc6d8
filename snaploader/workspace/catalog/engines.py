"""Connections to the databases, set up so that both behave alike.

SQLite: one writer at a time, which says so from its first statement on (BEGIN IMMEDIATE), so that no
transaction has to be given up half-way; readers see the state of their first statement and wait for
nobody. `synchronous=FULL`: what is committed survives a power loss, at the cost of one fsync a commit.

PostgreSQL: READ COMMITTED and row locks for writers, REPEATABLE READ for readers. Timeouts bound how long a
statement, a lock and an idle transaction last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event

from snaploader.errors import DeadlineExceeded, FailedPrecondition, NotFound, translate_os_errors
from snaploader.workspace.catalog.address import SQLITE, file_of, shown
from snaploader.workspace.catalog.faults import is_busy

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for others, and a reader for a database that is being recovered."""

_PATIENCE_MS = 10
"""How long SQLite itself waits for its turn to write. It sleeps longer with every try, so who has waited
longest would come last; asking anew after this little keeps it fair."""

_POOL_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10

_SQLITE_SESSION = (
    f"PRAGMA busy_timeout = {round(BUSY_TIMEOUT_S * 1000)}",
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = FULL",
)
_POSTGRESQL_SESSION = (
    "SET application_name = 'snaploader'; "
    "SET TimeZone = 'UTC'; "
    f"SET statement_timeout = '{round(BUSY_TIMEOUT_S)}s'; "
    f"SET lock_timeout = '{round(BUSY_TIMEOUT_S)}s'; "
    "SET idle_in_transaction_session_timeout = '60s'"
)
_POSTGRESQL_LOCK_SESSION = (
    "SET application_name = 'snaploader lock'; "
    "SET statement_timeout = 0; "
    # A host that vanished without a word loses its locks after about a minute.
    "SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4"
)

_WRITES = "snaploader_writes"
"""Execution option of a connection whose transactions write."""


def make_engine(url: URL) -> Engine:
    """An engine for the catalog's transactions. Opens no connection.

    Raises:
        FailedPrecondition: the database's driver is not installed.
    """
    if url.get_backend_name() == SQLITE:
        return _sqlite_engine(url)
    engine = _postgresql_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=5,
        max_overflow=15,
        pool_timeout=_POOL_TIMEOUT_S,
        pool_pre_ping=True,
    )
    event.listen(engine, "connect", _session(_POSTGRESQL_SESSION))
    return engine


def make_lock_engine(url: URL) -> Engine:
    """An engine for session locks on PostgreSQL: each of its connections is opened for one lock."""
    engine = _postgresql_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    event.listen(engine, "connect", _session(_POSTGRESQL_LOCK_SESSION))
    return engine


def writing(engine: Engine) -> Connection:
    """A connection whose next transaction may write."""
    return engine.connect().execution_options(**{_WRITES: True})


def reading(engine: Engine) -> Connection:
    """A connection whose next transaction reads one consistent state."""
    connection = engine.connect()
    if engine.dialect.name == SQLITE:
        return connection
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def prepare_database(engine: Engine) -> None:
    """Create an SQLite file if it is not there, for its owner's eyes only, and switch it to WAL mode.

    Raises:
        NotFound: its folder is not there.
        FailedPrecondition: its file system cannot share memory between processes.
    """
    if engine.dialect.name != SQLITE:
        return
    path = file_of(engine.url)
    if path is not None:
        _create_file(path)
    with contextlib.closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        # Each may have to wait for others that open the file for the first time too: SQLite's own
        # waiting does not cover the change of the journal's mode.
        _when_free(lambda: cursor.execute("PRAGMA journal_mode = WAL"))
        ((mode,),) = cursor.fetchall()
        cursor.close()
    if mode != "wal":
        raise FailedPrecondition(
            f"{shown(engine.url)} cannot be used in WAL mode (it is in {mode!r}): "
            "move it to a local file system"
        )


def _create_file(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise NotFound(f"cannot open the catalog {path!r}: there is no folder {folder!r}: make it first")
    with translate_os_errors(f"cannot create the catalog {path!r}"):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path) from None


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        pool_size=4,
        max_overflow=60,
        pool_timeout=_POOL_TIMEOUT_S,
        hide_parameters=True,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # this module begins transactions, the driver never does
        for statement in _SQLITE_SESSION:
            connection.execute(statement)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get(_WRITES):
            _begin_writing(connection)
        else:
            connection.exec_driver_sql("BEGIN")

    return engine


def _begin_writing(connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
    try:
        _when_free(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    finally:
        connection.exec_driver_sql(_SQLITE_SESSION[0])


def _when_free(work: Callable[[], Any]) -> Any:
    """What `work` returns, once no other connection is in its way. DeadlineExceeded after 30 s."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return work()
        except Exception as error:
            if not is_busy(error):
                raise
            if time.monotonic() > give_up_at:
                raise DeadlineExceeded(
                    f"the catalog was held by others for {BUSY_TIMEOUT_S:.0f} s: try again"
                ) from error
        time.sleep(0.001)


def _postgresql_engine(url: URL, **options: Any) -> Engine:
    query = dict(url.query)
    query.setdefault("connect_timeout", str(_CONNECT_TIMEOUT_S))
    try:
        return create_engine(url.set(query=query), hide_parameters=True, **options)
    except ImportError as error:
        raise FailedPrecondition(
            "PostgreSQL needs psycopg, which cannot be imported: install snaploader[postgresql]"
        ) from error


def _session(statements: str) -> Callable[[Any, object], None]:
    def set_up(connection: Any, _record: object) -> None:
        was_autocommit = connection.autocommit
        connection.autocommit = True
        connection.execute(statements)
        connection.autocommit = was_autocommit

    return set_up
