"""Creating, starting, stopping and deleting workspaces."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import DATA, Host, HostFactory

from snaploader._environment import HostEnvironment
from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
    Unavailable,
)
from snaploader.testing import FakeCAS
from snaploader.workspace.host import SlotPool
from snaploader.workspace.manager import versions
from snaploader.workspace.manager.operation import Work
from snaploader.workspace.model import (
    RunStatus,
    RunTransition,
    SnapshotKind,
    SnapshotStatus,
    Volume,
    WorkspaceState,
)


def test_a_command_that_is_one_str_is_refused_and_shown_as_a_sequence(host: Host) -> None:
    with pytest.raises(TypeError, match="and not one str: 'sleep 5'"):
        host.manager.create("one", command="sleep 5")
    assert host.manager.workspaces() == []


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"command": ["sleep", 5]}, "command .* holds 5"),
        ({"environment": {"PORT": 8000}}, "environment .* holds 8000"),
        ({"environment": {8000: "PORT"}}, "environment .* holds 8000"),
    ],
)
def test_a_command_and_an_environment_are_text(host: Host, values: dict[str, Any], shown: str) -> None:
    with pytest.raises(TypeError, match=shown):
        host.manager.create("one", **values)
    assert host.manager.slots.owners() == {}


def test_a_created_workspace_runs_and_is_as_it_was_asked_for(host: Host) -> None:
    workspace = host.manager.create(
        "one",
        command=["sleep", "5"],
        environment={"A": "b"},
        volumes=[Volume("data", "/data/")],
        owner="ann",
        base="debian",
        autostart_schedule="CRON_TZ=Europe/Berlin 30 9 * * 1-5",
    )
    assert host.is_running()
    assert (workspace.state, workspace.slot, workspace.host) == (WorkspaceState.RUNNING, 0, "host-a")
    assert (workspace.owner, workspace.base, workspace.policy) == ("ann", "debian", "default")
    assert workspace.spec.volumes == (DATA,)
    assert workspace.spec.command == ("sleep", "5")
    assert workspace == host.manager.workspace("one")
    assert host.events() == ["workspace_create"]
    assert host.findings() == []


def test_a_workspace_without_an_id_gets_a_new_one(host: Host) -> None:
    assert host.manager.create().id != host.manager.create().id


def test_a_workspace_may_be_created_without_starting_it(host: Host) -> None:
    assert host.create(start=False).state is WorkspaceState.STOPPED
    assert not host.is_running()
    with host.catalog.reading() as reader:
        assert reader.latest_run("one") is None


def test_a_workspace_begins_with_the_content_of_a_folder(host: Host, tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "tool").write_text("content")
    workspace = host.create(source=tmp_path / "template")
    assert host.read("tool") == "content"
    [info] = host.manager.list_snapshots("one")
    assert info.record is not None
    assert (info.record.kind, info.record.name) == (SnapshotKind.BASE, workspace.base_snapshot)
    assert host.manager.list_versions("one") == []
    assert host.findings() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"workspace_id": "../etc"},
        {"workspace_id": "x" * 65},
        {"volumes": [Volume("a", "/a/../b")]},
        {"volumes": [Volume("a", "/a"), Volume("b", "/a/b")]},
        {"autostart_schedule": "every day"},
    ],
)
def test_what_cannot_be_a_workspace_is_refused(host: Host, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        host.create(**arguments)  # type: ignore[arg-type]
    assert host.manager.workspaces() == []
    assert host.manager.slots.owners() == {}


def test_an_id_that_was_used_once_is_never_used_again(host: Host) -> None:
    host.create()
    with pytest.raises(FailedPrecondition, match="used before"):
        host.create()
    host.manager.delete("one")
    with pytest.raises(FailedPrecondition, match="used before"):
        host.create()
    assert host.manager.slots.owners() == {}


def test_an_unknown_policy_is_named(host: Host) -> None:
    with pytest.raises(NotFound, match="'gentle'"):
        host.create(policy="gentle")
    assert host.manager.slots.owners() == {}


def nothing_is_left(host: Host) -> None:
    assert host.manager.workspaces(include_deleted=True) == []
    assert host.manager.events() == []
    assert host.runtime.workspaces() == []
    assert host.manager.slots.owners() == {}
    assert host.cache.pins() == []
    assert host.cache.refs() == []
    assert host.findings() == []


@pytest.mark.parametrize("method", ["create", "capture", "start"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_a_creation_that_fails_leaves_nothing(
    host: Host, tmp_path: Path, method: str, after_effect: bool
) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "tool").write_text("content")
    host.runtime.fail_next(method, Unavailable("broken"), after_effect=after_effect)
    with pytest.raises(Unavailable, match="broken"):
        host.create(source=tmp_path / "template")
    nothing_is_left(host)
    host.create()


def test_a_creation_is_not_shown_before_it_is_complete(host: Host) -> None:
    seen = []
    object.__setattr__(
        host.manager._services,
        "environment",
        HostEnvironment(after_step=lambda step: seen.append(host.manager.workspaces())),
    )
    host.create()
    assert seen[0] == []
    assert [each.id for each in seen[-1]] == ["one"]


def test_workspaces_hold_different_slots_until_they_are_deleted(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host(slots=SlotPool(tmp_path / "slots", 2))
    assert [host.create("one").slot, host.create("two").slot] == [0, 1]
    with pytest.raises(ResourceExhausted, match="all 2 slots"):
        host.create("three")
    host.manager.stop("one")
    host.manager.pause("two")
    with pytest.raises(ResourceExhausted):
        host.create("three")
    host.manager.delete("one")
    assert host.create("three").slot == 0


# Start and stop


def test_stopping_and_starting_leave_runs_and_events(host: Host) -> None:
    host.create()
    assert host.manager.stop("one").state is WorkspaceState.STOPPED
    assert not host.is_running()
    assert host.manager.start("one").state is WorkspaceState.RUNNING
    assert host.is_running()
    assert host.events() == ["workspace_create", "workspace_stop", "workspace_start"]
    with host.catalog.reading() as reader:
        runs = [(run.transition, run.status, run.reason) for run in reader.runs("one")]
    assert runs == [
        (RunTransition.START, RunStatus.SUCCEEDED, "user"),
        (RunTransition.STOP, RunStatus.SUCCEEDED, "user"),
        (RunTransition.START, RunStatus.SUCCEEDED, "user"),
    ]


def deadline_of(host: Host, workspace_id: str = "one") -> datetime | None:
    with host.catalog.reading() as reader:
        return reader.situation(workspace_id).deadline


HOUR = timedelta(hours=1)


def test_the_ttl_of_a_workspace_counts_before_that_of_its_policy_from_the_next_start_on(host: Host) -> None:
    host.follow(autostop_after=2 * HOUR)
    host.create(ttl=3 * HOUR)
    assert deadline_of(host) == host.clock.now + 3 * HOUR
    assert host.manager.change("one", ttl=5 * HOUR).ttl == 5 * HOUR
    assert deadline_of(host) == host.clock.now + 3 * HOUR
    host.manager.stop("one")
    assert deadline_of(host) is None
    host.manager.start("one")
    assert deadline_of(host) == host.clock.now + 5 * HOUR
    assert host.manager.change("one", ttl=timedelta(0)).ttl is None
    host.manager.stop("one")
    host.manager.start("one")
    assert deadline_of(host) == host.clock.now + 2 * HOUR


def test_a_ttl_is_kept_by_a_pause_that_the_catalog_has_forgotten_and_by_forks(host: Host) -> None:
    host.create(ttl=HOUR)
    host.manager.commit("one")
    assert host.manager.fork("one", "two").ttl == HOUR
    assert host.manager.fork("one", "three", ttl=2 * HOUR).ttl == 2 * HOUR
    host.manager.pause("one")
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    assert host.manager.recover().adopted == ("one",)
    assert host.manager.workspace("one").ttl == HOUR
    with pytest.raises(InvalidArgument, match="TTL"):
        host.create("four", ttl=timedelta(days=367))


def test_a_deadline_is_extended_which_counts_as_a_use(host: Host) -> None:
    host.create(ttl=HOUR)
    start = host.clock.now
    now = host.clock.advance(minutes=30)
    assert host.manager.extend("one", 2 * HOUR) == start + 3 * HOUR == deadline_of(host)
    assert host.manager.extend("one", start + 4 * HOUR) == start + 4 * HOUR == deadline_of(host)
    assert host.manager.workspace("one").last_used_at == now
    [first, _] = host.manager.events(types=["deadline_extend"])
    with host.catalog.reading() as reader:
        assert reader.situation("one").earliest_due() == start + 4 * HOUR
        [run] = reader.runs("one")
    assert first.payload["before"] == (start + HOUR).isoformat()
    assert first.payload["deadline"] == (start + 3 * HOUR).isoformat()
    assert first.payload["run"] == run.id


def test_what_cannot_be_extended_is_refused_and_nothing_changes(host: Host) -> None:
    host.create(start=False)
    with pytest.raises(FailedPrecondition, match="it is stopped: start it first"):
        host.manager.extend("one", HOUR)
    host.manager.start("one")
    with pytest.raises(FailedPrecondition, match="has no deadline"):
        host.manager.extend("one", HOUR)
    host.follow(autostop_after=HOUR, max_ttl=2 * HOUR)
    host.manager.stop("one")
    host.manager.start("one")
    with pytest.raises(InvalidArgument, match="maxTtlSeconds"):
        host.manager.extend("one", 2 * HOUR)
    assert deadline_of(host) == host.clock.now + HOUR
    assert "deadline_extend" not in host.events()


def test_a_workspace_that_is_being_stopped_is_not_extended(make_host: HostFactory) -> None:
    refused = []

    def extend(step: str) -> None:
        if step == "stop.stopped":
            with pytest.raises(FailedPrecondition, match="a stop is under way: too late"):
                host.manager.extend("one", HOUR)
            refused.append(step)

    host = make_host(_environment=HostEnvironment(after_step=extend))
    host.create(ttl=HOUR)
    host.manager.stop("one")
    assert refused == ["stop.stopped"]


def test_a_use_moves_the_deadline_as_the_policy_says(host: Host) -> None:
    host.follow(autostop_after=HOUR / 2, activity_bump=HOUR, max_ttl=2 * HOUR)
    host.create()
    start = host.clock.now
    assert deadline_of(host) == start + HOUR / 2
    host.manager.extend("one", HOUR / 4)  # which is a use, but not after the start
    assert deadline_of(host) == start + HOUR * 3 / 4
    now = host.clock.advance(minutes=30)
    host.manager.touch("one")
    assert deadline_of(host) == now + HOUR
    now = host.clock.advance(minutes=15)
    host.manager.create_version("one")
    assert deadline_of(host) == now + HOUR
    host.clock.advance(minutes=30)
    host.manager.rollback("one", 1)
    assert deadline_of(host) == start + 2 * HOUR
    with host.catalog.reading() as reader:
        assert reader.situation("one").earliest_due() == start + 2 * HOUR


def test_what_is_no_use_or_ends_what_runs_moves_no_deadline(host: Host) -> None:
    host.follow(autostop_after=HOUR, activity_bump=HOUR)
    host.create()
    start = host.clock.now
    host.clock.advance(minutes=30)
    host.manager.stop("one")
    with host.catalog.reading() as reader:
        [run, _] = reader.runs("one")
    assert run.deadline == start + HOUR
    host.manager.touch("one")
    with host.catalog.reading() as reader:
        assert [run.deadline for run in reader.runs("one")] == [start + HOUR, None]


def test_a_start_gets_the_deadline_of_its_policy(host: Host) -> None:
    host.follow(autostop_after=timedelta(hours=2))
    host.create()
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert run.deadline == host.clock.now + timedelta(hours=2)


@pytest.mark.parametrize(
    ("operation", "state", "hint"),
    [
        ("start", WorkspaceState.RUNNING, "it is running"),
        ("start", WorkspaceState.PAUSED, "resume it first"),
        ("stop", WorkspaceState.STOPPED, "it is stopped"),
        ("stop", WorkspaceState.PAUSED, "resume it first"),
        ("resume", WorkspaceState.RUNNING, "it is running"),
        ("resume", WorkspaceState.STOPPED, "it is stopped"),
        ("pause", WorkspaceState.PAUSED, "it is paused"),
    ],
)
def test_an_operation_in_a_wrong_state_says_what_to_do(
    host: Host, operation: str, state: WorkspaceState, hint: str
) -> None:
    host.create(start=state is WorkspaceState.RUNNING)
    if state is WorkspaceState.PAUSED:
        host.manager.pause("one")
    events = host.events()
    with pytest.raises(FailedPrecondition, match=hint):
        getattr(host.manager, operation)("one")
    assert host.manager.workspace("one").state is state
    assert host.events() == events
    assert host.findings() == []


def test_a_start_that_fails_leaves_the_workspace_stopped_with_a_failed_run(host: Host) -> None:
    host.create(start=False)
    host.runtime.fail_next("start", FailedPrecondition("no such command"), after_effect=True)
    with pytest.raises(FailedPrecondition):
        host.manager.start("one")
    assert not host.is_running()
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status, run.error) == (
        RunTransition.START,
        RunStatus.FAILED,
        "no such command",
    )
    assert host.events() == ["workspace_create", "operation_failed"]


def test_a_stop_that_fails_leaves_the_workspace_running(host: Host) -> None:
    host.create()
    host.runtime.fail_next("stop", DeadlineExceeded("it cannot be killed"), after_effect=True)
    with pytest.raises(DeadlineExceeded):
        host.manager.stop("one")
    assert host.is_running()
    assert host.manager.workspace("one").state is WorkspaceState.RUNNING


def test_a_workspace_whose_files_are_gone_starts_from_its_snapshot(host: Host) -> None:
    host.create()
    host.write("data/a", "kept")
    host.manager.create_version("one")
    host.manager.stop("one")
    host.runtime.remove("one")
    host.manager.start("one")
    assert host.read("data/a") == "kept"


def test_a_workspace_that_lost_its_files_and_has_no_snapshot_says_so(host: Host) -> None:
    host.create(start=False)
    host.runtime.remove("one")
    with pytest.raises(NotFound, match="no snapshot was ever taken"):
        host.manager.start("one")
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED


# Deleting


def deleted(host: Host, workspace_id: str = "one") -> None:
    assert host.manager.workspace(workspace_id).state is WorkspaceState.DELETED
    assert workspace_id not in host.runtime.workspaces()
    assert workspace_id not in host.manager.slots.owners().values()
    assert host.cache.pins(f"workspace.{workspace_id}.") == []
    assert host.manager.records.entries() == []
    assert workspace_id not in host.manager.locks.ids()
    with host.catalog.reading() as reader:
        assert reader.snapshots(workspace_id, statuses=list(SnapshotStatus)) == []
        assert reader.versions(workspace_id) == []
    assert host.findings() == []


@pytest.mark.parametrize("state", [WorkspaceState.RUNNING, WorkspaceState.STOPPED, WorkspaceState.PAUSED])
def test_a_deleted_workspace_leaves_its_events_and_nothing_else(host: Host, state: WorkspaceState) -> None:
    host.create()
    host.write("data/a", "content")
    host.manager.create_version("one")
    if state is WorkspaceState.STOPPED:
        host.manager.stop("one")
    if state is WorkspaceState.PAUSED:
        host.manager.pause("one")
    host.manager.delete("one")
    deleted(host)
    assert host.cache.refs() == []
    assert host.events()[:2] == ["workspace_create", "version_create"]
    assert host.events()[-1] == "workspace_delete"


def test_deleting_takes_the_commits_out_of_the_remote_cache(host: Host) -> None:
    host.create()
    host.write("data/a", "content")
    name = host.manager.commit("one").snapshot_name
    host.manager.delete("one")
    deleted(host)
    with pytest.raises(NotFound):
        host.loader.get_snapshot_by_id(f"workspaces/one/{name}", read_policy="newest")


def test_deleting_takes_unmanaged_snapshots_of_the_workspace_away(host: Host) -> None:
    host.create()
    name = host.manager.create_version("one").snapshot_name
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", current_snapshot="")
        tx.remove_snapshot(name)
    host.manager.delete("one")
    deleted(host)
    assert host.cache.refs() == []


def test_deleted_twice_is_an_error_that_says_so(host: Host) -> None:
    host.create()
    host.manager.delete("one")
    for operation in (host.manager.delete, host.manager.start, host.manager.touch):
        with pytest.raises(FailedPrecondition, match="was deleted"):
            operation("one")
    deleted(host)


def test_deleting_changes_nothing_while_the_remote_cache_with_commits_does_not_answer(
    host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    host.write("data/a", "content")
    host.manager.commit("one")

    def fail(*_: object) -> None:
        raise Unavailable("no route")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "get_action_result", fail)
        with pytest.raises(Unavailable):
            host.manager.delete("one")
    assert host.is_running()
    assert host.manager.workspace("one").state is WorkspaceState.RUNNING
    assert host.findings() == []
    host.manager.delete("one")
    deleted(host)


def test_what_a_delete_cannot_remove_is_left_to_recovery(
    host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    host.write("data/a", "content")
    host.manager.commit("one")

    def fail(*_: object) -> None:
        raise Unavailable("no route")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "update_action_result", fail)
        host.manager.delete("one")
        assert [each for each in host.findings() if "is deleting" in each]
        assert host.manager.recover().problems
    summary = host.manager.recover()
    assert summary.problems == ()
    deleted(host)


def test_a_delete_that_fails_is_taken_back(host: Host) -> None:
    host.create()
    host.runtime.fail_next("stop", DeadlineExceeded("it cannot be killed"), after_effect=True)
    with pytest.raises(DeadlineExceeded):
        host.manager.delete("one")
    assert host.is_running()
    assert host.findings() == []


# Use, locks, other hosts


def test_what_a_user_does_counts_as_use_and_ends_dormancy(host: Host) -> None:
    host.create()
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", dormant_at=host.clock.now, deleting_at=host.clock.now)
    now = host.clock.advance(minutes=5)
    host.manager.create_version("one")
    workspace = host.manager.workspace("one")
    assert (workspace.last_used_at, workspace.dormant_at, workspace.deleting_at) == (now, None, None)


def test_what_the_lifecycle_does_is_no_use(host: Host) -> None:
    workspace = host.create()
    host.clock.advance(minutes=5)
    with host.manager.hold("one") as held:
        held.stop(reason="autostop")
        held.start(reason="autostart")
    assert host.manager.workspace("one").last_used_at == workspace.last_used_at
    event = host.manager.events("one")[-1]
    assert event.payload["reason"] == "autostart"
    with host.catalog.reading() as reader:
        assert [run.reason for run in reader.runs("one")] == ["user", "autostop", "autostart"]


def test_a_touch_counts_as_use_also_while_an_operation_is_under_way(host: Host) -> None:
    host.create()
    now = host.clock.advance(minutes=5)
    with host.manager.hold("one"):
        assert host.manager.touch("one").last_used_at == now


def test_a_failed_stop_of_the_lifecycle_is_a_failed_run(host: Host) -> None:
    host.create()
    host.runtime.fail_next("stop", DeadlineExceeded("it cannot be killed"))
    with host.manager.hold("one") as held, pytest.raises(DeadlineExceeded):
        held.stop(reason="autostop")
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status, run.reason) == (RunTransition.STOP, RunStatus.FAILED, "autostop")


def test_a_held_workspace_is_not_had_by_others(host: Host) -> None:
    host.create()
    with host.manager.try_hold("one") as held:
        assert held is not None
        with host.manager.try_hold("one") as second:
            assert second is None
        with pytest.raises(DeadlineExceeded), host.manager.hold("one", timeout_s=0):
            pass
        held.stop()
    assert not host.is_running()


def test_a_closed_manager_does_nothing_more(host: Host) -> None:
    host.create()
    host.manager.close()
    for operation in (
        lambda: host.manager.create("two"),
        lambda: host.manager.stop("one"),
        lambda: host.manager.recover(),
    ):
        with pytest.raises(Cancelled):
            operation()
    assert host.is_running()


def test_a_manager_made_before_a_fork_is_refused_in_the_child(host: Host) -> None:
    host.create()
    host.manager._sections._pid = os.getpid() + 1
    with pytest.raises(FailedPrecondition, match="fork"):
        host.manager.stop("one")
    host.manager._sections._pid = os.getpid()
    assert host.manager.stop("one").state is WorkspaceState.STOPPED


def test_a_forked_child_that_leaves_an_operation_does_not_take_back_its_parent_s(host: Host) -> None:
    host.create()
    services = host.manager._services
    children = []

    def fork(step: str) -> None:
        if step == "snapshot.captured":
            pid = os.fork()
            if not pid:
                raise SystemExit
            children.append(os.waitpid(pid, 0))

    object.__setattr__(services, "environment", HostEnvironment(after_step=fork))
    with host.manager.hold("one"):
        try:
            # On this thread, so that the child ends where it left the operation.
            taken = versions.take(services, "one")
        except SystemExit:
            os._exit(0)
    assert children
    assert taken.version == 1
    assert host.events() == ["workspace_create", "version_create"]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_workspace_of_another_host_is_not_worked_on_and_its_host_is_named(make_host: HostFactory) -> None:
    home, other = make_host("host-a"), make_host("host-b")
    home.create()
    operations: list[Callable[[str], object]] = [
        other.manager.create_version,
        other.manager.pause,
        other.manager.stop,
        other.manager.commit,
        other.manager.delete,
        lambda each: other.manager.rollback(each, 1),
    ]
    for operation in operations:
        with pytest.raises((FailedPrecondition, NotFound), match=r"host-a|no version"):
            operation("one")
    assert home.is_running()
    assert other.runtime.calls == []
    assert [each.id for each in other.manager.workspaces()] == ["one"]
    assert other.manager.workspaces(host="host-b") == []


def test_an_operation_left_by_another_process_is_put_right_by_the_next_one(host: Host) -> None:
    host.create()

    def die(step: str) -> None:
        if step == "snapshot.captured":
            raise SystemExit

    services = host.manager._services
    object.__setattr__(services, "environment", HostEnvironment(after_step=die))
    undo = host.manager.create_version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "__exit__", lambda *_: None)
        with pytest.raises(SystemExit):
            undo("one")
    object.__setattr__(services, "environment", HostEnvironment(after_step=lambda step: None))
    assert not host.is_running()
    assert host.manager.workspace("one").operation is not None
    assert host.manager.create_version("one").version == 1
    assert host.is_running()
    assert host.events() == ["workspace_create", "operation_recovered", "version_create"]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_an_operation_whose_catalog_fails_is_left_to_recovery_with_its_runtime_running(host: Host) -> None:
    host.create()
    catalog = host.catalog
    services = host.manager._services

    def close(step: str) -> None:
        if step == "snapshot.captured":
            object.__setattr__(services, "catalog", Broken())

    object.__setattr__(services, "environment", HostEnvironment(after_step=close))
    with pytest.raises(SnaploaderError) as failure:
        host.manager.create_version("one")
    assert "recovery will" in str(failure.value.__notes__)
    assert host.is_running()
    object.__setattr__(services, "catalog", catalog)
    object.__setattr__(services, "environment", HostEnvironment(after_step=lambda step: None))
    assert [note.name for note in host.manager.recover().repaired] == ["one"]
    assert (host.findings(), host.leftovers()) == ([], [])


class Broken:
    """A catalog that cannot be reached."""

    def transaction(self) -> None:
        raise Unavailable("the catalog cannot be reached")

    reading = transaction


@pytest.fixture
def half_committed(host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose remote cache died during a commit, and has an earlier commit."""
    host.create()
    host.manager.commit("one")
    host.write("data/a", "new")

    def dead(*_: Any) -> None:
        raise Unavailable("no route to host")

    with monkeypatch.context() as patch:
        for method in ("get_action_result", "update_action_result", "find_missing", "write_many"):
            patch.setattr(remote, method, dead)
        with pytest.raises(Unavailable):
            host.manager.commit("one")
        yield host


