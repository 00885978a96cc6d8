"""Where threads meet: a gate for each store, a lock for each chunk in motion, one call for many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Gate:
    """Counts operations in flight, so that a change can wait for writers, and closing for all. Thread-safe.

    Readers wait for nothing. Writers wait while an exclusive section runs or waits to run, so it cannot
    starve. Nothing slow belongs between `enter_write` and `leave_write`. Not reentrant.

    Entering and leaving take no lock: a thread appends to a list or pops from it, in one atomic step, and
    then looks at the flags. Whoever sets a flag looks at the lists after that, so at least one of the two
    sees the other. Every entry after `close` raises what `closed_error` makes.
    """

    def __init__(self, closed_error: Callable[[], Exception]) -> None:
        self._closed_error = closed_error
        self._changed = threading.Condition(threading.Lock())
        self._readers: list[None] = []
        self._writers: list[None] = []
        self._exclusive = False
        self.closed = False

    def check(self) -> None:
        if self.closed:
            raise self._closed_error()

    def enter_read(self) -> None:
        """Begin a read; `leave_read` must follow."""
        self._readers.append(None)
        if self.closed:
            self.leave_read()
            raise self._closed_error()

    def leave_read(self) -> None:
        self._readers.pop()
        if self.closed and not self._readers:
            self._notify()

    def enter_write(self) -> None:
        """Begin a write, after the exclusive section that runs or waits; `leave_write` must follow."""
        self._writers.append(None)
        while self._exclusive or self.closed:
            self.leave_write()
            with self._changed:
                self._changed.wait_for(lambda: self.closed or not self._exclusive)
            self.check()
            self._writers.append(None)

    def leave_write(self) -> None:
        self._writers.pop()
        if (self._exclusive or self.closed) and not self._writers:
            self._notify()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.enter_read()
        try:
            yield
        finally:
            self.leave_read()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Run a block while no write is in flight. Reads go on."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or not self._exclusive)
            self.check()
            self._exclusive = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._writers)
            yield
        finally:
            with self._changed:
                self._exclusive = False
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse all entries from now on, and return when the last operation has left. Idempotent."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._readers or self._writers or self._exclusive))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class ChunkLocks:
    """One lock per chunk, made on demand. Held for local work only, never while a source is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[threading.Lock, list[None]]] = {}

    @contextmanager
    def hold(self, index: int) -> Iterator[None]:
        """Hold the lock of chunk `index`. Not reentrant; hold one at a time."""
        with self._lock:
            lock, users = self._held.setdefault(index, (threading.Lock(), []))
            users.append(None)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._held[index]


class Flight(Generic[K, T]):
    """Work under way that several want the outcome of. It has one once it was finished."""

    __slots__ = ("_callbacks", "_finished", "error", "key", "result", "waiters")

    def __init__(self, key: K) -> None:
        self.key = key
        self.waiters = 0
        """How many have joined it, besides the one who leads."""
        self.result: T | None = None
        self.error: BaseException | None = None
        self._finished = threading.Event()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_finished(self) -> bool:
        """Whether it has its outcome."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until it is finished. Whatever bounds the leader's work bounds the wait."""
        self._finished.wait()

    def when_finished(self, callback: Callable[[], object]) -> None:
        """Call `callback` once it is finished, on the thread that does that, or at once. Perhaps twice."""
        self._callbacks.append(callback)
        if self._finished.is_set():
            callback()

    def end(self, result: T | None, error: BaseException | None) -> None:
        """Give it its outcome, for all who wait."""
        self.result, self.error = result, error
        self._finished.set()
        for callback in self._callbacks:
            callback()


class SingleFlight(Generic[K, T]):
    """Work under way, at most one for each key. Thread-safe.

    `run` is for one call. `join` and `finish` are for work that begins or ends elsewhere, such as one request
    for many keys. A waiter that is interrupted disturbs nobody.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[K, Flight[K, T]] = {}

    def run(self, key: K, call: Callable[[], T], wait: Callable[[Flight[K, T]], object] | None = None) -> T:
        """The result of `call`, or of the one for the same key that is under way.

        An Exception reaches all who wait. When the call is interrupted (KeyboardInterrupt, SystemExit), or
        what it raises has a true attribute `is_callers_own`, one of them takes over.

        Args:
            wait: Waits for a flight, and may raise to wait no longer. Default: as long as it takes.
        """
        while True:
            flight, leads = self.join(key)
            if leads:
                try:
                    result = call()
                    self.finish(flight, result)
                except BaseException as error:
                    self.finish(flight, error=error)
                    raise
                return result
            (wait or Flight.wait)(flight)
            if flight.error is None:
                return cast("T", flight.result)
            if isinstance(flight.error, Exception) and not getattr(flight.error, "is_callers_own", False):
                raise flight.error

    def join(self, key: K) -> tuple[Flight[K, T], bool]:
        """The flight for `key`, and whether the caller leads it: then it must `finish` it on every path."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                flight.waiters += 1
                return flight, False
            flight = self._flights[key] = Flight(key)
            return flight, True

    def finish(
        self, flight: Flight[K, T], result: T | None = None, error: BaseException | None = None
    ) -> None:
        """Give a flight its outcome, for all who wait. No effect when it has one."""
        with self._lock:
            if self._flights.get(flight.key) is not flight:
                return
            del self._flights[flight.key]
        flight.end(result, error)
