"""`run_once`: which transitions are made, how, and that no workspace's trouble is another's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest
from lifecycle_fakes import DELETED, PAUSED, RUNNING, STOPPED, FakeHeld, FakeManager, add, runs_of, state_of
from lifecycle_values import NOW, TICK_APART
from prometheus_client import CollectorRegistry

from snaploader.errors import Cancelled, FailedPrecondition, InvalidArgument, Unavailable
from snaploader.workspace.lifecycle import AuditRecord, Hooks, LifecycleExecutor, Metrics, Notification, Skip
from snaploader.workspace.model import (
    Operation,
    OperationKind,
    OwnerStatus,
    RunStatus,
    RunTransition,
    Scope,
)
from snaploader.workspace.policy import Policy, ScopePolicy, StopAction, Transition

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def manager(catalog):
    return FakeManager(catalog)


@pytest.fixture
def executor(manager):
    with LifecycleExecutor(manager, clock=lambda: NOW) as executor:
        yield executor


def tick_before(catalog, tick=NOW):
    """Let the host have had a tick a minute before `tick`, which confirms that one."""
    with catalog.transaction() as changes:
        changes.note_tick("here", tick - MINUTE)


def put_policy(catalog, **values):
    with catalog.transaction() as changes:
        changes.put_policy(Policy(**values))


def test_nothing_due_is_nothing_done(catalog, manager, executor):
    add(catalog, "idle")
    stats = executor.run_once()
    assert (stats.transitions, stats.errors, stats.skipped) == ({}, {}, {})
    assert stats.tick == NOW
    assert stats.elapsed_s >= 0
    assert manager.calls == []


def test_autostop_stops_at_the_deadline(catalog, manager, executor):
    add(catalog, "ws", deadline=NOW)
    assert executor.run_once(NOW - MINUTE).transitions == {}
    assert executor.run_once(NOW).transitions == {"ws": Transition.AUTOSTOP}
    assert manager.calls == [("stop", "ws", "autostop")]
    assert state_of(catalog, "ws").state is STOPPED
    assert executor.run_once(NOW + MINUTE).transitions == {}


def test_autostop_pauses_where_the_policy_says_so(catalog, manager, executor):
    put_policy(catalog, autostop_action=StopAction.PAUSE)
    add(catalog, "ws", deadline=NOW)
    assert executor.run_once().transitions == {"ws": Transition.AUTOSTOP}
    assert manager.calls == [("pause", "ws", "autostop")]
    assert state_of(catalog, "ws").state is PAUSED


def test_workspaces_of_a_suspended_owner_are_stopped_and_started_by_no_schedule(catalog, manager, executor):
    add(catalog, "runs", owner="ada")
    add(catalog, "scheduled", STOPPED, owner="ada", autostart_schedule="* * * * *")
    add(catalog, "other", owner="bob")
    with catalog.transaction() as changes:
        changes.set_owner_status("ada", OwnerStatus.SUSPENDED)
    assert executor.run_once().transitions == {"runs": Transition.AUTOSTOP}


@pytest.mark.parametrize(("state", "operation"), [(STOPPED, "start"), (PAUSED, "resume")])
def test_autostart_starts_a_stopped_one_and_resumes_a_paused_one(
    catalog, manager, executor, state, operation
):
    add(catalog, "ws", state, started_at=NOW - DAY, autostart_schedule="0 12 * * *")
    assert executor.run_once(NOW - MINUTE).transitions == {}
    assert executor.run_once().transitions == {"ws": Transition.AUTOSTART}
    assert manager.calls == [(operation, "ws", "autostart")]
    assert state_of(catalog, "ws").state is RUNNING


def test_failed_stop_stops_what_runs(catalog, manager, executor):
    put_policy(catalog, failure_ttl=HOUR)
    add(catalog, "ws", status=RunStatus.FAILED, started_at=NOW - HOUR)
    assert executor.run_once(NOW).transitions == {}
    assert executor.run_once(NOW + MINUTE).transitions == {"ws": Transition.FAILED_STOP}
    assert manager.calls == [("stop", "ws", "failed_stop")]


@pytest.mark.parametrize("state", [STOPPED, PAUSED])
def test_failed_stop_of_what_does_not_run_ends_the_failure_so_that_the_schedule_holds_again(
    catalog, manager, executor, state
):
    put_policy(catalog, failure_ttl=HOUR)
    schedule = "1 * * * *"
    add(catalog, "ws", state, status=RunStatus.FAILED, started_at=NOW - 2 * HOUR, autostart_schedule=schedule)
    assert executor.run_once().transitions == {"ws": Transition.FAILED_STOP}
    assert manager.calls == []
    assert state_of(catalog, "ws").state is state
    last = runs_of(catalog, "ws")[-1]
    assert (last.transition, last.status, last.reason) == (
        RunTransition.STOP,
        RunStatus.SUCCEEDED,
        "failed_stop",
    )
    with catalog.reading() as reader:
        assert reader.events("ws")[-1].payload["reason"] == "failed_stop"
    assert executor.run_once(NOW + MINUTE).transitions == {"ws": Transition.AUTOSTART}


def test_dormancy_stops_a_running_one_and_marks_it(catalog, manager, executor):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=DAY)
    add(catalog, "ws", last_used_at=NOW - HOUR)
    assert executor.run_once(NOW).transitions == {}
    tick = NOW + MINUTE
    assert executor.run_once(tick).transitions == {"ws": Transition.DORMANCY}
    assert manager.calls == [("stop", "ws", "dormancy")]
    marked = state_of(catalog, "ws")
    assert (marked.state, marked.dormant_at, marked.deleting_at) == (STOPPED, tick, tick + DAY)
    with catalog.reading() as reader:
        event = reader.events("ws")[-1]
    assert (event.type, event.payload["deleting_at"]) == ("dormancy_mark", (tick + DAY).isoformat())


@pytest.mark.parametrize("state", [STOPPED, PAUSED])
def test_dormancy_only_marks_what_does_not_run(catalog, manager, executor, state):
    put_policy(catalog, time_until_dormant=HOUR)
    add(catalog, "ws", state, last_used_at=NOW - 2 * HOUR)
    assert executor.run_once().transitions == {"ws": Transition.DORMANCY}
    assert manager.calls == []
    marked = state_of(catalog, "ws")
    assert (marked.state, marked.dormant_at, marked.deleting_at) == (state, NOW, None)
    assert executor.run_once(NOW + MINUTE).transitions == {}


def test_a_deletion_that_the_policy_no_longer_has_saves_the_dormant_workspace(catalog, manager, executor):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=DAY)
    add(catalog, "ws", STOPPED, last_used_at=NOW - DAY)
    executor.run_once(NOW)
    put_policy(catalog, time_until_dormant=HOUR)
    for days in (1, 2, 400):
        assert executor.run_once(NOW + days * DAY + MINUTE).transitions == {}
    assert state_of(catalog, "ws").deleting_at is None
    assert manager.calls == []


def test_dormancy_does_not_mark_one_that_was_used_while_it_was_stopped(catalog, manager, executor):
    put_policy(catalog, time_until_dormant=HOUR)
    add(catalog, "ws", last_used_at=NOW - 2 * HOUR)

    def use(operation, workspace_id):
        with catalog.transaction() as changes:
            changes.update_workspace(workspace_id, last_used_at=NOW)

    manager.during = use
    assert executor.run_once().skipped == {"ws": Skip.CHANGED}
    assert state_of(catalog, "ws").dormant_at is None


def test_a_deletion_beyond_the_calendar_is_none(catalog, executor):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=timedelta(seconds=1e10))
    add(catalog, "ws", STOPPED)
    assert executor.run_once(NOW.replace(year=9900)).transitions == {"ws": Transition.DORMANCY}
    assert state_of(catalog, "ws").deleting_at is None


def test_a_dormant_one_is_deleted_when_its_time_has_passed(catalog, manager, executor):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=DAY)
    add(catalog, "ws", last_used_at=NOW - DAY)
    executor.run_once(NOW)
    assert executor.run_once(NOW + DAY).transitions == {}
    assert executor.run_once(NOW + DAY + MINUTE).transitions == {"ws": Transition.DELETE}
    assert manager.calls[-1] == ("delete", "ws", "delete")
    assert state_of(catalog, "ws").state is DELETED
    assert executor.run_once(NOW + 9 * DAY).transitions == {}


@pytest.mark.parametrize("notes_failures", [False, True], ids=["executor notes it", "manager notes it"])
def test_a_failed_delete_is_one_failed_run_and_waits_24_hours(catalog, manager, executor, notes_failures):
    tick_before(catalog)
    put_policy(catalog, delete_after_dormant=HOUR)
    add(catalog, "ws", STOPPED, dormant_at=NOW - DAY, deleting_at=NOW - DAY)
    manager.notes_failures = notes_failures
    manager.failures["ws"] = Unavailable("remote cache is away")
    stats = executor.run_once()
    assert stats.errors == {"ws": "Unavailable: remote cache is away"}
    assert stats.transitions == {}
    _, failed = runs_of(catalog, "ws")
    assert (failed.transition, failed.status, failed.reason) == (
        RunTransition.DELETE,
        RunStatus.FAILED,
        "delete",
    )
    assert "remote cache is away" in failed.error
    assert executor.run_once(NOW + DAY - MINUTE).errors == {}
    del manager.failures["ws"]
    assert executor.run_once(NOW + DAY).transitions == {"ws": Transition.DELETE}


@pytest.mark.parametrize("notes_failures", [False, True], ids=["executor notes it", "manager notes it"])
def test_a_delete_that_fails_again_waits_24_hours_again(catalog, manager, notes_failures):
    put_policy(catalog, delete_after_dormant=HOUR)
    add(catalog, "ws", STOPPED, dormant_at=NOW - DAY, deleting_at=NOW - DAY)
    manager.failures["ws"] = Unavailable("remote cache is away")
    manager.notes_failures = notes_failures
    for later in (timedelta(0), DAY):
        manager.now = NOW + later
        tick_before(catalog, manager.now)
        with LifecycleExecutor(manager, clock=lambda: manager.now) as executor:
            assert executor.run_once().errors.keys() == {"ws"}
            assert executor.run_once(manager.now + DAY - MINUTE).errors == {}
    assert [run.status for run in runs_of(catalog, "ws")[1:]] == [RunStatus.FAILED] * 2


@pytest.mark.parametrize(
    ("state", "values", "expected"),
    [
        (RUNNING, {"deadline": NOW}, RunTransition.STOP),
        (STOPPED, {"autostart_schedule": "0 12 * * *"}, RunTransition.START),
    ],
    ids=["autostop", "autostart"],
)
def test_a_failed_autostop_or_autostart_is_not_tried_again(
    catalog, manager, executor, state, values, expected
):
    add(catalog, "ws", state, **values)
    manager.failures["ws"] = RuntimeError("broken")
    assert executor.run_once().errors == {"ws": "RuntimeError: broken"}
    last = runs_of(catalog, "ws")[-1]
    assert (last.transition, last.status, last.error) == (expected, RunStatus.FAILED, "RuntimeError: broken")
    assert executor.run_once(NOW + MINUTE).errors == {}


def test_a_dormancy_whose_stop_failed_is_tried_at_each_tick(catalog, manager, executor):
    put_policy(catalog, time_until_dormant=HOUR)
    add(catalog, "ws", last_used_at=NOW - DAY)
    manager.failures["ws"] = RuntimeError("broken")
    assert executor.run_once().errors.keys() == {"ws"}
    assert state_of(catalog, "ws").dormant_at is None
    del manager.failures["ws"]
    assert executor.run_once(NOW + MINUTE).transitions == {"ws": Transition.DORMANCY}


def test_a_failing_workspace_changes_no_others_result(catalog, manager, executor):
    ids = [f"ws-{number}" for number in range(12)]
    for each in ids:
        add(catalog, each, deadline=NOW)
    manager.failures = {"ws-0": RuntimeError("broken"), "ws-7": FailedPrecondition("not now")}
    stats = executor.run_once()
    assert stats.errors == {"ws-0": "RuntimeError: broken", "ws-7": "FailedPrecondition: not now"}
    assert stats.transitions == {each: Transition.AUTOSTOP for each in ids if each not in {"ws-0", "ws-7"}}
    assert {each: state_of(catalog, each).state for each in ids} == {
        each: RUNNING if each in {"ws-0", "ws-7"} else STOPPED for each in ids
    }


def test_one_whose_lock_cannot_be_taken_or_that_is_gone_from_the_catalog_fails_alone(
    catalog, manager, executor
):
    add(catalog, "good", deadline=NOW)
    add(catalog, "bad", deadline=NOW)
    hold = manager.try_hold

    def try_hold(workspace_id):
        if workspace_id == "bad":
            raise Unavailable("no connection for the lock")
        return hold(workspace_id)

    manager.try_hold = try_hold
    stats = executor.run_once()
    assert stats.transitions == {"good": Transition.AUTOSTOP}
    assert stats.errors == {"bad": "Unavailable: no connection for the lock"}
    assert len(runs_of(catalog, "bad")) == 1  # nothing was tried, so nothing failed


def test_a_failure_that_cannot_be_written_down_is_reported_all_the_same(
    catalog, manager, executor, monkeypatch, caplog
):
    add(catalog, "ws", deadline=NOW)
    manager.failures["ws"] = RuntimeError("broken")

    def away(self):
        raise Unavailable("database is away")

    manager.during = lambda operation, workspace_id: monkeypatch.setattr(type(catalog), "transaction", away)
    assert executor.run_once().errors == {"ws": "RuntimeError: broken"}
    assert "the failed autostop of 'ws' could not be written down" in caplog.text


def test_one_that_somebody_else_holds_is_skipped(catalog, manager, executor):
    add(catalog, "busy", deadline=NOW)
    add(catalog, "free", deadline=NOW)
    with manager.try_hold("busy") as held:
        assert held is not None
        stats = executor.run_once()
    assert stats.skipped == {"busy": Skip.LOCKED}
    assert stats.transitions == {"free": Transition.AUTOSTOP}
    assert executor.run_once().transitions == {"busy": Transition.AUTOSTOP}


def test_an_operation_whose_process_died_is_settled_before_deciding(catalog, manager, executor):
    add(catalog, "ws", deadline=NOW)
    add(catalog, "other", deadline=NOW)
    with catalog.transaction() as changes:
        changes.begin_operation("ws", Operation(OperationKind.SNAPSHOT, "token", "here", NOW))
    assert executor.run_once().transitions == dict.fromkeys(("other", "ws"), Transition.AUTOSTOP)
    assert [call for call in manager.calls if call[1] == "ws"] == [
        ("settle", "ws", ""),
        ("stop", "ws", "autostop"),
    ]


def test_what_settling_leaves_to_do_is_decided_by(catalog, manager, executor):
    add(catalog, "ws", deadline=NOW)
    with catalog.transaction() as changes:
        changes.begin_operation("ws", Operation(OperationKind.SNAPSHOT, "token", "here", NOW))

    def stopped_by_settling(operation, workspace_id):
        with catalog.transaction() as changes:
            changes.update_workspace(workspace_id, state=STOPPED)

    manager.during = stopped_by_settling
    assert executor.run_once().skipped == {"ws": Skip.CHANGED}


def test_the_decision_is_made_again_under_the_lock(catalog, manager, executor):
    add(catalog, "ws", deadline=NOW)
    hold = manager.try_hold

    def stopped_by_the_user_meanwhile(workspace_id):
        with catalog.transaction() as changes:
            changes.update_workspace(workspace_id, state=STOPPED)
        return hold(workspace_id)

    manager.try_hold = stopped_by_the_user_meanwhile
    assert executor.run_once().skipped == {"ws": Skip.CHANGED}
    assert manager.calls == []


def test_the_decision_is_made_again_in_the_transaction_that_begins_the_operation(
    catalog, manager, executor, monkeypatch
):
    tick_before(catalog)
    put_policy(catalog, delete_after_dormant=HOUR)
    add(catalog, "ws", STOPPED, dormant_at=NOW - DAY, deleting_at=NOW - DAY)
    guarded = FakeHeld.guarded

    def used_after_the_decision(held, guard):
        with catalog.transaction() as changes:
            changes.update_workspace("ws", dormant_at=None, deleting_at=None)
        return guarded(held, guard)

    monkeypatch.setattr(FakeHeld, "guarded", used_after_the_decision)
    assert executor.run_once().skipped == {"ws": Skip.CHANGED}
    assert manager.calls == []
    assert len(runs_of(catalog, "ws")) == 1


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        ({"time_until_dormant": HOUR}, {"last_used_at": NOW - DAY}),
        ({"failure_ttl": HOUR}, {"status": RunStatus.FAILED}),
    ],
    ids=["dormancy", "failed stop"],
)
def test_what_is_only_written_down_is_decided_again_in_the_transaction_that_writes_it(
    catalog, manager, executor, monkeypatch, policy, values
):
    put_policy(catalog, **policy)
    add(catalog, "ws", STOPPED, **values)
    transaction, the_tick_is_written_down = type(catalog).transaction, iter([True])

    def rules_switched_off_just_before(self):
        if next(the_tick_is_written_down, False):
            return transaction(self)
        monkeypatch.setattr(type(catalog), "transaction", transaction)
        put_policy(catalog)
        return self.transaction()

    monkeypatch.setattr(type(catalog), "transaction", rules_switched_off_just_before)
    assert executor.run_once().skipped == {"ws": Skip.CHANGED}
    assert state_of(catalog, "ws").dormant_at is None
    assert len(runs_of(catalog, "ws")) == 1


def test_only_this_hosts_workspaces_are_looked_at(catalog, manager, executor):
    add(catalog, "ours", deadline=NOW)
    add(catalog, "theirs", deadline=NOW, host="elsewhere")
    assert executor.run_once().transitions == {"ours": Transition.AUTOSTOP}


def test_neighbours_of_one_base_come_after_one_another(catalog, manager):
    for number, base in enumerate(["debian", "alpine", "debian", "", "alpine"]):
        add(catalog, f"ws-{number}", base=base, deadline=NOW - number * MINUTE)
    with LifecycleExecutor(manager, max_concurrency=1) as executor:
        executor.run_once(NOW)
    assert [each for _, each, _ in manager.calls] == ["ws-3", "ws-1", "ws-4", "ws-0", "ws-2"]


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_than_so_many_are_worked_on_at_once(catalog, manager, most):
    for number in range(2 * most + 1):
        add(catalog, f"ws-{number}", deadline=NOW)
    together, begun = threading.Barrier(most), threading.Semaphore(most)

    def meet(operation, workspace_id):
        if begun.acquire(blocking=False):
            together.wait(300)  # as many as that are there at one time

    manager.during = meet
    with LifecycleExecutor(manager, max_concurrency=most) as executor:
        assert len(executor.run_once(NOW).transitions) == 2 * most + 1
    assert manager.most_at_once == most


def test_of_several_executors_one_works_on_each_workspace(catalog, manager):
    ids = [f"ws-{number}" for number in range(8)]
    for each in ids:
        add(catalog, each, deadline=NOW)
    found, begin = [], threading.Barrier(3)

    def look():
        with LifecycleExecutor(manager, max_concurrency=3) as executor:
            begin.wait(300)
            found.append(executor.run_once(NOW))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    made = [each for stats in found for each in stats.transitions]
    assert sorted(made) == ids
    assert len(manager.calls) == len(ids)
    assert [stats.errors for stats in found] == [{}, {}, {}]


def test_ten_are_worked_on_at_once_unless_told_otherwise(catalog, manager, executor):
    for number in range(12):
        add(catalog, f"ws-{number}", deadline=NOW)
    together, begun = threading.Barrier(10), threading.Semaphore(10)

    def meet(operation, workspace_id):
        if begun.acquire(blocking=False):
            together.wait(300)

    manager.during = meet
    assert len(executor.run_once().transitions) == 12
    assert manager.most_at_once == 10


def test_a_concurrency_below_one_is_refused(manager):
    with pytest.raises(InvalidArgument, match="at least 1"):
        LifecycleExecutor(manager, max_concurrency=0)


def test_the_tick_is_cut_to_the_minute(catalog, executor):
    add(catalog, "ws", deadline=NOW + TICK_APART)
    stats = executor.run_once(NOW + timedelta(seconds=59, microseconds=999_999))
    assert stats.tick == NOW
    assert stats.transitions == {}
    assert executor.run_once(NOW + MINUTE).transitions == {"ws": Transition.AUTOSTOP}


def test_stats_cannot_be_changed(catalog, executor):
    stats = executor.run_once()
    with pytest.raises(TypeError):
        stats.transitions["ws"] = Transition.DELETE
    with pytest.raises(FrozenInstanceError):
        stats.elapsed_s = 0.0


# Hooks


def test_hooks_are_told_when_the_transition_is_committed_and_the_lock_released(catalog, manager):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=DAY)
    add(catalog, "ws", owner="ada", last_used_at=NOW - DAY)
    told, audited, seen = [], [], []

    def look(record):
        seen.append((manager.is_held("ws"), state_of(catalog, "ws").dormant_at))

    hooks = Hooks(notify=(told.append, look), audit=(audited.append,))
    with LifecycleExecutor(manager, hooks=hooks, clock=lambda: NOW) as executor:
        executor.run_once()
    assert told == [Notification("ws", "ada", Transition.DORMANCY, STOPPED, NOW, NOW + DAY)]
    assert audited == [AuditRecord("ws", "ada", Transition.DORMANCY, "here", RUNNING, STOPPED, NOW)]
    assert seen == [(False, NOW)]


def test_a_failed_transition_is_audited_and_not_notified(catalog, manager):
    add(catalog, "ws", deadline=NOW)
    manager.failures["ws"] = RuntimeError("broken")
    told, audited = [], []
    hooks = Hooks(notify=(told.append,), audit=(audited.append,))
    with LifecycleExecutor(manager, hooks=hooks, clock=lambda: NOW) as executor:
        executor.run_once()
    assert told == []
    assert [(each.error, each.state_after) for each in audited] == [("RuntimeError: broken", None)]


def test_skipped_ones_are_told_to_nobody(catalog, manager):
    add(catalog, "ws", deadline=NOW)
    told = []
    hooks = Hooks((told.append,), (told.append,))
    with LifecycleExecutor(manager, hooks=hooks) as executor, manager.try_hold("ws"):
        executor.run_once(NOW)
    assert told == []


def test_hooks_that_raise_or_hang_neither_undo_nor_fail_nor_delay_a_transition(catalog, manager, caplog):
    for each in ("a", "b"):
        add(catalog, each, deadline=NOW)
    release = threading.Event()

    def broken(record):
        raise RuntimeError("mail server is gone")

    hooks = Hooks(notify=(broken,), audit=(lambda record: release.wait(300),))
    registry = CollectorRegistry()
    executor = LifecycleExecutor(manager, hooks=hooks, metrics=Metrics(registry))
    try:
        stats = executor.run_once(NOW)  # returns although the hook hangs
        assert not release.is_set()
    finally:
        release.set()
    assert executor.close() is True
    assert stats.transitions == {"a": Transition.AUTOSTOP, "b": Transition.AUTOSTOP}
    assert stats.errors == {}
    assert state_of(catalog, "a").state is state_of(catalog, "b").state is STOPPED
    assert registry.get_sample_value("snaploader_lifecycle_hook_failures_total") == 2
    assert "mail server is gone" in caplog.text


# Stopping


def test_once_stopped_no_further_transition_is_begun_and_those_under_way_are_finished(catalog, manager):
    for number in range(4):
        add(catalog, f"ws-{number}", deadline=NOW)
    stop = threading.Event()
    manager.during = lambda operation, workspace_id: stop.set()
    with LifecycleExecutor(manager, max_concurrency=1) as executor:
        stats = executor.run_once(NOW, stop=stop)
    assert stats.transitions == {"ws-0": Transition.AUTOSTOP}
    assert stats.skipped == dict.fromkeys(("ws-1", "ws-2", "ws-3"), Skip.STOPPING)
    assert state_of(catalog, "ws-0").state is STOPPED


def test_a_manager_that_is_closed_meanwhile_is_no_failure(catalog, manager, executor):
    add(catalog, "ws", deadline=NOW)
    manager.failures["ws"] = Cancelled("the manager was closed")
    stats = executor.run_once()
    assert stats.skipped == {"ws": Skip.STOPPING}
    assert len(runs_of(catalog, "ws")) == 1


def test_an_interrupt_lets_those_under_way_finish_and_begins_no_other(catalog, manager, monkeypatch):
    for number in range(4):
        add(catalog, f"ws-{number}", deadline=NOW)
    manager.failures["ws-0"] = KeyboardInterrupt()
    called_off, shutdown = threading.Event(), ThreadPoolExecutor.shutdown

    def tell(pool, **options):
        shutdown(pool, **options)
        called_off.set()

    def wait(operation, workspace_id):
        if workspace_id == "ws-1":
            assert called_off.wait(300)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", tell)
    manager.during = wait
    with LifecycleExecutor(manager, max_concurrency=1) as executor, pytest.raises(KeyboardInterrupt):
        executor.run_once(NOW)
    under_way = {each for _, each, _ in manager.calls} - {"ws-0"}
    assert under_way <= {"ws-1"}
    for number in range(4):
        each = f"ws-{number}"
        assert state_of(catalog, each).state is (STOPPED if each in under_way else RUNNING)


# The catalog and metrics


def test_a_catalog_that_cannot_be_read_raises(catalog, manager, executor):
    catalog.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        executor.run_once()


def test_metrics_count_transitions_errors_hook_failures_and_time(catalog, manager, caplog):
    for each in ("a", "b", "c"):
        add(catalog, each, deadline=NOW)
    manager.failures["c"] = RuntimeError("broken")
    registry = CollectorRegistry()

    def fails(record):
        raise RuntimeError("no")

    with LifecycleExecutor(manager, hooks=Hooks(notify=(fails,)), metrics=Metrics(registry)) as executor:
        executor.run_once(NOW)
        executor.run_once(NOW)
    sample = registry.get_sample_value
    assert sample("snaploader_lifecycle_run_duration_seconds_count") == 2
    assert sample("snaploader_lifecycle_transitions_total", {"transition": "autostop"}) == 2
    assert sample("snaploader_lifecycle_errors_total") == 1
    assert sample("snaploader_lifecycle_hook_failures_total") == 2


# Clocks that jump: what could not be taken back waits for a tick that confirms the time


def all_due(catalog):
    """One workspace for each thing that is done when its time has come, a year ago."""
    put_policy(catalog, time_until_dormant=HOUR)
    put_policy(catalog, name="deletes", delete_after_dormant=HOUR)
    put_policy(catalog, name="parks", autostop_action=StopAction.PAUSE)
    data = ScopePolicy(Scope.DATA)
    put_policy(catalog, name="drops", autostop_action=StopAction.PAUSE, scopes=data)
    old = NOW - 400 * DAY
    add(catalog, "deleted", STOPPED, policy="deletes", dormant_at=old, deleting_at=old)
    add(catalog, "dormant", last_used_at=old)
    add(catalog, "dropped", deadline=old, policy="drops")
    add(catalog, "parked", deadline=old, policy="parks")
    add(catalog, "started", PAUSED, policy="parks", started_at=old, autostart_schedule="0 12 * * *")
    add(catalog, "stopped", deadline=old)


REVERSIBLE = {
    "dormant": Transition.DORMANCY,
    "parked": Transition.AUTOSTOP,
    "started": Transition.AUTOSTART,
    "stopped": Transition.AUTOSTOP,
}
IRREVERSIBLE = {"deleted": Transition.DELETE, "dropped": Transition.AUTOSTOP}


@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param([], id="first tick"),
        pytest.param([-10 * 365 * DAY], id="ten years ahead"),
        pytest.param([-25 * HOUR - MINUTE], id="just too far"),
        pytest.param([MINUTE], id="set back"),
        pytest.param([-30 * DAY, timedelta(0)], id="same tick once more"),
        pytest.param([-MINUTE, 400 * DAY], id="set back to where it was"),
    ],
)
def test_after_a_jump_only_what_can_be_taken_back_is_done_until_the_next_tick_agrees(
    catalog, manager, executor, earlier
):
    for distance in earlier:
        executor.run_once(NOW + distance)
    all_due(catalog)
    stats = executor.run_once(NOW)
    assert stats.transitions == REVERSIBLE
    assert stats.skipped == dict.fromkeys(IRREVERSIBLE, Skip.UNCONFIRMED)
    assert executor.run_once(NOW).transitions == {}
    assert executor.run_once(NOW + MINUTE).transitions == IRREVERSIBLE


@pytest.mark.parametrize("distance", [MINUTE, DAY, 25 * HOUR])
def test_ticks_at_a_plausible_distance_confirm_one_another(catalog, manager, executor, distance):
    executor.run_once(NOW - distance)
    all_due(catalog)
    assert executor.run_once(NOW).transitions == REVERSIBLE | IRREVERSIBLE


def test_a_clock_ten_years_ahead_marks_and_the_deletion_it_foresees_waits_for_two_ticks(
    catalog, manager, caplog
):
    put_policy(catalog, time_until_dormant=HOUR, delete_after_dormant=DAY)
    add(catalog, "ws", STOPPED)
    ahead = NOW + 3650 * DAY
    for tick, expected in [
        (NOW, {}),
        (ahead, {"ws": Transition.DORMANCY}),
        (ahead + 2 * DAY, {}),
        (ahead + 2 * DAY + MINUTE, {"ws": Transition.DELETE}),
    ]:
        with LifecycleExecutor(manager, clock=lambda: NOW) as restarted:  # the catalog remembers
            assert restarted.run_once(tick).transitions == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the clock of host 'here' may be wrong" in caplog.text


def test_ticks_of_other_hosts_confirm_nothing(catalog, manager, executor):
    with catalog.transaction() as changes:
        changes.note_tick("there", NOW - MINUTE)
    all_due(catalog)
    assert executor.run_once(NOW).transitions == REVERSIBLE
