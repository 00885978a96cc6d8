"""Where a catalog is, connections to its database and its errors: all by which the two kinds differ.

SQLite: one writer at a time, which says so from its first statement on (BEGIN IMMEDIATE), so that no
transaction has to be given up half-way; readers see the state of their first statement and wait for
nobody. `synchronous=FULL`: what is committed survives a power loss, at the cost of one fsync a commit.

PostgreSQL: READ COMMITTED and row locks for writers, REPEATABLE READ for readers. Timeouts bound how long a
statement, a lock and an idle transaction last. Workspaces are locked between hosts by advisory locks, each
held by a connection of its own: PostgreSQL lets go of them when the connection ends, however it does. See
"Advisory Locks" in its manual.

Messages of errors hold what the database said, never a statement, its parameters or a password.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc, make_url, text

from snaploader.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
    Unauthenticated,
    Unavailable,
    translate_os_errors,
)

SQLITE = "sqlite"
POSTGRESQL = "postgresql"
T = TypeVar("T")

_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_SECRETS = {"password", "sslpassword", "oauth_client_secret"}
"""Parameters of a connection string that nobody else may read."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_NEARLY_A_URL = re.compile(
    r"\s*(?:[a-z][a-z0-9+.-]+:/|(?:postgres|sqlite)[a-z0-9+]*(?::|//))|.*\bpassword\s*=",
    re.IGNORECASE | re.DOTALL,
)
"""What a URL becomes by a slip, and libpq's `password=…`: as a path it would be repeated in every message."""
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

_log = logging.getLogger(__name__)

_inherited: list[Connection] = []
"""Connections of a parent process that hold its locks."""


def parse_address(address: str | os.PathLike[str]) -> URL:
    """Return the URL of a catalog; text that looks like no URL is a path. No error repeats a password."""
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
    except (exc.ArgumentError, ValueError):  # their text may repeat the password
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


def is_read_only(url: URL) -> bool:
    """Whether an SQLite file may only be read, as its URL says."""
    return _is_uri(url) and url.query.get("mode") == "ro"


def _is_uri(url: URL) -> bool:
    says_so = str(url.query.get("uri")).lower() in {"true", "yes", "on", "y", "t", "1"}  # as in SQLAlchemy
    return says_so and (url.database or "").startswith("file:")


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
    """Make an engine for the catalog's transactions; no connection is opened."""
    if url.get_backend_name() == SQLITE:
        return _sqlite_engine(url)
    return _postgresql_engine(
        url,
        _POSTGRESQL_SESSION,
        isolation_level="READ COMMITTED",
        pool_size=5,
        max_overflow=15,
        pool_timeout=_POOL_TIMEOUT_S,
        pool_pre_ping=True,
    )


def make_lock_engine(url: URL) -> Engine:
    """Make an engine for session locks on PostgreSQL: each of its connections is opened for one lock."""
    return _postgresql_engine(url, _POSTGRESQL_LOCK_SESSION, poolclass=NullPool, isolation_level="AUTOCOMMIT")


def writing(engine: Engine) -> Connection:
    return engine.connect().execution_options(**{_WRITES: True})


