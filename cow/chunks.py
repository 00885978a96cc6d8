"""What the parts of a store share: where its chunks lie and come from, what each is, the counts, the locks.

Sizes and offsets are in bytes. Locks are taken in this order, and never the other way round:

    resize or sync lock → checkpoint's gate → store's gate → chunk lock → those in budget, flights, counters

A chunk source is asked with nothing held but the place in the gate as a reader.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, SupportsIndex, TypeVar, cast

import numpy as np
import numpy.typing as npt

from cow.errors import OutOfBounds, StoreClosed
from cow.fileio import PAGE_SIZE, BaseFile, PrivateFiles, file_name, read_all
from cow.mapping import CachePart, MappingBudget
from cow.sync import ChunkLocks, Gate

if TYPE_CHECKING:
    from cow.store import Checkpoint

_log = logging.getLogger(__name__)

DEFAULT_CHUNK_SIZE = 512 * 1024
"""A compromise between fetches per byte touched (small) and the cost of a file per chunk (large)."""

MAX_CHUNK_SIZE = 64 * 1024 * 1024
MAX_CHUNKS = 1 << 24
"""Keeps the per-chunk tables of a store, about 10 bytes a chunk, within reason: 8 TiB at the default."""
MAX_STORE_SIZE = 1 << 44
"""16 TiB, the largest ext4 file; keeps the table of dirty pages within 4 GiB of address space."""


def check_geometry(size: int, chunk_size: int) -> tuple[int, int]:
    """Both as plain ints. ValueError unless a store can have them."""
    size, chunk_size = operator.index(size), operator.index(chunk_size)
    if chunk_size < PAGE_SIZE or chunk_size > MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"chunk_size {chunk_size} must be a power of two "
            f"from {PAGE_SIZE} (the page size) to {MAX_CHUNK_SIZE}"
        )
    if not 0 <= size <= MAX_STORE_SIZE or chunk_count(size, chunk_size) > MAX_CHUNKS:
        raise ValueError(
            f"a store of {size} bytes in chunks of {chunk_size} is out of range: "
            f"at most {MAX_STORE_SIZE} bytes and {MAX_CHUNKS} chunks"
        )
    return size, chunk_size


def check_range(offset: SupportsIndex, length: SupportsIndex, size: int) -> tuple[int, int]:
    """The range as plain ints. OutOfBounds unless it lies within `size` bytes."""
    offset = operator.index(offset)
    length = operator.index(length)
    if offset < 0 or length < 0 or offset + length > size:
        raise OutOfBounds(f"{length} bytes at offset {offset} are not inside the store of {size} bytes")
    return offset, length


def check_index(index: SupportsIndex, count: int) -> int:
    """The index as a plain int. OutOfBounds unless it is one of `count` chunks."""
    index = operator.index(index)
    if not 0 <= index < count:
        raise OutOfBounds(f"chunk {index} is not one of {count} chunks, which are counted from 0")
    return index


def chunk_count(size: int, chunk_size: int) -> int:
    """How many chunks hold `size` bytes."""
    return -(-size // chunk_size)


def chunk_length(index: int, size: int, chunk_size: int) -> int:
    """Length of chunk `index`: less than the chunk size for a short last one."""
    return min(chunk_size, size - index * chunk_size)


def page_count(length: int) -> int:
    """How many pages hold `length` bytes."""
    return -(-length // PAGE_SIZE)


def pieces(offset: int, length: int, chunk_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at the chunk borders: index of the chunk, offset in it, offset in the range, and length."""
    position = 0
    while position < length:
        index, start = divmod(offset + position, chunk_size)
        part = min(chunk_size - start, length - position)
        yield index, start, position, part
        position += part


