"""Where a catalog is, and connections to its database, set up so that both kinds behave alike.

SQLite: one writer at a time, which says so from its first statement on (BEGIN IMMEDIATE), so that no
transaction has to be given up half-way; readers see the state of their first statement and wait for
nobody. `synchronous=FULL`: what is committed survives a power loss, at the cost of one fsync a commit.

PostgreSQL: READ COMMITTED and row locks for writers, REPEATABLE READ for readers. Timeouts bound how long a
statement, a lock and an idle transaction last. Workspaces are locked between hosts by advisory locks, each
held by a connection of its own: PostgreSQL lets go of them when the connection ends, however it does. See
"Advisory Locks" in its manual.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from snaploader.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    translate_os_errors,
)
from snaploader.workspace.catalog.faults import is_busy, translate_database_errors

SQLITE = "sqlite"
POSTGRESQL = "postgresql"

_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
T = TypeVar("T")

_SECRETS = {"password", "sslpassword", "oauth_client_secret"}
"""Parameters of a connection string that nobody else may read."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_NEARLY_A_URL = re.compile(
    r"\s*(?:[a-z][a-z0-9+.-]+:/|(?:postgres|sqlite)[a-z0-9+]*(?::|//))|.*\bpassword\s*=",
    re.IGNORECASE | re.DOTALL,
)
"""What a URL becomes by a slip, and libpq's `password=…`: as a path it would be repeated in every message."""
_YES = frozenset({"true", "yes", "on", "y", "t", "1"})
"""What SQLAlchemy takes for `uri=true`."""
_NEVER_CREATED = ("ro", "rw")
"""Modes of SQLite's URIs in which a file must be there."""
_USER = re.compile(r"[^/]*:[^/]*@")

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for others, and a reader for a database that is being recovered."""

_PATIENCE_MS = 10
"""How long SQLite itself waits for others. It sleeps longer with every try, so who has waited longest would
come last; asking anew after this little, as `when_free` does, keeps it fair."""

_POOL_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10

_SQLITE_SESSION = (
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = FULL",  # the first to look at the file, with the patience that it was opened with
    f"PRAGMA busy_timeout = {_PATIENCE_MS}",
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

_LOOK_EVERY_S = 0.25
"""How often whoever waits for a lock checks whether the waiting was cancelled."""

_LOCK_NOT_AVAILABLE = "55P03"

_log = logging.getLogger(__name__)

_inherited: list[Connection] = []
"""Connections of a parent process that hold its locks."""


def parse_address(address: str | os.PathLike[str]) -> URL:
    """Return the URL of a catalog; text that looks like no URL is a path.

    Raises:
        InvalidArgument: no such kind of database, no file named, or no URL. The message repeats no password.
    """
    if not isinstance(address, str):
        return _of_file(os.fspath(address))
    scheme, is_url, _ = address.partition("://")
    if not is_url and not _NEARLY_A_URL.match(address):
        return _of_file(address)
    if not is_url or not _SCHEME.fullmatch(scheme):
        raise InvalidArgument(
            "this is neither the URL nor the path of a catalog: write sqlite:///PATH, postgresql://HOST/NAME "
            "or the path of a file with its folder, such as ./NAME"
        )
    if scheme not in _DRIVERS:
        raise InvalidArgument(
            f"{scheme[:40]!r} is no database for a catalog: name a file, sqlite:///PATH or postgresql://HOST/NAME"
        )
    try:
        url = make_url(address).set(drivername=_DRIVERS[scheme])
    except (ArgumentError, ValueError):  # their text may repeat the password
        raise _unreadable(scheme) from None
    if url.get_backend_name() == POSTGRESQL and ("@" in (url.host or "") or _USER.match(url.database or "")):
        raise _unreadable(scheme)  # a password would be taken for something else, and shown
    if url.get_backend_name() == SQLITE:
        _check_file("" if url.query.get("mode") == "memory" else file_of(url))
    return url


def _unreadable(scheme: str) -> InvalidArgument:
    return InvalidArgument(
        f"this {scheme} URL cannot be read: write {scheme}://…, with special characters of user and "
        "password percent-encoded"
    )


def shown(url: URL) -> str:
    """Return the URL without its secrets, for messages and logs."""
    query: Mapping[str, str | tuple[str, ...]] = {
        name: "***" if name in _SECRETS else value for name, value in url.query.items()
    }
    return url.set(query=query).render_as_string(hide_password=True)


def file_of(url: URL) -> str:
    """Return the path of the file that an SQLite URL names, be it as `file:PATH` with `uri=true`."""
    path = url.database or ""
    if not _is_uri(url):
        return path
    path = re.split("[?#]", path.removeprefix("file:"))[0]
    if path.startswith("//"):  # and a host, which can only be this one
        path = "/" + path[2:].partition("/")[2]
    return unquote(path)


def _is_uri(url: URL) -> bool:
    return (url.database or "").startswith("file:") and str(url.query.get("uri")).lower() in _YES


def _of_file(path: str | bytes) -> URL:
    if not isinstance(path, str):
        raise TypeError("the path of a catalog must be a str")
    _check_file(path)
    return URL.create(SQLITE, database=os.path.abspath(path))


def _check_file(path: str | None) -> None:
    if not path or ":memory:" in path:
        raise InvalidArgument(
            "a catalog needs a file: name one, as in sqlite:////var/lib/snaploader/catalog.db"
        )
    if "\0" in path:
        raise InvalidArgument(f"{path[:80]!r} is no path")


def make_engine(url: URL) -> Engine:
    """Make an engine for the catalog's transactions; no connection is opened.

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
    """Make an engine for session locks on PostgreSQL: each of its connections is opened for one lock."""
    engine = _postgresql_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    event.listen(engine, "connect", _session(_POSTGRESQL_LOCK_SESSION))
    return engine


