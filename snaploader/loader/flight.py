"""One fetch per blob, however many threads and loaders ask for it."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

from snaploader.digest import Digest
from snaploader.filecache import FileCache


class Flight:
    """One blob on its way. Those who wait are told when it has landed, or why it did not."""

    def __init__(self, digest: Digest, *, background: bool) -> None:
        self.digest = digest
        self.background = background
        """Whether nobody asked for it yet: its failure is nobody's error."""
        self.error: BaseException | None = None
        self.data: bytes | None = None
        """The bytes, where no cache took them; otherwise they are to be found there."""
        self._landed = threading.Event()

    def wait(self) -> None:
        """Block until the flight has ended. Its owner's deadlines bound the wait."""
        self._landed.wait()

    def end(self, error: BaseException | None, data: bytes | None) -> None:
        self.error, self.data = error, data
        self._landed.set()


class Boarding(NamedTuple):
    """A flight, and whether the caller is the one who flies it."""

    flight: Flight
    is_owner: bool


class SingleFlight:
    """The flights under way, by digest. Thread-safe.

    An owner must end its flight with `land`, on every path; a waiter that goes away disturbs nobody.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Digest, Flight] = {}

    def board(self, digest: Digest, *, background: bool = False) -> Boarding:
        """The flight of `digest`: the one under way, or a new one that the caller owns."""
        with self._lock:
            flight = self._flights.get(digest)
            if flight is not None:
                return Boarding(flight, is_owner=False)
            flight = self._flights[digest] = Flight(digest, background=background)
            return Boarding(flight, is_owner=True)

    def land(self, flight: Flight, error: BaseException | None = None, data: bytes | None = None) -> None:
        """End a flight that the caller owns. No effect when it has landed before."""
        with self._lock:
            if self._flights.get(flight.digest) is not flight:
                return
            del self._flights[flight.digest]
        flight.end(error, data)

    def __len__(self) -> int:
        with self._lock:
            return len(self._flights)


_by_cache: weakref.WeakKeyDictionary[FileCache, SingleFlight] = weakref.WeakKeyDictionary()
_by_cache_lock = threading.Lock()


def flights_into(file_cache: FileCache) -> SingleFlight:
    """The flights of all loaders that share this file cache."""
    with _by_cache_lock:
        return _by_cache.setdefault(file_cache, SingleFlight())
