"""The worker pool: order of taking, first error, closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from snaploader.errors import Cancelled, ResourceExhausted
from snaploader.loader.pool import WorkerPool


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(4) as workers:
        yield workers


def test_every_item_is_worked_on_once(pool: WorkerPool) -> None:
    seen: list[int] = []
    pool.for_each(seen.append, range(1000))
    assert sorted(seen) == list(range(1000))


def test_items_are_worked_on_in_parallel(pool: WorkerPool) -> None:
    together = threading.Barrier(4, timeout=300)
    pool.for_each(lambda _: together.wait(), range(4))


def test_the_first_error_stops_the_taking_and_is_raised(pool: WorkerPool) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    def work(number: int) -> None:
        if number == 5:
            raise ValueError(str(number))

    with pytest.raises(ValueError, match="5"):
        pool.for_each(work, items())
    assert len(taken) < 1000


def test_an_error_waits_for_what_is_under_way(pool: WorkerPool) -> None:
    under_way, may_end = threading.Event(), threading.Event()
    ended = []

    def work(number: int) -> None:
        if number == 0:
            under_way.set()
            assert may_end.wait(300)
            ended.append(number)
        else:
            assert under_way.wait(300)
            may_end.set()
            raise RuntimeError("second")

    with pytest.raises(RuntimeError, match="second"):
        pool.for_each(work, [0, 1])
    assert ended == [0]


def test_an_error_of_the_iterator_is_raised(pool: WorkerPool) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the list broke off")

    with pytest.raises(OSError, match="broke off"):
        pool.for_each(lambda _: None, items())


def test_nested_calls_make_progress_on_a_full_pool() -> None:
    done = []
    with WorkerPool(2) as pool:
        pool.for_each(lambda _: pool.for_each(done.append, range(3)), range(8))
    assert len(done) == 24


def test_a_closed_pool_takes_no_work() -> None:
    pool = WorkerPool(2)
    pool.close()
    pool.close()
    with pytest.raises(Cancelled):
        pool.for_each(print, [1])
    with pytest.raises(Cancelled):
        pool.submit(lambda: None)


def test_closing_leaves_no_thread() -> None:
    before = threading.active_count()
    with WorkerPool(4) as pool:
        pool.for_each(lambda _: None, range(100))
    assert threading.active_count() == before


def test_a_pool_that_gets_no_thread_says_which_limit_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with WorkerPool(2) as pool:
        monkeypatch.setattr(threading.Thread, "start", start)
        for work in (lambda: pool.for_each(print, []), lambda: pool.submit(lambda: None)):
            with pytest.raises(ResourceExhausted, match=r"ulimit -u.*pids\.max"):
                work()
        monkeypatch.undo()
