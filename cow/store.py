"""The copy-on-write store, and a moment of it to save while it is written on."""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
import numpy.typing as npt

from cow.chunks import (
    BASE,
    DEFAULT_CHUNK_SIZE,
    FROZEN,
    HOLE,
    LAZY,
    OWN_FILE,
    ChunkSource,
    StoreState,
    StoreStatistics,
    check_geometry,
    check_index,
    chunk_count,
    chunk_length,
    chunk_mask,
    page_count,
)
from cow.errors import CheckpointConflict, OutOfBounds, StoreClosed
from cow.fileio import PAGE_SIZE, BaseFile, PrivateFiles, file_name, read_all
from cow.mapping import MappingBudget, default_budget
from cow.reader import DEFAULT_READAHEAD, ChunkReader, ReadaheadOptions
from cow.sync import Gate
from cow.writer import ChunkWriter

if TYPE_CHECKING:
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
        size, chunk_size = check_geometry(size, chunk_size)
        lazy = chunk_mask(chunks, chunk_count(size, chunk_size))
        if source is None and lazy.any():
            raise ValueError("chunks were given but no source to get them from")
        files = PrivateFiles(data_dir)
        self._state = StoreState(files, size, chunk_size, budget or default_budget())
        self._state.source = source
        self._state.chunks.kind[lazy] = LAZY
        self._reader = ChunkReader(self._state, readahead)
        self._writer = ChunkWriter(self._state, self._reader)
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
        with ExitStack() as undo:
            base = BaseFile(path)
            undo.callback(base.close_descriptor)
            size = os.fstat(base.fd).st_size
            store = cls(data_dir, size=size, chunk_size=chunk_size, budget=budget, readahead=None)
            undo.push(store)
            (store._writer.copy_file if copy else store._writer.adopt_file)(base)
            undo.pop_all()
        if copy:
            base.close_descriptor()
        return store

    @property
    def size(self) -> int:
        """Bytes in the store."""
        return self._state.size

    @property
    def chunk_size(self) -> int:
        """Bytes in every chunk but a short last one."""
        return self._state.chunk_size

    @property
    def chunk_count(self) -> int:
        """Number of chunks, a short last one included."""
        return chunk_count(self._state.size, self._state.chunk_size)

    @property
    def data_dir(self) -> str:
        """Absolute path of the folder with the private files."""
        return self._state.files.folder

    @property
    def source(self) -> ChunkSource | None:
        """Where lazy chunks come from: given at creation, or by the last committed checkpoint."""
        return self._state.source

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._state.gate.closed

    @property
    def dirty_chunks(self) -> npt.NDArray[np.int64]:
        """Sorted indices of the chunks modified since the store was opened or a checkpoint last committed."""
        with self._state.gate.reading():
            return np.flatnonzero(self._state.dirty())

    def dirty_pages(self, index: int) -> npt.NDArray[np.bool_]:
        """Which pages (of `cow.PAGE_SIZE` bytes) of a chunk were modified, since when as `dirty_chunks`."""
        state = self._state
        with state.gate.reading(), state.tables_lock:
            index = check_index(index, self.chunk_count)
            first = index * state.chunk_size // PAGE_SIZE
            count = page_count(state.length(index))
            pages = state.chunks.pages[first : first + count].copy()
            if state.checkpoint is not None:
                earlier = state.checkpoint.pages[first : first + count]
                pages[: len(earlier)] |= earlier
        return pages

    def is_hole(self, index: int) -> bool:
        """Whether a chunk is a hole: zeros without a file."""
        with self._state.gate.reading():
            return self._state.chunks.kind_of[check_index(index, self.chunk_count)] == HOLE

    def read_at(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`. OutOfBounds unless all are inside the store."""
        gate = self._state.gate
        gate.enter_read()
        try:
            return self._reader.read(offset, size)
        finally:
            gate.leave_read()

    def readinto_at(self, offset: int, buffer: Buffer) -> int:
        """Fill a writable contiguous buffer from `offset`, as `read_at` would; returns its length."""
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("readinto_at needs a writable buffer")
        view = view.cast("B") if view.nbytes else memoryview(bytearray())
        gate = self._state.gate
        gate.enter_read()
        try:
            self._reader.readinto(offset, view)
        finally:
            gate.leave_read()
        return len(view)

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A read-only array of the bytes at `offset`: zero-copy when they lie in one chunk, else a copy.

        A zero-copy array keeps its chunk mapped, beyond the budget and beyond `close`, until it and all
        arrays made from it are gone. Later writes to the chunk may show in it, until a checkpoint freezes
        the chunk; from then on it never changes. Copy what must not change before.
        """
        with self._state.gate.reading():
            return self._reader.view(offset, size)

    def write_at(self, offset: int, data: Buffer) -> int:
        """Write all of `data`, any contiguous buffer, at `offset`; returns its length in bytes.

        A chunk written in part is copied first, fetched if it is lazy; a chunk covered whole is not. Writing
        zeros to a hole modifies nothing. OutOfBounds, and nothing written, unless all is inside the store.
        When the operating system refuses (a full disk), chunks before the one that failed are written, and
        that one keeps its content; if it was private already, a first part of the range may be written.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        self._writer.write(offset, view)
        return len(view)

    def resize(self, size: int) -> None:
        """Grow the store to `size` bytes; what is new is a hole.

        ValueError for a smaller size, or one out of range. A short last chunk with data becomes private and
        dirty, and is fetched if it is lazy.
        """
        size = operator.index(size)
        with self._state.gate.reading():
            self._writer.grow(size)

    def sync(self) -> None:
        """Make everything written before the call durable (fsync of the private files and their folder)."""
        state = self._state
        # One at a time: what another one has begun to flush is not durable yet, and may fail.
        with state.gate.reading(), state.sync_lock:
            failed: OSError | None = None
            for index in np.flatnonzero(state.chunks.unsynced).tolist():
                try:
                    self._sync_chunk(index)
                except OSError as error:
                    failed = failed or error
            if failed is not None:
                raise failed
            os.fsync(state.files.fd)

    def checkpoint(self) -> Checkpoint:
        """Freeze the whole store at one moment. CheckpointConflict while another checkpoint is open.

        Waits for writes in progress, holds back new ones for that moment, and does no I/O.
        """
        state = self._state
        with state.gate.reading(), state.gate.exclusive():
            if state.checkpoint is not None:
                raise CheckpointConflict("the store has an open checkpoint: commit or release it first")
            return Checkpoint(state)

    def export(self, path: str | os.PathLike[str], *, durable: bool = False) -> None:
        """Write the whole store to a file, through a temporary one beside it; holes stay holes.

        Replaces `path`. Maps nothing; asks the source for lazy chunks in batches ahead. Writes that go on
        meanwhile may or may not be in the file. `durable` waits until it is on disk.
        """
        with self._state.gate.reading():
            self._reader.export(path, durable=durable)

    def open(self) -> io.RawIOBase:
        """The store as an unbuffered file, positioned at its start. Closing it leaves the store open."""
        self._state.gate.check()
        return StoreFile(self)

    def statistics(self) -> StoreStatistics:
        """Counts at this moment. The cost is one pass over a byte per chunk."""
        with self._state.gate.reading():
            used, issued = self._reader.planner.used, self._reader.planner.issued
            return self._state.statistics(issued, used)

    def __reduce__(self) -> NoReturn:
        # A copy by attributes would close the descriptors of this one.
        raise TypeError("a COWStore cannot be pickled or copied: its private files are its own")

    def close(self) -> None:
        """Wait for operations in progress, then remove the private files and let go of everything.

        Idempotent. Arrays returned by `view` stay valid. An open checkpoint ends. Everything else raises
        StoreClosed from now on. In a forked child it does nothing: the files are the parent's.
        """
        state = self._state
        if state.files.inherited:
            return
        state.gate.close()
        with state.resize_lock:
            if self._released:
                return
            self._released = True
        state.close()

    def __enter__(self) -> Self:
        self._state.gate.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes"
        return f"<COWStore {self._state.files.folder!r}, {state}>"

    def _sync_chunk(self, index: int) -> None:
        state = self._state
        with state.locks.hold(index):
            fd = state.files.open(state.name(index)) if state.chunks.kind_of[index] in OWN_FILE else -1
            # Before the flush, because whoever writes meanwhile marks the chunk again.
            state.chunks.unsynced[index] = False
        if fd < 0:
            return
        try:
            os.fsync(fd)
        except BaseException:
            state.chunks.unsynced[index] = True
            raise
        finally:
            os.close(fd)


class Checkpoint:
    """All bytes of a store as they were at one moment; made by `COWStore.checkpoint`. Thread-safe.

    Nothing that is written to the store later shows here: chunks with files of their own are frozen, and the
    next write to one copies it first. End it with `commit` or `release`; leaving the `with` block without a
    commit releases it. CheckpointConflict when it is used after its end, StoreClosed after the store's.
    """

    def __init__(self, state: StoreState) -> None:
        """Called in the exclusive section of the store's gate."""
        self._state = state
        self._gate = Gate(self._ended)
        with state.tables_lock:
            self._source = state.source
            self.chunks: npt.NDArray[np.int64] = np.flatnonzero(state.chunks.unsaved)
            """Sorted indices of the chunks to save, whose content is not known to the source: those modified
            since the last commit, and those of a converted file until the first one. Holes may be among them.
            Read-only."""
            # Added to the store's own tables while the checkpoint is open, and for good when it is released.
            self.written, self.pages = state.chunks.begin_epoch()
            self._kind = state.chunks.kind.copy()
            self._epoch = state.chunks.epoch.copy()
            state.epoch += 1
            state.checkpoint = self
        state.descriptors.clear()
        self.chunks.flags.writeable = False
        self.size = state.size
        """Size of the store at the checkpoint, in bytes."""
        self.chunk_size = state.chunk_size
        self.chunk_count = len(self._kind)
        """Number of chunks, the short last one included."""

    def chunk_length(self, index: int) -> int:
        """Length of a chunk in bytes."""
        self._check(index)
        return chunk_length(index, self.size, self.chunk_size)

    def is_hole(self, index: int) -> bool:
        """Whether a chunk is a hole."""
        self._check(index)
        return bool(self._kind[index] == HOLE)

    def path(self, index: int) -> str | None:
        """Path of the file that holds exactly this chunk; None for one without a file of its own.

        The file never changes again and exists until the checkpoint ends, so it may be linked into a cache.
        """
        self._check(index)
        if self._kind[index] != FROZEN:
            return None
        return self._state.files.path(self._name(index))

    def readinto(self, index: int, buffer: Buffer) -> int:
        """Read a whole chunk into the start of `buffer`; returns its length.

        Reads files without mapping them. A chunk that is still in the source is opened from there; what the
        source raises comes through. ValueError when the buffer is too small.
        """
        length = self.chunk_length(index)
        target = memoryview(buffer).cast("B")[:length]
        if len(target) < length:
            raise ValueError(f"a buffer of {len(target)} bytes is too small for a chunk of {length}")
        state, kind = self._state, self._kind[index]
        with self._gate.reading(), state.gate.reading():
            if kind == HOLE:
                np.frombuffer(target, np.uint8).fill(0)
            elif kind == BASE:
                state.read_base(index, 0, target)
            else:
                what = state.describe(index)
                if kind == FROZEN:
                    fd, what = state.files.open(self._name(index)), f"the file of {what}"
                else:
                    assert self._source is not None
                    fd = self._source.open_chunk(index).fd
                try:
                    read_all(fd, target, 0, what)
                finally:
                    os.close(fd)
        return length

    def commit(self, source: ChunkSource | None = None) -> None:
        """End the checkpoint: everything it holds is saved now.

        Its chunks are clean from here on, unless they were written since. `source`, when given, becomes the
        store's source for the chunks it does not have itself, in one step for all readers; it serves the same
        bytes as the old one, on which calls may still be in flight. The store keeps the chunks it has.
        """
        state = self._state
        with self._ending():
            state.chunks.unsaved[: self.chunk_count] &= state.chunks.written[: self.chunk_count]
            if source is not None:
                state.source = source

    def release(self) -> None:
        """End the checkpoint: nothing counts as saved. Idempotent, also after a commit.

        In a forked child it does nothing: what it keeps is its parent's.
        """
        state = self._state
        if state.checkpoint is not self or state.files.inherited:
            return
        try:
            with self._ending():
                state.chunks.written[: len(self.written)] |= self.written
                state.chunks.pages[: len(self.pages)] |= self.pages
        except StoreClosed:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        state = self._state
        with state.gate.reading():
            self._gate.close()
            with state.gate.exclusive():
                if state.checkpoint is not self:
                    raise self._ended()
                with state.tables_lock:
                    yield
                    state.checkpoint = None
                superseded, state.superseded = state.superseded, []
            state.files.remove(superseded)

    @staticmethod
    def _ended() -> CheckpointConflict:
        return CheckpointConflict("the checkpoint was committed or released: make a new one")

    def _check(self, index: int) -> None:
        self._gate.check()
        self._state.gate.check()
        check_index(index, self.chunk_count)

    def _name(self, index: int) -> str:
        return file_name(index, int(self._epoch[index]))


class StoreFile(io.RawIOBase):
    """An unbuffered binary file over a store. Not thread-safe: it has a position.

    Reads end at the end of the store; a write that would pass it is OutOfBounds (`truncate` grows it first).
    """

    def __init__(self, store: COWStore) -> None:
        super().__init__()
        self._store = store
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._store.size}[whence]
        if start + offset < 0:
            raise OutOfBounds(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        self._check()
        target = memoryview(buffer).cast("B")
        length = max(0, min(len(target), self._store.size - self._position))
        if length:
            self._store.readinto_at(self._position, target[:length])
        self._position += length
        return length

    def write(self, data: Buffer, /) -> int:
        self._check()
        done = self._store.write_at(self._position, data)
        self._position += done
        return done

    def truncate(self, size: int | None = None, /) -> int:
        self._check()
        size = self._position if size is None else size
        self._store.resize(size)
        return size

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed file")
