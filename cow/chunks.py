"""What is known of the chunks of a store: where they lie, what state each is in, and what was done with them.

Sizes and offsets are in bytes. Nothing here does I/O.
"""

from __future__ import annotations

import mmap
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, SupportsIndex, TypeVar, cast

import numpy as np
import numpy.typing as npt

from cow.errors import OutOfBounds

PAGE_SIZE = mmap.PAGESIZE
"""Granularity of dirty pages and of mappings."""

DEFAULT_CHUNK_SIZE = 512 * 1024
"""A compromise between fetches per byte touched (small) and the cost of a file per chunk (large)."""

MAX_CHUNK_SIZE = 64 * 1024 * 1024
MAX_CHUNKS = 1 << 24
"""Keeps the per-chunk tables of a store, about 10 bytes a chunk, within reason: 8 TiB at the default."""
MAX_STORE_SIZE = 1 << 44
"""16 TiB, the largest ext4 file; keeps the table of dirty pages within 4 GiB of address space."""


def check_chunk_size(chunk_size: int) -> int:
    """`chunk_size` if it is usable, else ValueError."""
    chunk_size = operator.index(chunk_size)
    if chunk_size < PAGE_SIZE or chunk_size > MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"chunk_size {chunk_size} must be a power of two "
            f"from {PAGE_SIZE} (the page size) to {MAX_CHUNK_SIZE}"
        )
    return chunk_size


def check_store_size(size: int, chunk_size: int) -> int:
    """`size` if a store can have it, else ValueError."""
    size = operator.index(size)
    if not 0 <= size <= MAX_STORE_SIZE or chunk_count(size, chunk_size) > MAX_CHUNKS:
        raise ValueError(
            f"a store of {size} bytes in chunks of {chunk_size} is out of range: "
            f"at most {MAX_STORE_SIZE} bytes and {MAX_CHUNKS} chunks"
        )
    return size


def check_range(offset: SupportsIndex, length: SupportsIndex, size: int) -> tuple[int, int]:
    """The range as plain ints. OutOfBounds unless it lies within `size` bytes."""
    offset = operator.index(offset)
    length = operator.index(length)
    if offset < 0 or length < 0 or offset + length > size:
        raise OutOfBounds(f"{length} bytes at offset {offset} are not inside the store of {size} bytes")
    return offset, length