def orphans_of(host: Host) -> list[str]:
    return [event.payload["snapshot"] for event in host.manager.events(types=["remote_orphan"])]


def test_a_workspace_is_deleted_without_the_remote_cache_when_that_is_to_be_forgotten(
    half_committed: Host,
) -> None:
    host = half_committed
    with host.catalog.reading() as reader:
        commits = [each.name for each in reader.snapshots("one", statuses=list(SnapshotStatus))]
    with pytest.raises(Unavailable) as refusal:
        host.manager.delete("one")
    assert "--forget-remote" in refusal.value.__notes__[0]
    assert orphans_of(host) == []
    assert host.manager.delete("one", forget_remote=True).state is WorkspaceState.DELETED
    assert sorted(orphans_of(host)) == sorted(commits)
    assert len(commits) == 2
    assert list(host.cache.pins()) == []
    assert host.manager.recover().problems == ()
    assert (host.findings(), host.leftovers()) == ([], [])


def test_recovery_forgets_the_remote_part_of_what_failed_when_told_to(half_committed: Host) -> None:
    host = half_committed
    with host.catalog.transaction() as tx:  # as after a server that died when the manifest was on its way
        [orphan] = tx.snapshots("one", statuses=[SnapshotStatus.ORPHANED])
        tx.put_snapshot(replace(orphan, is_remote=True))
    [problem] = host.manager.recover().problems
    assert problem.name == orphan.name
    summary = host.manager.recover(forget_remote=True)
    assert [note.name for note in summary.repaired] == [orphan.name]
    assert summary.problems == ()
    assert orphans_of(host) == [orphan.name]
    assert host.manager.recover().problems == ()
    assert host.findings() == []
    assert len(host.manager.list_snapshots("one")) == 1  # the commit that was made is kept
