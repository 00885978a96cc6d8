"""Ends streams that fall silent: gRPC's deadlines cover a whole call, not the time between two messages."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from snaploader.errors import translate_thread_errors


class Cancellable(Protocol):
    """A call that can be ended from another thread."""

    def cancel(self) -> bool: ...


class Guard:
    """Watches one stream; `touch` it at each message."""

    def __init__(self, call: Cancellable) -> None:
        self.call = call
        self.touched = time.monotonic()
        self.expired = False

    def touch(self) -> None:
        """The stream moved."""
        self.touched = time.monotonic()

    def pause(self) -> None:
        """Wait for no message until the next `touch`."""
        self.touched = math.inf


class Watchdog:
    """One thread for all streams of a cache, started with the first one. Thread-safe.

    Args:
        idle_s: The silence after which a stream is cancelled.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._condition = threading.Condition()
        self._guards: set[Guard] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def watch(self, call: Cancellable) -> Iterator[Guard]:
        """Watch a call while the block runs."""
        guard = Guard(call)
        with self._condition:
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="snaploader-remote-watchdog", daemon=True)
                with translate_thread_errors("the remote cache was closed"):
                    thread.start()
                self._thread = thread
            self._guards.add(guard)
            if len(self._guards) == 1:  # with others, it wakes before this one's time anyway
                self._condition.notify()
        try:
            yield guard
        finally:
            with self._condition:
                self._guards.discard(guard)

    def close(self) -> None:
        """End the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                limit = time.monotonic() - self._idle_s
                expired = [guard for guard in self._guards if guard.touched <= limit]
                for guard in expired:
                    self._guards.discard(guard)
                    guard.expired = True
                    guard.call.cancel()
                # A guard touched or resumed meanwhile has its whole time still to go: checking every
                # `idle_s` at least, its silence is noticed at most that much late.
                oldest = min((guard.touched for guard in self._guards), default=None)
                self._condition.wait(None if oldest is None else min(self._idle_s, oldest - limit))
