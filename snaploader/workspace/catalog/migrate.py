"""The schema's versions: found out, and brought up to date by Alembic's migrations; and auxiliary tables.

Alembic is imported only when there is something to do. Auxiliary tables are not counted in the revision, so
that an earlier release, which does not know them, goes on with the catalog.
"""

from __future__ import annotations

import os

from sqlalchemy import Connection, Engine, inspect, text

from snaploader.errors import FailedPrecondition
from snaploader.workspace.catalog import engines, tables
from snaploader.workspace.catalog.engines import POSTGRESQL, shown

HEAD = "0001"
"""Revision of the schema that this library reads and writes."""

_UNRELEASED = ("0002", "0003")
"""Revisions that no release had: they counted what is in auxiliary tables now. The next one is "0004"."""

MIGRATIONS = os.path.join(os.path.dirname(__file__), "migrations")
"""Alembic's folder of migrations."""

_MIGRATION_LOCK = 0x536E61705F6D6967
"""Key of the advisory lock under which PostgreSQL's schema changes: "Snap_mig"."""


def upgrade(engine: Engine, *, migrations: str = MIGRATIONS, head: str = HEAD) -> None:
    """Bring the schema to revision `head`, with all tables, in one transaction that others wait for."""
    with engine.connect() as connection:
        if engines.when_free(lambda: _revision(connection) == head) and (
            engines.is_read_only(engine.url) or engines.when_free(lambda: _has_auxiliary(connection))
        ):
            return
    with engines.writing(engine) as connection, connection.begin():
        if engine.dialect.name == POSTGRESQL:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL lock_timeout = '10min'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        revision = _revision(connection)
        if revision in _UNRELEASED:
            _take_back(connection, revision)
            revision = "0001"
        if revision != head:
            _migrate(connection, revision, migrations, head)
        tables.metadata.create_all(connection, tables=tables.AUXILIARY)


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision, or None when there is no schema."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _has_auxiliary(connection: Connection) -> bool:
    inspector = inspect(connection)
    return all(inspector.has_table(table.name) for table in tables.AUXILIARY)


def _take_back(connection: Connection, revision: str) -> None:
    """Bring an unreleased revision to 0001, with all that it holds."""
    tables.metadata.create_all(connection, tables=tables.AUXILIARY)
    if revision == "0003":
        places = "SELECT name, state_id, state_place FROM hosts WHERE state_place IS NOT NULL"
        connection.execute(text(f"INSERT INTO host_places (host, state_id, place) {places}"))
        connection.execute(text("ALTER TABLE hosts DROP COLUMN state_place"))
    connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))


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