def reading(engine: Engine) -> Connection:
    """Return a connection whose next transaction reads one consistent state."""
    connection = engine.connect()
    if engine.dialect.name == SQLITE:
        return connection
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def prepare_database(engine: Engine) -> None:
    """Create an SQLite file that is not there, readable by its owner alone, and switch it to WAL mode."""
    if engine.dialect.name != SQLITE:
        return
    if not (_is_uri(engine.url) and engine.url.query.get("mode") in ("ro", "rw")):  # where it must be there
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
    """Do `work`, one statement, once no other connection of SQLite is in its way, for 30 s at most."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return work()
        except Exception as error:
            if not _is_busy(error):
                raise
            if time.monotonic() > give_up_at:
                raise DeadlineExceeded(
                    f"the catalog was held by others for {BUSY_TIMEOUT_S:.0f} s: try again"
                ) from error
        time.sleep(0.001)


def _postgresql_engine(url: URL, session: str, **options: Any) -> Engine:
    query = {"connect_timeout": str(_CONNECT_TIMEOUT_S), **url.query}
    try:
        engine = create_engine(url.set(query=query), hide_parameters=True, **options)
    except ImportError as error:
        raise FailedPrecondition(
            "PostgreSQL needs psycopg, which cannot be imported: install snaploader[postgresql]"
        ) from error

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        was_autocommit = connection.autocommit
        connection.autocommit = True
        connection.execute(session)
        connection.autocommit = was_autocommit

    return engine


@contextmanager
def advisory_lock(
    engine: Engine, name: str, where: str, *, wait_s: float | None, cancelled: threading.Event | None = None
) -> Iterator[bool]:
    """See `Catalog.lock`. Waiting ones are served in the order in which they came."""
    # Two names that share 64 bits of a hash merely wait for each other.
    digest = hashlib.blake2b(f"snaploader workspace {name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "big", signed=True)
    process = os.getpid()
    with translate_database_errors(where):
        connection = engine.connect()
    try:
        with translate_database_errors(where):
            held = _acquire(connection, key, wait_s, cancelled)
        yield held
        if held and os.getpid() == process:
            try:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
            except exc.SQLAlchemyError:
                # The connection is gone, and the lock with it. Its holder finds out by the operation's token.
                _log.warning("the database let go of the lock of %s before its time", name, exc_info=True)
    finally:
        if os.getpid() == process:
            connection.close()
        else:
            # A forked child speaks on its parent's connection neither now nor by its destructor.
            _inherited.append(connection)


def _acquire(
    connection: Connection, key: int, wait_s: float | None, cancelled: threading.Event | None
) -> bool:
    if connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar_one():
        return True
    give_up_at = math.inf if wait_s is None else time.monotonic() + wait_s
    while not (cancelled is not None and cancelled.is_set()):
        left_s = min(give_up_at - time.monotonic(), _LOOK_EVERY_S)
        if left_s <= 0:
            return False
        connection.exec_driver_sql(f"SET lock_timeout = {max(1, round(left_s * 1000))}")
        try:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
            return True
        except exc.DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available
                raise
    return False


_SQLITE: dict[int, type[SnaploaderError]] = {
    sqlite3.SQLITE_BUSY: DeadlineExceeded,
    sqlite3.SQLITE_LOCKED: DeadlineExceeded,
    sqlite3.SQLITE_PROTOCOL: DeadlineExceeded,
    sqlite3.SQLITE_FULL: ResourceExhausted,
    sqlite3.SQLITE_NOMEM: ResourceExhausted,
    sqlite3.SQLITE_TOOBIG: ResourceExhausted,
    sqlite3.SQLITE_CORRUPT: DataLoss,
    sqlite3.SQLITE_NOTADB: DataLoss,
    sqlite3.SQLITE_READONLY: PermissionDenied,
    sqlite3.SQLITE_PERM: PermissionDenied,
    sqlite3.SQLITE_AUTH: PermissionDenied,
    sqlite3.SQLITE_CANTOPEN: PermissionDenied,
    sqlite3.SQLITE_CONSTRAINT: FailedPrecondition,
    sqlite3.SQLITE_INTERRUPT: Cancelled,
}
"""By primary result code, the low byte of the extended one: https://sqlite.org/rescode.html"""

_SQLITE_CANNOT_WRITE = frozenset(
    {
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_DIR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
        sqlite3.SQLITE_IOERR_NOMEM,
        sqlite3.SQLITE_IOERR_SHMOPEN,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_SHMMAP,
        sqlite3.SQLITE_IOERR_MMAP,
        sqlite3.SQLITE_IOERR_GETTEMPPATH,
    }
)
"""Extended codes of SQLITE_IOERR that a full disk has, also for those who only read: the -shm file grows."""

_SQLITE_READ_WRONG = frozenset(
    {
        sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_IOERR_SHORT_READ,
        sqlite3.SQLITE_IOERR | 32 << 8,  # SQLITE_IOERR_DATA, which sqlite3 may be too old to name
        sqlite3.SQLITE_IOERR | 33 << 8,  # SQLITE_IOERR_CORRUPTFS
    }
)
"""Extended codes of SQLITE_IOERR by which what was written cannot be read."""

