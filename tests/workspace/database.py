"""Databases for tests: files of SQLite, and a real PostgreSQL from Debian's package."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time

import psycopg

from snaploader.workspace.catalog import Catalog
from snaploader.workspace.catalog.tables import metadata

SQLITE = "sqlite"
POSTGRESQL = "postgresql"
START_TIMEOUT_S = 300
_USER = "snaploader"
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "16MB",
    "logging_collector": "off",
    "autovacuum": "off",
}
# Ends the server when its standard input is closed, so with the tests, however these end.
_WATCH = '"$@" </dev/null & server=$!; read -r _; kill -QUIT $server; wait $server'


class PostgreSQLServer:
    """A server of its own folder, on a Unix socket in it.

    What it holds survives its own end, not a crash of the machine: it is fast, and for tests only.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._numbers = itertools.count(1)
        self._free: list[str] = []

    @staticmethod
    def missing() -> str:
        """Why there cannot be a server here; empty: there can."""
        if _binary("postgres") and _binary("initdb"):
            return ""
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"

    def start(self) -> None:
        """Start the server, unless it runs."""
        if self._process is not None:
            return
        if not self._folder:
            self._make_folder()
        with open(os.path.join(self._folder, "log"), "ab") as log:
            self._process = subprocess.Popen(
                [
                    *("/bin/sh", "-c", _WATCH, "sh", _binary("postgres"), "-D", self._data),
                    *itertools.chain(*(("-c", f"{name}={value}") for name, value in _SETTINGS.items())),
                    *("-c", f"unix_socket_directories={self._folder}"),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                **_unprivileged(),
            )
        self._wait_until_it_answers()

    def stop(self) -> None:
        """Stop the server at once; `start` starts it again on the same data."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_TIMEOUT_S)
        self._process = None

    def remove(self) -> None:
        """Stop the server and remove all its data."""
        self.stop()
        if self._folder:
            shutil.rmtree(self._folder)
            self._folder = ""

    def url(self, database: str) -> str:
        """URL of a database for a catalog."""
        return f"postgresql://{_USER}@/{database}?host={self._folder}"

    def create_database(self) -> str:
        """Name of a new database without any table."""
        name = f"test{next(self._numbers)}"
        self._administrate(f"CREATE DATABASE {name} TEMPLATE template0")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever uses it."""
        self._administrate(f"DROP DATABASE {name} WITH (FORCE)")

    def lend_catalog(self) -> str:
        """Name of a database with the newest schema and nothing in it; `take_back` makes it one again.

        Emptying one takes a tenth of the time that making one does.
        """
        return self._free.pop() if self._free else self._new_catalog()

    def take_back(self, name: str) -> None:
        """Empty a database, whoever uses it, for the next test."""
        with contextlib.closing(self.connect(name)) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            tables = [table.name for table in reversed(metadata.sorted_tables)]
            connection.execute(
                "".join(f"DELETE FROM {table};" for table in tables)
                + "".join(
                    f"ALTER SEQUENCE {table}_id_seq RESTART;" for table in ("versions", "events", "runs")
                )
                + "INSERT INTO policies SELECT * FROM pristine_policies"
            )
        self._free.append(name)

    def _new_catalog(self) -> str:
        name = self.create_database()
        Catalog.open(self.url(name)).close()
        with contextlib.closing(self.connect(name)) as connection:
            connection.execute("CREATE TABLE pristine_policies AS SELECT * FROM policies")
        return name

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection of the test's own, in autocommit mode."""
        return psycopg.connect(host=self._folder, user=_USER, dbname=database, autocommit=True)

    def _administrate(self, statement: str) -> None:
        with contextlib.closing(self.connect()) as connection:
            connection.execute(statement)

    @property
    def _data(self) -> str:
        return os.path.join(self._folder, "data")

    def _make_folder(self) -> None:
        # Not in pytest's folder, which the user that the server runs as may not enter; short, for a socket.
        self._folder = tempfile.mkdtemp(prefix="snaploader-pg-", dir="/tmp")
        identity = _unprivileged()
        if identity:
            os.chown(self._folder, identity["user"], identity["group"])
        subprocess.run(
            [
                *(_binary("initdb"), "-D", self._data, "--username", _USER, "--auth", "trust"),
                *("--no-sync", "--no-instructions", "--encoding", "UTF8"),
                # As people of a language sort, which is not as SQLite does: what depends on it is found.
                *("--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale", "en"),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **identity,
        )

    def _wait_until_it_answers(self) -> None:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > give_up_at:
                    with open(os.path.join(self._folder, "log"), encoding="utf-8") as log:
                        raise RuntimeError(f"PostgreSQL does not start: {log.read()}") from None
                time.sleep(0.02)


def _binary(name: str) -> str:
    """Path of one of PostgreSQL's programs, of the newest version there is; empty: there is none."""
    versions = sorted(
        glob.glob(f"/usr/lib/postgresql/*/bin/{name}"),
        key=lambda path: float(path.split("/")[4]),
        reverse=True,
    )
    return next(iter(versions), "") or shutil.which(name) or ""


def _unprivileged() -> dict[str, int | list[int]]:
    """As whom to run the server: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("there is neither a user postgres nor nobody to run PostgreSQL as")