def chunk_count(size: int, chunk_size: int) -> int:
    """How many chunks hold `size` bytes."""
    return -(-size // chunk_size)


def chunk_length(index: int, size: int, chunk_size: int) -> int:
    """Length of chunk `index`: the chunk size, or less for the last one."""
    return min(chunk_size, size - index * chunk_size)


def page_count(length: int) -> int:
    """How many pages hold `length` bytes."""
    return -(-length // PAGE_SIZE)


def pieces(offset: int, length: int, chunk_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at the chunk borders, in order. Nothing for an empty range.

    Each piece is the index of its chunk, its offset in the chunk, its offset in the range, and its length.
    """
    position = 0
    while position < length:
        index, start = divmod(offset + position, chunk_size)
        part = min(chunk_size - start, length - position)
        yield index, start, position, part
        position += part


def chunk_mask(chunks: Iterable[int] | npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """A mask of `count` chunks, from indices or from such a mask.

    TypeError for anything else, ValueError for a mask of another length, OutOfBounds for a wrong index.
    """
    if isinstance(chunks, np.ndarray) and chunks.dtype == np.bool_:
        if chunks.shape != (count,):
            raise ValueError(f"the mask of chunks has shape {chunks.shape}, but the store has {count} chunks")
        return chunks
    if not isinstance(chunks, np.ndarray):
        chunks = np.array([operator.index(index) for index in chunks], np.int64)
    indices = cast("npt.NDArray[np.int64]", chunks)
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise TypeError(f"chunks must be integers or a bool mask, not an array of {indices.dtype}")
    mask = np.zeros(count, np.bool_)
    if len(indices):
        if indices.min() < 0 or indices.max() >= count:
            raise OutOfBounds(f"chunks must be from 0 to {count - 1}, the store's last one")
        mask[indices] = True
    return mask


HOLE: Final = 0
"""Zeros, no file."""
LAZY: Final = 1
"""In the chunk source."""
BASE: Final = 2
"""In the original file."""
PRIVATE: Final = 3
"""In a file of its own, which is written in place."""
FROZEN: Final = 4
"""In a file of its own that a checkpoint has seen: the next write makes a new one."""


class ChunkStates:
    """The state of each chunk, in flat numpy tables: about 10 bytes a chunk, nothing per chunk in Python.

    `np.zeros` gets fresh pages from the kernel, so what is never written takes no memory. Single elements are
    set under the GIL without a lock; the arrays themselves are replaced only in the exclusive section of
    the store's gate, which keeps writers out.
    """

    def __init__(self, size: int, chunk_size: int) -> None:
        count = chunk_count(size, chunk_size)
        self.chunk_size = chunk_size
        self.kind: npt.NDArray[np.uint8] = np.zeros(count, np.uint8)
        self.epoch: npt.NDArray[np.uint32] = np.zeros(count, np.uint32)
        """Checkpoint epoch in which the file was made; with the index it names the file."""
        self.saved: npt.NDArray[np.bool_] = np.ones(count, np.bool_)
        """The content is known to the source, or is a hole: nothing to save."""
        self.written: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        """Modified since the last checkpoint began."""
        self.unsynced: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        """Modified since the last sync."""
        self.touched: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        """Has been read, and its origin counted, or written."""
        self.pages: npt.NDArray[np.bool_] = np.zeros(page_count(size), np.bool_)
        """Pages modified since the last checkpoint began; chunks begin at page borders."""
        self._bind()

    def _bind(self) -> None:
        # Single elements, as plain ints and bools: a memoryview hands them out faster than numpy does.
        self.kind_of = self.kind.data
        self._written = self.written.data
        self._touched = self.touched.data
        self._pages = self.pages.data

    def __len__(self) -> int:
        return len(self.kind)

    def mark(self, index: int, start: int, end: int) -> None:
        """Note that bytes `start` to `end` of a chunk are being modified."""
        base = index * self.chunk_size
        first, last = (base + start) // PAGE_SIZE, page_count(base + end)
        if last - first == 1:
            self._pages[first] = True
        else:
            self.pages[first:last] = True
        if not self._written[index]:
            self.written[index] = True
            self.touched[index] = True
            self.saved[index] = False

    def is_touched(self, index: int) -> bool:
        """The element of `touched`."""
        return bool(self._touched[index])

    def adopt(self, index: int) -> None:
        """Note that a chunk of a converted file got its private file."""
        self.kind[index] = PRIVATE
        self.saved[index] = False
        self.unsynced[index] = True
        self.touched[index] = True

    def grow(self, size: int) -> None:
        """Make room for a bigger store; what is new is a hole."""
        count = chunk_count(size, self.chunk_size)
        self.kind = _grown(self.kind, count)
        self.epoch = _grown(self.epoch, count)
        self.saved = _grown(self.saved, count, fill=True)
        self.written = _grown(self.written, count)
        self.unsynced = _grown(self.unsynced, count)
        self.touched = _grown(self.touched, count)
        self.pages = _grown(self.pages, page_count(size))
        self._bind()

    def begin_epoch(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Freeze all private files and start new tables of modifications; returns the old two."""
        written, pages = self.written, self.pages
        self.kind[self.kind == PRIVATE] = FROZEN
        self.written = np.zeros(len(written), np.bool_)
        self.pages = np.zeros(len(pages), np.bool_)
        self._bind()
        return written, pages


S = TypeVar("S", bound=np.generic)


def _grown(array: npt.NDArray[S], count: int, *, fill: bool = False) -> npt.NDArray[S]:
    bigger = np.ones(count, array.dtype) if fill else np.zeros(count, array.dtype)
    bigger[: len(array)] = array
    return bigger


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
