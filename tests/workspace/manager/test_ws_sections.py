"""Critical sections: run to their end under the lock, or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from snaploader.errors import Cancelled
from snaploader.workspace.host import HeldLock, WorkspaceLocks
from snaploader.workspace.manager.held_workspace import CriticalSections


@pytest.fixture
def locks(tmp_path: Path) -> WorkspaceLocks:
    return WorkspaceLocks(tmp_path)


@pytest.fixture
def hold(locks: WorkspaceLocks) -> HeldLock:
    return locks.acquire("one")


def is_free(locks: WorkspaceLocks) -> bool:
    lock = locks.try_acquire("one")
    if lock is not None:
        lock.release()
    return lock is not None


def test_the_result_of_the_work_is_handed_over(locks: WorkspaceLocks, hold: HeldLock) -> None:
    sections = CriticalSections()
    assert sections.run_to_end(hold, lambda: 7) == 7
    sections.close()
    assert not is_free(locks)
    hold.release()
    assert is_free(locks)


def test_the_error_of_the_work_is_raised_to_the_caller(hold: HeldLock) -> None:
    def fail() -> None:
        raise ValueError("broken")

    sections = CriticalSections()
    with pytest.raises(ValueError, match="broken"):
        sections.run_to_end(hold, fail)
    sections.close()
    hold.release()


def test_work_holds_the_lock_after_its_caller_released_it(locks: WorkspaceLocks, hold: HeldLock) -> None:
    sections = CriticalSections()
    began, go_on = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert go_on.wait(300)

    caller = threading.Thread(target=sections.run_to_end, args=(hold, work))
    caller.start()
    assert began.wait(300)
    hold.release()
    assert not is_free(locks)
    go_on.set()
    caller.join()
    sections.close()
    assert is_free(locks)


def test_closed_sections_do_nothing_and_keep_no_lock(locks: WorkspaceLocks, hold: HeldLock) -> None:
    sections = CriticalSections()
    sections.close()
    sections.close()
    with pytest.raises(Cancelled, match="closed"):
        sections.run_to_end(hold, lambda: pytest.fail("it ran"))
    hold.release()
    assert is_free(locks)


def test_work_whose_caller_is_interrupted_while_handing_it_over_runs_once_or_never(
    locks: WorkspaceLocks, hold: HeldLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = CriticalSections(1)
    ran: list[int] = []
    submit = sections._pool.submit

    def interrupted(work: object) -> None:
        future = submit(work)  # type: ignore[arg-type]
        future.exception(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(sections._pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sections.run_to_end(hold, lambda: ran.append(1))
    hold.release()
    sections.close()
    assert ran == [1]
    assert is_free(locks)


def test_work_that_was_given_up_before_it_began_never_runs(
    locks: WorkspaceLocks, hold: HeldLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = CriticalSections(1)
    late: list[object] = []

    def interrupted(work: object) -> None:
        late.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(sections._pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sections.run_to_end(hold, lambda: pytest.fail("it ran"))
    hold.release()
    assert is_free(locks)
    with pytest.raises(Cancelled, match="before it began"):
        late[0]()  # type: ignore[operator]
    sections.close()


def test_what_is_asked_for_next_under_one_lock_waits_for_work_whose_caller_gave_up(hold: HeldLock) -> None:
    sections = CriticalSections()
    began, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        began.set()
        assert go_on.wait(300)
        done.append("first")

    abandoned = threading.Thread(target=sections.run_to_end, args=(hold, first))
    abandoned.start()
    assert began.wait(300)
    following = threading.Thread(target=sections.run_to_end, args=(hold, lambda: done.append("second")))
    following.start()
    following.join(0.05)
    assert done == []
    go_on.set()
    abandoned.join()
    following.join()
    assert done == ["first", "second"]
    hold.release()
    sections.close()
