"""Many transfers at once, on a bounded pool of threads, within a bounded number of bytes.

A signal may raise between any two steps of the calling thread. So nothing is counted up to be counted down
later: what is under way are entries of sets and dictionaries, made before the work begins and removed by
name, and what wakes a waiter only makes it look again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from queue import SimpleQueue
from typing import TypeAlias

from snaploader.errors import translate_thread_errors
from snaploader.remote.cancel import Cancellation

Task: TypeAlias = "tuple[int, Callable[[Cancellation], None]]"
"""The bytes a task holds, and what it does."""

_MIN_COST_BYTES = 64 * 1024
"""Bounds the number of tasks that wait, where each is tiny."""


class Share:
    """Bytes of a `ByteBudget` that are asked for, held, or given back."""

    __slots__ = ("granted", "size_bytes", "wake")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.granted = False
        self.wake: SimpleQueue[None] = SimpleQueue()


class ByteBudget:
    """Hands out shares of a number of bytes, first come, first served. Thread-safe.

    A share bigger than the whole budget is granted when nothing else is out, so that one big blob
    can still go, alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._lock = threading.Lock()
        self._shares: dict[Share, None] = {}
        """Those granted, and behind them those that wait, in the order in which they came."""

    def acquire(self, share: Share) -> None:
        """Wait for a share. Whoever asked for one, had it or not, must `release` it in bounded time."""
        with self._lock:
            self._shares[share] = None
        while True:
            with self._lock:
                self._grant()
                if share.granted:
                    return
            share.wake.get()

    def release(self, share: Share) -> None:
        """Give a share back, or ask for it no more. Again is fine."""
        with self._lock:
            self._shares.pop(share, None)
            self._grant()

    @property
    def used_bytes(self) -> int:
        """What is out now."""
        with self._lock:
            return self._used()

    def _used(self) -> int:
        return sum(share.size_bytes for share in self._shares if share.granted)

    def _grant(self) -> None:
        used = self._used()
        for share in self._shares:
            if not share.granted:
                if used and used + share.size_bytes > self._total:
                    return
                share.wake.put(None)  # first: who is woken grants itself what an interrupt left undone
                share.granted = True
                used += share.size_bytes


def run_all(tasks: Iterable[Task], executor: Executor, budget: ByteBudget, parent: Cancellation) -> None:
    """Run tasks, taken one by one as there is room. The first error calls off the rest and is raised.

    Returns or raises after every task that began has ended, unless waiting for that is interrupted.
    """
    group = _Group(executor, budget, parent.child())
    pid = os.getpid()
    try:
        try:
            for size_bytes, task in tasks:
                if not group.submit(size_bytes, task):
                    break
        except BaseException as error:
            if os.getpid() != pid:
                raise  # a child that was forked by `tasks` has none of the threads
            group.fail(error)
            group.drop_waiting()
        group.wait()
    except BaseException:
        group.cancel()
        raise


class _Group:
    def __init__(self, executor: Executor, budget: ByteBudget, cancellation: Cancellation) -> None:
        self._executor = executor
        self._budget = budget
        self._cancellation = cancellation
        self._lock = threading.Lock()
        self._waiting: set[Share] = set()
        self._working: set[Share] = set()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None

    def submit(self, size_bytes: int, task: Callable[[Cancellation], None]) -> bool:
        """Wait for room, then start a task; False when no more should come."""
        share = Share(max(size_bytes, _MIN_COST_BYTES))
        with self._lock:
            self._waiting.add(share)
        self._budget.acquire(share)
        with translate_thread_errors("the remote cache was closed"):
            self._executor.submit(self._work, share, task)
        return not self._cancellation.cancelled

    def cancel(self) -> None:
        """Call the rest off."""
        self._cancellation.cancel()

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and call off the rest."""
        with self._lock:
            self._error = self._error or error
        self.cancel()

    def drop_waiting(self) -> None:
        """Let no task begin that has not begun. Of one it is not known whether the executor has it."""
        with self._lock:
            dropped = list(self._waiting)
            self._waiting.clear()
        for share in dropped:
            self._budget.release(share)

    def wait(self) -> None:
        """Until all have ended; raises the first error."""
        while True:
            with self._lock:
                if not self._waiting and not self._working:
                    break
            self._wake.get()
        if self._error is not None:
            raise self._error
        self._cancellation.check()

    def _work(self, share: Share, task: Callable[[Cancellation], None]) -> None:
        with self._lock:
            if share not in self._waiting:
                return
            self._working.add(share)
            self._waiting.remove(share)
        try:
            if not self._cancellation.cancelled:
                task(self._cancellation)
        except BaseException as error:  # noqa: BLE001 - raised by wait, on the caller's thread
            self.fail(error)
        finally:
            self._budget.release(share)
            with self._lock:
                self._working.remove(share)
                is_last = not self._working and not self._waiting
            if is_last:
                self._wake.put(None)
