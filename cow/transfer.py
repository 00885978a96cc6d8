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
from cow.sparse import Copier, clone_range, data_extents, read_all, write_all
from cow.states import BASE, HOLE, LAZY, PRIVATE
from cow.statistics import BASE_ORIGIN
from cow.zero import is_zero

_PREFETCH_BYTES = 16 << 20


def mask_data(base: BaseFile, size: int, chunk_size: int) -> npt.NDArray[np.bool_]:
    """Which chunks of a file have data, by its holes."""
    mask = np.zeros(-(-size // chunk_size), np.bool_)
    for start, end in data_extents(base.fd, size):
        mask[start // chunk_size : -(-end // chunk_size)] = True
    return mask


def convert(core: StoreCore, base: BaseFile, mask: npt.NDArray[np.bool_]) -> None:
    """Copy the chunks in `mask` into private files of a store that nobody else uses yet.

    Chunks of only zeros become holes. On a file system with reflinks the extents are shared, not copied.
    """
    buffer = memoryview(bytearray(core.chunk_size))
    what = f"the file {base.path!r}"
    clone = True
    for index in np.flatnonzero(mask).tolist():
        length = chunk_length(index, core.size, core.chunk_size)
        offset = index * core.chunk_size
        read_all(base.fd, buffer[:length], offset, what)
        if is_zero(buffer[:length]):
            continue
        name = file_name(index, 0)
        fd = core.files.create(name, length)
        core.states.kind[index] = PRIVATE
        core.states.saved[index] = False
        core.states.unsynced[index] = True
        core.states.touched[index] = True
        try:
            # A range that ends inside a block can only be cloned at the end of both files, which is so here.
            clone = clone and clone_range(base.fd, offset, length, fd, 0)
            if not clone:
                for start, end in data_extents(base.fd, offset + length, offset):
                    write_all(fd, [buffer[start - offset : end - offset]], start - offset)
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
    holes = core.states.kind[: chunk_count(size, core.chunk_size)] == HOLE
    core.count_holes(holes)
    present = np.flatnonzero(~holes)
    for index in _with_prefetch(core, present):
        length = chunk_length(index, size, core.chunk_size)
        offset = index * core.chunk_size
        opened = _open(core, index)
        if opened is None:
            continue
        fd, start, owned, what = opened
        try:
            copier.copy_sparse(fd, start, length, target, offset, what)
        finally:
            if owned:
                os.close(fd)


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


def _open(core: StoreCore, index: int) -> tuple[int, int, bool, str] | None:
    """A descriptor with a chunk, the chunk's offset in it, whether to close it, and its name for messages."""
    what = core.describe(index)
    while True:
        with core.locks.hold(index):
            kind = core.states.kind[index]
            if kind == HOLE:
                return None
            if kind == BASE:
                assert core.base is not None
                core.count_origin(index, BASE_ORIGIN)
                return core.base.fd, index * core.chunk_size, False, f"the file {core.base.path!r}"
            if kind != LAZY:
                return core.files.open(core.name(index)), 0, True, f"the file of {what}"
        source = core.source
        assert source is not None
        opened = source.open_chunk(index)
        core.count_open(index, opened)
        return opened.fd, 0, True, what
