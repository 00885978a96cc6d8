"""Errors of databases, as this library's."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from catalog_data import add, snapshot, workspace
from database import PostgreSQLServer
from sqlalchemy import exc, text

from snaploader.errors import (
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
from snaploader.workspace.catalog import Catalog, engines
from snaploader.workspace.catalog.engines import from_database_error
from snaploader.workspace.catalog.tables import AUXILIARY
from snaploader.workspace.model import OwnerStatus


def test_a_constraint_that_a_change_breaks_is_a_failed_precondition(catalog: Catalog) -> None:
    with pytest.raises(FailedPrecondition), catalog.transaction() as transaction:
        transaction._execute(text("INSERT INTO owners VALUES ('eve', 'on holiday')"))


class TestSQLite:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "catalog.db"

    @pytest.fixture
    def catalog(self, path: Path) -> Iterator[Catalog]:
        with Catalog.open(path) as catalog:
            yield catalog

    def test_a_missing_folder_is_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"there is no folder .*nowhere.*make it first"):
            Catalog.open(tmp_path / "nowhere" / "catalog.db")

    def test_a_folder_is_no_catalog(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="Is a directory"):
            Catalog.open(tmp_path)

    def test_a_file_that_is_no_database_is_data_loss_and_left_alone(self, path: Path) -> None:
        path.write_bytes(b"This is no database. " * 100)
        with pytest.raises(DataLoss, match=r"not a database.*restore it from a backup"):
            Catalog.open(path)
        assert path.read_bytes() == b"This is no database. " * 100

    def test_a_damaged_database_is_data_loss(self, path: Path) -> None:
        with Catalog.open(path) as catalog:
            add(catalog, *(workspace(f"w{number}") for number in range(50)))
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(200_000))
        with pytest.raises(DataLoss), Catalog.open(path) as catalog, catalog.reading() as reader:
            reader.workspaces()

    def test_an_empty_file_becomes_a_catalog(self, path: Path) -> None:
        path.touch()
        with Catalog.open(path) as catalog, catalog.reading() as reader:
            assert reader.workspaces() == []

    def test_a_catalog_that_may_only_be_read_is_permission_denied(self, path: Path) -> None:
        Catalog.open(path).close()
        with (
            pytest.raises(PermissionDenied, match="readonly"),
            Catalog.open(f"sqlite:///file:{path}?mode=ro&uri=true") as catalog,
            catalog.transaction() as transaction,
        ):
            transaction.add_workspace(workspace())

    def test_a_catalog_of_an_earlier_release_that_may_only_be_read_is_read(self, path: Path) -> None:
        with Catalog.open(path) as catalog:
            add(catalog, workspace())
            with catalog._engine.begin() as connection:
                for table in AUXILIARY:  # which that release did not make
                    table.drop(connection)
        with Catalog.open(f"sqlite:///file:{path}?mode=ro&uri=true") as catalog, catalog.reading() as reader:
            assert reader.workspaces() == [workspace()]

    def test_a_full_disk_leaves_the_old_state_and_a_usable_catalog(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        with _page_limit(catalog):
            with (
                pytest.raises(ResourceExhausted, match=r"full.*make room"),
                catalog.transaction() as transaction,
            ):
                for number in range(1000):
                    transaction.put_snapshot(snapshot(f"s{number}", display_name="x" * 1000))
            with catalog.reading() as reader:
                assert reader.snapshots("ws") == []
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("s", display_name="x" * 100_000))

    @pytest.mark.slow
    def test_a_file_beside_it_that_cannot_grow_is_a_full_disk_and_no_damage(self, path: Path) -> None:
        with Catalog.open(path) as catalog:
            add(catalog, workspace())
        program = f"""
import resource
from snaploader.workspace.catalog import Catalog
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with Catalog.open({str(path)!r}) as catalog, catalog.reading() as reader:
        reader.workspaces()
