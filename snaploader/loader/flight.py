"""One fetch per blob, however many threads ask for it."""

from __future__ import annotations

import threading
from typing import NamedTuple

from snaploader.digest import Digest


class Flight:
    """One blob on its way. Those who wait are told when it has landed, or why it did not."""

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self.error: BaseException | None = None
        self._landed = threading.Event()

    def wait(self) -> None:
        """Block until the flight has ended. Its owner's deadlines bound the wait."""
        self._landed.wait()

    def land(self, error: BaseException | None) -> None:
        self.error = error
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
            flight = self._flights[digest] = Flight(background=background)
            return Boarding(flight, is_owner=True)

    def land(self, digest: Digest, error: BaseException | None = None) -> None:
        """End the caller's flight. No effect when it has landed before."""
        with self._lock:
            flight = self._flights.pop(digest, None)
        if flight is not None:
            flight.land(error)

    def __len__(self) -> int:
        with self._lock:
            return len(self._flights)
