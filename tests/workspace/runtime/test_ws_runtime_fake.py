"""The fake runtime: what tests can script, and what it tells them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from runtime_harness import save

from snaploader import SnapshotLoader
from snaploader.errors import Cancelled, DeadlineExceeded, FailedPrecondition, Unavailable
from snaploader.workspace.model import Scope, WorkspaceSpec
from snaploader.workspace.runtime import StopOutcome
from snaploader.workspace.testing import FakeRuntime, RuntimeCall, RuntimeGate

ID = "ws"
SPEC = WorkspaceSpec(ID, command=("anything",))


def test_calls_are_recorded_in_order(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    fake.start(SPEC)
    fake.status(ID)
    fake.stop(ID)
    fake.workspaces()
    assert fake.calls == [
        RuntimeCall("create", ID),
        RuntimeCall("start", ID),
        RuntimeCall("stop", ID),
        RuntimeCall("workspaces"),
    ]


def test_a_scripted_failure_comes_once_and_nothing_is_done(fake: FakeRuntime) -> None:
    error = Unavailable("no")
    fake.fail_next("create", error)
    with pytest.raises(Unavailable) as caught:
        fake.create(SPEC)
    assert caught.value is error
    assert not fake.status(ID).exists
    fake.create(SPEC)


def test_a_failure_may_come_several_times_or_after_the_work(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    fake.fail_next("start", Unavailable("no"), times=2)
    fake.fail_next("start", Unavailable("late"), after_effect=True)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no"):
            fake.start(SPEC)
        assert not fake.status(ID).is_running
    with pytest.raises(Unavailable, match="late"):
        fake.start(SPEC)
    assert fake.status(ID).is_running


def test_a_capture_fails_at_its_begin_or_its_end(fake: FakeRuntime, loader: SnapshotLoader) -> None:
    fake.create(SPEC)
    fake.fail_next("capture", Unavailable("no"))
    with pytest.raises(Unavailable), fake.capture(SPEC, Scope.FULL):
        pytest.fail("the block was entered")
    fake.fail_next("capture", Unavailable("late"), after_effect=True)
    entered = []
    with pytest.raises(Unavailable), fake.capture(SPEC, Scope.FULL) as captured:
        entered.append(captured)
    assert entered
    save(fake, loader, SPEC)


def test_a_held_call_waits_for_its_gate(fake: FakeRuntime) -> None:
    gate = fake.hold_next("create")
    creating = threading.Thread(target=fake.create, args=(SPEC,))
    creating.start()
    assert gate.wait_reached()
    assert not fake.status(ID).exists
    gate.open()
    creating.join()
    assert fake.status(ID).exists
    fake.start(SPEC)


def test_methods_that_do_not_exist_cannot_be_scripted(fake: FakeRuntime) -> None:
    for script in (fake.hold_next, lambda method: fake.fail_next(method, Unavailable("no"))):
        with pytest.raises(ValueError, match="'destroy'"):
            script("destroy")


def test_a_gate_that_nobody_opens_is_an_error() -> None:
    gate = RuntimeGate()
    assert not gate.wait_reached(0)
    with pytest.raises(TimeoutError):
        gate.pass_through(0)
    assert gate.wait_reached(0)
    gate.open()
    gate.pass_through(0)


def test_what_runs_goes_on_in_other_runtimes(fake: FakeRuntime, tmp_path: Path) -> None:
    fake.create(SPEC)
    fake.start(SPEC)
    fake.close()
    other = FakeRuntime(tmp_path / "runtime")
    assert other.status(ID).is_running
    other.stop(ID)
    assert not fake.status(ID).is_running


def test_a_command_may_end_by_itself(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    fake.start(SPEC)
    fake.end(ID, 3)
    assert fake.status(ID).exit_code == 3
    assert fake.stop(ID) is StopOutcome.NOT_RUNNING
    with pytest.raises(FailedPrecondition):
        fake.wait_ready(SPEC)
    fake.start(SPEC)
    assert fake.status(ID).exit_code is None


def test_a_stubborn_workspace_stops_by_force_alone(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    fake.start(SPEC)
    fake.ignore_stop(ID)
    with pytest.raises(DeadlineExceeded):
        fake.stop(ID, force=False)
    assert fake.stop(ID) is StopOutcome.KILLED
    assert fake.status(ID).exit_code == -9


def test_readiness_is_what_the_test_says(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    fake.start(SPEC)
    fake.set_ready(ID, is_ready=False)
    with pytest.raises(DeadlineExceeded, match="within 60 s"):
        fake.wait_ready(SPEC)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        fake.wait_ready(SPEC, 60, cancelled)
    fake.set_ready(ID)
    fake.wait_ready(SPEC)
