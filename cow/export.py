"""Whole files in and out of a store, holes kept."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cow.chunks import BASE, BASE_ORIGIN, HOLE, HOLE_ORIGIN, LAZY, chunk_count, chunk_length
from cow.fileio import Copier, chunk_extents, clone_range, is_zero, read_all, replaced_file, write_all
from cow.state import BaseFile, StoreState, file_name

_PREFETCH_BYTES = 16 << 20


def adopt_file(state: StoreState, base: BaseFile) -> None:
    """Make a new store, which nobody else uses yet, show the content of a file by reading it there."""
    chunks = [index for index, _ in chunk_extents(base.fd, state.size, state.chunk_size)]
    state.chunks.kind[chunks] = BASE
    state.chunks.saved[chunks] = False


def copy_file(state: StoreState, base: BaseFile) -> None:
    """Copy the chunks of a file into private files of a new store, which nobody else uses yet.

    Chunks of only zeros become holes. On a file system with reflinks the extents are shared, not copied.
    """
    buffer = memoryview(bytearray(state.chunk_size))
    what = f"the file {base.path!r}"
    clone = True
    for index, ranges in chunk_extents(base.fd, state.size, state.chunk_size):
        offset = index * state.chunk_size
        parts = [(start, buffer[start - offset : end - offset]) for start, end in ranges]
        for start, part in parts:
            read_all(base.fd, part, start, what)
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
        state.count_first_reads(kinds == HOLE, HOLE_ORIGIN)
        if state.base is not None:
            _export_base(state, state.base, kinds == BASE, target, size, copier)
        for index in _with_prefetch(state, np.flatnonzero((kinds != HOLE) & (kinds != BASE))):
            _export_chunk(state, index, target, size, copier)


def _export_base(
    state: StoreState, base: BaseFile, mask: npt.NDArray[np.bool_], target: int, size: int, copier: Copier
) -> None:
    """Copy the chunks in `mask` from the original file, each run of neighbours at once."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)) * state.chunk_size
    for start, end in edges.reshape(-1, 2).tolist():
        length = min(end, size) - start
        copier.copy_sparse(base.fd, start, length, target, start, f"the file {base.path!r}")
    state.count_first_reads(mask, BASE_ORIGIN)


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
        fd = state.files.open(state.name(index)) if state.has_file(kind) else -1
    if fd < 0:
        fd = state.open_lazy(index).fd
    try:
        length = chunk_length(index, size, state.chunk_size)
        copier.copy_sparse(fd, 0, length, target, index * state.chunk_size, what)
    finally:
        os.close(fd)
