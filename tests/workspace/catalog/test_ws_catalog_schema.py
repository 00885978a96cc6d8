"""The schema: made, brought up to date and recognised."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from catalog_data import NOON, add, later, workspace
from sqlalchemy import MetaData, UniqueConstraint, create_engine, inspect, text

from snaploader.errors import FailedPrecondition
from snaploader.workspace.catalog import Catalog, engines, migrate, tables
from snaploader.workspace.catalog.engines import parse_address
from snaploader.workspace.catalog.reader import HostState
from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY, Policy


def _described(catalog: Catalog) -> dict[str, Any]:
    """All that the database says of its tables."""
    with catalog._engine.connect() as connection:
        inspector = inspect(connection)
        return {
            name: {
                "columns": [
                    (each["name"], str(each["type"]), each["nullable"])
                    for each in inspector.get_columns(name)
                ],
                "key": inspector.get_pk_constraint(name),
                "foreign keys": sorted(map(str, inspector.get_foreign_keys(name))),
                "unique": sorted(map(str, inspector.get_unique_constraints(name))),
                "checks": sorted(str(each["sqltext"]) for each in inspector.get_check_constraints(name)),
                "check names": sorted(str(each["name"]) for each in inspector.get_check_constraints(name)),
                "indexes": sorted(map(str, inspector.get_indexes(name))),
            }
            for name in inspector.get_table_names()
            if name not in {"alembic_version", "pristine_policies"}
        }


def test_migrations_make_what_the_tables_say(catalog: Catalog, empty_catalog_url: str) -> None:
    with Catalog(parse_address(empty_catalog_url)) as declared:
        with declared._engine.begin() as connection:
            tables.metadata.create_all(connection)
        assert _described(catalog) == _described(declared)


def test_numbers_of_rows_are_not_used_again_on_sqlite(catalog: Catalog) -> None:
    if catalog.dialect != "sqlite":
        return  # PostgreSQL's sequences never go back
    query = text("SELECT sql FROM sqlite_master WHERE name = :name")
    with catalog._engine.connect() as connection:
        for name in ("versions", "events", "runs"):
            assert "AUTOINCREMENT" in connection.execute(query, {"name": name}).scalar_one()


def test_the_newest_revision_is_the_one_that_is_expected() -> None:
    config = Config()
    config.set_main_option("script_location", migrate.MIGRATIONS)
    assert ScriptDirectory.from_config(config).get_current_head() == migrate.HEAD


def test_an_empty_database_becomes_a_catalog(empty_catalog_url: str) -> None:
    with Catalog.open(empty_catalog_url) as catalog, catalog.reading() as reader:
        assert reader.policy(DEFAULT_POLICY) == Policy()
        assert reader.workspaces() == []


def test_opening_it_again_finds_what_was_kept(empty_catalog_url: str) -> None:
    with Catalog.open(empty_catalog_url) as catalog:
        add(catalog, workspace())
    with Catalog.open(empty_catalog_url) as catalog, catalog.reading() as reader:
        assert reader.workspace("ws") == workspace()


@pytest.mark.slow
def test_an_up_to_date_catalog_opens_without_alembic(catalog_url: str) -> None:
    program = (
        "import sys; from snaploader.workspace.catalog import Catalog; "
        "Catalog.open(sys.argv[1]).close(); sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, catalog_url], check=True)


DATA_OF_REVISION = {
    "0001": (
        "INSERT INTO owners VALUES ('eve', 'suspended')",
        """INSERT INTO workspaces (id, host, state, owner, base, policy, autostart_schedule, current_snapshot,
           base_snapshot, last_version, created_at, last_used_at, due_at, spec) VALUES
           ('old', 'host-a', 'stopped', 'eve', 'debian', 'default', '', 's', '', 1, 1772366400000000,
           1772366400000000, NULL, '{"command":["sh"],"environment":{},"volumes":[],"readiness":
           {"kind":"none","target":"","interval_s":0.1,"timeout_s":60.0}}')""",
        """INSERT INTO snapshots VALUES ('s', 'old', 'r', 'version', 'Full', 'manual', 'complete', 'first',
           '', '', false, 5, 1772366400000000)""",
        "INSERT INTO versions VALUES (1, 'old', 1, 's', 'first', 1772366400000000)",
        "INSERT INTO events VALUES (1, 'old', 'version_create', '{\"version\":1}', 1772366400000000)",
        "INSERT INTO runs VALUES (1, 'old', 'start', 'succeeded', 1, 2, NULL, 'user', '')",
        "INSERT INTO hosts (name, state_id, state_directory) VALUES ('host-a', 'id', '/state')",
    ),
}
"""What a catalog of each revision may hold. A new revision adds an entry."""

