"""Many processes and threads at once, forks, and writers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest
from catalog_data import NOON, add, add_version, later, operation, snapshot, workspace

from snaploader.errors import FailedPrecondition
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.model import SnapshotStatus
from snaploader.workspace.policy import Policy

FORK = multiprocessing.get_context("fork")


def _joined(processes: list[Any], timeout_s: float = 100) -> list[int | None]:
    for process in processes:
        process.join(timeout_s)
    return [process.exitcode for process in processes]


def _add_50_versions(url: str, name: str, barrier: Any) -> None:
    with Catalog.open(url) as catalog:
        barrier.wait(300)
        for number in range(50):
            add_version(catalog, f"{name}.{number}")


@pytest.mark.slow
def test_8_processes_adding_50_versions_each_get_400_consecutive_numbers(
    catalog: Catalog, catalog_url: str
) -> None:
    add(catalog, workspace())
    barrier = FORK.Barrier(8)
    processes = [
        FORK.Process(target=_add_50_versions, args=(catalog_url, str(number), barrier)) for number in range(8)
    ]
    for process in processes:
        process.start()
    assert _joined(processes) == [0] * 8
    with catalog.reading() as reader:
        versions = reader.versions("ws")
        events = reader.events("ws")
    assert [version.number for version in versions] == list(range(1, 401))
    assert len({version.snapshot_name for version in versions}) == 400
    assert [event.payload["version"] for event in events] == list(range(1, 401))


def test_8_threads_of_one_catalog_get_consecutive_numbers(catalog: Catalog) -> None:
    add(catalog, workspace())
    barrier = threading.Barrier(8)

    def work(name: str) -> None:
        barrier.wait(300)
        for number in range(5):
            add_version(catalog, f"{name}.{number}")

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.reading() as reader:
        assert [version.number for version in reader.versions("ws")] == list(range(1, 41))


def test_who_follows_events_by_id_misses_none(catalog: Catalog) -> None:
    # Numbers are given before a transaction is visible. Writers that did not follow one another could make
    # a later number visible first, and who had seen it would never ask for the earlier one.
    add(catalog, *(workspace(f"w{number}") for number in range(4)))
    seen: list[int] = []
    ended = threading.Event()

    def write(workspace_id: str) -> None:
        for number in range(15):
            with catalog.transaction() as transaction:
                transaction.add_event(workspace_id, "tick", {"number": number}, NOON)
                transaction.update_workspace(workspace_id, last_used_at=later(seconds=number))

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = ended.is_set()
            with catalog.reading() as reader:
                seen.extend(each.id for each in reader.events(after=seen[-1] if seen else 0))

    writers = [threading.Thread(target=write, args=(f"w{number}",)) for number in range(4)]
    follower = threading.Thread(target=follow)
    for thread in (follower, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    follower.join()
    with catalog.reading() as reader:
        assert seen == [each.id for each in reader.events()]
    assert len(seen) == 60


def test_a_policy_that_changes_while_a_workspace_is_added_concerns_it(
    catalog: Catalog, open_catalog: Callable[[], Catalog]
) -> None:
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy("strict"))
    other = open_catalog()
    changed = threading.Event()

    def change() -> None:
        with other.transaction() as transaction:
            transaction.put_policy(Policy("strict", time_until_dormant=later(hours=1) - NOON))
        changed.set()

    thread = threading.Thread(target=change)
    with catalog.transaction() as transaction:
        transaction.add_workspace(workspace(policy="strict"))
        thread.start()
        assert not changed.wait(0.05)  # it waits, so that it sees the workspace
    thread.join()
    with catalog.reading() as reader:
        assert [each.id for each in reader.due(later(hours=2), host="host-a")] == ["ws"]


def _stop_within_a_transaction(url: str, ready: Any) -> None:
    with Catalog.open(url) as catalog, catalog.transaction() as transaction:
        transaction.put_snapshot(snapshot("s"))
        transaction.add_version("ws", "s", NOON)
        transaction.begin_operation("ws", operation())
        ready.send(True)
        signal.pause()


def test_a_writer_that_is_killed_leaves_the_old_state_and_no_lock(catalog: Catalog, catalog_url: str) -> None:
    add(catalog, workspace())
    ready, report = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_stop_within_a_transaction, args=(catalog_url, report))
    process.start()
    assert ready.poll(30)
    process.kill()
    assert _joined([process]) == [-signal.SIGKILL]
    ready.close()
    report.close()
    with catalog.reading() as reader:
        assert reader.workspace("ws") == workspace()
        assert reader.snapshots("ws", statuses=list(SnapshotStatus)) == []
    assert add_version(catalog, "s") == 1


def _more_until_killed(url: str, last: int, written: Any) -> None:
    with Catalog.open(url) as catalog:
        while True:
            last = add_version(catalog, f"s{last}")
            written.send(last)


@pytest.mark.slow
def test_what_a_killed_writer_had_committed_is_kept(catalog: Catalog, catalog_url: str) -> None:
    add(catalog, workspace())
    last = 0
    for _attempt in range(3):
        written, report = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_more_until_killed, args=(catalog_url, last, report))
        process.start()
        report.close()
        for _version in range(7):
            last = written.recv()
        process.kill()
        _joined([process])
        while True:  # what it still told
            try:
                last = written.recv()
            except EOFError:
                break
        written.close()
        with catalog.reading() as reader:
            numbers = [version.number for version in reader.versions("ws")]
        assert numbers in (list(range(1, last + 1)), list(range(1, last + 2)))
        last = len(numbers)


class TestForks:
    def test_a_child_has_connections_of_its_own(self, catalog: Catalog) -> None:
        add(catalog, workspace())

        def work() -> None:
            add_version(catalog, "of-child")
            catalog.close()

        add_version(catalog, "of-parent")
        process = FORK.Process(target=work)
        process.start()
        assert _joined([process]) == [0]
        assert add_version(catalog, "of-parent-again") == 3

    def test_what_a_child_commits_is_kept_when_its_parent_closes(
        self, catalog: Catalog, open_catalog: Callable[[], Catalog]
    ) -> None:
        # SQLite's own notes on the locks of this process are inherited, the locks are not.
        add(catalog, workspace())
        add_version(catalog, "of-parent")
        go_on, tell = FORK.Pipe(duplex=False)
        written, report = FORK.Pipe(duplex=False)

        def work() -> None:
            add_version(catalog, "of-child")
            report.send(True)
            go_on.recv()
            add_version(catalog, "of-child-again")

        process = FORK.Process(target=work)
        process.start()
        assert written.poll(30)
        catalog.close()
        with open_catalog().reading() as reader:
            assert len(reader.versions("ws")) == 2
        tell.send(True)
        assert _joined([process]) == [0]
        for end in (go_on, tell, written, report):
            end.close()
        with open_catalog().reading() as reader:
            assert [version.number for version in reader.versions("ws")] == [1, 2, 3]

    def test_a_fork_waits_for_the_transactions_of_other_threads(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        begun, end, forked = threading.Event(), threading.Event(), threading.Event()

        def write() -> None:
            with catalog.transaction() as transaction:
                transaction.update_workspace("ws", base="x")
                begun.set()
                end.wait(300)

        def fork() -> None:
            process = FORK.Process(target=add_version, args=(catalog, "of-child"))
            process.start()
            forked.set()
            assert _joined([process]) == [0]

        writer, forker = threading.Thread(target=write), threading.Thread(target=fork)
        writer.start()
        begun.wait(300)
        forker.start()
        assert not forked.wait(0.05)
        end.set()
        writer.join()
        forker.join()
        with catalog.reading() as reader:
            assert reader.workspace("ws").base == "x"
            assert len(reader.versions("ws")) == 1

    def test_a_child_forked_within_a_transaction_cannot_commit_it(self, catalog: Catalog) -> None:
        add(catalog, workspace())

        def child_of(catalog: Catalog) -> int:
            """Fork within a transaction, and let both go on; the exit status in the child."""
            try:
                with catalog.transaction() as transaction:
                    transaction.update_workspace("ws", base="x")
                    pid = os.fork()
                    if pid != 0:
                        assert os.waitpid(pid, 0)[1] == 0
                        return -1
            except FailedPrecondition:
                return 0
            return 1

        status = child_of(catalog)
        if status >= 0:
            os._exit(status)
        with catalog.reading() as reader:
            assert reader.workspace("ws").base == "x"


class TestClose:
    def test_a_closed_catalog_says_so(self, catalog: Catalog) -> None:
        catalog.close()
        catalog.close()
        with pytest.raises(FailedPrecondition, match="is closed"), catalog.reading():
            pytest.fail("it is closed")

    def test_it_waits_for_the_transactions_of_other_threads(self, catalog: Catalog) -> None:
        begun, end, closed = threading.Event(), threading.Event(), threading.Event()

        def write() -> None:
            with catalog.transaction() as transaction:
                begun.set()
                end.wait(300)
                transaction.add_workspace(workspace())

        def close() -> None:
            catalog.close()
            closed.set()

        writer, closer = threading.Thread(target=write), threading.Thread(target=close)
        writer.start()
        begun.wait(300)
        closer.start()
        assert not closed.wait(0.05)
        end.set()
        assert closed.wait(300)
        writer.join()
        closer.join()

    def test_within_a_transaction_it_waits_for_nothing_and_leaves_nothing_open(
        self, catalog: Catalog
    ) -> None:
        with catalog.transaction() as transaction:
            catalog.close()
            transaction.add_workspace(workspace())
        with pytest.raises(FailedPrecondition, match="is closed"), catalog.transaction():
            pytest.fail("it is closed")

    def test_a_thread_has_one_transaction(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            with pytest.raises(FailedPrecondition, match="a transaction already"), catalog.transaction():
                pytest.fail("two transactions")
            transaction.add_workspace(workspace())
        with catalog.reading() as reader:
            assert reader.workspace("ws") == workspace()

    def test_the_log_of_sqlite_is_gone_with_the_last_connection(
        self, catalog: Catalog, open_catalog: Callable[[], Catalog]
    ) -> None:
        if catalog.dialect != "sqlite":
            return
        path = str(catalog._address.database)
        second = open_catalog()
        add(catalog, workspace())
        catalog.close()
        assert os.path.exists(f"{path}-wal")
        second.close()
        assert not os.path.exists(f"{path}-wal")
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        assert connection.execute("SELECT id FROM workspaces").fetchall() == [("ws",)]
        connection.close()


def _open(url: str, barrier: Any, opened: Any) -> None:
    barrier.wait(300)
    with Catalog.open(url) as catalog, catalog.transaction() as transaction:
        transaction.add_workspace(workspace(f"w{multiprocessing.current_process().name}"))
    opened.put(True)


@pytest.mark.slow
def test_8_processes_open_a_new_catalog_at_once(empty_catalog_url: str) -> None:
    barrier, opened = FORK.Barrier(8), FORK.SimpleQueue()
    processes = [
        FORK.Process(target=_open, args=(empty_catalog_url, barrier, opened), name=str(number))
        for number in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 8
    opened.close()
    with Catalog.open(empty_catalog_url) as catalog, catalog.reading() as reader:
        assert [each.id for each in reader.workspaces()] == [f"w{number}" for number in range(8)]
