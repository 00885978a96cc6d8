"""Parallel work: a bounded pool of threads, which the loader and the remote cache each have one of.

A signal may raise between any two steps of the calling thread. So nothing is counted up to be counted down
later: the helpers of a call are entries of sets, made before they begin and removed by name, and what wakes
the caller only makes it look again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

from snaploader.errors import Cancelled, translate_thread_errors

T = TypeVar("T")

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


class WorkerPool:
    """A bounded pool of threads. Thread-safe. Threads start with the first work and end with `close`.

    Args:
        workers: Most threads at work for one `for_each`, the calling one included; at least 1.
        owner: Whose pool it is, for messages.
        thread_name: What the threads are called, before their numbers.
    """

    def __init__(
        self,
        workers: int = DEFAULT_WORKERS,
        *,
        owner: str = "the loader",
        thread_name: str = "snaploader",
    ) -> None:
        self.workers = max(1, workers)
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix=thread_name)
        # Apart, because what runs in the background must not queue behind a save that takes minutes.
        self._background = ThreadPoolExecutor(1, thread_name_prefix=f"{thread_name}-background")
        self._closed_message = f"{owner} was closed"
        self._closed = False

    def for_each(
        self,
        function: Callable[[T], object],
        items: Iterable[T],
        *,
        on_failure: Callable[[], object] = lambda: None,
        waits_when_interrupted: bool = True,
    ) -> None:
        """Call `function` with every item, in parallel, taking items in order and only as they are needed.

        The calling thread works too, so a call makes progress however busy the pool is, and nested calls
        cannot lock each other out. The other threads work in turns for all calls under way. `items` is
        advanced by one thread at a time, whichever is free.

        The first error stops the taking of items and is raised once everything that was under way has ended,
        unless the wait for that is interrupted. `Cancelled` when the pool is closed.

        Args:
            on_failure: Called at an error, on the thread that met it, to end early what is under way. May be
                called several times.
            waits_when_interrupted: Whether an interrupt (KeyboardInterrupt, SystemExit) is raised when all
                that was under way has ended, as other errors are, or at once.
        """
        self._check_open()
        pid = os.getpid()
        work = _SharedWork(function, items, on_failure, self.workers - 1, self._start)
        try:
            work.drain()
        except BaseException as error:  # noqa: BLE001 - an interrupt; raised below, after the others ended
            work.fail(error)
        try:
            is_interrupted = work.error is not None and not isinstance(work.error, Exception)
            # A child that was forked by what runs here has none of the threads to wait for.
            if os.getpid() == pid and (waits_when_interrupted or not is_interrupted):
                work.join()
        except BaseException as error:
            work.fail(error)
            raise
        if work.error is not None:
            raise work.error

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the background thread, after what was submitted before.

        `Cancelled` when the pool is closed.
        """
        self._check_open()
        with translate_thread_errors(self._closed_message):
            return self._background.submit(function)

    def close(self) -> None:
        """Drop what has not begun, wait for what has. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)

    def _start(self, function: Callable[[], object]) -> None:
        with translate_thread_errors(self._closed_message):
            self._executor.submit(function)

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled(self._closed_message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _SharedWork(Generic[T]):
    """The items of one call, which several threads take in turns.

    A helper does one item, then queues again behind the helpers of other calls.
    """

    def __init__(
        self,
        function: Callable[[T], object],
        items: Iterable[T],
        on_failure: Callable[[], object],
        max_helpers: int,
        start: Callable[[Callable[[], object]], None],
    ) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._items: Iterator[T] = iter(items)
        self._on_failure = on_failure
        self._max_helpers = max_helpers
        self._start = start
        self._taking = threading.Lock()
        self._lock = threading.Lock()
        self._queued: set[object] = set()
        self._working: set[object] = set()
        self._is_over = False
        self._wake: SimpleQueue[None] = SimpleQueue()

    def drain(self) -> None:
        """Work until no item is left or somebody failed."""
        while self._do_one():
            pass

    def fail(self, error: BaseException) -> None:
        """Keep the first error; no item is taken any more."""
        with self._lock:
            self._is_over = True
            self.error = self.error or error
        self._on_failure()

    def join(self) -> None:
        """Wait for the helpers that are at work. The others find that all is over, should they begin."""
        with self._lock:
            self._is_over = True
            self._queued.clear()
        while True:
            with self._lock:
                if not self._working:
                    return
            self._wake.get()

    def _do_one(self) -> bool:
        """Take an item and work on it; False when there is none, or somebody failed."""
        try:
            with self._taking:
                if self._is_over:
                    return False
                try:
                    item = next(self._items)
                except StopIteration:
                    self._is_over = True
                    return False
            self._add_helper()
            self._function(item)
        except BaseException as error:  # noqa: BLE001 - raised by for_each, on the calling thread
            self.fail(error)
            return False
        return True

    def _add_helper(self) -> None:
        """One more thread, where there may be: each that finds work wakes the next."""
        helper = object()  # a thread's share of the call
        with self._lock:
            if self._is_over or len(self._queued) + len(self._working) >= self._max_helpers:
                return
            self._queued.add(helper)
        self._start(lambda: self._help(helper))

    def _help(self, helper: object) -> None:
        with self._lock:
            if helper not in self._queued:
                return
            self._working.add(helper)
            self._queued.remove(helper)
        may_go_on = False
        try:
            may_go_on = self._do_one()
        finally:
            with self._lock:
                may_go_on = may_go_on and not self._is_over
                if may_go_on:
                    self._queued.add(helper)
                self._working.remove(helper)
            self._wake.put(None)
        if may_go_on:
            with contextlib.suppress(Cancelled):  # the pool is being closed: the caller does the rest
                self._start(lambda: self._help(helper))


class ThreadBuffers:
    """A buffer for each thread that asks for one: a fresh one per chunk would cost its page faults each time.

    They live as long as this object does.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, size: int) -> memoryview:
        """This thread's buffer, cut to `size` bytes. What it was given before is overwritten."""
        buffer: memoryview | None = getattr(self._local, "view", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.view = memoryview(bytearray(size))
        return buffer[:size]
