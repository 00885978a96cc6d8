"""The copy-on-write store."""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from cow.budget import MappingBudget, default_budget
from cow.checkpoint import Checkpoint
from cow.core import BaseFile, StoreCore
from cow.errors import CheckpointConflict, OutOfBounds
from cow.files import PrivateFiles
from cow.geometry import (
    DEFAULT_CHUNK_SIZE,
    PAGE_SIZE,
    check_chunk_size,
    check_store_size,
    chunk_count,
    page_count,
)
from cow.rawio import StoreFile
from cow.readahead import DEFAULT_READAHEAD, ReadaheadOptions
from cow.reader import ChunkReader
from cow.source import ChunkSource
from cow.states import BASE, FROZEN, HOLE, LAZY, PRIVATE
from cow.statistics import StoreStatistics
from cow.transfer import convert, data_chunks, export
from cow.writer import ChunkWriter

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer


class COWStore:
    """A big file as chunks that are read where they are and copied when they are written.

    A chunk is a hole (zeros, no file), lazy (in the source, opened at its first use), in the original file
    (`from_file` without a copy), or private (in a file of its own in `data_dir`).

    Thread-safe. Reads of different chunks never wait for each other. A read that overlaps a write in
    progress sees old or new bytes, or some of both; once `write_at` has returned, every read sees the new
    ones. A store belongs to the process that made it: do not use it in a forked child.

    Args:
        data_dir: Scratch folder for the chunks that are written; made if absent, and owned by the store:
            `close` removes what is in it. StoreInUse when it holds files of another store.
        size: Bytes in the store.
        chunk_size: Bytes per chunk, a power of two from the page size to 64 MiB. The last may be short.
        chunks: Chunks that exist in `source`, as indices or a numpy bool mask. All others are holes.
        source: Where these chunks come from.
        budget: Bounds mapped memory and open files; the process's `default_budget()` unless given.
        readahead: When to ask the source for chunks ahead of a reader; None never does.

    Raises:
        ValueError: A size, a chunk size, or chunks without a source. OutOfBounds for a chunk past the end.
        OSError: From the operating system, here and in all methods.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        *,
        size: int,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        chunks: Iterable[int] | npt.NDArray[np.bool_] = (),
        source: ChunkSource | None = None,
        budget: MappingBudget | None = None,
        readahead: ReadaheadOptions | None = DEFAULT_READAHEAD,
    ) -> None:
        chunk_size = check_chunk_size(chunk_size)
        size = check_store_size(size, chunk_size)
        lazy = _as_mask(chunks, chunk_count(size, chunk_size))
        if source is None and lazy.any():
            raise ValueError("chunks were given but no source to get them from")
        core = StoreCore(
            PrivateFiles(data_dir),
            size=size,
            chunk_size=chunk_size,
            budget=budget or default_budget(),
            source=source,
        )
        core.states.kind[lazy] = LAZY
        self._init(core, readahead)

    def _init(self, core: StoreCore, readahead: ReadaheadOptions | None) -> None:
        self._core = core
        self._reader = ChunkReader(core, readahead)
        self._writer = ChunkWriter(core, self._reader)
        self._released = False

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        data_dir: str | os.PathLike[str],
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        *,
        copy: bool = True,
        budget: MappingBudget | None = None,
    ) -> Self:
        """A store with the content of a file; its holes, and with `copy` all zero chunks too, stay holes.

        With `copy` the chunks are copied to `data_dir` (shared, where the file system has reflinks), and
        the file is not needed afterwards. Without, they are read from the file, through one descriptor, when
        they are needed; the file must not change while the store is open, and is not written to.

        Nothing of it counts as dirty, and all of it as not saved: see `Checkpoint.chunks`.
        """
        chunk_size = check_chunk_size(chunk_size)
        base = BaseFile(path)
        try:
            size = check_store_size(os.fstat(base.fd).st_size, chunk_size)
            core = StoreCore(
                PrivateFiles(data_dir),
                size=size,
                chunk_size=chunk_size,
                budget=budget or default_budget(),
                base=None if copy else base,
            )
            store = cls.__new__(cls)
            store._init(core, None)
            try:
                if not copy:
                    chunks = data_chunks(base, size, chunk_size)
                    core.states.kind[chunks] = BASE
                    core.states.saved[chunks] = False
                    return store
                convert(core, base)
            except BaseException:
                store.close()
                raise
        except BaseException:
            base.close()
            raise
        base.close()
        return store

    @property
    def size(self) -> int:
        """Bytes in the store."""
        return self._core.size

    @property
    def chunk_size(self) -> int:
        """Bytes in every chunk but a short last one."""
        return self._core.chunk_size

    @property
    def chunk_count(self) -> int:
        """Number of chunks, a short last one included."""
        return chunk_count(self._core.size, self._core.chunk_size)

    @property
    def data_dir(self) -> str:
        """Absolute path of the folder with the private files."""
        return self._core.files.folder

    @property
    def source(self) -> ChunkSource | None:
        """Where lazy chunks come from: given at creation, or by the last committed checkpoint."""
        with self._core.tables_lock:
            return self._core.source

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.gate.closed

    @property
    def dirty_chunks(self) -> npt.NDArray[np.int64]:
        """Sorted indices of the chunks modified since the store was opened or a checkpoint last committed.

        Writing zeros to a hole modifies nothing.
        """
        with self._core.gate.reading():
            return np.flatnonzero(self._dirty())

    def dirty_pages(self, index: int) -> npt.NDArray[np.bool_]:
        """Which pages (of `cow.PAGE_SIZE` bytes) of a chunk were modified, since when as `dirty_chunks`."""
        core = self._core
        with core.gate.reading(), core.tables_lock:
            index = self._check_index(index)
            first = index * core.chunk_size // PAGE_SIZE
            count = page_count(core.length(index))
            pages = core.states.pages[first : first + count].copy()
            if core.checkpoint is not None:
                earlier = core.checkpoint.pages[first : first + count]
                pages[: len(earlier)] |= earlier
        return pages

    def chunk_length(self, index: int) -> int:
        """Length of a chunk in bytes."""
        return self._core.length(self._check_index(index))

    def is_hole(self, index: int) -> bool:
        """Whether a chunk is a hole: zeros without a file."""
        with self._core.gate.reading():
            return bool(self._core.states.kind[self._check_index(index)] == HOLE)

    def read_at(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`. OutOfBounds unless all are inside the store."""
        gate = self._core.gate
        gate.enter_read()
        try:
            return self._reader.read(offset, size)
        finally:
            gate.leave_read()

    def readinto_at(self, offset: int, buffer: Buffer) -> int:
        """Fill a writable contiguous buffer from `offset`; returns its length.

        OutOfBounds, and nothing filled, unless all is inside the store.
        """
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("readinto_at needs a writable buffer")
        target = np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.empty(0, np.uint8)
        with self._core.gate.reading():
            self._reader.readinto(offset, target)
        return len(target)

    def read_chunk(self, index: int) -> bytes:
        """The bytes of a whole chunk."""
        index = self._check_index(index)
        return self.read_at(index * self._core.chunk_size, self._core.length(index))

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A read-only array of the bytes at `offset`: zero-copy when they lie in one chunk, else a copy.

        A zero-copy array keeps its chunk mapped, beyond the budget and beyond `close`, until it and all
        arrays made from it are gone. Later writes to the chunk may show in it, until a checkpoint freezes
        the chunk; from then on it never changes. Copy what must not change before.
        """
        with self._core.gate.reading():
            return self._reader.view(offset, size)

    def write_at(self, offset: int, data: Buffer) -> int:
        """Write all of `data`, any contiguous buffer, at `offset`; returns its length in bytes.

        A chunk written in part is copied first, fetched if it is lazy; a chunk covered whole is not.
        OutOfBounds, and nothing written, unless all is inside the store. When the operating system refuses
        (a full disk), chunks before the one that failed are written, and that one keeps its content; if it
        was private already, a first part of the range may be written.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        gate = self._core.gate
        gate.enter_read()
        try:
            self._writer.write(offset, view)
        finally:
            gate.leave_read()
        return len(view)

    def resize(self, size: int) -> None:
        """Grow the store to `size` bytes; what is new is a hole.

        ValueError for a smaller size, or one out of range. A short last chunk with data becomes private and
        dirty, because it gets longer; if it is lazy it is fetched.
        """
        size = operator.index(size)
        with self._core.gate.reading():
            self._writer.grow(size)

    def sync(self) -> None:
        """Make everything written before the call durable (fsync of the private files and their folder)."""
        core = self._core
        with core.gate.reading():
            failed: OSError | None = None
            for index in np.flatnonzero(core.states.unsynced).tolist():
                core.states.unsynced[index] = False
                try:
                    self._sync_chunk(index)
                except OSError as error:
                    core.states.unsynced[index] = True
                    failed = failed or error
            if failed is not None:
                raise failed
            core.files.sync_folder()

    def checkpoint(self) -> Checkpoint:
        """Freeze the whole store at one moment, to save it while it is written on.

        Waits for writes in progress, holds back new ones for that moment, and does no I/O.
        CheckpointConflict while another checkpoint is open.
        """
        core = self._core
        with core.gate.reading(), core.gate.exclusive():
            if core.checkpoint is not None:
                raise CheckpointConflict("the store has an open checkpoint: commit or release it first")
            return Checkpoint(core, self._writer)

    def export(self, path: str | os.PathLike[str], *, durable: bool = False) -> None:
        """Write the whole store to a file, through a temporary one beside it; holes stay holes.

        Replaces `path`. Maps nothing; asks the source for lazy chunks in batches ahead. Writes that go on
        meanwhile may or may not be in the file. `durable` waits until it is on disk.
        """
        with self._core.gate.reading():
            export(self._core, path, durable=durable)

    def open(self) -> io.RawIOBase:
        """The store as an unbuffered file, positioned at its start. Closing it leaves the store open."""
        self._core.gate.check()
        return StoreFile(self)

    def statistics(self) -> StoreStatistics:
        """Counts at this moment. The cost is one pass over a byte per chunk."""
        core = self._core
        with core.gate.reading():
            kinds = core.states.kind
            issued, used = self._reader.prefetch_counts()
            own = np.isin(kinds, (PRIVATE, FROZEN))
            dirty = self._dirty()
            counters = core.counters
            with counters.lock:
                return StoreStatistics(
                    size=core.size,
                    chunk_size=core.chunk_size,
                    chunk_count=len(kinds),
                    hole_chunks=int((kinds == HOLE).sum()),
                    hole_bytes=core.masked_bytes(kinds == HOLE),
                    lazy_chunks=int((kinds == LAZY).sum()),
                    lazy_bytes=core.masked_bytes(kinds == LAZY),
                    base_chunks=int((kinds == BASE).sum()),
                    base_bytes=core.masked_bytes(kinds == BASE),
                    private_chunks=int(own.sum()),
                    private_bytes=core.masked_bytes(own),
                    dirty_chunks=int(dirty.sum()),
                    dirty_bytes=core.masked_bytes(dirty),
                    origins=counters.origins(),
                    hole_reads=counters.hole_reads,
                    copies_on_write=counters.copies_on_write,
                    copied_bytes=counters.copied_bytes,
                    source_opens=counters.source_opens,
                    mapped_bytes=core.budget._maps.group_weight(core.serial),
                    prefetch_issued=issued,
                    prefetch_used=used,
                )

    def close(self) -> None:
        """Wait for operations in progress, then remove the private files and let go of everything.

        Idempotent. Arrays returned by `view` stay valid. An open checkpoint ends. Everything else raises
        StoreClosed from now on. In a forked child it does nothing: the files are the parent's.
        """
        core = self._core
        if core.files.inherited:
            return
        core.gate.close()
        with core.resize_lock:
            if self._released:
                return
            self._released = True
        core.budget._maps.discard_group(core.serial)
        core.budget._files.discard_group(core.serial)
        own = np.flatnonzero(np.isin(core.states.kind, (PRIVATE, FROZEN)))
        try:
            core.files.remove(core.name(index) for index in own.tolist())
            if core.checkpoint is not None:
                core.files.remove(core.checkpoint.superseded())
        finally:
            core.files.close()
            if core.base is not None:
                core.base.close()

    def __enter__(self) -> Self:
        self._core.gate.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes"
        return f"<COWStore {self._core.files.folder!r}, {state}>"

    def _check_index(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.chunk_count:
            raise OutOfBounds(f"chunk {index} is not in a store of {self.chunk_count} chunks")
        return index

    def _dirty(self) -> npt.NDArray[np.bool_]:
        core = self._core
        with core.tables_lock:
            dirty = core.states.written.copy()
            if core.checkpoint is not None:
                dirty[: len(core.checkpoint.written)] |= core.checkpoint.written
        return dirty

    def _sync_chunk(self, index: int) -> None:
        core = self._core
        with core.locks.hold(index):
            if not core.has_file(int(core.states.kind[index])):
                return
            fd = core.files.open(core.name(index))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _as_mask(chunks: Iterable[int] | npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
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
