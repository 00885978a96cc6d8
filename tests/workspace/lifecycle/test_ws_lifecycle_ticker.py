"""`run`: ticks at whole minutes, never two at once, without drift, through failures, until told to stop."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from lifecycle_fakes import STOPPED, FakeManager, add, state_of
from lifecycle_values import NOW
from prometheus_client import CollectorRegistry

from snaploader.errors import InvalidArgument, Unavailable
from snaploader.workspace.lifecycle import LifecycleExecutor, Metrics, wall_clock_ticks
from snaploader.workspace.policy import Transition


class Time:
    """A clock that only waiting and `pass_by` move on; waiting stops after so many rounds."""

    def __init__(self, start=NOW, *, rounds=5, early_s=0.0):
        self.now = start
        self.waited = []
        self._rounds = rounds
        self._early_s = early_s

    def clock(self):
        return self.now

    def wait(self, stop, seconds):
        self.waited.append(seconds)
        if len(self.waited) >= self._rounds:
            stop.set()
            return True
        self.pass_by(seconds - self._early_s if seconds > 1 else seconds)
        return stop.is_set()

    def pass_by(self, seconds):
        self.now += timedelta(seconds=seconds)

    def wall_clock_ticks(self, interval_s=60.0):
        return wall_clock_ticks(threading.Event(), interval_s, clock=self.clock, wait=self.wait)


def seconds_since_now(moments):
    return [round((moment - NOW).total_seconds(), 3) for moment in moments]


def test_the_first_tick_is_at_once_and_the_others_at_whole_minutes():
    time = Time(NOW + timedelta(seconds=42.5), rounds=4)
    assert seconds_since_now(time.wall_clock_ticks()) == [42.5, 60, 120, 180]


def test_time_spent_on_a_tick_does_not_add_up():
    time, seen = Time(rounds=4), []
    for tick in time.wall_clock_ticks():
        seen.append(tick)
        time.pass_by(13.25)
    assert seconds_since_now(seen) == [0, 60, 120, 180]
    assert time.waited == [46.75] * 4


def test_ticks_that_were_missed_are_left_out():
    time, seen = Time(rounds=3), []
    for tick in time.wall_clock_ticks():
        seen.append(tick)
        time.pass_by(150)
    assert seconds_since_now(seen) == [0, 180, 360]


def test_waking_a_little_early_gives_no_tick_twice():
    time = Time(rounds=5, early_s=0.01)
    found = seconds_since_now(time.wall_clock_ticks())
    assert found == [0, 60, 120]
    assert len({number // 60 for number in found}) == len(found)


def test_a_clock_that_is_set_back_gives_a_tick_within_one_interval():
    time, seen = Time(rounds=3), []
    for tick in time.wall_clock_ticks():
        seen.append(tick)
        if len(seen) == 1:
            time.pass_by(-3600)
    assert seconds_since_now(seen) == [0, -3540, -3480]
    assert max(time.waited) <= 60


def test_nothing_ticks_once_stop_is_set():
    stop = threading.Event()
    stop.set()
    assert list(wall_clock_ticks(stop, 60, clock=Time().clock, wait=Time().wait)) == []


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(interval_s):
    with pytest.raises(InvalidArgument, match="above 0 s"):
        next(Time().wall_clock_ticks(interval_s))


# The executor


@pytest.fixture
def manager(catalog):
    return FakeManager(catalog)


def test_run_looks_at_each_tick_until_stopped(catalog, manager):
    add(catalog, "first", deadline=NOW)
    add(catalog, "second", deadline=NOW + timedelta(seconds=1))
    add(catalog, "third", deadline=NOW + timedelta(minutes=2))
    add(catalog, "later", deadline=NOW + timedelta(minutes=3))
    time = Time(NOW + timedelta(seconds=30), rounds=3)
    with LifecycleExecutor(manager, clock=time.clock, wait=time.wait) as executor:
        executor.run(threading.Event())
    assert [each for _, each, _ in manager.calls] == ["first", "second", "third"]
    assert time.waited == [30, 60, 60]


def test_a_tick_that_fails_is_logged_and_counted_and_the_next_one_runs(catalog, manager, monkeypatch, caplog):
    add(catalog, "ws", deadline=NOW)
    reading = type(catalog).reading
    failures = [Unavailable("database is away"), RuntimeError("bug")]

    def failing(self):
        if failures:
            raise failures.pop(0)
        return reading(self)

    monkeypatch.setattr(type(catalog), "reading", failing)
    registry, time = CollectorRegistry(), Time(rounds=3)
    with LifecycleExecutor(manager, clock=time.clock, wait=time.wait, metrics=Metrics(registry)) as executor:
        executor.run(threading.Event())
    assert state_of(catalog, "ws").state is STOPPED
    assert registry.get_sample_value("snaploader_lifecycle_errors_total") == 2
    assert "database is away" in caplog.text
    assert "bug" in caplog.text


def test_run_hands_out_what_each_tick_did(catalog, manager):
    add(catalog, "first", deadline=NOW)
    add(catalog, "third", deadline=NOW + timedelta(minutes=2))
    time, told = Time(rounds=3), []
    with LifecycleExecutor(manager, clock=time.clock, wait=time.wait) as executor:
        executor.run(threading.Event(), on_stats=told.append)
    assert [(stats.tick, dict(stats.transitions)) for stats in told] == [
        (NOW, {"first": Transition.AUTOSTOP}),
        (NOW + timedelta(minutes=1), {}),
        (NOW + timedelta(minutes=2), {"third": Transition.AUTOSTOP}),
    ]


def test_who_is_told_of_a_tick_and_fails_does_not_end_the_ticks(catalog, manager, caplog):
    add(catalog, "third", deadline=NOW + timedelta(minutes=2))
    time, told = Time(rounds=3), []

    def failing(stats):
        told.append(stats)
        raise RuntimeError("nobody listens")

    registry = CollectorRegistry()
    with LifecycleExecutor(manager, clock=time.clock, wait=time.wait, metrics=Metrics(registry)) as executor:
        executor.run(threading.Event(), on_stats=failing)
    assert len(told) == 3
    assert state_of(catalog, "third").state is STOPPED
    assert "nobody listens" in caplog.text
    assert registry.get_sample_value("snaploader_lifecycle_errors_total") == 0


def test_stopping_in_the_middle_of_a_tick_finishes_what_is_under_way_and_returns(catalog, manager):
    for number in range(3):
        add(catalog, f"ws-{number}", deadline=NOW)
    stop, under_way, go_on = threading.Event(), threading.Event(), threading.Event()

    def work(operation, workspace_id):
        under_way.set()
        assert go_on.wait(300)

    manager.during = work
    with LifecycleExecutor(manager, max_concurrency=1, clock=lambda: NOW) as executor:
        thread = threading.Thread(target=executor.run, args=(stop,))
        thread.start()
        assert under_way.wait(300)
        stop.set()
        assert thread.is_alive()
        go_on.set()
        thread.join(300)
        assert not thread.is_alive()
    assert [each for _, each, _ in manager.calls] == ["ws-0"]
    assert state_of(catalog, "ws-0").state is STOPPED


def test_stopping_between_ticks_ends_the_waiting(catalog, manager):
    stop, waits = threading.Event(), threading.Event()

    def wait(event, seconds):
        waits.set()
        return event.wait(seconds)

    with LifecycleExecutor(manager, wait=wait) as executor:
        thread = threading.Thread(target=executor.run, args=(stop, 3600.0))
        thread.start()
        assert waits.wait(300)
        stop.set()
        thread.join(300)
        assert not thread.is_alive()
