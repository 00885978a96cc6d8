"""Whole files in and out of a store, holes kept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cow.core import BaseFile, StoreCore
from cow.files import file_name
from cow.geometry import chunk_count, chunk_length
from cow.sparse import Copier, chunk_extents, clone_range, read_all, write_all
from cow.states import BASE, HOLE, LAZY
from cow.statistics import BASE_ORIGIN, HOLE_ORIGIN
from cow.zero import is_zero

_PREFETCH_BYTES = 16 << 20


def data_chunks(base: BaseFile, size: int, chunk_size: int) -> list[int]:
    """The chunks of a file that have data, by its holes."""
    return [index for index, _ in chunk_extents(base.fd, size, chunk_size)]


def convert(core: StoreCore, base: BaseFile) -> None:
    """Copy the chunks of a file into private files of a store that nobody else uses yet.

    Chunks of only zeros become holes. On a file system with reflinks the extents are shared, not copied.
    """
    buffer = memoryview(bytearray(core.chunk_size))
    what = f"the file {base.path!r}"
    clone = True
    for index, ranges in chunk_extents(base.fd, core.size, core.chunk_size):
        offset = index * core.chunk_size
        parts = [(start, buffer[start - offset : end - offset]) for start, end in ranges]
        for start, part in parts:
            read_all(base.fd, part, start, what)
        if all(is_zero(part) for _, part in parts):
            continue
        length = core.length(index)
        fd = core.files.create(file_name(index, 0), length)
        core.states.adopt(index)
        try:
            # A range that ends inside a block can only be cloned at the end of both files, which is so here.
            clone = clone and clone_range(base.fd, offset, length, fd, 0)
            if not clone:
                for start, part in parts:
                    write_all(fd, [part], start - offset)
        finally:
            os.close(fd)


def export(core: StoreCore, path: str | os.PathLike[str], *, durable: bool) -> None:
    """Write the store to `path` through a temporary file beside it."""
    target = os.path.abspath(os.fspath(path))
    temporary = f"{target}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            size = core.size
            os.ftruncate(fd, size)
            _export_chunks(core, fd, size)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, target)
    except BaseException:
        if not core.files.inherited:
            os.unlink(temporary)
        raise
    if durable:
        folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _export_chunks(core: StoreCore, target: int, size: int) -> None:
    copier = Copier()
    kinds = core.states.kind[: chunk_count(size, core.chunk_size)].copy()
    core.count_first_reads(kinds == HOLE, HOLE_ORIGIN)
    if core.base is not None:
        _export_base(core, core.base, kinds == BASE, target, size, copier)
    for index in _with_prefetch(core, np.flatnonzero((kinds != HOLE) & (kinds != BASE))):
        opened = _open(core, index)
        if opened is None:
            continue
        fd, what = opened
        try:
            length = chunk_length(index, size, core.chunk_size)
            copier.copy_sparse(fd, 0, length, target, index * core.chunk_size, what)
        finally:
            os.close(fd)


def _export_base(
    core: StoreCore, base: BaseFile, mask: npt.NDArray[np.bool_], target: int, size: int, copier: Copier
) -> None:
    """Copy the chunks in `mask` from the original file, each run of neighbours at once."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)) * core.chunk_size
    for start, end in edges.reshape(-1, 2).tolist():
        length = min(end, size) - start
        copier.copy_sparse(base.fd, start, length, target, start, f"the file {base.path!r}")
    core.count_first_reads(mask, BASE_ORIGIN)


def _with_prefetch(core: StoreCore, present: npt.NDArray[np.int64]) -> Iterator[int]:
    """The chunks in order, naming those that come next to the source, a window ahead."""
    batch = max(1, _PREFETCH_BYTES // core.chunk_size)
    for position, index in enumerate(present.tolist()):
        if position % batch == 0:
            window = present[position + batch if position else 0 : position + 2 * batch]
            lazy = window[core.states.kind[window] == LAZY].tolist()
            if lazy:
                core.prefetch(lazy)
        yield index


def _open(core: StoreCore, index: int) -> tuple[int, str] | None:
    """A descriptor, to be closed, of a file with a chunk, and its name for messages; None for a hole."""
    what = core.describe(index)
    with core.locks.hold(index):
        kind = int(core.states.kind[index])
        if kind == HOLE:
            return None
        if core.has_file(kind):
            return core.files.open(core.name(index)), f"the file of {what}"
    source = core.source
    assert source is not None
    opened = source.open_chunk(index)
    core.count_open(index, opened)
    return opened.fd, what
