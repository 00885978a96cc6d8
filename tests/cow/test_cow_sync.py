"""The gate of a store under many threads, and calls that many want the result of."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cow_sources import wait_until

from cow import SingleFlight
from cow.sync import Gate

PATIENCE = 60


class Closed(Exception):
    pass


def test_an_exclusive_section_runs_while_nobody_writes():
    gate = Gate(Closed)
    inside: list[None] = []
    seen: list[int] = []
    barrier = threading.Barrier(6)

    def write():
        barrier.wait(PATIENCE)
        for _ in range(500):
            gate.enter_write()
            inside.append(None)
            inside.pop()
            gate.leave_write()

    def exclude():
        barrier.wait(PATIENCE)
        for _ in range(25):
            with gate.exclusive():
                seen.append(len(inside))
                inside.append(None)
                seen.append(len(inside) - 1)
                inside.pop()

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work) for work in (write, write, write, write, exclude, exclude)]:
            done.result(PATIENCE)
    assert len(seen) == 100
    assert not any(seen)


def test_readers_come_and_go_during_an_exclusive_section_and_writers_wait():
    gate = Gate(Closed)
    with ThreadPoolExecutor(2) as pool:
        with gate.exclusive():
            writer = pool.submit(gate.enter_write)
            gate.enter_read()
            gate.leave_read()
            assert not writer.done()
        writer.result(PATIENCE)
        exclusive = pool.submit(lambda: gate.exclusive().__enter__())
        gate.leave_write()
        exclusive.result(PATIENCE)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_closing_waits_for_all_who_are_inside_and_refuses_the_rest(kind):
    gate = Gate(Closed)
    enter, leave = getattr(gate, f"enter_{kind}"), getattr(gate, f"leave_{kind}")
    refused = threading.Barrier(5)
    entered = threading.Barrier(5)

    def use():
        enter()
        entered.wait(PATIENCE)
        leave()
        while True:
            try:
                enter()
            except Closed:
                break
            leave()
        refused.wait(PATIENCE)

    with ThreadPoolExecutor(5) as pool:
        users = [pool.submit(use) for _ in range(4)]
        entered.wait(PATIENCE)
        closing = pool.submit(gate.close)
        refused.wait(PATIENCE)
        closing.result(PATIENCE)
        for user in users:
            user.result(PATIENCE)
    for call in (gate.enter_read, gate.enter_write, gate.check, gate.exclusive().__enter__):
        with pytest.raises(Closed):
            call()
    gate.close()


def test_a_flight_that_another_thread_finishes_has_one_outcome():
    flights: SingleFlight[str, int] = SingleFlight()
    flight, leads = flights.join("key")
    assert leads
    again, leads = flights.join("key")
    assert again is flight
    assert not leads
    assert flight.waiters == 1
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(flights.run, "key", lambda: 0)
        wait_until(lambda: flight.waiters == 2)
        flights.finish(flight, 7)
        assert waiter.result(PATIENCE) == 7
    flights.finish(flight, error=ValueError("too late"))
    flight.wait()
    assert (flight.result, flight.error) == (7, None)
    assert flights.run("key", lambda: 8) == 8


def test_of_many_threads_one_leads_a_flight_and_the_others_learn_why_it_failed():
    flights: SingleFlight[str, int] = SingleFlight()
    together = threading.Barrier(16, timeout=PATIENCE)

    def ask() -> bool:
        together.wait()
        flight, leads = flights.join("key")
        if leads:
            try:
                wait_until(lambda: flight.waiters == 15)
            finally:
                flights.finish(flight, error=ValueError("gone"))
        flight.wait()
        assert isinstance(flight.error, ValueError)
        return leads

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(lambda _: ask(), range(16))) == 1
    _, leads = flights.join("key")
    assert leads
