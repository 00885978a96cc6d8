"""Who may be inside an object at the same time: readers, writers, one exclusive change, or nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Counts operations in flight, so that a change can wait for writers, and closing for all. Thread-safe.

    Readers wait for nothing. Writers wait while an exclusive section runs or waits to run, so it cannot
    starve. Nothing slow belongs between `enter_write` and `leave_write`. Not reentrant.

    Args:
        closed_error: Makes the exception for every entry after `close`.
    """

    def __init__(self, closed_error: Callable[[], Exception]) -> None:
        self._closed_error = closed_error
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._reads = 0
        self._writes = 0
        self._exclusive = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def check(self) -> None:
        """Raise if closed."""
        if self._closed:
            raise self._closed_error()

    def enter_read(self) -> None:
        """Begin a read; `leave_read` must follow."""
        with self._lock:
            if self._closed:
                raise self._closed_error()
            self._reads += 1

    def leave_read(self) -> None:
        """End a read."""
        with self._lock:
            self._reads -= 1
            if self._closed and not self._reads:
                self._changed.notify_all()

    def enter_write(self) -> None:
        """Begin a write, after the exclusive section that runs or waits; `leave_write` must follow."""
        with self._lock:
            while self._exclusive and not self._closed:
                self._changed.wait()
            if self._closed:
                raise self._closed_error()
            self._writes += 1

    def leave_write(self) -> None:
        """End a write."""
        with self._lock:
            self._writes -= 1
            if not self._writes and (self._exclusive or self._closed):
                self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """`enter_read` and `leave_read` around a block."""
        self.enter_read()
        try:
            yield
        finally:
            self.leave_read()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """`enter_write` and `leave_write` around a block."""
        self.enter_write()
        try:
            yield
        finally:
            self.leave_write()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Run a block while no write is in flight. Reads go on."""
        with self._lock:
            while self._exclusive and not self._closed:
                self._changed.wait()
            if self._closed:
                raise self._closed_error()
            self._exclusive = True
        try:
            with self._lock:
                while self._writes:
                    self._changed.wait()
            yield
        finally:
            with self._lock:
                self._exclusive = False
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse all entries from now on, and return when the last operation has left. Idempotent."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            while self._reads or self._writes or self._exclusive:
                self._changed.wait()
