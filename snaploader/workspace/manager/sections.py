"""Threads on which operations run to their end, whatever becomes of those who asked for them.

An operation stops a workspace, works and starts it again: it must not be left in the middle because its
caller was interrupted. So it runs on a thread of the manager, which shares the workspace's lock, while the
caller only waits for the result. Under one lock they follow one another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from snaploader.errors import Cancelled, FailedPrecondition, translate_thread_errors
from snaploader.workspace.locks import HeldLock

DEFAULT_WORKERS = 16

T = TypeVar("T")


class CriticalSections:
    """A bounded number of threads, the first of which starts with the first operation. Thread-safe.

    Args:
        workers: Most operations at one time; further ones wait, holding their locks.
    """

    def __init__(self, workers: int = DEFAULT_WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="snaploader-workspace")
        self._pid = os.getpid()

    def run(self, hold: HeldLock, work: Callable[[], T]) -> T:
        """The result of `work`, which goes on under the lock also when waiting for it is interrupted.

        Raises:
            Cancelled: The manager was closed; nothing was done.
        """
        if os.getpid() != self._pid:
            raise FailedPrecondition("this manager was made before a fork: make another one in the child")
        section = _Section(hold.share(), work)
        try:
            with translate_thread_errors("the manager of the workspaces was closed"):
                future = self._pool.submit(section.run)
        except BaseException:
            section.give_up()
            raise
        return future.result()

    def close(self) -> None:
        """Wait for all operations under way, and end the threads. Idempotent; nothing in a forked child."""
        if os.getpid() == self._pid:
            self._pool.shutdown(wait=True)


class _Section(Generic[T]):
    """Work and its share of a lock, which is released once: when the work ended or was never begun."""

    def __init__(self, hold: HeldLock, work: Callable[[], T]) -> None:
        self._hold = hold
        self._work = work
        self._unclaimed = threading.Lock()

    def run(self) -> T:
        """Do the work, unless it was given up."""
        if not self._unclaimed.acquire(blocking=False):
            raise Cancelled("the operation was called off before it began")
        try:
            # Whoever gave up waiting for one operation may ask for the next under the same lock.
            with self._hold.turn:
                return self._work()
        finally:
            self._hold.release()

    def give_up(self) -> None:
        """Release the lock if the work has not begun; it never will then."""
        if self._unclaimed.acquire(blocking=False):
            self._hold.release()
