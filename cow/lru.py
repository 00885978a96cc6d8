"""A bounded cache of resources that may be in use: what is pinned stays, the rest goes oldest first."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

V = TypeVar("V")
Key = tuple[int, int]
"""(group, member): a group's members are dropped together."""
_NOTHING: Final = ()


class Entry(Generic[V]):
    """A resource in the cache. `pins` counts its users; everything but `value` is the cache's own."""

    __slots__ = ("group", "key", "pins", "value", "weight")

    def __init__(self, group: int, key: Key | None, value: V, weight: int) -> None:
        self.group = group
        self.key = key
        """None once it was discarded: it goes away with its last pin."""
        self.value = value
        self.weight = weight
        self.pins = 1


class PinnedLRU(Generic[V]):
    """Entries by key, bounded in number and weight, least recently used first out. Thread-safe.

    A pinned entry is never disposed of, so both bounds may be exceeded by what is pinned. `dispose` runs
    without the lock, once per entry, soon after it became surplus.
    """

    def __init__(self, max_weight: int, max_entries: int, dispose: Callable[[V], None]) -> None:
        self.max_weight = max_weight
        self.max_entries = max_entries
        self._dispose = dispose
        self._lock = threading.Lock()
        self._entries: dict[Key, Entry[V]] = {}
        self._idle: OrderedDict[Key, Entry[V]] = OrderedDict()
        self._weight = 0
        self._count = 0
        self._group_weight: dict[int, int] = {}
        self._late: deque[Entry[V]] = deque()

    @property
    def weight(self) -> int:
        """Weight of everything held, pinned or not, discarded entries in use included."""
        self._drain()
        return self._weight

    @property
    def count(self) -> int:
        """Number of entries held, as for `weight`."""
        self._drain()
        return self._count

    def group_weight(self, group: int) -> int:
        """The part of `weight` that belongs to one group."""
        self._drain()
        return self._group_weight.get(group, 0)

    def pin(self, key: Key) -> Entry[V] | None:
        """The entry at `key`, pinned, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                if not entry.pins:
                    del self._idle[key]
                entry.pins += 1
        return entry

    def add(self, group: int, key: Key | None, value: V, weight: int) -> Entry[V]:
        """Take over a resource; returns its entry, pinned. It replaces what was at `key`.

        Without a key nobody else can pin it: it is counted, and goes away with its last pin.
        """
        entry = Entry(group, key, value, weight)
        with self._lock:
            surplus = [] if key is None else self._forget(key)
            if key is not None:
                self._entries[key] = entry
            self._weight += weight
            self._count += 1
            self._group_weight[group] = self._group_weight.get(group, 0) + weight
            surplus += self._surplus()
        self._finish(surplus)
        return entry

    def pin_more(self, entry: Entry[V], pins: int) -> None:
        """Add pins, for others, to an entry that the caller has pinned."""
        with self._lock:
            entry.pins += pins

    def unpin(self, entry: Entry[V]) -> None:
        """Undo one pin."""
        with self._lock:
            surplus = self._unpin(entry)
        if surplus or self._late:
            self._finish(surplus)

    def unpin_from_finalizer(self, entry: Entry[V]) -> None:
        """Undo one pin, from a `__del__`: those may run inside any of these methods, in the same thread."""
        self._late.append(entry)
        self._drain()

    def discard(self, key: Key) -> None:
        """Forget `key`. Its resource is disposed of now, or with its last pin."""
        with self._lock:
            surplus = self._forget(key)
        self._finish(surplus)

    def discard_group(self, group: int) -> None:
        """Forget all keys of a group."""
        with self._lock:
            surplus = [
                gone for key in [k for k in self._entries if k[0] == group] for gone in self._forget(key)
            ]
        self._finish(surplus)

    def trim(self) -> None:
        """Dispose of everything that is not pinned."""
        with self._lock:
            surplus = [gone for key in list(self._idle) for gone in self._forget(key)]
        self._finish(surplus)

    def _forget(self, key: Key) -> list[Entry[V]]:
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        entry.key = None
        if entry.pins:
            return []
        del self._idle[key]
        self._subtract(entry)
        return [entry]

    def _unpin(self, entry: Entry[V]) -> Sequence[Entry[V]]:
        entry.pins -= 1
        if entry.pins:
            return _NOTHING
        if entry.key is None:
            self._subtract(entry)
            return [entry]
        self._idle[entry.key] = entry
        if self._weight <= self.max_weight and self._count <= self.max_entries:
            return _NOTHING
        return self._surplus()

    def _surplus(self) -> list[Entry[V]]:
        surplus: list[Entry[V]] = []
        while self._idle and (self._weight > self.max_weight or self._count > self.max_entries):
            surplus += self._forget(next(iter(self._idle)))
        return surplus

    def _subtract(self, entry: Entry[V]) -> None:
        self._weight -= entry.weight
        self._count -= 1
        left = self._group_weight[entry.group] - entry.weight
        if left:
            self._group_weight[entry.group] = left
        else:
            del self._group_weight[entry.group]

    def _finish(self, surplus: Sequence[Entry[V]]) -> None:
        for entry in surplus:
            self._dispose(entry.value)
        if self._late:
            self._drain()

    def _drain(self) -> None:
        # Whoever holds the lock looks here again after letting go of it, so a failed attempt loses nothing.
        while self._late and self._lock.acquire(blocking=False):
            surplus: list[Entry[V]] = []
            try:
                while self._late:
                    surplus += self._unpin(self._late.popleft())
            finally:
                self._lock.release()
            for entry in surplus:
                self._dispose(entry.value)
