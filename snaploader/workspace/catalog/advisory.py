"""Locks on workspaces between hosts: PostgreSQL's advisory locks, each held by a connection of its own.

PostgreSQL lets go of them when the connection ends, however it does. See "Advisory Locks" in its manual.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from snaploader.workspace.catalog.faults import translate_database_errors

_LOOK_EVERY_S = 0.25
"""How often a waiting one looks whether it is called off."""

_LOCK_NOT_AVAILABLE = "55P03"

_log = logging.getLogger(__name__)

_inherited: list[Connection] = []
"""Connections of a parent process that hold its locks."""


@contextmanager
def advisory_lock(
    engine: Engine,
    name: str,
    where: str,
    *,
    wait_s: float | None,
    cancelled: threading.Event | None = None,
) -> Iterator[bool]:
    """Hold the lock of that name in the database of `engine`; whether it is held.

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
