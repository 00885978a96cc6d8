"""Pausing and resuming: local, temporary, with the scope that the policy says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from manager_hosts import DATA, Host, HostFactory

from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snaploader.testing import FakeCAS
from snaploader.workspace.manager.operation import utc_now
from snaploader.workspace.model import (
    Readiness,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotKind,
    Volume,
    WorkspaceState,
)

READY = Readiness("command", "true", timeout_s=7)


def test_a_paused_workspace_keeps_its_snapshot_its_record_and_its_slot_and_nothing_else(host: Host) -> None:
    host.create()
    host.write("data/a", "content")
    result = host.manager.pause("one")
    workspace = host.manager.workspace("one")
    assert (workspace.state, workspace.slot, workspace.paused_at) == (
        WorkspaceState.PAUSED,
        0,
        host.clock.now,
    )
    assert workspace.current_snapshot == result.snapshot_name
    assert result.version is None
    assert host.runtime.workspaces() == []
    assert host.manager.records.read("one").workspace.current_snapshot == result.snapshot_name
    assert host.manager.slots.owners() == {0: "one"}
    assert host.events() == ["workspace_create", "workspace_pause"]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_what_is_paused_is_on_disk_before_its_files_are_removed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_sync: list[tuple[list[str], int]] = []
    sync = host.cache.sync

    def seen_sync() -> None:
        at_sync.append((host.runtime.workspaces(), len(host.cache.pins("workspace.one."))))
        sync()

    monkeypatch.setattr(host.cache, "sync", seen_sync)
    host.create()
    host.manager.pause("one")
    assert at_sync == [(["one"], 1)]


def test_a_pause_that_cannot_be_flushed_to_disk_leaves_the_workspace_as_it_was(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    host.write("data/a", "kept")

    def fail() -> None:
        raise ResourceExhausted("no room")

    monkeypatch.setattr(host.cache, "sync", fail)
    with pytest.raises(ResourceExhausted, match="no room"):
        host.manager.pause("one")
    assert host.is_running()
    assert host.read("data/a") == "kept"
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_full_pause_brings_everything_back(host: Host) -> None:
    host.create()
    host.write("data/a", "kept")
    host.write("rest", "kept too")
    assert host.manager.pause("one").scope is Scope.FULL
    host.calls()
    workspace = host.manager.resume("one")
    assert (workspace.state, workspace.paused_at) == (WorkspaceState.RUNNING, None)
    assert host.calls() == ["place", "start"]
    assert (host.read("data/a"), host.read("rest")) == ("kept", "kept too")
    assert host.manager.records.entries() == []
    assert host.events()[-1] == "workspace_resume"
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_data_pause_brings_the_durable_directories_back_and_the_process_starts_fresh(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create(volumes=[DATA, Volume("conf", "/etc/..config"), Volume("tab", "/a\tb c")])
    host.write("data/a", "kept")
    host.write("etc/..config/b", "kept too")
    host.write("a\tb c/x..y", "kept as well")
    host.write("rest", "not kept")
    assert host.manager.pause("one").scope is Scope.DATA
    host.manager.resume("one")
    paths = ("data/a", "etc/..config/b", "a\tb c/x..y", "rest")
    assert [host.read(path) for path in paths] == ["kept", "kept too", "kept as well", None]


def test_a_data_pause_comes_back_on_what_the_workspace_was_created_from(host: Host, tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "tool").write_text("template")
    host.follow(Scope.DATA)
    host.create(source=tmp_path / "template")
    host.write("tool", "changed")
    host.write("data/a", "kept")
    host.manager.pause("one")
    host.manager.resume("one")
    assert (host.read("tool"), host.read("data/a")) == ("template", "kept")


def test_a_workspace_without_volumes_can_be_paused_as_data(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create(volumes=())
    host.write("rest", "not kept")
    host.manager.pause("one")
    host.manager.resume("one")
    assert host.read("rest") is None


def test_pausing_and_resuming_ask_the_remote_cache_for_nothing(host: Host, remote: FakeCAS) -> None:
    host.create()
    host.write("data/a", "x" * 3000)
    remote.calls.clear()
    host.manager.pause("one")
    host.manager.resume("one")
    assert dict(remote.calls) == {}


def test_a_pause_works_without_any_remote_cache(make_host: HostFactory) -> None:
    host = make_host(is_remote=False)
    host.create()
    host.write("data/a", "kept")
    host.manager.pause("one")
    host.manager.resume("one")
    assert host.read("data/a") == "kept"


def test_there_is_at_most_one_pause_snapshot_and_the_next_capture_takes_its_place(host: Host) -> None:
    host.create()
    first = host.manager.pause("one").snapshot_name
    host.manager.resume("one")
    assert [info.record and info.record.name for info in host.manager.list_snapshots("one")] == [first]
    second = host.manager.pause("one").snapshot_name
    host.manager.resume("one")
    assert [info.record and info.record.name for info in host.manager.list_snapshots("one")] == [second]
    host.manager.create_version("one")
    [info] = host.manager.list_snapshots("one")
    assert info.record is not None
    assert info.record.kind is SnapshotKind.VERSION
    assert len(host.cache.pins()) == 1
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_pause_is_no_version_and_its_own_parent_stands_for_it(host: Host) -> None:
    host.create()
    first = host.manager.create_version("one").snapshot_name
    host.manager.pause("one")
    host.manager.resume("one")
    second = host.manager.create_version("one").snapshot_name
    with host.catalog.reading() as reader:
        assert reader.snapshot(second).parent == first
    assert [version.number for version in host.manager.list_versions("one")] == [1, 2]


def test_a_pause_that_a_rollback_left_behind_goes(host: Host) -> None:
    host.create()
    host.manager.create_version("one")
    host.manager.pause("one")
    host.manager.resume("one")
    host.manager.rollback("one", 1)
    assert len(host.manager.list_snapshots("one")) == 1
    assert len(host.cache.pins()) == 1


def test_a_stopped_workspace_can_be_paused(host: Host) -> None:
    host.create(start=False)
    host.manager.pause("one")
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert host.manager.resume("one").state is WorkspaceState.RUNNING


@pytest.mark.parametrize("method", ["stop", "capture"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_a_pause_that_fails_leaves_the_workspace_running(host: Host, method: str, after_effect: bool) -> None:
    host.create()
    host.write("data/a", "content")
    host.runtime.fail_next(method, Unavailable("broken"), after_effect=after_effect)
    with pytest.raises(Unavailable):
        host.manager.pause("one")
    assert host.is_running()
    assert host.manager.workspace("one").state is WorkspaceState.RUNNING
    assert host.manager.records.entries() == []
    assert (host.findings(), host.leftovers()) == ([], [])


def test_a_pause_whose_record_cannot_be_written_leaves_the_workspace_running(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("snaploader.workspace.records.write_new", fail)
        with pytest.raises(Exception, match="No space"):
            host.manager.pause("one")
    assert host.is_running()
    assert host.cache.pins() == []
    assert (host.findings(), host.leftovers()) == ([], [])


def test_files_that_a_pause_cannot_remove_are_left_to_recovery(host: Host) -> None:
    host.create()
    host.runtime.fail_next("remove", Unavailable("busy"))
    host.manager.pause("one")
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert host.findings() == ["one: it is paused, but the runtime holds state of it"]
    host.manager.recover()
    assert host.findings() == []


# Readiness


def test_a_resume_from_data_waits_until_the_workspace_is_ready(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create(readiness=READY)
    host.manager.pause("one")
    host.calls()
    gate = host.runtime.hold_next("wait_ready")
    states = []
    caller = threading.Thread(target=lambda: states.append(host.manager.resume("one").state))
    caller.start()
    assert gate.wait_reached()
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    gate.open()
    caller.join()
    assert states == [WorkspaceState.RUNNING]
    assert host.calls() == ["place", "start", "wait_ready"]


def test_a_resume_from_full_waits_unless_the_runtime_brings_memory_back(host: Host) -> None:
    host.create(readiness=READY)
    host.manager.pause("one")
    host.runtime.set_ready("one", is_ready=False)
    with pytest.raises(DeadlineExceeded, match="not ready within 0 s"):
        host.manager.resume("one", ready_timeout_s=0)
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    host.runtime.keeps_memory = True
    assert host.manager.resume("one").state is WorkspaceState.RUNNING


FRESH: dict[str, Callable[[Host], object]] = {
    "create": lambda host: host.manager.create("new", readiness=READY),
    "fork": lambda host: host.manager.fork("one", "new"),
    "start": lambda host: (host.manager.stop("one"), host.manager.start("one")),
    "version": lambda host: host.manager.create_version("one"),
    "snapshot": lambda host: host.manager.create_snapshot("one", scope=Scope.DATA),
    "rollback": lambda host: host.manager.rollback("one", 1),
    "commit": lambda host: host.manager.commit("one"),
    "resume": lambda host: (host.manager.pause("one"), host.manager.resume("one")),
}
"""All that starts a process afresh."""


@pytest.mark.parametrize("operation", FRESH)
def test_whatever_starts_a_process_afresh_returns_when_it_is_ready(host: Host, operation: str) -> None:
    host.create(readiness=READY)
    host.manager.create_version("one")
    host.manager.commit("one")
    events = len(host.manager.events())
    host.calls()
    gate = host.runtime.hold_next("wait_ready")
    caller = threading.Thread(target=FRESH[operation], args=(host,))
    caller.start()
    assert gate.wait_reached()
    assert host.calls()[-2:] == ["start", "wait_ready"]
    assert len(host.manager.events()) - events == (operation in {"start", "resume"})  # the stop and the pause
    gate.open()
    caller.join()
    workspace_id = "new" if operation in {"create", "fork"} else "one"
    assert host.manager.workspace(workspace_id).state is WorkspaceState.RUNNING
    assert (host.findings(), host.leftovers()) == ([], [])


NOT_READY = {
    "create": None,
    "fork": None,
    "start": WorkspaceState.STOPPED,
    "version": WorkspaceState.RUNNING,
    "snapshot": WorkspaceState.RUNNING,
    "rollback": WorkspaceState.STOPPED,
    "commit": WorkspaceState.RUNNING,
    "resume": WorkspaceState.PAUSED,
}
"""What becomes of the workspace whose process is not ready in time; None: nothing is left of it."""


@pytest.mark.parametrize("operation", FRESH)
def test_one_that_is_not_ready_in_time_is_as_it_was_before(host: Host, operation: str) -> None:
    host.create(readiness=READY)
    host.write("data/a", "first")
    host.manager.create_version("one")
    host.manager.commit("one")
    host.write("data/a", "second")
    late = DeadlineExceeded("not ready within 7 s")
    host.runtime.fail_next("wait_ready", late)
    with pytest.raises(DeadlineExceeded, match="not ready within 7 s") as raised:
        FRESH[operation](host)
    state = NOT_READY[operation]
    if state is None:
        with pytest.raises(NotFound):
            host.manager.workspace("new")
        assert host.runtime.workspaces() == ["one"]
        state = WorkspaceState.RUNNING
    assert host.manager.workspace("one").state is state
    assert host.is_running() == (state is WorkspaceState.RUNNING)
    assert len(host.manager.list_versions("one")) == 1
    if operation == "rollback":
        assert host.read("data/a") == "first"
        assert "rolled back, and stopped" in raised.value.__notes__[-1]
    assert (host.findings(), host.leftovers()) == ([], [])


def test_without_a_readiness_check_nothing_is_waited_for(host: Host) -> None:
    host.create()
    host.manager.create_version("one")
    host.manager.commit("one")
    for act in FRESH.values():
        host.calls()
        if act is not FRESH["create"]:
            act(host)
            assert "wait_ready" not in host.calls()
            if "new" in host.runtime.workspaces():
                host.manager.delete("new")


def test_a_rollback_whose_manager_closes_meanwhile_is_rolled_back_and_runs(host: Host) -> None:
    host.create(readiness=READY)
    host.write("data/a", "first")
    host.manager.create_version("one")
    host.write("data/a", "second")
    host.runtime.fail_next("wait_ready", Cancelled("called off"))
    with pytest.raises(Cancelled) as raised:
        host.manager.rollback("one", 1)
    assert "rolled back, and may not be ready yet" in raised.value.__notes__[-1]
    assert host.manager.workspace("one").state is WorkspaceState.RUNNING
    assert host.read("data/a") == "first"
    assert host.is_running()
    assert host.findings() == []


def test_a_workspace_that_is_not_ready_in_time_is_stopped_and_stays_paused(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create(readiness=READY)
    host.write("data/a", "kept")
    host.manager.pause("one")
    host.runtime.set_ready("one", is_ready=False)
    with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.01 s"):
        host.manager.resume("one", ready_timeout_s=0.01)
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert host.runtime.workspaces() == []
    assert host.events()[-1] == "operation_failed"
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status) == (RunTransition.START, RunStatus.FAILED)
    assert (host.findings(), host.leftovers()) == ([], [])
    host.runtime.set_ready("one")
    host.manager.resume("one")
    assert host.read("data/a") == "kept"


def test_waiting_for_readiness_ends_when_the_manager_closes(host: Host) -> None:
    host.follow(Scope.DATA)
    host.create(readiness=Readiness("command", "true", timeout_s=60))
    host.manager.pause("one")
    host.runtime.set_ready("one", is_ready=False)
    gate = host.runtime.hold_next("wait_ready")
    errors = []

    def resume() -> None:
        try:
            host.manager.resume("one")
        except Cancelled as error:
            errors.append(error)

    caller = threading.Thread(target=resume)
    caller.start()
    assert gate.wait_reached()
    gate.open()
    host.manager.close()
    caller.join()
    assert len(errors) == 1
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert host.findings() == []


@pytest.mark.parametrize("method", ["place", "start"])
@pytest.mark.parametrize("after_effect", [False, True])
def test_a_resume_that_fails_leaves_the_workspace_paused(host: Host, method: str, after_effect: bool) -> None:
    host.create()
    host.write("data/a", "kept")
    host.manager.pause("one")
    host.runtime.fail_next(method, Unavailable("broken"), after_effect=after_effect)
    with pytest.raises(Unavailable):
        host.manager.resume("one")
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert (host.findings(), host.leftovers()) == ([], [])
    host.manager.resume("one")
    assert host.read("data/a") == "kept"


def test_a_resume_whose_snapshot_is_gone_leaves_the_workspace_paused(host: Host) -> None:
    host.create()
    name = host.manager.pause("one").snapshot_name
    host.cache.delete_ref(host.cache.pinned(f"workspace.{name}").refs[0])
    with pytest.raises(NotFound):
        host.manager.resume("one")
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED


def test_a_pause_cannot_be_forked(host: Host) -> None:
    host.create()
    name = host.manager.pause("one").snapshot_name
    with pytest.raises(FailedPrecondition, match="only a commit can be forked"):
        host.manager.fork(name)
    with pytest.raises(NotFound, match="has no commit"):
        host.manager.fork("one")


def test_pause_and_resume_by_the_lifecycle_are_runs_with_their_reason(host: Host) -> None:
    host.create()
    with host.manager.hold("one") as held:
        held.pause(reason="autostop")
        held.resume(reason="autostart")
    with host.catalog.reading() as reader:
        runs = [(run.transition, run.reason) for run in reader.runs("one")]
    assert runs[1:] == [(RunTransition.STOP, "autostop"), (RunTransition.START, "autostart")]


def test_the_record_says_what_the_catalog_says(make_host: HostFactory) -> None:
    host = make_host(clock=utc_now)
    host.create()
    host.manager.create_version("one")
    host.manager.pause("one")
    host.manager.resume("one")
    host.manager.pause("one")
    record = host.manager.records.read("one")
    assert record.workspace == replace(host.manager.workspace("one"), last_version=0)
    with host.catalog.reading() as reader:
        assert record.snapshots == tuple(reader.snapshots("one"))
        assert record.policy == reader.policy("default")


def test_a_pause_whose_record_is_behind_is_recorded_again_without_a_word(host: Host) -> None:
    host.create()
    host.manager.pause("one")
    host.clock.advance(seconds=5)
    host.manager.touch("one")
    summary = host.manager.recover()
    assert summary.repaired == ()
    assert host.manager.records.read("one").workspace.last_used_at == host.clock.now
