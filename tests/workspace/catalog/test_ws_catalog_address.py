"""Where a catalog is: paths and URLs."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest

from snaploader.cli.resources import WorkspaceSettings
from snaploader.errors import InvalidArgument
from snaploader.workspace.catalog.engines import file_of, parse_address, shown


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/var/lib/catalog.db", "sqlite:////var/lib/catalog.db"),
        (Path("/var/lib/catalog.db"), "sqlite:////var/lib/catalog.db"),
        ("sqlite:////var/lib/catalog.db", "sqlite:////var/lib/catalog.db"),
        ("sqlite:///catalog.db", "sqlite:///catalog.db"),
        ("postgres://me@db/w", "postgresql+psycopg://me@db/w"),
        ("postgresql://me@db:5433/w", "postgresql+psycopg://me@db:5433/w"),
        ("postgresql+psycopg://db/w", "postgresql+psycopg://db/w"),
        ("postgresql:///w?host=/run/postgresql", "postgresql+psycopg:///w?host=%2Frun%2Fpostgresql"),
    ],
)
def test_paths_and_urls_name_databases(address: str | Path, expected: str) -> None:
    assert parse_address(address).render_as_string(hide_password=False) == expected


def test_a_relative_path_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("catalog.db").database == str(tmp_path / "catalog.db")


@pytest.mark.parametrize("path", ["with space.db", "100%41.db", "a?b=c#d.db", "ü:@.db"])
def test_a_path_may_have_any_characters(path: str) -> None:
    assert file_of(parse_address(f"/tmp/{path}")) == f"/tmp/{path}"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///file:/tmp/a.db?uri=true", "/tmp/a.db"),
        ("sqlite:///file:///tmp/a%20b.db?uri=1&cache=private", "/tmp/a b.db"),
        ("sqlite:///file://localhost/tmp/a.db?uri=true", "/tmp/a.db"),
        ("sqlite:///file:a.db?uri=true", "a.db"),
        ("sqlite:///file:a.db", "file:a.db"),
    ],
)
def test_a_file_may_be_named_in_the_way_of_sqlite(url: str, path: str) -> None:
    assert file_of(parse_address(url)) == path


@pytest.mark.parametrize(
    "address",
    [
        "",
        "sqlite://",
        "sqlite:///",
        ":memory:",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:///file:?uri=true",
        "sqlite:///file:%3Amemory:?uri=true",
    ],
)
def test_a_catalog_needs_a_file(address: str) -> None:
    with pytest.raises(InvalidArgument, match="needs a file"):
        parse_address(address)


def test_a_path_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is no path"):
        parse_address("/tmp/a\0b")


@pytest.mark.parametrize("scheme", ["mysql", "postgresql+asyncpg", "sqlite+aiosqlite", "http"])
def test_other_databases_are_refused(scheme: str) -> None:
    with pytest.raises(InvalidArgument, match=f"'{re.escape(scheme)}' is no database for a catalog"):
        parse_address(f"{scheme}://host/name")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hunter2@db/w",
        "postgresql://db/w?user=me&password=hunter2",
        "postgresql://db/w?sslkey=/key&sslpassword=hunter2",
    ],
)
def test_passwords_are_not_shown(address: str) -> None:
    url = parse_address(address)
    assert "hunter2" in url.render_as_string(hide_password=False)
    assert "hunter2" not in shown(url)
    assert "***" in shown(url) or "%2A%2A%2A" in shown(url)


def test_what_cannot_be_read_repeats_no_password() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_address("postgresql://me:hunter2@db:port/w")
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert "hunter2" not in str(refusal.value.__context__) or refusal.value.__suppress_context__


@pytest.mark.parametrize(
    "address",
    [
        "postgresql:/me:hunter2@db/w",
        "postgresql:me:hunter2@db/w",
        "postgres:/me:hunter2@db/w",
        "postgresql//me:hunter2@db/w",
        "postgresql+psycopg:/me:hunter2@db/w",
        "PostgreSQL:/me:hunter2@db/w",
        "postgresq:/me:hunter2@db/w",
        " postgresql:/me:hunter2@db/w",
        "me:hunter2@postgresql://db/w",
        "postgresql:///me:hunter2@db/w",
        "postgresql://m/e:hunter2@db/w",
        "postgresql://me:one@hunter2@db/w",
        "host=db user=me password=hunter2",
        "host=db user=me password = 'hunter2'",
        "sqlite:/var/lib/hunter2.db",
    ],
)
def test_what_is_nearly_a_url_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_address(address)
    assert "hunter2" not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.parametrize("path", ["postgresql/catalog.db", "./postgresql:/x.db", "postgres.db", "a@b:c.db"])
def test_a_path_may_look_a_little_like_a_url(path: str) -> None:
    assert file_of(parse_address(path)) == str(Path(path).absolute())


def test_a_password_is_in_no_repr(tmp_path: Path) -> None:
    settings = WorkspaceSettings("postgresql://me:hunter2@db/w", tmp_path, "here")
    assert "hunter2" not in repr(settings)
