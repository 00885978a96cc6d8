"""The lifecycle on a real manager: states, runs and events after each transition, failures and uses."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from datetime import timedelta

import pytest
from lifecycle_values import NOW

from snaploader import FileCache, SnapshotLoader
from snaploader.errors import FailedPrecondition
from snaploader.testing import FakeCAS
from snaploader.workspace.lifecycle import LifecycleExecutor, Skip
from snaploader.workspace.manager import HeldWorkspace, WorkspaceManager
from snaploader.workspace.model import (
    Operation,
    OperationKind,
    OwnerStatus,
    Readiness,
    RunStatus,
    RunTransition,
    Scope,
    WorkspaceState,
)
from snaploader.workspace.policy import Policy, ScopePolicy, StopAction, Transition
from snaploader.workspace.testing import FakeRuntime

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
RUNNING, STOPPED, PAUSED, DELETED = (
    WorkspaceState.RUNNING,
    WorkspaceState.STOPPED,
    WorkspaceState.PAUSED,
    WorkspaceState.DELETED,
)


class Host:
    """A manager with a fake runtime and a clock that stands still, and the lifecycle on it."""

    def __init__(self, folder, catalog, stack):
        self.now = NOW
        self.catalog = catalog
        cache = stack.enter_context(FileCache(folder / "cache"))
        loader = stack.enter_context(SnapshotLoader(cache, FakeCAS(), workers=2))
        self.runtime = FakeRuntime(folder / "runtime")
        stack.callback(self.runtime.close)
        self.manager = stack.enter_context(
            WorkspaceManager(
                catalog,
                loader,
                cache,
                self.runtime,
                folder / "state",
                host="here",
                clock=self.clock,
                workers=2,
            )
        )
        self.executor = stack.enter_context(LifecycleExecutor(self.manager, clock=self.clock))

    def clock(self):
        return self.now

    def policy(self, **values):
        with self.catalog.transaction() as changes:
            changes.put_policy(Policy(**values))

    def state(self, workspace_id="ws"):
        return self.manager.workspace(workspace_id).state

    def runs(self, workspace_id="ws"):
        with self.catalog.reading() as reader:
            return [(run.transition, run.status, run.reason) for run in reader.runs(workspace_id)]

    def last_event(self, workspace_id="ws"):
        event = self.manager.events(workspace_id)[-1]
        return event.type, event.payload.get("reason")

    def look(self, later=timedelta(0)):
        self.now += later
        return self.executor.run_once()


@pytest.fixture
def host(tmp_path, catalog):
    with ExitStack() as stack:
        yield Host(tmp_path, catalog, stack)


SUCCEEDED, FAILED = RunStatus.SUCCEEDED, RunStatus.FAILED


def test_a_started_one_is_stopped_when_its_time_is_over(host):
    host.policy(autostop_after=HOUR)
    host.manager.create("ws")
    assert host.look(HOUR - MINUTE).transitions == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.AUTOSTOP}
    assert host.state() is STOPPED
    assert not host.runtime.status("ws").is_running
    assert host.runs()[-1] == (RunTransition.STOP, SUCCEEDED, "autostop")
    assert host.last_event() == ("workspace_stop", "autostop")
    host.manager.start("ws")
    assert host.look(HOUR).transitions == {"ws": Transition.AUTOSTOP}


def test_autostop_by_pausing_and_autostart_by_resuming(host):
    host.policy(autostop_after=HOUR, autostop_action=StopAction.PAUSE)
    host.manager.create("ws", autostart_schedule="0 9 * * *")
    (host.runtime.root("ws") / "kept").write_text("yes")
    assert host.look(HOUR).transitions == {"ws": Transition.AUTOSTOP}
    assert host.state() is PAUSED
    assert host.runs()[-1] == (RunTransition.STOP, SUCCEEDED, "autostop")
    assert host.look(20 * HOUR - MINUTE).transitions == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.AUTOSTART}
    assert host.state() is RUNNING
    assert (host.runtime.root("ws") / "kept").read_text() == "yes"
    assert host.runs()[-1] == (RunTransition.START, SUCCEEDED, "autostart")


def test_autostart_starts_a_stopped_one(host):
    host.manager.create("ws", start=False, autostart_schedule="30 12 * * *")
    assert host.look().transitions == {}
    assert host.look(HOUR / 2).transitions == {"ws": Transition.AUTOSTART}
    assert host.runtime.status("ws").is_running
    assert host.last_event() == ("workspace_start", "autostart")


def test_a_suspended_owners_workspace_is_stopped(host):
    host.manager.create("ws", owner="ada")
    with host.catalog.transaction() as changes:
        changes.set_owner_status("ada", OwnerStatus.SUSPENDED)
    assert host.look().transitions == {"ws": Transition.AUTOSTOP}


def test_a_failed_start_waits_for_its_ttl_and_then_the_schedule_holds_again(host):
    host.policy(failure_ttl=HOUR)
    host.manager.create("ws", start=False, autostart_schedule="*/30 * * * *")
    host.runtime.fail_next("start", FailedPrecondition("no such command"))
    stats = host.look(HOUR / 2)
    assert stats.errors == {"ws": "FailedPrecondition: no such command"}
    assert host.runs()[-1] == (RunTransition.START, FAILED, "autostart")
    assert len(host.runs()) == 1  # it failed once, and is written down once
    assert host.look(HOUR).transitions == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.FAILED_STOP}
    assert host.runs()[-1] == (RunTransition.STOP, SUCCEEDED, "failed_stop")
    assert host.state() is STOPPED
    assert host.look(29 * MINUTE).transitions == {"ws": Transition.AUTOSTART}


def test_an_unused_one_is_stopped_marked_and_deleted(host):
    host.policy(time_until_dormant=DAY, delete_after_dormant=7 * DAY)
    host.manager.create("ws")
    assert host.look(DAY).transitions == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.DORMANCY}
    marked = host.manager.workspace("ws")
    assert (marked.state, marked.dormant_at, marked.deleting_at) == (STOPPED, host.now, host.now + 7 * DAY)
    assert host.last_event() == ("dormancy_mark", None)
    assert host.look(7 * DAY).transitions == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.DELETE}
    assert host.state() is DELETED
    assert not host.runtime.status("ws").exists
    assert host.last_event() == ("workspace_delete", "delete")
    assert host.look(DAY).transitions == {}


@pytest.mark.parametrize("use", ["touch", "start"])
def test_a_use_ends_dormancy(host, use):
    host.policy(time_until_dormant=DAY, delete_after_dormant=DAY)
    host.manager.create("ws")
    host.look(DAY + MINUTE)
    getattr(host.manager, use)("ws")
    used = host.manager.workspace("ws")
    assert (used.dormant_at, used.deleting_at) == (None, None)
    assert host.look(DAY).transitions == {}


def test_what_the_lifecycle_does_is_no_use(host):
    host.policy(autostop_after=HOUR, time_until_dormant=DAY)
    host.manager.create("ws", autostart_schedule="0 * * * *")
    assert host.look(HOUR).transitions == {"ws": Transition.AUTOSTOP}
    assert host.look(HOUR).transitions == {"ws": Transition.AUTOSTART}
    assert host.manager.workspace("ws").last_used_at == NOW


def test_a_failed_delete_is_tried_again_after_24_hours(host):
    host.policy(time_until_dormant=DAY, delete_after_dormant=DAY)
    host.manager.create("ws")
    host.look(DAY + MINUTE)
    host.runtime.fail_next("stop", RuntimeError("will not go"))
    assert host.look(DAY + MINUTE).errors == {"ws": "RuntimeError: will not go"}
    assert host.state() is STOPPED
    assert host.runs().count((RunTransition.DELETE, FAILED, "delete")) == 1
    assert host.look(DAY - MINUTE).errors == {}
    assert host.look(MINUTE).transitions == {"ws": Transition.DELETE}


def test_a_failing_workspace_changes_no_others_result(host):
    host.policy(autostop_after=HOUR)
    for name in ("a", "b", "c"):
        host.manager.create(name)
    host.runtime.fail_next("stop", RuntimeError("stuck"))
    stats = host.look(HOUR)
    assert len(stats.errors) == 1
    assert len(stats.transitions) == 2
    states = {name: host.state(name) for name in ("a", "b", "c")}
    assert {name for name, state in states.items() if state is RUNNING} == set(stats.errors)
    assert {name for name, state in states.items() if state is STOPPED} == set(stats.transitions)


def test_one_on_which_somebody_works_is_skipped(host):
    host.policy(autostop_after=HOUR)
    host.manager.create("ws")
    gate = host.runtime.hold_next("capture")
    worker = threading.Thread(target=host.manager.create_version, args=("ws",))
    worker.start()
    try:
        assert gate.wait_reached(30)
        assert host.look(HOUR).skipped == {"ws": Skip.LOCKED}
    finally:
        gate.open()
        worker.join(300)
    assert host.look().transitions == {"ws": Transition.AUTOSTOP}


def test_an_operation_whose_process_died_is_taken_back_and_then_the_transition_made(host):
    host.policy(autostop_after=HOUR)
    host.manager.create("ws")
    with host.catalog.transaction() as changes:
        changes.begin_operation("ws", Operation(OperationKind.SNAPSHOT, "token", "here", NOW))
    assert host.look(HOUR).transitions == {"ws": Transition.AUTOSTOP}
    assert host.manager.workspace("ws").operation is None


def test_a_resume_that_the_closing_manager_calls_off_is_no_failed_run(host):
    host.policy(scopes=ScopePolicy(Scope.DATA))
    readiness = Readiness("command", "true")
    host.manager.create("ws", readiness=readiness, autostart_schedule="30 12 * * *")
    host.manager.pause("ws")
    runs = host.runs()
    host.runtime.set_ready("ws", False)
    gate = host.runtime.hold_next("wait_ready")
    found = []
    looker = threading.Thread(target=lambda: found.append(host.look(HOUR / 2)))
    looker.start()
    try:
        assert gate.wait_reached(30)
        closer = threading.Thread(target=host.manager.close)
        closer.start()
    finally:
        gate.open()
        looker.join(300)
    closer.join(300)
    assert found[0].skipped == {"ws": Skip.STOPPING}
    assert host.state() is PAUSED
    assert host.runs() == runs


def test_a_use_just_before_the_deletion_begins_prevents_it(host, monkeypatch):
    host.policy(time_until_dormant=DAY, delete_after_dormant=DAY)
    host.manager.create("ws")
    host.look(DAY + MINUTE)
    guarded = HeldWorkspace.guarded

    def touched_once_it_was_decided(held, guard):
        host.manager.touch("ws")
        return guarded(held, guard)

    monkeypatch.setattr(HeldWorkspace, "guarded", touched_once_it_was_decided)
    assert host.look(DAY + MINUTE).skipped == {"ws": Skip.CHANGED}
    assert host.state() is STOPPED
    assert host.manager.workspace("ws").operation is None
    assert host.runs()[-1] == (RunTransition.STOP, SUCCEEDED, "dormancy")


def test_a_use_while_it_is_being_deleted_is_refused(host):
    host.policy(time_until_dormant=DAY, delete_after_dormant=DAY)
    host.manager.create("ws")
    host.look(DAY + MINUTE)
    gate = host.runtime.hold_next("stop")
    looker = threading.Thread(target=host.look, args=(DAY + MINUTE,))
    looker.start()
    try:
        assert gate.wait_reached(30)
        with pytest.raises(FailedPrecondition, match="is being deleted"):
            host.manager.touch("ws")
    finally:
        gate.open()
        looker.join(300)
    assert host.state() is DELETED
