"""What a store has done, in numbers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

HOLE_ORIGIN = "hole"
BASE_ORIGIN = "local_file"


@dataclass(frozen=True, slots=True)
class OriginStatistics:
    """The chunks that came from one place, counted when they are read for the first time."""

    chunks: int = 0
    bytes: int = 0
    prefetched: int = 0
    """How many of `chunks` were there because they had been asked for ahead."""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A store at one moment. Counters start at zero when the store is opened."""

    size: int
    chunk_size: int
    chunk_count: int
    hole_chunks: int
    hole_bytes: int
    lazy_chunks: int
    """Still in the chunk source only, whether read or not."""
    lazy_bytes: int
    base_chunks: int
    """In the original file, for stores that did not copy it."""
    base_bytes: int
    private_chunks: int
    """In a file of the store's own."""
    private_bytes: int
    dirty_chunks: int
    """Modified since the store was opened or a checkpoint last committed."""
    dirty_bytes: int
    """Length of these chunks."""
    origins: Mapping[str, OriginStatistics]
    """Where what was read came from: "hole", "local_file" or what the source says. Chunks that were
    written before anything was read of them, and those copied by `from_file`, are in none."""
    hole_reads: int
    """Reads of a part of a hole, repeated ones too."""
    copies_on_write: int
    """Chunks copied because a part of them was written."""
    copied_bytes: int
    source_opens: int
    """Chunks asked of the source; more than once for a chunk whose mapping was dropped."""
    mapped_bytes: int
    """Mapped now, for this store."""
    prefetch_issued: int
    """Chunks named to the source ahead of time."""
    prefetch_used: int
    """How many of them were read afterwards."""


class Counters:
    """The running counts behind StoreStatistics. Thread-safe through its `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hole_reads = 0
        self.copies_on_write = 0
        self.copied_bytes = 0
        self.source_opens = 0
        self._origins: dict[str, OriginStatistics] = {}

    def count_origin(self, origin: str, length: int, prefetched: bool, chunks: int = 1) -> None:
        """Count chunks read for the first time, `length` bytes in all. The caller holds `lock`."""
        old = self._origins.get(origin, OriginStatistics())
        self._origins[origin] = OriginStatistics(
            old.chunks + chunks, old.bytes + length, old.prefetched + (1 if prefetched else 0)
        )

    def origins(self) -> Mapping[str, OriginStatistics]:
        """A copy of the counts by origin. The caller holds `lock`."""
        return MappingProxyType(dict(self._origins))

    def count_copy(self, length: int) -> None:
        """Count a copy on write."""
        with self.lock:
            self.copies_on_write += 1
            self.copied_bytes += length
