"""The one home of a loader's parallel work: a bounded pool of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from snaploader.errors import Cancelled, translate_thread_errors

T = TypeVar("T")

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


class WorkerPool:
    """A bounded pool of threads. Thread-safe. Threads start with the first work and end with `close`.

    Args:
        workers: Most threads at work for one `for_each`, the calling one included; at least 1.
    """

    def __init__(self, workers: int = DEFAULT_WORKERS) -> None:
        self.workers = max(1, workers)
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="snaploader")
        # Apart, because what runs in the background must not queue behind a save that takes minutes.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="snaploader-background")
        self._closed = False

    def for_each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Call `function` with every item, in parallel, taking items in order and only as they are needed.

        The calling thread works too, so a call makes progress however busy the pool is, and nested
        calls cannot lock each other out. The first error stops the taking of items and is raised
        once everything that was under way has ended.
        """
        self._check_open()
        pid = os.getpid()
        work = _SharedWork(function, items)
        helpers: list[Future[None]] = []
        try:
            helpers.extend(_submit(self._executor, work.drain) for _ in range(self.workers - 1))
            work.drain()
        except BaseException as error:  # noqa: BLE001 - an interrupt; raised below, after the others ended
            work.fail(error)
        finally:
            # A child that was forked by what runs here has none of the threads to wait for.
            if os.getpid() == pid:
                for helper in helpers:
                    if not helper.cancel():
                        helper.result()
        if work.error is not None:
            raise work.error

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the background thread, after what was submitted before.

        `Cancelled` when the pool is closed.
        """
        self._check_open()
        return _submit(self._background, function)

    def close(self) -> None:
        """Drop what has not begun, wait for what has. Idempotent."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._background.shutdown(wait=True, cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled("the loader was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _submit(executor: ThreadPoolExecutor, function: Callable[[], T]) -> Future[T]:
    with translate_thread_errors("the loader was closed"):
        return executor.submit(function)


class _SharedWork(Generic[T]):
    """Items that several threads take in turns."""

    def __init__(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        self._function = function
        self._items: Iterator[T] = iter(items)
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def drain(self) -> None:
        """Work until no item is left or somebody failed."""
        while True:
            try:
                with self._lock:
                    if self.error is not None:
                        return
                    item = next(self._items)
            except StopIteration:
                return
            except BaseException as error:  # noqa: BLE001 - raised by for_each, on the calling thread
                self.fail(error)
                return
            try:
                self._function(item)
            except BaseException as error:  # noqa: BLE001 - raised by for_each, on the calling thread
                self.fail(error)
                return

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self.error is None:
                self.error = error


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
