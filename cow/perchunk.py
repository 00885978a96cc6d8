"""Locks and flights that exist only for the chunks in motion, so that a big store costs nothing at rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class ChunkLocks:
    """One lock per chunk, made on demand. Held for local work only, never while a source is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[threading.Lock, list[None]]] = {}

    @contextmanager
    def hold(self, index: int) -> Iterator[None]:
        """Hold the lock of chunk `index`. Not reentrant; hold one at a time."""
        with self._lock:
            held = self._held.get(index)
            if held is None:
                held = self._held[index] = (threading.Lock(), [])
            lock, users = held
            users.append(None)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._held[index]


class _Flight(Generic[T]):
    __slots__ = ("done", "error", "result", "waiters")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None
        self.waiters = 0


class SingleFlight(Generic[T]):
    """Runs one call per chunk at a time; whoever comes meanwhile gets its result. Thread-safe.

    A waiter that is interrupted leaves the call to the others. When the call is interrupted
    (KeyboardInterrupt, SystemExit), a waiter takes over; an Exception reaches all of them.

    Args:
        share: Called with the result and the number of waiters, before they get it: takes the
            references that each of them will own.
        give_back: Drops one such reference, for a waiter that was interrupted too late to be left out.
    """

    def __init__(self, share: Callable[[T, int], None], give_back: Callable[[T], None]) -> None:
        self._share = share
        self._give_back = give_back
        self._lock = threading.Lock()
        self._flights: dict[int, _Flight[T]] = {}

    def run(self, index: int, call: Callable[[], T]) -> T:
        """The result of `call`, or of the call for the same chunk that is in flight."""
        while True:
            with self._lock:
                flight = self._flights.get(index)
                leading = flight is None
                if flight is None:
                    flight = self._flights[index] = _Flight()
                else:
                    flight.waiters += 1
            if leading:
                return self._lead(index, flight, call)
            self._wait(flight)
            if flight.error is None:
                assert flight.result is not None
                return flight.result
            if isinstance(flight.error, Exception):
                raise flight.error

    def _lead(self, index: int, flight: _Flight[T], call: Callable[[], T]) -> T:
        try:
            result = call()
        except BaseException as error:
            with self._lock:
                del self._flights[index]
                flight.error = error
                flight.done.set()
            raise
        with self._lock:
            del self._flights[index]
            if flight.waiters:
                self._share(result, flight.waiters)
            flight.result = result
            flight.done.set()
        return result

    def _wait(self, flight: _Flight[T]) -> None:
        try:
            flight.done.wait()
        except BaseException:
            with self._lock:
                if not flight.done.is_set():
                    flight.waiters -= 1
                elif flight.result is not None:
                    self._give_back(flight.result)
            raise
