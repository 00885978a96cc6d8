"""The schema's versions: found out with one query, and brought up to date by Alembic's migrations.

Alembic is imported only when there is something to do.
"""

from __future__ import annotations

import os

from sqlalchemy import Connection, Engine, inspect, text

from snaploader.errors import FailedPrecondition
from snaploader.workspace.catalog import engines
from snaploader.workspace.catalog.engines import POSTGRESQL, shown

HEAD = "0003"
"""Revision of the schema that this library reads and writes."""

MIGRATIONS = os.path.join(os.path.dirname(__file__), "migrations")
"""Alembic's folder of migrations."""

_MIGRATION_LOCK = 0x536E61705F6D6967
"""Key of the advisory lock under which PostgreSQL's schema changes: "Snap_mig"."""


def upgrade(engine: Engine, *, migrations: str = MIGRATIONS, head: str = HEAD) -> None:
    """Bring the schema to revision `head`, in one transaction that others wait for."""
    with engine.connect() as connection:
        if engines.when_free(lambda: _revision(connection)) == head:
            return
    with engines.writing(engine) as connection, connection.begin():
        if engine.dialect.name == POSTGRESQL:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL lock_timeout = '10min'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        revision = _revision(connection)
        if revision != head:
            _migrate(connection, revision, migrations, head)


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision, or None when there is no schema."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _migrate(connection: Connection, revision: str | None, migrations: str, head: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", migrations.replace("%", "%%"))
    known = {each.revision for each in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise FailedPrecondition(
            f"catalog {shown(connection.engine.url)} has schema {revision!r}, and this library knows up to "
            f"{head!r}: upgrade snaploader on this host, or name another database"
        )
    if revision is None and inspect(connection).has_table("workspaces"):
        raise FailedPrecondition(
            f"{shown(connection.engine.url)} has a table 'workspaces' that is no catalog's: "
            "name another database"
        )
    command.upgrade(config, head)
