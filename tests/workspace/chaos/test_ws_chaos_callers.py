"""Callers that go away in the middle: the operation ends as it would have, and the lock is free again."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos_world import BUSY_S, DATA, Place, World, fill, opened

from snaploader.errors import Cancelled, FailedPrecondition, Unavailable
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.manager.held_workspace import HeldWorkspace
from snaploader.workspace.testing import FakeRuntime, RuntimeGate


@pytest.fixture
def world(tmp_path: Path, catalog_url: str) -> Iterator[World]:
    """A world with a workspace that runs and has a version."""
    with opened(Place(str(tmp_path), catalog_url, is_fake=True), workers=4) as world:
        world.manager.create("one", volumes=[DATA])
        fill(world.root("one"), "word")
        world.manager.create_version("one")
        yield world


@dataclass(frozen=True)
class Case:
    """An operation, the runtime's call in the middle of it, and what is true when it was done."""

    act: Callable[[WorkspaceManager], object]
    held_at: str
    event: str
    state: str
    first: str = ""


CASES = {
    "version": Case(lambda m: m.create_version("one"), "capture", "version_create", "running"),
    "version-restarting": Case(lambda m: m.create_version("one"), "start", "version_create", "running"),
    "rollback": Case(lambda m: m.rollback("one", 1), "place", "version_rollback", "running"),
    "pause": Case(lambda m: m.pause("one"), "capture", "workspace_pause", "paused"),
    "resume": Case(lambda m: m.resume("one"), "place", "workspace_resume", "running", first="pause"),
    "start": Case(lambda m: m.start("one"), "start", "workspace_start", "running", first="stop"),
    "stop": Case(lambda m: m.stop("one"), "stop", "workspace_stop", "stopped"),
    "delete": Case(lambda m: m.delete("one"), "stop", "workspace_delete", "deleted"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, world: World) -> Case:
    """An operation that is about to be done."""
    case = CASES[request.param]
    if case.first:
        getattr(world.manager, case.first)("one")
    return case


def hold(world: World, method: str) -> RuntimeGate:
    """Let the next call of this method of the runtime wait."""
    assert isinstance(world.runtime, FakeRuntime)
    return world.runtime.hold_next(method)


def expect_done(world: World, case: Case) -> None:
    """Wait for the lock, and see that all is as after the operation."""
    world.manager.locks.acquire("one", timeout_s=BUSY_S).release()
    if case.state == "deleted":
        world.manager.recover()
    workspace = world.manager.workspace("one")
    assert workspace.state == case.state
    assert workspace.operation is None
    assert world.events("one")[-1] == case.event
    assert world.runtime.status("one").is_running == (case.state == "running")
    assert world.findings() == []


def interrupt_when(gate: RuntimeGate) -> threading.Thread:
    """Sends this thread SIGINT once somebody waits at the gate."""
    main = threading.get_ident()

    def interrupt() -> None:
        assert gate.wait_reached()
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


needs_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread"
)


@needs_main_thread
def test_an_interrupted_caller_does_not_interrupt_the_operation(world: World, case: Case) -> None:
    gate = hold(world, case.held_at)
    thread = interrupt_when(gate)
    with pytest.raises(KeyboardInterrupt):
        case.act(world.manager)
    thread.join()
    assert world.manager.locks.try_acquire("one") is None, "the operation lost its lock"
    gate.open()
    expect_done(world, case)


def test_a_cancelled_task_does_not_cancel_the_operation(world: World, case: Case) -> None:
    gate = hold(world, case.held_at)

    async def call_and_cancel() -> None:
        task = asyncio.create_task(asyncio.to_thread(case.act, world.manager))
        assert await asyncio.to_thread(gate.wait_reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.manager.locks.try_acquire("one") is None, "the operation lost its lock"
        gate.open()

    asyncio.run(call_and_cancel())
    expect_done(world, case)


def test_closing_the_manager_waits_for_the_operation(world: World, case: Case) -> None:
    gate = hold(world, case.held_at)
    caller = threading.Thread(target=case.act, args=(world.manager,))
    caller.start()
    assert gate.wait_reached()
    closer = threading.Thread(target=world.manager.close)
    closer.start()
    gate.open()
    for thread in (closer, caller):
        thread.join(BUSY_S)
        assert not thread.is_alive()
    with opened(world.place) as reopened:
        expect_done(reopened, case)


def test_a_closed_generator_leaves_its_operation_the_lock(world: World) -> None:
    gate = hold(world, "capture")

    def holding() -> Iterator[HeldWorkspace]:
        with world.manager.hold("one") as held:
            yield held

    generator = holding()
    held = next(generator)
    caller = threading.Thread(target=held.create_version)
    caller.start()
    assert gate.wait_reached()
    generator.close()  # type: ignore[attr-defined]
    assert world.manager.locks.try_acquire("one") is None, "the operation lost its lock"
    gate.open()
    caller.join(BUSY_S)
    assert [each.number for each in world.manager.list_versions("one")] == [1, 2]
    with pytest.raises(Cancelled):
        held.stop()
    expect_done(world, CASES["version"])


@needs_main_thread
def test_who_is_interrupted_while_waiting_for_the_lock_has_done_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = world.events("one")
    released = InterruptedCondition()
    lock = world.manager.locks.acquire("one")
    with monkeypatch.context() as patch:
        patch.setattr(world.manager.locks, "_released", released)
        with pytest.raises(KeyboardInterrupt):
            world.manager.create_version("one")
    lock.release()
    world.manager.locks.acquire("one", timeout_s=0).release()
    assert world.events("one") == events
    assert world.findings() == []


class InterruptedCondition(threading.Condition):
    """Whoever waits for it is interrupted meanwhile."""

    def wait(self, timeout: float | None = None) -> bool:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return super().wait(timeout)


@needs_main_thread
def test_an_interrupted_creation_is_made_to_the_end(world: World) -> None:
    gate = hold(world, "start")
    thread = interrupt_when(gate)
    with pytest.raises(KeyboardInterrupt):
        world.manager.create("two", volumes=[DATA])
    thread.join()
    gate.open()
    world.manager.locks.acquire("two", timeout_s=BUSY_S).release()
    assert world.manager.workspace("two").state == "running"
    assert world.events("two") == ["workspace_create"]
    assert world.findings() == []


def test_who_waited_for_a_workspace_that_was_deleted_meanwhile_leaves_no_lock(world: World) -> None:
    gate = hold(world, "stop")
    with ThreadPoolExecutor(4) as pool:
        deletion = pool.submit(world.manager.delete, "one")
        assert gate.wait_reached()
        waiting = [pool.submit(world.manager.create_version, "one") for _ in range(3)]
        gate.open()
        assert deletion.result(BUSY_S).state == "deleted"
        for each in waiting:
            with pytest.raises(FailedPrecondition):
                each.result(BUSY_S)
    assert world.manager.locks.ids() == []
    assert world.findings() == []


def test_a_creation_that_failed_leaves_no_lock(world: World) -> None:
    assert isinstance(world.runtime, FakeRuntime)
    world.runtime.fail_next("start", Unavailable("no process"))
    with pytest.raises(Unavailable):
        world.manager.create("two")
    assert world.manager.locks.ids() == ["one"]
    assert world.findings() == []
