"""Many transfers at once, within so many bytes.

A signal may raise between any two steps of the calling thread. So no bytes are counted up to be counted down
later: what is held are entries of a dictionary, made before they are waited for and removed by name, and what
wakes a waiter only makes it look again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeAlias

from snaploader.remote.calls import Cancellation
from snaploader.workers import WorkerPool

Task: TypeAlias = "tuple[int, Callable[[Cancellation], None]]"
"""The bytes a task holds, and what it does."""


@dataclass(eq=False, slots=True)
class Share:
    """Bytes of a `ByteBudget` that are asked for, held, or given back."""

    size_bytes: int
    granted: bool = False
    wake: SimpleQueue[None] = field(default_factory=SimpleQueue)


class ByteBudget:
    """Hands out shares of a number of bytes, first come, first served. Thread-safe.

    A share bigger than the whole budget is granted when nothing else is out, so that one big blob
    can still go, alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._lock = threading.Lock()
        self._shares: dict[Share, None] = {}
        """Those granted, and behind them those that wait, in the order in which they came."""

    def acquire(self, share: Share) -> None:
        """Wait for a share. Whoever asked for one, had it or not, must `release` it in bounded time."""
        with self._lock:
            self._shares[share] = None
        while True:
            with self._lock:
                self._grant()
                if share.granted:
                    return
            share.wake.get()

    def release(self, share: Share) -> None:
        """Give a share back, or ask for it no more. May be called again."""
        with self._lock:
            self._shares.pop(share, None)
            self._grant()

    @property
    def used_bytes(self) -> int:
        """The bytes that are granted now."""
        return sum(share.size_bytes for share in list(self._shares) if share.granted)

    def _grant(self) -> None:
        used = self.used_bytes
        for share in self._shares:
            if not share.granted:
                if used and used + share.size_bytes > self._total:
                    return
                share.wake.put(None)  # first: who is woken grants itself what an interrupt left undone
                share.granted = True
                used += share.size_bytes


def run_all(tasks: Iterable[Task], pool: WorkerPool, budget: ByteBudget, parent: Cancellation) -> None:
    """Run tasks, taken one by one as threads are free. The first error calls off the rest and is raised.

    Returns or raises after every task that began has ended; but an interrupt is raised at once, as a server
    that does not answer may keep the other threads for a while.
    """
    cancellation = parent.child()
    latest: dict[int, Share] = {}  # by thread, as each works on one task at a time

    def work(task: Task) -> None:
        size_bytes, call = task
        share = latest[threading.get_ident()] = Share(size_bytes)
        try:
            budget.acquire(share)
            cancellation.check()
            call(cancellation)
        finally:
            budget.release(share)

    try:
        pool.for_each(work, tasks, on_failure=cancellation.cancel, waits_when_interrupted=False)
    finally:
        # An interrupt may have kept this thread from giving its share back.
        if share := latest.get(threading.get_ident()):
            budget.release(share)
    cancellation.check()