def chunk_mask(chunks: Iterable[int] | npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """A mask of `count` chunks, from indices or from such a mask."""
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


class OpenedChunk(NamedTuple):
    """An open file that holds one chunk, and where it came from."""

    fd: int
    """Read-only file descriptor; the chunk lies at its start. The receiver owns it and closes it."""
    origin: str
    """Where the bytes came from, such as "file_cache" or "remote"; the key under which they are counted."""
    prefetched: bool = False
    """Whether they were there because of an earlier `prefetch`."""


class ChunkSource(Protocol):
    """Serves the chunks of one file, by index. Thread-safe.

    The file behind a descriptor is immutable, as long as the chunk (or, for the last chunk of a
    store, as long as its part inside the store), and verified: a store shows its bytes unchecked.

    A source may have a method `wait(flight)`, too. A reader calls it instead of `cow.Flight.wait` while
    another one has the chunk that it wants opened; what it raises ends the wait.
    """

    def open_chunk(self, index: int) -> OpenedChunk:
        """Open chunk `index`, fetching it first if need be. Blocks.

        May be called again for the same chunk, after the store let go of its mapping; bytes that
        were fetched once should then be near. Whatever is raised reaches the reader unchanged.
        """

    def prefetch(self, indices: Sequence[int]) -> None:
        """A hint, most wanted first: these will likely be opened soon. Returns at once, never raises."""


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
OWN_FILE: Final = (PRIVATE, FROZEN)


class ChunkStates:
    """The state of each chunk, in flat numpy tables: about 10 bytes a chunk, none for what is never written.

    Single elements are set under the GIL without a lock; the arrays themselves are replaced only in the
    exclusive section of the store's gate, which keeps writers out.
    """

    def __init__(self, size: int, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.kind: npt.NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.epoch: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)
        """Checkpoint epoch in which the file was made; with the index it names the file."""
        nothing: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.unsaved = nothing
        """The content is not known to the source."""
        self.written = nothing
        """Modified since the last checkpoint began."""
        self.unsynced = nothing
        """Modified since the last sync."""
        self.touched = nothing
        """Has been read, and its origin counted, or written."""
        self.pages = nothing
        """Pages modified since the last checkpoint began; chunks begin at page borders."""
        self.grow(size)

    def _bind(self) -> None:
        # Single elements, as plain ints and bools: a memoryview hands them out faster than numpy does.
        self.kind_of = self.kind.data
        self._written = self.written.data
        self.touched_of = self.touched.data
        self._pages = self.pages.data

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
            self.unsaved[index] = True

    def grow(self, size: int) -> None:
        """Make room for a bigger store; what is new is a hole."""
        count = chunk_count(size, self.chunk_size)
        self.kind = _grown(self.kind, count)
        self.epoch = _grown(self.epoch, count)
        self.unsaved = _grown(self.unsaved, count)
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


def _grown(array: npt.NDArray[S], count: int) -> npt.NDArray[S]:
    bigger = np.zeros(count, array.dtype)
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
    """Where what was read came from: "hole", "local_file" or what the source says. Not for chunks that were
    written before they were read, nor those that `from_file` copied."""
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


class StoreState:
    """The shared state of a store. What may change says when."""

    def __init__(self, files: PrivateFiles, size: int, chunk_size: int, budget: MappingBudget) -> None:
        self.files = files
        self.size = size
        """Grows, in the gate's exclusive section."""
        self.chunk_size = chunk_size
        self.mappings = CachePart(budget._maps)
        """Mapped chunks. What is found here is the chunk's content now, or was when the reader began."""
        self.descriptors = CachePart(budget._files)
        """Private files that are open for writing. A checkpoint lets go of them all."""
        self.source: ChunkSource | None = None
        """Replaced, in the gate's exclusive section, by one that serves the same bytes."""
        self.base: BaseFile | None = None
        """Set before the store is used."""
        self.chunks = ChunkStates(size, chunk_size)
        self.epoch = 0
        """Number of checkpoints begun; names the files made since."""
        self.checkpoint: Checkpoint | None = None
        """The open one. Changes in the gate's exclusive section."""
        self.superseded: list[str] = []
        """Private files that only the open checkpoint needs, and which are removed when it ends."""
        self.gate = Gate(lambda: StoreClosed(f"the store in {files.folder!r} is closed"))
        self.locks = ChunkLocks()
        self.resize_lock = threading.Lock()
        self.sync_lock = threading.Lock()
        self.tables_lock = threading.Lock()
        """Held where several tables must be seen together, and to set `touched`, which readers do."""
        self._counts_lock = threading.Lock()
        self._counts = {"hole_reads": 0, "copies_on_write": 0, "copied_bytes": 0, "source_opens": 0}
        self._origins: dict[str, OriginStatistics] = {}

    def length(self, index: int) -> int:
        return chunk_length(index, self.size, self.chunk_size)

    def name(self, index: int) -> str:
        """Name of a chunk's own file."""
        return file_name(index, int(self.chunks.epoch[index]))

    def describe(self, index: int) -> str:
        """A chunk, for messages."""
        return f"chunk {index} of the store in {self.files.folder!r}"

    def prefetch(self, indices: list[int]) -> None:
        """Tell the source what will be read soon."""
        assert self.source is not None
        try:
            self.source.prefetch(indices)
        except Exception:  # noqa: BLE001  (hints are optional, whatever goes wrong with them)
            _log.exception("a chunk source failed to take a hint; reading goes on without")

    def open_lazy(self, index: int) -> OpenedChunk:
        """Open a chunk that is in the source, and count it; the caller closes the descriptor."""
        assert self.source is not None
        opened = self.source.open_chunk(index)
        self.count(source_opens=1)
        self.count_origin(index, opened.origin, opened.prefetched)
        return opened

    def read_base(self, index: int, start: int, target: memoryview) -> None:
        """Fill `target` from a chunk that is in the original file."""
        assert self.base is not None
        read_all(self.base.fd, target, index * self.chunk_size + start, str(self.base))

    def drop_file(self, name: str, kind: int) -> None:
        """Remove the file of a chunk that was in state `kind` and has another now, once nobody needs it."""
        if kind == FROZEN and self.checkpoint is not None:
            self.superseded.append(name)
        elif kind in OWN_FILE:
            self.files.remove([name])

    def dirty(self) -> npt.NDArray[np.bool_]:
        """Which chunks were modified since the last commit."""
        with self.tables_lock:
            dirty = self.chunks.written.copy()
            if self.checkpoint is not None:
                dirty[: len(self.checkpoint.written)] |= self.checkpoint.written
        return dirty

    def count(self, **amounts: int) -> None:
        """Add to counts, by their names in StoreStatistics."""
        with self._counts_lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def count_origin(self, index: int, origin: str, prefetched: bool = False) -> None:
        """Count where a chunk came from, the first time it is read."""
        if self.chunks.touched_of[index]:
            return
        with self.tables_lock:
            if self.chunks.touched_of[index]:
                return
            self.chunks.touched[index] = True
        self._add_origin(origin, OriginStatistics(1, self.length(index), int(prefetched)))

    def count_origins(self, mask: npt.NDArray[np.bool_], origin: str) -> None:
        """Do as `count_origin` does for many chunks, all of one origin."""
        with self.tables_lock:
            fresh = mask & ~self.chunks.touched[: len(mask)]
            self.chunks.touched[: len(mask)] |= fresh
        if fresh.any():
            self._add_origin(origin, OriginStatistics(int(fresh.sum()), self._masked_bytes(fresh)))

    def _add_origin(self, origin: str, new: OriginStatistics) -> None:
        with self._counts_lock:
            old = self._origins.get(origin, OriginStatistics())
            self._origins[origin] = OriginStatistics(
                old.chunks + new.chunks, old.bytes + new.bytes, old.prefetched + new.prefetched
            )

    def statistics(self, prefetch_issued: int, prefetch_used: int) -> StoreStatistics:
        """All counts, with those of the readahead, which it is given."""
        kinds = self.chunks.kind
        masks = {
            "hole": kinds == HOLE,
            "lazy": kinds == LAZY,
            "base": kinds == BASE,
            "private": np.isin(kinds, OWN_FILE),
            "dirty": self.dirty(),
        }
        counts = {f"{name}_chunks": int(mask.sum()) for name, mask in masks.items()}
        lengths = {f"{name}_bytes": self._masked_bytes(mask) for name, mask in masks.items()}
        with self._counts_lock:
            return StoreStatistics(
                size=self.size,
                chunk_size=self.chunk_size,
                chunk_count=len(kinds),
                **counts,
                **lengths,
                **self._counts,
                origins=MappingProxyType(dict(self._origins)),
                mapped_bytes=self.mappings.weight,
                prefetch_issued=prefetch_issued,
                prefetch_used=prefetch_used,
            )

    def _masked_bytes(self, mask: npt.NDArray[np.bool_]) -> int:
        """Total length of the chunks in a mask of the first ones, or all."""
        total = int(mask.sum()) * self.chunk_size
        if len(mask) and mask[-1]:
            total -= self.chunk_size - self.length(len(mask) - 1)
        return total

    def close(self) -> None:
        """Remove the private files, and let go of everything. The gate is closed."""
        self.mappings.clear()
        self.descriptors.clear()
        own = np.flatnonzero(np.isin(self.chunks.kind, OWN_FILE))
        try:
            self.files.remove([*map(self.name, own.tolist()), *self.superseded])
        finally:
            self.files.close()
            if self.base is not None:
                self.base.close_descriptor()
