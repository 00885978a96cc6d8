"""The lock of a workspace between hosts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from database import PostgreSQLServer

from snaploader.workspace.catalog import Catalog


def test_sqlite_holds_it_at_once(tmp_path: Any) -> None:
    with Catalog.open(tmp_path / "catalog.db") as catalog, catalog.lock("ws", wait_s=0) as held:
        assert held


@pytest.fixture
def url(postgresql: PostgreSQLServer) -> Iterator[str]:
    name = postgresql.lend_catalog()
    yield postgresql.url(name)
    postgresql.take_back(name)


@pytest.fixture
def hosts(url: str) -> Iterator[tuple[Catalog, Catalog]]:
    with Catalog.open(url) as first, Catalog.open(url) as second:
        yield first, second


Hosts = tuple[Catalog, Catalog]


def test_one_host_holds_it(hosts: Hosts) -> None:
    first, second = hosts
    with first.lock("ws", wait_s=0) as held:
        assert held
        with second.lock("ws", wait_s=0) as held_too, second.lock("other", wait_s=0) as held_other:
            assert not held_too
            assert held_other
    with second.lock("ws", wait_s=0) as held:
        assert held


def test_two_threads_of_a_host_exclude_each_other_too(hosts: Hosts) -> None:
    first, _second = hosts
    with first.lock("ws", wait_s=None) as held, first.lock("ws", wait_s=0) as held_too:
        assert held
        assert not held_too


def test_waiting_ends_after_its_time(hosts: Hosts) -> None:
    first, second = hosts
    with first.lock("ws", wait_s=0), second.lock("ws", wait_s=0.05) as held:
        assert not held


def _waiting(catalog: Catalog, server: PostgreSQLServer, act: Callable[[], None], **arguments: Any) -> bool:
    """Whether the lock was held by a thread that waited for it when `act` was called."""
    outcome: list[bool] = []

    def wait() -> None:
        with catalog.lock("ws", wait_s=30, **arguments) as held:
            outcome.append(held)

    thread = threading.Thread(target=wait)
    thread.start()
    with contextlib.closing(server.connect()) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
        while connection.execute(query).fetchone() == (0,):
            assert thread.is_alive()
    act()
    thread.join()
    return outcome[0]


def test_who_waits_gets_it_when_it_is_free(hosts: Hosts, postgresql: PostgreSQLServer) -> None:
    first, second = hosts
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(first.lock("ws", wait_s=0))
        assert _waiting(second, postgresql, stack.close)


def test_waiting_can_be_called_off(hosts: Hosts, postgresql: PostgreSQLServer) -> None:
    first, second = hosts
    cancelled = threading.Event()
    with first.lock("ws", wait_s=0):
        assert not _waiting(second, postgresql, cancelled.set, cancelled=cancelled)


def test_who_is_called_off_already_takes_it_only_if_it_is_free(hosts: Hosts) -> None:
    first, second = hosts
    cancelled = threading.Event()
    cancelled.set()
    with first.lock("ws", wait_s=0), second.lock("ws", wait_s=None, cancelled=cancelled) as held:
        assert not held


def test_it_is_let_go_when_the_block_raises(hosts: Hosts) -> None:
    first, second = hosts
    with pytest.raises(ZeroDivisionError), first.lock("ws", wait_s=0):
        raise ZeroDivisionError
    with second.lock("ws", wait_s=0) as held:
        assert held


def test_a_connection_that_is_lost_lets_go_of_it(
    hosts: Hosts, postgresql: PostgreSQLServer, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = hosts
    with first.lock("ws", wait_s=0):
        with contextlib.closing(postgresql.connect()) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE locktype = 'advisory'"
            )
        with second.lock("ws", wait_s=10) as held:
            assert held
    assert "let go of the lock of ws before its time" in caplog.text


HOLDER = """
import sys
from snaploader.workspace.catalog import Catalog

with Catalog.open(sys.argv[1]) as catalog, catalog.lock("ws", wait_s=0) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def test_a_holder_that_is_killed_lets_go_of_it(hosts: Hosts, url: str) -> None:
    command = [sys.executable, "-c", HOLDER, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with hosts[0].lock("ws", wait_s=0) as held:
            assert not held
        process.kill()
    with hosts[0].lock("ws", wait_s=30) as held:
        assert held
