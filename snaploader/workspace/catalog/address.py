"""Where a catalog is: a path, or a URL of SQLite or PostgreSQL. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from snaploader.errors import InvalidArgument

SQLITE = "sqlite"
POSTGRESQL = "postgresql"

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


def parse_address(address: str | os.PathLike[str]) -> URL:
    """The URL of a catalog; text that looks like no URL is a path.

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
        _check_file("" if url.query.get("mode") == "memory" else url.database)
    return url


def _unreadable(scheme: str) -> InvalidArgument:
    return InvalidArgument(
        f"this {scheme} URL cannot be read: write {scheme}://…, with special characters of user and "
        "password percent-encoded"
    )


def shown(url: URL) -> str:
    """The URL for people and logs: without its secrets."""
    query: Mapping[str, str | tuple[str, ...]] = {
        name: "***" if name in _SECRETS else value for name, value in url.query.items()
    }
    return url.set(query=query).render_as_string(hide_password=True)


def file_of(url: URL) -> str | None:
    """Path of an SQLite file, None if the URL names it in SQLite's own way (`file:…?uri=true`)."""
    if url.get_backend_name() != SQLITE or url.database is None or url.database.startswith("file:"):
        return None
    return url.database


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