_SQLSTATE: tuple[tuple[str, type[SnaploaderError]], ...] = (
    ("25P03", Unavailable),  # idle_in_transaction_session_timeout
    ("25006", PermissionDenied),  # read_only_sql_transaction
    ("28", Unauthenticated),
    ("3D000", NotFound),  # no such database
    ("40", Unavailable),  # serialization_failure, deadlock_detected
    ("42501", PermissionDenied),
    ("53300", Unavailable),  # too_many_connections
    ("53", ResourceExhausted),  # disk_full, out_of_memory
    ("54", ResourceExhausted),
    ("55P03", DeadlineExceeded),  # lock_not_available
    ("57014", DeadlineExceeded),  # query_canceled: statement_timeout
    ("57", Unavailable),  # admin_shutdown, crash_shutdown, cannot_connect_now
    ("58", DataLoss),  # io_error
    ("08", Unavailable),
    ("22", InvalidArgument),
    ("23", FailedPrecondition),
    ("XX001", DataLoss),
    ("XX002", DataLoss),
)
"""By prefix of the SQLSTATE, the first that fits: PostgreSQL's appendix of error codes."""

_CONNECTING: tuple[tuple[str, type[SnaploaderError]], ...] = (
    ("authentication failed", Unauthenticated),
    ("no password supplied", Unauthenticated),
    ("no pg_hba.conf entry", Unauthenticated),
    ('role "', Unauthenticated),
    ('database "', NotFound),
)
"""By what the reason holds, where nothing else tells why a connection was refused."""

_ADVICE: dict[type[SnaploaderError], str] = {
    DeadlineExceeded: "something else holds it: try again",
    ResourceExhausted: "nothing was written; make room and try again",
    DataLoss: "restore it from a backup",
    Unavailable: "try again",
    PermissionDenied: "check who may read and write it",
    Unauthenticated: "check the user and the password",
}


@contextmanager
def translate_database_errors(where: str) -> Iterator[None]:
    """Raise typed errors, chained, for every error of a database that leaves the block, about `where`."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        mine = getattr(error, "orig", None)
        if isinstance(mine, SnaploaderError | TypeError):  # a value that a column refused
            raise mine from None
        raise from_database_error(error, where) from error
    except OverflowError as error:
        raise InvalidArgument(f"{where}: a number is beyond what databases hold") from error
    except sqlite3.Error as error:  # raised while the file is prepared
        raise _from_sqlite(error, where, str(error)) from error


def from_database_error(error: exc.SQLAlchemyError, where: str) -> SnaploaderError:
    if isinstance(error, exc.TimeoutError):
        return ResourceExhausted(
            f"{where}: all connections are in use: make fewer transactions at once", transient=True
        )
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return Internal(f"{where}: {type(error).__name__}: {error}")
    # A database's further lines repeat whole rows; a driver's say why each of several hosts did not answer.
    has_state = getattr(error.orig, "sqlstate", None) is not None
    reason = str(error.orig).strip()
    reason = reason.partition("\n")[0] if has_state else " ".join(reason.split())
    if isinstance(error.orig, sqlite3.Error):
        return _from_sqlite(error.orig, where, reason)
    return _typed(_postgresql_kind(error, reason), where, reason)


def _is_busy(error: BaseException) -> bool:
    """Whether SQLite refused because another connection holds the database."""
    found = error.orig if isinstance(error, exc.DBAPIError) else error
    return isinstance(found, sqlite3.Error) and _SQLITE.get(_code(found) & 0xFF) is DeadlineExceeded


def _typed(
    kind: type[SnaploaderError], where: str, reason: str, advice: str | None = None
) -> SnaploaderError:
    advice = advice or _ADVICE.get(kind)
    return kind(f"{where}: {reason}" + (f" ({advice})" if advice else ""))


def _from_sqlite(error: sqlite3.Error, where: str, reason: str) -> SnaploaderError:
    if _code(error) & 0xFF != sqlite3.SQLITE_IOERR:
        return _typed(_SQLITE.get(_code(error) & 0xFF, Internal), where, reason)
    if _code(error) in _SQLITE_CANNOT_WRITE:
        advice = "the catalog could not be written: make room on its disk, or look at the disk"
        return _typed(ResourceExhausted, where, reason, advice)
    if _code(error) in _SQLITE_READ_WRONG:
        return _typed(DataLoss, where, reason)
    return _typed(Unavailable, where, reason, "look at its disk, and try again")


def _code(error: BaseException) -> int:
    return int(getattr(error, "sqlite_errorcode", 0))


def _postgresql_kind(error: exc.DBAPIError, reason: str) -> type[SnaploaderError]:
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return next((kind for prefix, kind in _SQLSTATE if state.startswith(prefix)), Internal)
    if not error.connection_invalidated and not isinstance(error, exc.OperationalError):
        return Internal
    # libpq could not connect, or lost the connection; it tells what the server said, but not its SQLSTATE.
    return next((kind for words, kind in _CONNECTING if words in reason), Unavailable)
