"""Parallel work: a bounded pool of threads, which the loader and the remote cache each have one of; and what
one thread does for all who wait for it.

A signal may raise between any two steps of the calling thread. So nothing is counted up to be counted down
later: the helpers of a call are entries of sets, made before they begin and removed by name, and what wakes
the caller only makes it look again.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

from snaploader import context
from snaploader.errors import Cancelled, SnaploaderError, translate_thread_errors

log = logging.getLogger(__name__)

T = TypeVar("T")

_SEEN_THROUGH = 16
"""Most calls of `WorkerPool.see_through` that run on its threads at a time; more wait for one."""

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


class WorkerPool:
    """A bounded pool of threads. Thread-safe. Threads start with the first work and end with `close`.

    `workers` is the most at work for one `for_each`, the calling thread included.
    """

    def __init__(
        self, workers: int = DEFAULT_WORKERS, *, owner: str = "the loader", thread_name: str = "snaploader"
    ) -> None:
        self.workers = max(1, workers)
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix=thread_name)
        # Apart, because what runs in the background must not queue behind a save that takes minutes.
        self._background = ThreadPoolExecutor(1, thread_name_prefix=f"{thread_name}-background")
        # Apart, because what hangs there belongs to calls that ended.
        self._seeing_through = ThreadPoolExecutor(_SEEN_THROUGH, thread_name_prefix=f"{thread_name}-through")
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

        The other threads work in the context of the calling one (`snaploader.context`). When that is called
        off, no item is taken any more.

        The first error stops the taking of items and is raised once everything that was under way has ended.
        To end that early, `on_failure` is called on the thread that met an error, maybe several times. An
        interrupt (KeyboardInterrupt, SystemExit) need not wait. `Cancelled` when the pool is closed.
        """
        if self._closed:
            raise Cancelled(self._closed_message)
        pid = os.getpid()
        work = _SharedWork(self, function, items, on_failure)
        try:
            while work.do_one():
                pass
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
        return self.start(function, self._background)

    def see_through(self, function: Callable[[], T]) -> T:
        """Run what must not stop half-way to its end, whatever becomes of the call that runs (its context).

        When the call is called off, or its time is up, it ends with that error as every call does. A function
        that has begun goes on without it, and closing the pool waits for that; one that has not begun never
        does. The function sees the context of the call without its bounds. `Cancelled` when the pool is
        closed.
        """
        call = context.current()
        if not call.is_bounded:
            return function()
        call.check()
        variables = contextvars.copy_context()

        def run() -> T:
            with context.unbounded():
                return function()

        future = self.start(lambda: variables.run(run), self._seeing_through)
        try:
            call.wait_until_done(future)
        except SnaploaderError as error:
            if not future.cancel():
                error.add_note("what it had begun to publish or to delete is completed without it")
                future.add_done_callback(_log_failure)
            raise
        return future.result()

    def start(self, function: Callable[[], T], executor: ThreadPoolExecutor | None = None) -> Future[T]:
        """Run `function` on a thread of `for_each`, as soon as one is free. Errors as `submit`."""
        with translate_thread_errors(self._closed_message):
            return (executor or self._executor).submit(function)

    def close(self) -> None:
        """Drop what has not begun, wait for what has. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)
        self._seeing_through.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _log_failure(future: Future[T]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        log.warning("what a call had begun could not be completed after its end: %s", error)


class _SharedWork(Generic[T]):
    """The items of one call, which several threads take in turns.

    A helper does one item, then queues again behind the helpers of other calls.
    """

    def __init__(
        self,
        pool: WorkerPool,
        function: Callable[[T], object],
        items: Iterable[T],
        on_failure: Callable[[], object],
    ) -> None:
        self.error: BaseException | None = None
        self._pool = pool
        self._function = function
        self._items: Iterator[T] = iter(items)
        self._on_failure = on_failure
        self._taking = threading.Lock()
        self._lock = threading.Lock()
        self._queued: set[object] = set()
        self._working: set[object] = set()
        self._is_over = False
        self._wake: SimpleQueue[None] = SimpleQueue()

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

    def do_one(self) -> bool:
        """Take an item and work on it; False when there is none, or somebody failed."""
        try:
            with self._taking:
                if self._is_over:
                    return False
                context.current().check()
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
            # The caller is one of the pool's workers.
            if self._is_over or 1 + len(self._queued) + len(self._working) >= self._pool.workers:
                return
            self._queued.add(helper)
        variables = contextvars.copy_context()  # one for each thread: none can be entered twice at once
        self._pool.start(lambda: variables.run(self._help, helper))

    def _help(self, helper: object) -> None:
        with self._lock:
            if helper not in self._queued:
                return
            self._working.add(helper)
            self._queued.remove(helper)
        may_go_on = False
        try:
            may_go_on = self.do_one()
        finally:
            with self._lock:
                self._working.remove(helper)
            self._wake.put(None)
        if may_go_on:
            with contextlib.suppress(Cancelled):  # the pool is being closed: the caller does the rest
                self._add_helper()


class Once(Generic[T]):
    """Keeps the first success of `make`. A failure reaches those who waited; the next caller tries again.

    When the one who makes it is called off, one of those who wait takes over.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._future: Future[T] | None = None

    def get(self) -> T:
        """Return the value, made now if need be."""
        while True:
            with self._lock:
                future = self._future
                if future is None:
                    made = self._future = Future()
            if future is None:
                return self._lead(made)
            if not future.done():
                context.current().wait_until_done(future)
            if not isinstance(future.exception(), _CalledOffError):
                return future.result()

    def _lead(self, made: Future[T]) -> T:
        try:
            made.set_result(self._make())
        except BaseException as error:
            with self._lock:
                self._future = None
            made.set_exception(_CalledOffError() if context.current().is_over else error)
            raise
        return made.result()


class _CalledOffError(Exception):
    """Tells those who waited that the one who led was called off."""
