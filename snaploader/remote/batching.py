"""Which blobs travel together: pure planning, no calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from snaploader.digest import Digest
from snaploader.remote.encoding import ITEM_OVERHEAD_BYTES

T = TypeVar("T")


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
    """Slices of `count` items; the last may be shorter."""
    return (items[start : start + count] for start in range(0, len(items), count))


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """A group that was too large, as two."""
    middle = (len(items) + 1) // 2
    return items[:middle], items[middle:]


def distinct(digests: Iterable[Digest]) -> Iterator[Digest]:
    """Each digest once, in order, without the empty blob, which exists everywhere."""
    return iter(dict.fromkeys(digest for digest in digests if digest.size_bytes))


_LEAST_LIMIT_BYTES = 64 * 1024
"""Refusals of smaller batches have other reasons than size."""


class BatchLimit:
    """The size of batches, in bytes: lowered when a server refuses one that was below. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._lock = threading.Lock()
        self._limit = limit_bytes

    def __call__(self) -> int:
        """The limit as known now."""
        return self._limit

    def fits(self, size_bytes: int) -> bool:
        """Whether a blob of this size may go in a batch."""
        return size_bytes + ITEM_OVERHEAD_BYTES <= self._limit

    def refused(self, batch_bytes: int) -> None:
        """Learn from a refusal: half of what was refused is the new limit, unless it is lower already."""
        with self._lock:
            self._limit = min(self._limit, max(_LEAST_LIMIT_BYTES, batch_bytes // 2))
