"""A point in time of a store, to save from while the store is written on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cow.chunks import BASE, FROZEN, HOLE, chunk_length
from cow.errors import CheckpointConflict, OutOfBounds, StoreClosed, TruncatedFile
from cow.fileio import read_all
from cow.source import ChunkSource
from cow.state import StoreState, file_name
from cow.sync import Gate

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer


class Checkpoint:
    """All bytes of a store as they were at one moment; made by `COWStore.checkpoint`.

    Nothing that is written to the store later shows here: chunks with files of their own are frozen, and the
    next write to one copies it first. Thread-safe. End it with `commit` or `release`; leaving the `with`
    block without a commit releases it. CheckpointConflict when it is used after its end, StoreClosed
    when the store was closed.
    """

    def __init__(self, state: StoreState) -> None:
        """Called in the exclusive section of the store's gate."""
        self._state = state
        self._gate = Gate(self._ended)
        self._superseded: list[str] = []
        with state.tables_lock:
            self._source = state.source
            self._chunks = np.flatnonzero(~state.chunks.saved)
            # Added to the store's own tables while the checkpoint is open, and for good when it is released.
            self.written, self.pages = state.chunks.begin_epoch()
            self._kind = state.chunks.kind.copy()
            self._epoch = state.chunks.epoch.copy()
            state.epoch += 1
            state.checkpoint = self
        state.descriptors.clear()
        self._chunks.flags.writeable = False
        self.size = state.size
        """Size of the store at the checkpoint, in bytes."""
        self.chunk_size = state.chunk_size

    @property
    def chunks(self) -> npt.NDArray[np.int64]:
        """Sorted indices of the chunks to save: their content is not known to the source.

        They are those modified since the last commit, and those of a converted file until the first one.
        Holes may be among them. Read-only.
        """
        return self._chunks

    @property
    def chunk_count(self) -> int:
        """Number of chunks, the short last one included."""
        return len(self._kind)

    def chunk_length(self, index: int) -> int:
        """Length of a chunk in bytes."""
        self._check(index)
        return chunk_length(index, self.size, self.chunk_size)

    def is_hole(self, index: int) -> bool:
        """Whether a chunk is a hole: all zeros, without a file."""
        self._check(index)
        return bool(self._kind[index] == HOLE)

    def path(self, index: int) -> str | None:
        """Path of the file that holds exactly this chunk, or None when it has none of its own.

        The file never changes again and exists until the checkpoint ends, so it may be hard-linked into a
        cache. None for holes, for chunks in the source and in the original file.
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
        target = memoryview(buffer).cast("B")
        if len(target) < length:
            raise ValueError(f"a buffer of {len(target)} bytes is too small for a chunk of {length}")
        with self._reading():
            self._read(index, target[:length])
        return length

    def commit(self, source: ChunkSource | None = None) -> None:
        """End the checkpoint: everything it holds is saved now.

        Its chunks are clean from here on, unless they were written since. `source`, when given, becomes the
        store's source for the chunks it does not have itself, in one step for all readers; it serves the same
        bytes as the old one, on which calls may still be in flight. The store keeps the chunks it has.
        """
        state = self._state
        with self._ending():
            count = len(self._kind)
            state.chunks.saved[:count] |= ~state.chunks.written[:count]
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def keep_until_end(self, name: str) -> None:
        """Remove a private file of the store, of which this checkpoint may need the content, when it ends."""
        self._superseded.append(name)

    def superseded(self) -> list[str]:
        """The files kept by `keep_until_end`, for the store to remove when it closes."""
        return list(self._superseded)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._gate.reading(), self._state.gate.reading():
            yield

    @contextmanager
    def _ending(self) -> Iterator[None]:
        state = self._state
        with state.gate.reading():
            if state.checkpoint is not self:
                raise self._ended()
            self._gate.close()
            with state.gate.exclusive():
                if state.checkpoint is not self:
                    raise self._ended()
                with state.tables_lock:
                    yield
                    state.checkpoint = None
            state.files.remove(self._superseded)

    @staticmethod
    def _ended() -> CheckpointConflict:
        return CheckpointConflict("the checkpoint was committed or released: make a new one")

    def _check(self, index: int) -> None:
        self._gate.check()
        self._state.gate.check()
        if not 0 <= index < len(self._kind):
            raise OutOfBounds(f"chunk {index} is not in a checkpoint of {len(self._kind)} chunks")

    def _name(self, index: int) -> str:
        return file_name(index, int(self._epoch[index]))

    def _read(self, index: int, target: memoryview) -> None:
        state = self._state
        kind = self._kind[index]
        what = state.describe(index)
        if kind == HOLE:
            np.frombuffer(target, np.uint8).fill(0)
        elif kind == BASE:
            assert state.base is not None
            read_all(state.base.fd, target, index * self.chunk_size, f"the file {state.base.path!r}")
        else:
            if kind == FROZEN:
                fd, what = state.files.open(self._name(index)), f"the file of {what}"
            else:
                assert self._source is not None
                fd = self._source.open_chunk(index).fd
            try:
                if os.fstat(fd).st_size < len(target):
                    raise TruncatedFile(f"{what} has fewer than {len(target)} bytes")
                read_all(fd, target, 0, what)
            finally:
                os.close(fd)
