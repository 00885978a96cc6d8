"""One fetch per blob, however many threads ask for it."""

from __future__ import annotations

import threading

from snaploader.digest import Digest, DigestFunction
from snaploader.errors import NotFound
from snaploader.loader.flight import SingleFlight

ONE = Digest.of(b"one", DigestFunction.SHA256)
TWO = Digest.of(b"two", DigestFunction.SHA256)


def test_the_second_to_ask_waits_for_the_first() -> None:
    flights = SingleFlight()
    owner = flights.board(ONE)
    waiter = flights.board(ONE)
    assert owner.is_owner
    assert not waiter.is_owner
    assert waiter.flight is owner.flight

    woken = threading.Event()
    thread = threading.Thread(target=lambda: (waiter.flight.wait(), woken.set()))
    thread.start()
    assert not woken.is_set()
    flights.land(owner.flight)
    thread.join(300)
    assert woken.is_set()
    assert waiter.flight.error is None


def test_waiters_learn_why_it_failed() -> None:
    flights = SingleFlight()
    owner = flights.board(ONE)
    waiter = flights.board(ONE)
    flights.land(owner.flight, NotFound("gone"))
    waiter.flight.wait()
    assert isinstance(waiter.flight.error, NotFound)


def test_after_landing_the_next_to_ask_owns_a_new_flight() -> None:
    flights = SingleFlight()
    first = flights.board(ONE).flight
    flights.land(first)
    second = flights.board(ONE)
    assert second.is_owner
    flights.land(first, NotFound("late"))
    assert not flights.board(ONE).is_owner
    assert flights.board(TWO).is_owner
    assert len(flights) == 2


def test_of_many_threads_one_owns_the_flight() -> None:
    flights = SingleFlight()
    together = threading.Barrier(16, timeout=300)
    owners = []

    def ask() -> None:
        together.wait()
        if flights.board(ONE).is_owner:
            owners.append(threading.get_ident())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(owners) == 1
