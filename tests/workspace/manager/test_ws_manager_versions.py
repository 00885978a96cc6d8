"""Versions and rollback: what the table of operations says of each, on both databases."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from manager_hosts import Host, HostFactory

from snaploader._environment import HostEnvironment
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snaploader.workspace.model import (
    MAX_VERSION,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotSource,
    SnapshotStatus,
    WorkspaceState,
)


def test_a_snapshot_returns_what_it_is_called_and_its_number(host: Host) -> None:
    host.create()
    result = host.manager.create_snapshot("one", "before the update")
    assert (result.workspace_id, result.display_name, result.version) == ("one", "before the update", 1)
    assert result.runtime_name == f"workspaces/one/{result.snapshot_name}"
    assert result.created_at == host.clock.now


def test_a_snapshot_stops_captures_continues_and_starts_in_this_order(host: Host) -> None:
    host.create()
    host.calls()
    host.manager.create_snapshot("one")
    assert host.calls() == ["stop", "capture", "continue_on", "start"]
    assert host.is_running()


def test_a_workspace_whose_process_has_ended_is_snapshot_and_runs_again(host: Host) -> None:
    host.create()
    host.runtime.end("one")
    host.manager.create_snapshot("one")
    assert host.is_running()


def test_a_runtime_that_does_not_stop_by_itself_is_forced_to_after_10_s(host: Host) -> None:
    host.create()
    stops: list[dict[str, Any]] = []
    stop = host.runtime.stop
    host.runtime.stop = lambda workspace_id, **kwargs: (stops.append(kwargs), stop(workspace_id, **kwargs))[1]  # type: ignore[method-assign]
    host.runtime.ignore_stop("one")
    host.manager.create_snapshot("one")
    assert stops == [{"timeout_s": 10.0, "force": True}]


def test_a_stopped_workspace_stays_stopped(host: Host) -> None:
    host.create(start=False)
    host.calls()
    assert host.manager.create_version("one").version == 1
    assert "start" not in host.calls()
    assert not host.is_running()


@pytest.mark.parametrize(
    ("source", "kept"),
    [("", "manual"), ("manual", "manual"), ("rollback", "rollback"), (" vor dem Umzug ", "vor dem Umzug")],
)
def test_the_source_is_kept_and_an_empty_one_means_manual(host: Host, source: str, kept: str) -> None:
    host.create()
    name = host.manager.create_snapshot("one", source=source).snapshot_name
    [info] = host.manager.list_snapshots("one")
    assert info.record is not None
    assert (info.record.name, info.record.source) == (name, kept)
    [version] = host.manager.list_versions("one")
    assert version.source == kept


def test_a_name_is_kept_without_the_white_space_around_it(host: Host) -> None:
    host.create()
    assert host.manager.create_snapshot("one", "  before the upgrade\t").display_name == "before the upgrade"
    assert host.manager.create_snapshot("one", " \n ").display_name == "Version 2"
    assert [each.display_name for each in host.manager.list_versions("one")] == [
        "before the upgrade",
        "Version 2",
    ]


def test_create_version_is_a_snapshot_before_something_is_executed(host: Host) -> None:
    host.create()
    result = host.manager.create_version("one")
    assert result.display_name == "Version 1"
    [version] = host.manager.list_versions("one")
    assert (version.source, version.display_name) == (SnapshotSource.PRE_EXEC, "Version 1")
    assert host.events() == ["workspace_create", "version_create"]


def test_every_snapshot_leaves_its_event_with_what_it_is(host: Host) -> None:
    host.create()
    name = host.manager.create_snapshot("one").snapshot_name
    [event] = host.manager.events("one", types=["snapshot_create"])
    assert event.created_at == host.clock.now
    assert (
        event.payload.items() >= {"snapshot": name, "version": 1, "source": "manual", "scope": "Full"}.items()
    )


@pytest.mark.parametrize(
    "arguments",
    [{"source": "a\nb"}, {"scope": "Half"}, {"name": "a\nb"}, {"name": "x" * 201}, {"workspace_id": "A B"}],
)
def test_wrong_arguments_are_refused_before_anything_is_stopped(
    host: Host, arguments: dict[str, str]
) -> None:
    host.create()
    host.calls()
    with pytest.raises(InvalidArgument):
        host.manager.create_snapshot(**{"workspace_id": "one", **arguments})  # type: ignore[arg-type]
    assert host.calls() == []


def test_a_snapshot_of_an_unknown_workspace_is_not_found_and_leaves_no_lock_file(host: Host) -> None:
    with pytest.raises(NotFound, match="'nope'"):
        host.manager.create_version("nope")
    assert host.manager.locks.ids() == []


def test_versions_are_listed_with_name_number_and_runtime_name(host: Host) -> None:
    host.create()
    first = host.manager.create_snapshot("one", "first")
    host.clock.advance(seconds=1)
    second = host.manager.create_version("one")
    listed = host.manager.list_versions("one")
    assert [(each.number, each.display_name, each.runtime_name, each.created_at) for each in listed] == [
        (1, "first", first.runtime_name, first.created_at),
        (2, "Version 2", second.runtime_name, second.created_at),
    ]
    assert listed[0].id < listed[1].id
    assert host.manager.version_snapshot_name("one", 2) == second.runtime_name


def test_snapshots_within_one_tick_of_the_clock_have_different_names(host: Host) -> None:
    host.create()
    names = {host.manager.create_version("one").snapshot_name for _ in range(3)}
    assert len(names) == 3


def test_the_parent_is_the_snapshot_that_the_state_goes_on_from(host: Host) -> None:
    host.create()
    first = host.manager.create_version("one").snapshot_name
    second = host.manager.create_version("one").snapshot_name
    host.manager.rollback("one", 1)
    third = host.manager.create_version("one").snapshot_name
    with host.catalog.reading() as reader:
        parents = {each.name: each.parent for each in reader.snapshots("one")}
    assert parents == {first: "", second: first, third: first}


def test_unmanaged_snapshots_are_listed_and_marked_so(make_host: HostFactory) -> None:
    host = make_host()
    host.create()
    name = host.manager.create_version("one").snapshot_name
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", current_snapshot="")
        tx.remove_snapshot(name)
    [info] = host.manager.list_snapshots("one")
    assert (info.runtime_name, info.is_managed, info.is_local) == (f"workspaces/one/{name}", False, True)
    assert info.record is None
    assert info.version is None


def test_managed_snapshots_are_listed_with_source_version_and_name(host: Host) -> None:
    host.create()
    host.manager.create_snapshot("one", "a name")
    host.manager.create_version("one")
    infos = host.manager.list_snapshots("one")
    assert [(info.version, info.display_name, info.is_local) for info in infos] == [
        (1, "a name", True),
        (2, "Version 2", True),
    ]
    assert [info.record and info.record.source for info in infos] == ["manual", "pre_exec"]


# Rollback


def test_a_rollback_brings_the_whole_state_back(host: Host) -> None:
    host.create()
    host.write("data/a", "old")
    host.write("rest", "old")
    host.manager.create_version("one")
    host.write("data/a", "new")
    host.write("data/b", "new")
    (host.runtime.root("one") / "rest").unlink()
    host.calls()
    workspace = host.manager.rollback("one", 1)
    assert host.calls() == ["stop", "place", "start"]
    assert [host.read(path) for path in ("data/a", "data/b", "rest")] == ["old", None, "old"]
    assert host.is_running()
    assert workspace.state is WorkspaceState.RUNNING


def test_a_rollback_leaves_an_event(host: Host) -> None:
    host.create()
    name = host.manager.create_version("one").snapshot_name
    host.manager.rollback("one", 1)
    [event] = host.manager.events("one", types=["version_rollback"])
    assert (event.payload["version"], event.payload["snapshot"]) == (1, name)


def test_numbers_go_on_rising_after_a_rollback_and_history_stays(host: Host) -> None:
    host.create()
    host.manager.create_version("one")
    host.manager.create_version("one")
    host.manager.rollback("one", 1)
    assert host.manager.create_version("one").version == 3
    assert [version.number for version in host.manager.list_versions("one")] == [1, 2, 3]


def test_a_rollback_can_keep_the_present_state_as_a_version(host: Host) -> None:
    host.create()
    host.write("data/a", "old")
    host.manager.create_version("one")
    host.write("data/a", "new")
    host.manager.rollback("one", 1, keep_current=True)
    assert host.read("data/a") == "old"
    kept = host.manager.list_versions("one")[-1]
    assert (kept.number, kept.source) == (2, SnapshotSource.ROLLBACK)
    host.manager.rollback("one", 2)
    assert host.read("data/a") == "new"


def test_the_state_that_a_rollback_keeps_is_on_disk_before_it_is_replaced(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    host.write("data/a", "old")
    host.manager.create_version("one")
    host.write("data/a", "new")
    at_sync: list[tuple[str | None, int]] = []
    monkeypatch.setattr(
        host.cache,
        "sync",
        lambda: at_sync.append((host.read("data/a"), len(host.cache.pins("workspace.one.")))),
    )
    host.manager.rollback("one", 1, keep_current=True)
    assert at_sync == [("new", 2)]


def test_a_rolled_back_workspace_that_was_stopped_stays_stopped(host: Host) -> None:
    host.create(start=False)
    host.manager.create_version("one")
    assert host.manager.rollback("one", 1).state is WorkspaceState.STOPPED
    assert not host.is_running()


@pytest.mark.parametrize("number", [0, -1, MAX_VERSION + 1, True, False, 1.0, "1", None])
def test_what_is_no_version_number_is_refused_and_nothing_is_stopped(host: Host, number: Any) -> None:
    host.create()
    host.manager.create_version("one")
    host.calls()
    with pytest.raises(InvalidArgument, match="no version"):
        host.manager.rollback("one", number)
    with pytest.raises(InvalidArgument):
        host.manager.version_snapshot_name("one", number)
    assert host.calls() == []


@pytest.mark.parametrize("number", [2, MAX_VERSION])
def test_a_version_that_does_not_exist_is_named_and_nothing_is_stopped(host: Host, number: int) -> None:
    host.create()
    host.manager.create_version("one")
    events = host.events()
    host.calls()
    with pytest.raises(NotFound, match=f"'one' has no version {number}"):
        host.manager.rollback("one", number)
    assert host.calls() == []
    assert host.events() == events


def test_a_version_whose_content_is_gone_is_not_gone_back_to_and_nothing_is_stopped(host: Host) -> None:
    host.create()
    host.write("data/a", "x" * 5000)
    name = host.manager.create_version("one").snapshot_name
    pin = host.cache.pinned(f"workspace.{name}")
    for ref in pin.refs:
        host.cache.delete_ref(ref)
    host.calls()
    with pytest.raises(NotFound):
        host.manager.rollback("one", 1)
    assert host.calls() == []
    assert host.is_running()


def test_a_rollback_that_cannot_replace_the_state_changes_nothing(host: Host) -> None:
    host.create()
    host.write("data/a", "old")
    host.manager.create_version("one")
    host.write("data/a", "new")
    host.runtime.fail_next("place", Unavailable("no content"))
    with pytest.raises(Unavailable):
        host.manager.rollback("one", 1, keep_current=True)
    assert host.read("data/a") == "new"
    assert host.is_running()
    assert len(host.manager.list_versions("one")) == 1
    assert host.events()[-1] == "operation_failed"
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_rollback_that_replaced_the_state_and_then_fails_is_finished(host: Host) -> None:
    host.create()
    host.write("data/a", "old")
    first = host.manager.create_version("one").snapshot_name
    host.write("data/a", "new")
    host.runtime.fail_next("place", Unavailable("lost"), after_effect=True)
    with pytest.raises(Unavailable) as failure:
        host.manager.rollback("one", 1, keep_current=True)
    assert "rolled back nevertheless" in str(failure.value.__notes__)
    assert host.read("data/a") == "old"
    assert host.is_running()
    assert host.manager.workspace("one").current_snapshot == first
    assert len(host.manager.list_versions("one")) == 2
    assert host.findings() == []


def test_a_rollback_after_which_nothing_starts_is_recorded_as_stopped(host: Host) -> None:
    host.create()
    host.write("data/a", "old")
    host.manager.create_version("one")
    host.runtime.fail_next("start", FailedPrecondition("no such command"))
    with pytest.raises(FailedPrecondition, match="no such command") as failure:
        host.manager.rollback("one", 1)
    assert "rolled back, and stopped" in str(failure.value.__notes__)
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED
    assert host.events()[-1] == "version_rollback"
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status) == (RunTransition.START, RunStatus.FAILED)
    assert host.findings() == []


# Failures, and callers that go away


@pytest.mark.parametrize("method", ["stop", "capture", "continue_on"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_a_snapshot_that_fails_leaves_the_workspace_running_and_nothing_else(
    host: Host, method: str, after_effect: bool
) -> None:
    host.create()
    host.write("data/a", "content")
    host.runtime.fail_next(method, Unavailable("broken"), after_effect=after_effect)
    with pytest.raises(Unavailable, match="broken"):
        host.manager.create_snapshot("one")
    assert host.is_running()
    assert host.manager.list_snapshots("one") == []
    [event] = host.manager.events("one", types=["operation_failed"])
    assert (event.payload["operation"], event.payload["error"]) == ("snapshot", "broken")
    assert host.manager.create_version("one").version == 1
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_start_that_fails_once_is_tried_again_before_the_workspace_is_given_up(host: Host) -> None:
    host.create()
    host.runtime.fail_next("start", Unavailable("busy"))
    with pytest.raises(Unavailable):
        host.manager.create_version("one")
    assert host.is_running()
    assert host.manager.workspace("one").state is WorkspaceState.RUNNING


def test_a_workspace_that_cannot_be_started_again_is_stopped_with_a_failed_run(host: Host) -> None:
    host.create()
    host.runtime.fail_next("start", Unavailable("broken"), times=2)
    with pytest.raises(Unavailable) as failure:
        host.manager.create_version("one")
    assert "could not be started again" in str(failure.value.__notes__)
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status, run.error) == (RunTransition.START, RunStatus.FAILED, "broken")
    assert (host.findings(), host.leftovers()) == ([], [])
    host.manager.start("one")
    assert host.is_running()


def test_a_caller_that_is_interrupted_interrupts_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.create()
    gate = host.runtime.hold_next("capture")

    def interrupted(self: Any, timeout: Any = None) -> Any:
        assert gate.wait_reached()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host.manager.create_version("one")
    assert host.manager.locks.try_acquire("one") is None
    gate.open()
    host.manager.locks.acquire("one", timeout_s=30).release()
    assert host.is_running()
    assert [version.number for version in host.manager.list_versions("one")] == [1]


def test_closing_waits_for_what_is_under_way(host: Host) -> None:
    host.create()
    gate = host.runtime.hold_next("capture")
    caller = threading.Thread(target=host.manager.create_version, args=("one",))
    caller.start()
    assert gate.wait_reached()
    gate.open()
    host.manager.close()
    caller.join()
    assert [version.number for version in host.manager.list_versions("one")] == [1]


def test_operations_on_one_workspace_follow_one_another(host: Host) -> None:
    host.create()
    numbers: list[int | None] = []

    def take() -> None:
        numbers.append(host.manager.create_version("one").version)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers, key=str) == [1, 2, 3, 4, 5, 6]
    kinds = [call.method for call in host.runtime.calls if call.method in {"stop", "start"}]
    assert kinds[1:] == ["stop", "start"] * 6


def test_a_snapshot_of_scope_data_holds_the_durable_directories_alone(host: Host) -> None:
    host.create()
    host.write("data/a", "kept")
    host.write("rest", "not kept")
    result = host.manager.create_snapshot("one", scope="data")
    assert result.scope is Scope.DATA
    host.write("data/a", "changed")
    host.manager.rollback("one", 1)
    assert (host.read("data/a"), host.read("rest")) == ("kept", None)


def test_only_what_changed_is_read_again(host: Host) -> None:
    host.create()
    host.write("data/a", "a" * 20_000)
    assert host.manager.create_version("one").read_bytes >= 20_000
    host.write("data/b", "b" * 100)
    second = host.manager.create_version("one")
    assert second.stored_bytes < 20_000


def test_a_paused_workspace_must_be_resumed_first(host: Host) -> None:
    host.create()
    host.manager.create_version("one")
    host.manager.pause("one")
    for operation in (
        lambda: host.manager.create_version("one"),
        lambda: host.manager.create_snapshot("one"),
        lambda: host.manager.rollback("one", 1),
    ):
        with pytest.raises(FailedPrecondition, match="resume it first"):
            operation()


def test_a_version_is_recorded_with_its_snapshot_at_once(host: Host) -> None:
    host.create()
    seen: list[tuple[int, list[SnapshotStatus]]] = []

    def look(step: str) -> None:
        with host.catalog.reading() as reader:
            statuses = [each.status for each in reader.snapshots("one", statuses=list(SnapshotStatus))]
            seen.append((len(reader.versions("one")), statuses))

    object.__setattr__(host.manager._services, "environment", HostEnvironment(after_step=look))
    host.manager.create_version("one")
    assert seen[0] == (0, [SnapshotStatus.PENDING])
    assert seen[-1] == (1, [SnapshotStatus.COMPLETE])
    assert all((number == 1) == (statuses == [SnapshotStatus.COMPLETE]) for number, statuses in seen)