def writing(engine: Engine) -> Connection:
    """Return a connection whose next transaction may write."""
    return engine.connect().execution_options(**{_WRITES: True})


def reading(engine: Engine) -> Connection:
    """Return a connection whose next transaction reads one consistent state."""
    connection = engine.connect()
    if engine.dialect.name == SQLITE:
        return connection
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def prepare_database(engine: Engine) -> None:
    """Create an SQLite file that is not there, readable by its owner alone, and switch it to WAL mode.

    Raises:
        NotFound: its folder is not there.
        FailedPrecondition: its file system cannot share memory between processes.
    """
    if engine.dialect.name != SQLITE:
        return
    if not (_is_uri(engine.url) and engine.url.query.get("mode") in _NEVER_CREATED):
        _create_file(file_of(engine.url))
    with contextlib.closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        # Each may have to wait for others that open the file for the first time too: SQLite's own
        # waiting does not cover the change of the journal's mode.
        when_free(lambda: cursor.execute("PRAGMA journal_mode = WAL"))
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
            when_free(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        else:
            connection.exec_driver_sql("BEGIN")

    return engine


def when_free(work: Callable[[], T]) -> T:
    """Do `work` once no other connection of SQLite is in its way; DeadlineExceeded after 30 s.

    Args:
        work: One statement, which has done nothing when it is refused.
    """
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


@contextmanager
def advisory_lock(
    engine: Engine,
    name: str,
    where: str,
    *,
    wait_s: float | None,
    cancelled: threading.Event | None = None,
) -> Iterator[bool]:
    """Hold the lock of that name in the database of `engine`; the block is told whether it is held.

    Waiting ones are served in the order in which they came. Not reentrant.

    Args:
        where: Names the catalog in errors.
        wait_s: How long to wait; 0: not at all; None: for ever.
        cancelled: Ends the waiting when set.
    """
    key = _key(name)
    process = os.getpid()
    with translate_database_errors(where):
        connection = engine.connect()
    try:
        with translate_database_errors(where):
            held = _acquire(connection, key, wait_s, cancelled)
        yield held
        if held and os.getpid() == process:
            _release(connection, key, name)
    finally:
        if os.getpid() == process:
            connection.close()
        else:
            # A forked child speaks on its parent's connection neither now nor by its destructor.
            _inherited.append(connection)


def _key(name: str) -> int:
    """64 bits of a hash: two names that share them merely wait for each other."""
    digest = hashlib.blake2b(f"snaploader workspace {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _acquire(
    connection: Connection, key: int, wait_s: float | None, cancelled: threading.Event | None
) -> bool:
    if connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar_one():
        return True
    give_up_at = None if wait_s is None else time.monotonic() + wait_s
    while not (cancelled is not None and cancelled.is_set()):
        left_s = _LOOK_EVERY_S if give_up_at is None else give_up_at - time.monotonic()
        if left_s <= 0:
            return False
        if _wait(connection, key, min(left_s, _LOOK_EVERY_S)):
            return True
    return False


def _wait(connection: Connection, key: int, timeout_s: float) -> bool:
    """Wait in PostgreSQL's own queue, for a bounded time."""
    connection.exec_driver_sql(f"SET lock_timeout = {max(1, round(timeout_s * 1000))}")
    try:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def _release(connection: Connection, key: int, name: str) -> None:
    try:
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
    except SQLAlchemyError:
        # The connection is gone, and the lock with it. Whoever held it finds out by the operation's token.
        _log.warning("the database let go of the lock of %s before its time", name, exc_info=True)
