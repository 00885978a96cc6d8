"""Errors of databases, in the one place that makes them errors of this library.

Messages hold what the database said, never a statement, its parameters or a password.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import exc

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
)

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
    """Raise typed errors, chained, for every error of a database that leaves the block.

    Args:
        where: Which catalog, as in "catalog sqlite:////var/lib/catalog.db".
    """
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
    """The typed error for one of SQLAlchemy."""
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


def is_busy(error: BaseException) -> bool:
    """Whether SQLite refused because another connection holds the database."""
    found = error.orig if isinstance(error, exc.DBAPIError) else error
    return isinstance(found, sqlite3.Error) and _primary_code(found) in {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
    }


def _typed(
    kind: type[SnaploaderError], where: str, reason: str, advice: str | None = None
) -> SnaploaderError:
    advice = advice or _ADVICE.get(kind)
    return kind(f"{where}: {reason}" + (f" ({advice})" if advice else ""))


def _from_sqlite(error: sqlite3.Error, where: str, reason: str) -> SnaploaderError:
    if _primary_code(error) != sqlite3.SQLITE_IOERR:
        return _typed(_SQLITE.get(_primary_code(error), Internal), where, reason)
    if _code(error) in _SQLITE_CANNOT_WRITE:
        advice = "the catalog could not be written: make room on its disk, or look at the disk"
        return _typed(ResourceExhausted, where, reason, advice)
    if _code(error) in _SQLITE_READ_WRONG:
        return _typed(DataLoss, where, reason)
    return _typed(Unavailable, where, reason, "look at its disk, and try again")


def _primary_code(error: BaseException) -> int:
    return _code(error) & 0xFF


def _code(error: BaseException) -> int:
    """The extended result code; 0 where SQLite was not asked."""
    return int(getattr(error, "sqlite_errorcode", 0))


def _postgresql_kind(error: exc.DBAPIError, reason: str) -> type[SnaploaderError]:
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return next((kind for prefix, kind in _SQLSTATE if state.startswith(prefix)), Internal)
    if not error.connection_invalidated and not isinstance(error, exc.OperationalError):
        return Internal
    # libpq could not connect, or lost the connection; it tells what the server said, but not its SQLSTATE.
    return next((kind for words, kind in _CONNECTING if words in reason), Unavailable)
