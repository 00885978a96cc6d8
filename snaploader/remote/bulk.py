"""Many transfers at once: which blobs travel together, and within how many bytes.

A signal may raise between any two steps of the calling thread. So no bytes are counted up to be counted down
later: what is held are entries of a dictionary, made before they are waited for and removed by name, and what
wakes a waiter only makes it look again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

from snaploader.digest import Digest
from snaploader.remote.codec import ITEM_OVERHEAD_BYTES
from snaploader.remote.retry import Cancellation
from snaploader.workers import WorkerPool

T = TypeVar("T")

Task: TypeAlias = "tuple[int, Callable[[Cancellation], None]]"
"""The bytes a task holds, and what it does."""

_LEAST_LIMIT_BYTES = 64 * 1024
"""Refusals of smaller batches have other reasons than size."""


def batches(
    items: Iterable[T], size_of: Callable[[T], int], limit_bytes: Callable[[], int], max_items: int
) -> Iterator[list[T]]:
    """Group items, in order, into messages of at most so many bytes and items.

    An item above the limit comes alone. Lazy: takes from `items` only what the next group needs.

    Args:
        size_of: An item's content, without overhead.
        limit_bytes: Asked again for every group, since servers teach us lower limits.
    """
    group: list[T] = []
    group_bytes = 0
    for item in items:
        cost = size_of(item) + ITEM_OVERHEAD_BYTES
        if group and (group_bytes + cost > limit_bytes() or len(group) >= max_items):
            yield group
            group, group_bytes = [], 0
        group.append(item)
        group_bytes += cost
    if group:
        yield group


def chunked(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    """Cut items into slices of `count`; the last may be shorter."""
    return (items[start : start + count] for start in range(0, len(items), count))


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Cut a group that was too large in two."""
    middle = (len(items) + 1) // 2
    return items[:middle], items[middle:]


def distinct(digests: Iterable[Digest]) -> Iterator[Digest]:
    """Give each digest once, in order, without the empty blob, which exists everywhere."""
    return iter(dict.fromkeys(digest for digest in digests if digest.size_bytes))


class BatchLimit:
    """The size of batches, in bytes: lowered when a server refuses one that was below. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._lock = threading.Lock()
        self._limit = limit_bytes

    def __call__(self) -> int:
        """Return the limit as known now."""
        return self._limit

    def fits(self, size_bytes: int) -> bool:
        """Tell whether a blob of this size may go in a batch."""
        return size_bytes + ITEM_OVERHEAD_BYTES <= self._limit

    def refused(self, batch_bytes: int) -> None:
        """Learn from a refusal: half of what was refused is the new limit, unless it is lower already."""
        with self._lock:
            self._limit = min(self._limit, max(_LEAST_LIMIT_BYTES, batch_bytes // 2))


class Share:
    """Bytes of a `ByteBudget` that are asked for, held, or given back."""

    __slots__ = ("granted", "size_bytes", "wake")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.granted = False
        self.wake: SimpleQueue[None] = SimpleQueue()


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
        with self._lock:
            return self._used()

    def _used(self) -> int:
        return sum(share.size_bytes for share in self._shares if share.granted)

    def _grant(self) -> None:
        used = self._used()
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
    latest: dict[int, Share] = {}
    """By thread, as each works on one task at a time."""

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
