"""Commits and forks: durable, shared, and nothing to be seen of those that fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host, HostFactory, open_host
from sqlalchemy.event import listen, remove

from snaploader import RemoteCache
from snaploader.blobstore import TransferStatistics, Upload
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError, Unavailable
from snaploader.testing import EmbeddedServer, FakeCAS
from snaploader.workspace.model import (
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotStatus,
    WorkspaceState,
)


def fill(host: Host, files: int = 6, workspace_id: str = "one") -> None:
    """Files of several blobs."""
    for number in range(files):
        host.write(f"data/{number}", f"{number}" * 2000, workspace_id)


def snapshot(host: Host, name: str) -> SnapshotRecord:
    with host.catalog.reading() as reader:
        return reader.snapshot(name)


def found_remotely(host: Host, record: SnapshotRecord) -> bool:
    try:
        host.loader.get_snapshot_by_id(record.runtime_name, read_policy="newest")
    except NotFound:
        return False
    return True


def test_a_commit_is_complete_in_the_remote_cache(host: Host) -> None:
    host.create()
    fill(host)
    result = host.manager.commit("one", "a release")
    record = snapshot(host, result.snapshot_name)
    assert (record.kind, record.status, record.is_remote) == (
        SnapshotKind.COMMIT,
        SnapshotStatus.COMPLETE,
        True,
    )
    assert (result.display_name, result.version) == ("a release", None)
    assert result.uploaded_bytes >= 12_000
    assert found_remotely(host, record)
    assert host.events() == ["workspace_create", "workspace_commit"]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_running_workspace_is_stopped_for_the_capture_and_not_for_the_upload(
    host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    fill(host)
    running = []
    write_many = remote.write_many

    def watch(uploads: Iterable[Upload]) -> TransferStatistics:
        running.append(host.is_running())
        return write_many(uploads)

    monkeypatch.setattr(remote, "write_many", watch)
    host.calls()
    host.manager.commit("one")
    assert host.calls() == ["stop", "capture", "continue_on", "start"]
    assert running
    assert all(running)


@pytest.mark.parametrize(
    ("on_pause", "on_commit", "scope"),
    [
        (Scope.FULL, None, Scope.FULL),
        (Scope.FULL, Scope.DATA, Scope.DATA),
        (Scope.DATA, None, Scope.DATA),
    ],
)
@pytest.mark.parametrize("is_paused", [False, True])
def test_a_commit_holds_what_on_commit_says_and_else_what_on_pause_says(
    host: Host, on_pause: Scope, on_commit: Scope | None, scope: Scope, is_paused: bool
) -> None:
    host.follow(on_pause, on_commit)
    host.create()
    host.write("data/a", "durable")
    host.write("rest", "rest")
    if is_paused:
        host.manager.pause("one")
    result = host.manager.commit("one")
    assert result.scope is scope
    host.manager.fork("one", "two")
    assert host.read("data/a", "two") == "durable"
    assert host.read("rest", "two") == ("rest" if scope is Scope.FULL else None)
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_paused_workspace_is_committed_from_its_snapshot_and_stays_paused(host: Host) -> None:
    host.create()
    fill(host)
    paused = host.manager.pause("one").snapshot_name
    host.calls()
    result = host.manager.commit("one")
    assert host.calls() == []
    workspace = host.manager.workspace("one")
    assert (workspace.state, workspace.current_snapshot) == (WorkspaceState.PAUSED, paused)
    names = [snapshot.name for snapshot in host.manager.records.read("one").snapshots]
    assert result.snapshot_name in names
    host.manager.resume("one")
    assert host.read("data/3") == "3" * 2000
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_data_pause_cannot_become_a_full_commit(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create()
    host.manager.pause("one")
    host.follow(Scope.FULL)
    with pytest.raises(FailedPrecondition, match="paused as Data and onCommit is Full"):
        host.manager.commit("one")
    assert host.findings() == []


def test_a_commit_without_a_remote_cache_is_refused_before_anything_is_stopped(
    make_host: HostFactory,
) -> None:
    host = make_host(is_remote=False)
    host.create()
    host.calls()
    with pytest.raises(FailedPrecondition, match="needs a remote cache"):
        host.manager.commit("one")
    assert host.calls() == []
    assert host.events() == ["workspace_create"]


def test_a_commit_is_let_go_here_once_the_workspace_has_gone_on(host: Host) -> None:
    host.create()
    fill(host)
    name = host.manager.commit("one").snapshot_name
    assert host.cache.pins() == [f"workspace.{name}"]
    host.manager.create_version("one")
    assert f"workspace.{name}" not in host.cache.pins()
    assert found_remotely(host, snapshot(host, name))
    assert host.findings() == []


# Commits that fail


def fail_after(remote: FakeCAS, patch: pytest.MonkeyPatch, blobs: int) -> None:
    """Let the remote cache break after so many blobs."""
    write_many = remote.write_many

    def broken(uploads: Iterable[Upload]) -> TransferStatistics:
        write_many(islice(uploads, blobs))
        raise Unavailable("the remote cache went away")

    patch.setattr(remote, "write_many", broken)


def fail_call(name: str, number: int = 1) -> Callable[[FakeCAS, pytest.MonkeyPatch], None]:
    """Let the nth call of a method fail, and no other."""

    def arrange(remote: FakeCAS, patch: pytest.MonkeyPatch) -> None:
        method, calls = getattr(remote, name), []

        def once(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == number:
                raise Unavailable("the remote cache went away")
            return method(*arguments)

        patch.setattr(remote, name, once)

    return arrange


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_commit_that_fails_half_way_leaves_nothing_visible_and_its_uploads_are_listed(
    host: Host, remote: FakeCAS, is_paused: bool
) -> None:
    host.create()
    fill(host)
    if is_paused:
        host.manager.pause("one")
    with pytest.MonkeyPatch.context() as patch:
        fail_after(remote, patch, 3)
        with pytest.raises(Unavailable, match="went away"):
            host.manager.commit("one")
    assert not any("Tombstone" not in str(data) for data in remote.action_results.values())
    assert [
        info for info in host.manager.list_snapshots("one") if info.record and info.record.is_remote
    ] == []
    assert host.events()[-1] == "operation_failed"
    assert (host.findings(), host.leftovers()) == ([], [])
    assert host.is_running() is not is_paused
    [upload] = host.manager.orphaned_uploads("one")
    assert upload.digests == frozenset(remote.blobs)
    assert upload.size_bytes == sum(digest.size_bytes for digest in remote.blobs)
    with host.catalog.reading() as reader:
        [record] = reader.snapshots("one", statuses=[SnapshotStatus.ORPHANED])
    assert not host.manager._services.content.is_local(record.runtime_name)
    assert f"workspace.{record.name}" in host.cache.pins()


def test_the_next_commit_sends_only_what_is_missing_and_clears_the_list(host: Host, remote: FakeCAS) -> None:
    host.create()
    fill(host)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(remote, patch, 3)
        with pytest.raises(Unavailable):
            host.manager.commit("one")
    sent = dict(remote.writes)
    host.manager.commit("one")
    assert len(sent) == 3
    assert {digest: remote.writes[digest] for digest in sent} == sent
    assert host.manager.orphaned_uploads() == []
    with host.catalog.reading() as reader:
        assert reader.snapshots("one", statuses=[SnapshotStatus.ORPHANED, SnapshotStatus.DELETING]) == []
    assert len(host.cache.pins()) == 1
    assert (host.findings(), host.leftovers()) == ([], [])


@pytest.mark.parametrize(
    "arrange",
    [
        fail_call("find_missing"),
        fail_call("write_many"),
        fail_call("update_action_result"),
        fail_call("get_action_result"),
        fail_call("get_action_result", 2),
    ],
)
def test_a_commit_that_fails_at_any_call_can_be_made_again(
    host: Host, remote: FakeCAS, arrange: Callable[[FakeCAS, pytest.MonkeyPatch], None]
) -> None:
    host.create()
    fill(host)
    with pytest.MonkeyPatch.context() as patch:
        arrange(remote, patch)
        with pytest.raises(SnaploaderError):
            host.manager.commit("one")
    assert host.is_running()
    assert [info for info in host.manager.list_snapshots("one") if info.record is not None] == []
    assert (host.findings(), host.leftovers()) == ([], [])
    name = host.manager.commit("one").snapshot_name
    assert found_remotely(host, snapshot(host, name))
    assert host.manager.orphaned_uploads() == []


def test_a_commit_whose_withdrawal_fails_is_withdrawn_by_recovery(
    host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    fill(host)

    def gone(*_: Any) -> None:
        raise Unavailable("no route")

    def going(*_: Any) -> None:
        monkeypatch.setattr(remote, "get_action_result", gone)
        gone()

    with monkeypatch.context() as patch:
        patch.setattr(remote, "update_action_result", going)
        with pytest.raises(Unavailable):
            host.manager.commit("one")
        with host.catalog.reading() as reader:
            [record] = reader.snapshots("one", statuses=[SnapshotStatus.ORPHANED])
        assert record.is_remote
    assert host.manager.workspace("one").operation is None
    assert host.manager.recover().problems
    monkeypatch.undo()
    host.manager.recover()
    assert not snapshot(host, record.name).is_remote
    assert host.manager.orphaned_uploads()


def test_asking_for_orphans_needs_a_remote_cache_only_when_there_are_some(make_host: HostFactory) -> None:
    host = make_host(is_remote=False)
    host.create()
    assert host.manager.orphaned_uploads("one") == []
    with pytest.raises(NotFound):
        host.manager.orphaned_uploads("nope")


# Forks


def test_a_fork_has_the_committed_state_and_shares_all_chunks(host: Host) -> None:
    host.create(command=["serve"], environment={"A": "1"}, owner="ann", base="debian")
    fill(host)
    name = host.manager.commit("one").snapshot_name
    before = sum(1 for _ in host.cache.entries())
    fork = host.manager.fork(name, "two", environment={"B": "2"})
    assert host.read("data/4", "two") == "4" * 2000
    assert fork.spec.command == ("serve",)
    assert dict(fork.spec.environment) == {"A": "1", "B": "2"}
    assert (fork.owner, fork.base, fork.state) == ("ann", "debian", WorkspaceState.RUNNING)
    assert fork.base_snapshot == fork.current_snapshot
    assert snapshot(host, fork.base_snapshot).kind is SnapshotKind.BASE
    sizes = host.manager.sizes(["one", "two", "three"])
    assert sizes["two"].exclusive_bytes == 0
    assert sizes["two"].shared_bytes > 12_000
    assert sizes["three"].total_bytes == 0
    assert sum(1 for _ in host.cache.entries()) == before + 1  # its manifest
    assert host.events("two") == ["workspace_fork"]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_fork_of_a_workspace_is_of_its_latest_commit(host: Host) -> None:
    host.create()
    host.write("data/a", "first")
    host.manager.commit("one")
    host.clock.advance(seconds=1)
    host.write("data/a", "second")
    host.manager.commit("one")
    host.write("data/a", "not committed")
    host.manager.fork("one", "two")
    assert host.read("data/a", "two") == "second"


def test_a_fork_lives_on_when_its_origin_is_deleted(host: Host) -> None:
    host.create()
    host.write("data/a", "shared")
    host.manager.commit("one")
    host.manager.fork("one", "two", start=False)
    host.manager.delete("one")
    host.manager.start("two")
    host.manager.pause("two")
    host.manager.resume("two")
    assert host.read("data/a", "two") == "shared"
    with host.catalog.transaction() as tx:
        tx.update_workspace("two", current_snapshot=host.manager.workspace("two").base_snapshot)
    host.manager.stop("two")
    host.runtime.remove("two")
    host.manager.start("two")
    assert host.read("data/a", "two") == "shared"


def test_a_commit_of_another_host_is_forked_with_content_from_the_remote_cache(
    make_host: HostFactory,
) -> None:
    home, other = make_host("host-a"), make_host("host-b")
    home.create()
    fill(home)
    name = home.manager.commit("one").snapshot_name
    fork = other.manager.fork(name, "two")
    assert fork.host == "host-b"
    assert other.read("data/2", "two") == "2" * 2000
    other.manager.create_version("two")
    other.manager.delete("two")
    assert (home.findings(), other.findings()) == ([], [])


@pytest.mark.parametrize("method", ["place", "start"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_a_fork_that_fails_leaves_nothing(host: Host, method: str, after_effect: bool) -> None:
    host.create()
    fill(host)
    host.manager.commit("one")
    pins, refs = host.cache.pins(), host.cache.refs()
    host.runtime.fail_next(method, Unavailable("broken"), after_effect=after_effect)
    with pytest.raises(Unavailable):
        host.manager.fork("one", "two")
    assert (host.cache.pins(), host.cache.refs()) == (pins, refs)
    assert [each.id for each in host.manager.workspaces(include_deleted=True)] == ["one"]
    assert host.manager.slots.owners() == {0: "one"}
    assert (host.findings(), host.leftovers()) == ([], [])
    host.manager.fork("one", "two")


def test_what_is_no_commit_cannot_be_forked(host: Host) -> None:
    host.create()
    version = host.manager.create_version("one").snapshot_name
    with pytest.raises(FailedPrecondition, match="is a version, and only a commit can be forked"):
        host.manager.fork(version)
    with pytest.raises(NotFound):
        host.manager.fork("one.20260101T000000.0")
    with pytest.raises(NotFound):
        host.manager.fork("nope")


def test_an_incomplete_commit_cannot_be_forked(host: Host, remote: FakeCAS) -> None:
    host.create()
    fill(host)
    with pytest.MonkeyPatch.context() as patch:
        fail_after(remote, patch, 1)
        with pytest.raises(Unavailable):
            host.manager.commit("one")
    with host.catalog.reading() as reader:
        [orphan] = reader.snapshots("one", statuses=[SnapshotStatus.ORPHANED])
    with pytest.raises(FailedPrecondition, match="is orphaned"):
        host.manager.fork(orphan.name)
    with pytest.raises(NotFound, match="has no commit"):
        host.manager.fork("one")


def test_a_fork_with_a_used_or_malformed_id_is_refused(host: Host) -> None:
    host.create()
    host.manager.commit("one")
    with pytest.raises(FailedPrecondition, match="used before"):
        host.manager.fork("one", "one")
    with pytest.raises(InvalidArgument):
        host.manager.fork("one", "Two")


def test_commits_that_keep_failing_leave_one_orphan_and_not_a_pin_each(host: Host, remote: FakeCAS) -> None:
    host.create()
    with pytest.MonkeyPatch.context() as patch:
        fail_after(remote, patch, 2)
        for attempt in range(3):
            fill(host, 3 + attempt)
            with pytest.raises(Unavailable):
                host.manager.commit("one")
    with host.catalog.reading() as reader:
        [orphan] = reader.snapshots("one", statuses=[SnapshotStatus.ORPHANED])
    assert host.cache.pins() == [f"workspace.{orphan.name}"]
    assert host.leftovers() == []


def test_the_latest_commit_is_the_one_that_was_made_last_also_when_the_clock_was_set_back(host: Host) -> None:
    host.create()
    host.write("data/a", "first")
    host.manager.commit("one")
    host.clock.advance(hours=-2)
    host.write("data/a", "second")
    host.manager.commit("one")
    host.manager.fork("one", "two")
    assert host.read("data/a", "two") == "second"


def test_a_commit_costs_a_bounded_number_of_statements_and_calls(
    make_host: HostFactory, tmp_path: Path
) -> None:
    with EmbeddedServer() as server, RemoteCache(server.url) as served:
        catalog = make_host().catalog
        with open_host(tmp_path / "measured", catalog, served, host="measured") as host:
            host.create()
            fill(host)
            host.manager.commit("one")
            host.write("data/1", "changed" * 500)
            server.call_log.clear()
            statements: list[str] = []

            def count(*event: Any) -> None:
                statements.append(event[2])

            listen(catalog._engine, "before_cursor_execute", count)
            host.manager.commit("one")
            remove(catalog._engine, "before_cursor_execute", count)
    is_session = re.compile("BEGIN|PRAGMA").match
    lock_of_events = catalog.dialect == "postgresql"
    assert len([each for each in statements if not is_session(each)]) <= 14 + lock_of_events
    assert len(statements) <= 25
    # Asked twice whether the name is free, once before and once after the manifest; content in the order in
    # which it becomes visible: blobs, directories, trees.
    assert server.calls("GetActionResult") <= 4
    assert server.calls("FindMissingBlobs") <= 4
    assert server.calls("BatchUpdateBlobs") <= 3
    assert server.calls("UpdateActionResult") == 1
    assert server.total_calls() <= 12