UNRELEASED = {
    "0002": (
        """CREATE TABLE ticks (host TEXT {} NOT NULL, latest_at BIGINT NOT NULL, previous_at BIGINT,
           CONSTRAINT ticks_key PRIMARY KEY (host))""",
        "INSERT INTO ticks VALUES ('host-a', 1772366400000000, NULL)",
        "UPDATE alembic_version SET version_num = '0002'",
    )
}
"""What revisions that no release had added to 0001, and what a catalog may hold of it."""
UNRELEASED["0003"] = (
    *UNRELEASED["0002"],
    "ALTER TABLE hosts ADD COLUMN state_place TEXT",
    "UPDATE hosts SET state_place = '{{\"inode\":1}}'",
    "INSERT INTO hosts (name, state_id, state_directory) VALUES ('host-b', 'other', '/state')",
    "UPDATE alembic_version SET version_num = '0003'",
)


def _revisions() -> list[str]:
    config = Config()
    config.set_main_option("script_location", migrate.MIGRATIONS)
    return [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]


def _make_catalog(url: str, revision: str) -> None:
    """Make a catalog of a revision, without auxiliary tables unless it counts them."""
    with Catalog(parse_address(url)) as old:
        engines.prepare_database(old._engine)
        migrate.upgrade(old._engine, head="0001" if revision in UNRELEASED else revision)
        collation = 'COLLATE "C"' if old.dialect == "postgresql" else ""
        with old._engine.begin() as connection:
            for table in tables.AUXILIARY:
                table.drop(connection)
            for statement in DATA_OF_REVISION["0001" if revision in UNRELEASED else revision]:
                connection.exec_driver_sql(statement)
            for statement in UNRELEASED.get(revision, ()):
                connection.exec_driver_sql(statement.format(collation))


@pytest.mark.parametrize("revision", [*_revisions(), *UNRELEASED])
def test_a_catalog_of_any_revision_is_brought_up_to_date_with_its_data(
    empty_catalog_url: str, revision: str
) -> None:
    _make_catalog(empty_catalog_url, revision)
    with Catalog.open(empty_catalog_url) as catalog, catalog.reading() as reader:
        found = reader.workspace("old")
        assert (found.state, found.owner, found.spec.command) == (WorkspaceState.STOPPED, "eve", ("sh",))
        assert found.created_at == NOON
        assert [version.display_name for version in reader.versions("old")] == ["first"]
        assert [item.payload for item in reader.events("old")] == [{"version": 1}]
        assert reader.latest_run("old") is not None
    with Catalog.open(empty_catalog_url) as catalog, catalog.transaction() as transaction:
        host = transaction.host_state("host-a")
        assert host is not None
        assert (host.state_id, host.state_directory) == ("id", "/state")
        assert host.place == ({"inode": 1} if revision == "0003" else None)
        other = transaction.host_state("host-b")
        assert (other is not None) == (revision == "0003")
        assert other is None or other.place is None
        assert transaction.note_tick("host-a", later(minutes=1)).agree is (revision in UNRELEASED)


@pytest.mark.parametrize("revision", [*_revisions(), *UNRELEASED])
def test_an_old_catalog_has_the_tables_of_a_new_one(
    catalog: Catalog, empty_catalog_url: str, revision: str
) -> None:
    _make_catalog(empty_catalog_url, revision)
    with Catalog.open(empty_catalog_url) as brought:
        assert _described(brought) == _described(catalog)
        assert _revision_of(brought) == migrate.HEAD


@pytest.mark.parametrize("revision", [*_revisions(), *UNRELEASED])
def test_many_may_open_an_old_catalog_at_once(empty_catalog_url: str, revision: str) -> None:
    _make_catalog(empty_catalog_url, revision)
    together = threading.Barrier(4)

    def open_it(_: int) -> HostState | None:
        together.wait(60)
        with Catalog.open(empty_catalog_url) as catalog, catalog.reading() as reader:
            return reader.host_state("host-a")

    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(open_it, range(4)))
    assert states == [HostState("host-a", "id", "/state", {"inode": 1} if revision == "0003" else None)] * 4


def test_what_came_after_the_first_release_is_not_counted(catalog: Catalog) -> None:
    # The first release refuses any other revision; and it reads and writes no other tables than these.
    assert _revision_of(catalog) == "0001"
    described = _described(catalog)
    assert described.keys() - {table.name for table in tables.AUXILIARY} == {
        "events",
        "hosts",
        "owners",
        "policies",
        "runs",
        "snapshots",
        "versions",
        "workspaces",
    }
    assert [column[0] for column in described["hosts"]["columns"]] == ["name", "state_id", "state_directory"]
    for table in tables.AUXILIARY:
        assert not table.foreign_keys


