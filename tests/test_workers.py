"""Worker pools: order of taking, taking turns, first error, interrupts, closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from interrupts import interrupt_everywhere

from snaploader import workers
from snaploader.errors import Cancelled, ResourceExhausted
from snaploader.workers import WorkerPool


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


def test_a_failure_ends_early_what_is_under_way(pool: WorkerPool) -> None:
    under_way, called_off = threading.Barrier(2, timeout=300), threading.Event()
    ended = []

    def work(number: int) -> None:
        under_way.wait()
        if number == 1:
            raise ValueError("the second")
        assert called_off.wait(300)
        ended.append(number)

    with pytest.raises(ValueError, match="the second"):
        pool.for_each(work, [0, 1], on_failure=called_off.set)
    assert ended == [0]


def test_an_error_on_the_calling_thread_waits_for_the_others(pool: WorkerPool) -> None:
    under_way, failed, may_end = threading.Event(), threading.Event(), threading.Event()
    ended: list[int] = []

    def call() -> None:
        caller = threading.get_ident()

        def work(item: int) -> None:
            if threading.get_ident() == caller:
                assert under_way.wait(300)
                raise RuntimeError("the caller failed")
            under_way.set()
            assert may_end.wait(300)
            ended.append(item)

        pool.for_each(work, range(10), on_failure=failed.set)

    with ThreadPoolExecutor(1) as threads:
        called = threads.submit(call)
        assert failed.wait(300)
        assert not called.done()
        may_end.set()
        with pytest.raises(RuntimeError, match="the caller failed"):
            called.result(300)
    assert len(ended) >= 1


def test_calls_at_once_take_turns() -> None:
    """Neither waits for the end of the other, however long its list is."""
    with WorkerPool(2) as pool, ThreadPoolExecutor(1) as threads:
        endless, stop = threading.Event(), threading.Event()
        helped: set[int] = set()

        def numbers() -> Iterator[int]:
            number = 0
            while not stop.is_set():
                yield number
                number += 1
                if number > 10:
                    endless.set()

        long = threads.submit(pool.for_each, lambda _: None, numbers())
        try:
            assert endless.wait(300)
            together = threading.Barrier(2, timeout=300)

            def meet(_: int) -> None:
                helped.add(threading.get_ident())
                together.wait()

            pool.for_each(meet, range(2))
        finally:
            stop.set()
        long.result(300)
    assert len(helped) == 2


def test_one_item_is_worked_on_by_the_caller(pool: WorkerPool) -> None:
    workers: list[int] = []
    pool.for_each(lambda _: workers.append(threading.get_ident()), [1])
    assert workers == [threading.get_ident()]


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
        for work in (lambda: pool.for_each(print, [1, 2]), lambda: pool.submit(lambda: None)):
            with pytest.raises(ResourceExhausted, match=r"ulimit -u.*pids\.max"):
                work()
        monkeypatch.undo()


def test_a_pool_that_closes_while_work_is_handed_out_calls_it_off() -> None:
    pool = WorkerPool(2)
    done: list[int] = []

    class ClosingItems:
        def __iter__(self) -> Iterator[int]:
            pool.close()
            return iter(range(10))

    with pytest.raises(Cancelled):
        pool.for_each(done.append, ClosingItems())
    assert done == []


def test_an_interrupt_at_any_step_leaves_nothing_to_wait_for() -> None:
    def work() -> None:
        done: list[int] = []
        pool.for_each(done.append, range(3))
        assert sorted(done) == [0, 1, 2]

    with WorkerPool(3) as pool:
        assert interrupt_everywhere(work, workers.__file__) > 20