except Exception as error:
    print(type(error).__name__, error)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
        )
        assert re.match(r"ResourceExhausted .*disk I/O error .*make room on its disk", done.stdout), done
        assert "backup" not in done.stdout
        with Catalog.open(path) as catalog, catalog.reading() as reader:
            assert [each.id for each in reader.workspaces()] == ["ws"]

    def test_a_writer_waits_for_another_process_and_then_gives_up(
        self, catalog: Catalog, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "BUSY_TIMEOUT_S", 0.05)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(DeadlineExceeded, match="held by others"), catalog.transaction():
                pytest.fail("two may not write at once")
            with catalog.reading() as reader:
                assert reader.workspaces() == []
            other.execute("ROLLBACK")
        add(catalog, workspace())

    def test_a_writer_waits_for_another_thread_and_then_gives_up(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "BUSY_TIMEOUT_S", 0.05)
        outcome: list[object] = []

        def write() -> None:
            try:
                add(catalog, workspace())
            except DeadlineExceeded as error:
                outcome.append(error)

        with catalog.transaction():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
        assert len(outcome) == 1

    def test_a_writer_waits_until_the_other_is_done(self, catalog: Catalog, path: Path) -> None:
        done = threading.Event()
        thread = threading.Thread(target=lambda: (add(catalog, workspace()), done.set()))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            thread.start()
            assert not done.wait(0.05)
            other.execute("COMMIT")
            assert done.wait(300)
        thread.join()

    def test_a_reader_waits_for_who_has_the_file_alone(self, catalog: Catalog, path: Path) -> None:
        read = threading.Event()

        def look() -> None:
            with catalog.reading() as reader:
                assert reader.workspaces() == []
            read.set()

        catalog._engine.dispose()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN IMMEDIATE")
            thread = threading.Thread(target=look)
            thread.start()
            assert not read.wait(0.05)
        assert read.wait(300)
        thread.join()

    def test_what_is_committed_is_on_the_disk(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            connection = transaction._connection
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


@contextlib.contextmanager
def _page_limit(catalog: Catalog) -> Iterator[None]:
    """No more pages than there are, so the disk is full; the pool has one connection, which keeps it."""
    with catalog._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    yield
    with catalog._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")


class TestPostgreSQL:
    @pytest.fixture
    def url(self, postgresql: PostgreSQLServer) -> Iterator[str]:
        name = postgresql.lend_catalog()
        yield postgresql.url(name)
        postgresql.take_back(name)

    @pytest.fixture
    def catalog(self, url: str) -> Iterator[Catalog]:
        with Catalog.open(url) as catalog:
            yield catalog

    def test_a_server_that_is_not_there_is_unavailable(self, tmp_path: Path) -> None:
        with pytest.raises(Unavailable, match="No such file") as refusal:
            Catalog.open(f"postgresql://me:hunter2@/w?host={tmp_path}")
        assert "hunter2" not in str(refusal.value)

    def test_a_database_that_is_not_there_is_not_found(self, postgresql: PostgreSQLServer) -> None:
        with pytest.raises(NotFound, match='database "nowhere" does not exist'):
            Catalog.open(postgresql.url("nowhere"))

    def test_a_user_that_is_not_known_is_unauthenticated(self, postgresql: PostgreSQLServer) -> None:
        with pytest.raises(Unauthenticated, match='"stranger"'):
            Catalog.open(postgresql.url("postgres").replace("snaploader@", "stranger:hunter2@"))

    def test_a_lost_connection_is_replaced(self, catalog: Catalog, postgresql: PostgreSQLServer) -> None:
        add(catalog, workspace())
        _end_sessions(postgresql, catalog)
        with catalog.reading() as reader:
            assert reader.workspace("ws") == workspace()
        _end_sessions(postgresql, catalog)
        add(catalog, workspace("b"))

    def test_a_connection_lost_in_the_middle_is_unavailable_and_leaves_nothing(
        self, catalog: Catalog, postgresql: PostgreSQLServer
    ) -> None:
        with pytest.raises(Unavailable, match="try again"), catalog.transaction() as transaction:
            transaction.add_workspace(workspace())
            _end_sessions(postgresql, catalog)
            transaction.add_workspace(workspace("b"))
        with catalog.reading() as reader:
            assert reader.workspaces() == []

    @pytest.mark.slow
    def test_a_restarted_server_is_used_again(self) -> None:
        server = PostgreSQLServer()
        try:
            server.start()
            name = server.create_database()
            with Catalog.open(server.url(name)) as catalog:
                add(catalog, workspace())
                server.stop()
                with pytest.raises(Unavailable):
                    add(catalog, workspace("b"))
                server.start()
                add(catalog, workspace("c"))
                with catalog.reading() as reader:
                    assert [each.id for each in reader.workspaces()] == ["c", "ws"]
        finally:
            server.remove()

    def test_a_row_that_another_holds_is_waited_for_within_bounds(
        self, url: str, open_second: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch, catalog: Catalog
    ) -> None:
        add(catalog, workspace())
        quick = engines._POSTGRESQL_SESSION.replace("lock_timeout = '30s'", "lock_timeout = '50ms'")
        monkeypatch.setattr(engines, "_POSTGRESQL_SESSION", quick)
        with catalog.transaction() as transaction:
            transaction.lock_workspace("ws")
            impatient = open_second()
            with pytest.raises(DeadlineExceeded, match="lock timeout"), impatient.transaction() as other:
                other.lock_workspace("ws")

    @pytest.fixture
    def open_second(self, url: str) -> Iterator[Callable[[], Catalog]]:
        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(Catalog.open(url))

    @pytest.mark.slow
    def test_a_deadlock_is_broken_and_can_be_tried_again(self, catalog: Catalog) -> None:
        add(catalog, workspace("a"), workspace("b"))
        both = threading.Barrier(2)
        outcomes: list[str] = []

        def lock(first: str, second: str) -> None:
            try:
                with catalog.transaction() as transaction:
                    transaction.lock_workspace(first)
                    both.wait(300)
                    transaction.lock_workspace(second)
                outcomes.append("done")
            except Unavailable as error:
                outcomes.append("broken" if "deadlock" in error.message else error.message)

        threads = [threading.Thread(target=lock, args=order) for order in (("a", "b"), ("b", "a"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["broken", "done"]

    def test_a_missing_driver_names_the_extra(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(FailedPrecondition, match=r"install snaploader\[postgresql\]"):
            Catalog.open(url)


def _end_sessions(server: PostgreSQLServer, catalog: Catalog) -> None:
    name = catalog._address.database
    with contextlib.closing(server.connect()) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name]
        )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_BUSY_SNAPSHOT, DeadlineExceeded),
        (sqlite3.SQLITE_FULL, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_SHMSIZE, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_SHMMAP, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_SHMOPEN, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_WRITE, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_FSYNC, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_DIR_FSYNC, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_TRUNCATE, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_NOMEM, ResourceExhausted),
        (sqlite3.SQLITE_IOERR_READ, DataLoss),
        (sqlite3.SQLITE_IOERR_SHORT_READ, DataLoss),
        (8202, DataLoss),  # SQLITE_IOERR_DATA
        (8458, DataLoss),  # SQLITE_IOERR_CORRUPTFS
        (sqlite3.SQLITE_IOERR, Unavailable),
        (sqlite3.SQLITE_IOERR_LOCK, Unavailable),
        (sqlite3.SQLITE_CORRUPT_INDEX, DataLoss),
        (sqlite3.SQLITE_READONLY_DBMOVED, PermissionDenied),
        (sqlite3.SQLITE_CANTOPEN_ISDIR, PermissionDenied),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, FailedPrecondition),
        (sqlite3.SQLITE_MISUSE, Internal),
    ],
)
def test_codes_of_sqlite_have_a_kind(code: int, expected: type[SnaploaderError]) -> None:
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorcode = code
    translated = _translated(error)
    assert type(translated) is expected
    assert ("backup" in translated.message) == (expected is DataLoss)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("40001", Unavailable),
        ("40P01", Unavailable),
        ("55P03", DeadlineExceeded),
        ("57014", DeadlineExceeded),
        ("57P01", Unavailable),
        ("25P03", Unavailable),
        ("53100", ResourceExhausted),
        ("53300", Unavailable),
        ("42501", PermissionDenied),
        ("28P01", Unauthenticated),
        ("3D000", NotFound),
        ("23503", FailedPrecondition),
        ("22003", InvalidArgument),
        ("XX001", DataLoss),
        ("42601", Internal),
    ],
)
def test_states_of_postgresql_have_a_kind(state: str, expected: type[SnaploaderError]) -> None:
    error = psycopg.errors.lookup(state)("as PostgreSQL says\nDETAIL: a row with secrets")
    translated = _translated(error)
    assert type(translated) is expected
    assert "secrets" not in translated.message


def test_a_pool_without_connections_left_is_exhausted_for_now() -> None:
    error = from_database_error(exc.TimeoutError(), "catalog x")
    assert isinstance(error, ResourceExhausted)
    assert error.transient


def _translated(error: Exception) -> SnaploaderError:
    return from_database_error(exc.OperationalError("SELECT 1", {}, error), "catalog x")


def test_statements_and_their_parameters_are_not_in_tracebacks(catalog: Catalog) -> None:
    secret = workspace(base="hunter2")
    with catalog.transaction() as transaction:
        transaction.add_workspace(secret)
    with pytest.raises(FailedPrecondition) as refusal, catalog.transaction() as transaction:
        transaction.set_owner_status("eve", OwnerStatus.ACTIVE)
        values = {"name": "hunter2", "status": "hunter2"}
        transaction._execute(text("INSERT INTO owners VALUES (:name, :status)"), values)
    assert "hunter2" not in str(refusal.value)
    assert "hidden" in str(refusal.value.__cause__)