def test_a_place_counts_only_for_the_state_directory_that_it_was_recorded_for(catalog: Catalog) -> None:
    claimed = HostState("host-a", "id", "/state", {"inode": 1})
    with catalog.transaction() as transaction:
        transaction.claim_host(claimed)
        assert transaction.host_state("host-a") == claimed
    with catalog._engine.begin() as connection:  # as an earlier release does
        connection.execute(text("UPDATE hosts SET state_id = 'another'"))
    with catalog.transaction() as transaction:
        assert transaction.host_state("host-a") == HostState("host-a", "another", "/state")
        transaction.claim_host(claimed._replace(state_id="another", place={"inode": 2}))
        assert transaction.host_state("host-a") == HostState("host-a", "another", "/state", {"inode": 2})


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """A copy of the migrations that the test can add to."""
    folder = tmp_path / "100% migrations"
    (folder / "versions").mkdir(parents=True)
    for path in Path(migrate.MIGRATIONS).rglob("*.py"):
        copy = folder / path.relative_to(migrate.MIGRATIONS)
        copy.write_bytes(path.read_bytes())
    return folder


def _add_revision(migrations: Path, body: str) -> None:
    (migrations / "versions" / "v9999_next.py").write_text(
        f"from alembic import op\nrevision = '9999'\ndown_revision = {migrate.HEAD!r}\n"
        f"def upgrade():\n    {body}\n"
    )


def test_the_next_revision_is_applied(catalog: Catalog, migrations: Path) -> None:
    add(catalog, workspace())
    _add_revision(migrations, "op.execute(\"UPDATE workspaces SET base = 'debian'\")")
    migrate.upgrade(catalog._engine, migrations=str(migrations), head="9999")
    with catalog.reading() as reader:
        assert reader.workspace("ws").base == "debian"
    _set_revision(catalog, migrate.HEAD)  # what other tests of this database expect


def test_a_migration_that_fails_leaves_the_old_schema(catalog: Catalog, migrations: Path) -> None:
    _add_revision(migrations, "op.execute('DROP TABLE runs'); op.execute('SELECT nonsense')")
    with pytest.raises(Exception, match="nonsense"):
        migrate.upgrade(catalog._engine, migrations=str(migrations), head="9999")
    with catalog._engine.connect() as connection:
        assert inspect(connection).has_table("runs")
    assert _revision_of(catalog) == migrate.HEAD


def test_a_newer_schema_is_refused_with_what_to_do(empty_catalog_url: str) -> None:
    with Catalog.open(empty_catalog_url) as catalog:
        _set_revision(catalog, "0815")
    with pytest.raises(FailedPrecondition, match=r"schema '0815'.*upgrade snaploader on this host"):
        Catalog.open(empty_catalog_url)


def test_tables_of_another_program_are_left_alone(empty_catalog_url: str) -> None:
    engine = create_engine(parse_address(empty_catalog_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE workspaces (color TEXT)"))
    with pytest.raises(FailedPrecondition, match="no catalog's: name another database"):
        Catalog.open(empty_catalog_url)
    found = MetaData()
    found.reflect(engine)
    engine.dispose()
    assert list(found.tables) == ["workspaces"]


def test_every_foreign_key_has_an_index() -> None:
    for table in tables.metadata.sorted_tables:
        unique = (each for each in table.constraints if isinstance(each, UniqueConstraint))
        indexed = {next(iter(each.columns)).name for each in (*table.indexes, *unique)}
        for key in table.foreign_keys:
            assert key.parent.name in indexed, f"{table.name}.{key.parent.name}"


def test_the_page_on_the_format_names_every_column_and_the_newest_revision() -> None:
    page = (Path(__file__).parents[3] / "docs/formats/catalog.md").read_text(encoding="utf-8")
    for table in tables.metadata.sorted_tables:
        described = page[page.index(f"**{table.name}") :].partition("\n**")[0].partition("\n## ")[0]
        for column in table.columns:
            assert f"`{column.name}`" in described, f"{table.name}.{column.name}"
    assert f"revision `{migrate.HEAD}`" in page


def _revision_of(catalog: Catalog) -> str:
    with catalog._engine.connect() as connection:
        return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one())


def _set_revision(catalog: Catalog, revision: str) -> None:
    with catalog._engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})


@pytest.mark.parametrize("address", ["{}", "sqlite:///{}", "sqlite:///file:{}?uri=true"])
def test_an_sqlite_catalog_is_for_its_owner_only_and_in_wal_mode(tmp_path: Path, address: str) -> None:
    path = tmp_path / "catalog.db"
    umask = os.umask(0)
    try:
        opened = Catalog.open(address.format(path))
    finally:
        os.umask(umask)
    with opened as catalog:
        add(catalog, workspace())
        modes = {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()}
        assert modes == dict.fromkeys(("catalog.db", "catalog.db-wal", "catalog.db-shm"), 0o600)
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.close()
    assert [each.name for each in tmp_path.iterdir()] == ["catalog.db"]  # the log was merged and removed
