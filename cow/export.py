"""Stores and files: whole files in and out of a store, holes kept, and a store as a file of Python."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cow.chunks import (
    BASE,
    BASE_ORIGIN,
    HOLE,
    HOLE_ORIGIN,
    LAZY,
    OWN_FILE,
    StoreState,
    chunk_count,
    chunk_length,
)
from cow.errors import OutOfBounds
from cow.fileio import (
    BaseFile,
    Copier,
    chunk_extents,
    clone_range,
    file_name,
    is_zero,
    read_all,
    replaced_file,
    write_all,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cow.store import COWStore

_PREFETCH_BYTES = 16 << 20


def adopt_file(state: StoreState, base: BaseFile) -> None:
    """Make a new store, which nobody else uses yet, show the content of a file by reading it there."""
    chunks = [index for index, _ in chunk_extents(base.fd, state.size, state.chunk_size)]
    state.chunks.kind[chunks] = BASE
    state.chunks.unsaved[chunks] = True
    state.base = base


def copy_file(state: StoreState, base: BaseFile) -> None:
    """Copy the chunks of a file into private files of a new store, which nobody else uses yet.

    Chunks of only zeros become holes. On a file system with reflinks the extents are shared, not copied.
    """
    buffer = memoryview(bytearray(state.chunk_size))
    clone = True
    for index, ranges in chunk_extents(base.fd, state.size, state.chunk_size):
        offset = index * state.chunk_size
        parts = [(start, buffer[start - offset : end - offset]) for start, end in ranges]
        for start, part in parts:
            read_all(base.fd, part, start, str(base))
        if all(is_zero(part) for _, part in parts):
            continue
        length = state.length(index)
        fd = state.files.create(file_name(index, 0), length)
        state.chunks.adopt(index)
        try:
            # A range that ends inside a block can only be cloned at the end of both files, which is so here.
            clone = clone and clone_range(base.fd, offset, length, fd, 0)
            if not clone:
                for start, part in parts:
                    write_all(fd, part, start - offset)
        finally:
            os.close(fd)


def export(state: StoreState, path: str | os.PathLike[str], *, durable: bool) -> None:
    """Write the store to `path` through a temporary file beside it."""
    with replaced_file(os.path.abspath(os.fspath(path)), durable=durable) as target:
        size = state.size
        os.ftruncate(target, size)
        copier = Copier()
        kinds = state.chunks.kind[: chunk_count(size, state.chunk_size)].copy()
        state.count_origins(kinds == HOLE, HOLE_ORIGIN)
        if state.base is not None:
            is_base = kinds == BASE
            # Each run of neighbours at once.
            edges = np.flatnonzero(np.diff(is_base, prepend=False, append=False)) * state.chunk_size
            for start, end in edges.reshape(-1, 2).tolist():
                length = min(end, size) - start
                copier.copy_sparse(state.base.fd, start, length, target, start, str(state.base))
            state.count_origins(is_base, BASE_ORIGIN)
        for index in _with_prefetch(state, np.flatnonzero((kinds != HOLE) & (kinds != BASE))):
            _export_chunk(state, index, target, size, copier)


def _with_prefetch(state: StoreState, present: npt.NDArray[np.int64]) -> Iterator[int]:
    """The chunks in order, naming those that come next to the source, a window ahead."""
    batch = max(1, _PREFETCH_BYTES // state.chunk_size)
    for position, index in enumerate(present.tolist()):
        if position % batch == 0:
            window = present[position + batch if position else 0 : position + 2 * batch]
            lazy = window[state.chunks.kind[window] == LAZY].tolist()
            if lazy:
                state.prefetch(lazy)
        yield index


def _export_chunk(state: StoreState, index: int, target: int, size: int, copier: Copier) -> None:
    """Copy a chunk that the source or a file of its own has, or had when the export began."""
    what = state.describe(index)
    with state.locks.hold(index):
        kind = state.chunks.kind_of[index]
        if kind == HOLE:
            return
        fd = state.files.open(state.name(index)) if kind in OWN_FILE else -1
    if fd < 0:
        fd = state.open_lazy(index).fd
    try:
        length = chunk_length(index, size, state.chunk_size)
        copier.copy_sparse(fd, 0, length, target, index * state.chunk_size, what)
    finally:
        os.close(fd)


class StoreFile(io.RawIOBase):
    """An unbuffered binary file over a store: seekable, readable, writable.

    Reads end at the end of the store; a write that would pass it is OutOfBounds (`truncate` grows the
    store first). Closing it leaves the store open. Not thread-safe: it has a position.
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
