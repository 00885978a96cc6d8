"""Many transfers at once, on a bounded pool of threads, within a bounded number of bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeAlias

from snaploader.errors import Cancelled
from snaploader.remote.cancel import Cancellation
from snaploader.remote.limiter import ByteBudget

Task: TypeAlias = "tuple[int, Callable[[Cancellation], None]]"
"""The bytes a task holds, and what it does."""

_MIN_COST_BYTES = 64 * 1024
"""Bounds the number of tasks that wait, where each is tiny."""


def run_all(tasks: Iterable[Task], executor: Executor, budget: ByteBudget, parent: Cancellation) -> None:
    """Run tasks, taken one by one as there is room. The first error calls off the rest and is raised.

    Returns or raises after every task that began has ended.
    """
    group = _Group(executor, budget, parent.child())
    try:
        for size_bytes, task in tasks:
            if not group.submit(size_bytes, task):
                break
    except BaseException as error:  # noqa: BLE001 - raised by wait, when all have ended
        group.fail(error)
    group.wait()


class _Group:
    def __init__(self, executor: Executor, budget: ByteBudget, cancellation: Cancellation) -> None:
        self._executor = executor
        self._budget = budget
        self._cancellation = cancellation
        self._condition = threading.Condition()
        self._running = 0
        self._error: BaseException | None = None

    def submit(self, size_bytes: int, task: Callable[[Cancellation], None]) -> bool:
        """Wait for room, then start a task; False when no more should come."""
        cost = max(size_bytes, _MIN_COST_BYTES)
        self._budget.acquire(cost)
        with self._condition:
            self._running += 1
        try:
            self._executor.submit(self._work, cost, task)
        except RuntimeError as error:
            self._done(cost)
            raise Cancelled("the remote cache was closed") from error
        return not self._cancellation.cancelled

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and call off the rest."""
        with self._condition:
            self._error = self._error or error
        self._cancellation.cancel()

    def wait(self) -> None:
        """Until all have ended; raises the first error."""
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._running)
                error = self._error
        except BaseException:  # an interrupt: nobody waits for the rest any more
            self._cancellation.cancel()
            raise
        if error is not None:
            raise error
        self._cancellation.check()

    def _work(self, cost: int, task: Callable[[Cancellation], None]) -> None:
        try:
            if not self._cancellation.cancelled:
                task(self._cancellation)
        except BaseException as error:  # noqa: BLE001 - raised by wait, on the caller's thread
            self.fail(error)
        finally:
            self._done(cost)

    def _done(self, cost: int) -> None:
        self._budget.release(cost)
        with self._condition:
            self._running -= 1
            self._condition.notify_all()
