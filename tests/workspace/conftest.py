"""Fixtures: a catalog on every kind of database.

`catalog` and `catalog_url` are for all tests that touch a catalog; each runs once on SQLite and once on
PostgreSQL. Only the tests of the catalog itself do both in `make test`: what is above it does not know which
database there is, and its runs on PostgreSQL count as slow. The server is started by the first test that
needs it, one for each worker of pytest-xdist.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from database import POSTGRESQL, SQLITE, PostgreSQLServer

from snaploader.workspace.catalog import Catalog


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the runs on PostgreSQL of what is above the catalog, before items are selected by their marks."""
    catalog, here = Path(__file__).with_name("catalog"), Path(__file__).parent
    for item in items:
        if here in item.path.parents and catalog not in item.path.parents:
            callspec = getattr(item, "callspec", None)
            if callspec is not None and callspec.params.get("database") == POSTGRESQL:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def _idle_postgresql() -> Iterator[PostgreSQLServer]:
    server = PostgreSQLServer()
    yield server
    server.remove()


def _started(server: PostgreSQLServer) -> PostgreSQLServer:
    missing = server.missing()
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    server.start()
    return server


@pytest.fixture(scope="session")
def postgresql(_idle_postgresql: PostgreSQLServer) -> PostgreSQLServer:
    """A PostgreSQL server that runs."""
    return _started(_idle_postgresql)


@pytest.fixture(scope="session", params=[SQLITE, POSTGRESQL])
def database(request: pytest.FixtureRequest, _idle_postgresql: PostgreSQLServer) -> str:
    """Which kind of database the test runs on: "sqlite" or "postgresql"."""
    if request.param == POSTGRESQL:
        _started(_idle_postgresql)
    kind: str = request.param
    return kind


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the newest schema and nothing in it, to be copied."""
    path = str(tmp_path_factory.mktemp("template") / "catalog.db")
    Catalog.open(path).close()
    return path


@pytest.fixture
def empty_catalog_url(
    database: str, _idle_postgresql: PostgreSQLServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a database in which there is nothing yet, no schema either."""
    if database == SQLITE:
        yield f"sqlite:///{tmp_path_factory.mktemp('catalog')}/catalog.db"
        return
    name = _idle_postgresql.create_database()
    yield _idle_postgresql.url(name)
    _idle_postgresql.drop_database(name)


@pytest.fixture
def catalog_url(
    database: str,
    _sqlite_template: str,
    _idle_postgresql: PostgreSQLServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """URL of an empty catalog."""
    if database == SQLITE:
        path = tmp_path_factory.mktemp("catalog") / "catalog.db"
        shutil.copyfile(_sqlite_template, path)
        yield f"sqlite:///{path}"
        return
    name = _idle_postgresql.lend_catalog()
    yield _idle_postgresql.url(name)
    _idle_postgresql.take_back(name)


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    """An empty catalog, closed after the test."""
    with Catalog.open(catalog_url) as catalog:
        yield catalog


@pytest.fixture
def open_catalog(catalog_url: str) -> Iterator[Callable[[], Catalog]]:
    """Opens the test's catalog once more, as another process would; closed after the test."""
    opened: list[Catalog] = []

    def open_it() -> Catalog:
        opened.append(Catalog.open(catalog_url))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()
