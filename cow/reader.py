"""The reading half of a store: mappings of chunks, made once, shared, and bounded by the budget."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import cast

import numpy as np
import numpy.typing as npt

from cow.core import StoreCore
from cow.errors import COWError
from cow.geometry import check_range, pieces
from cow.lru import Entry, PinnedLRU
from cow.memory import Mapping, RawArray
from cow.perchunk import SingleFlight
from cow.readahead import ReadaheadOptions, ReadaheadPlanner
from cow.sparse import read_all
from cow.states import BASE, HOLE, LAZY
from cow.statistics import BASE_ORIGIN, HOLE_ORIGIN

_RELEASE_GIL_FROM = 128 * 1024
"""Copies from this size on let other threads run meanwhile; below, that costs more than the copy."""


class _PinnedArray(RawArray):
    """The owner of a view's memory: the mapping stays until the last array over it is gone."""

    __slots__ = ("_entry", "_maps")

    def __init__(self, maps: PinnedLRU[Mapping], entry: Entry[Mapping], start: int, length: int) -> None:
        super().__init__(entry.value.address + start, length)
        self._maps = maps
        self._entry = entry

    def __del__(self) -> None:
        self._maps.unpin_from_finalizer(self._entry)


class ChunkReader:
    """Reads for one store. Thread-safe; the caller is in the gate."""

    def __init__(self, core: StoreCore, readahead: ReadaheadOptions | None) -> None:
        self._core = core
        self._maps = core.budget._maps
        self._flights: SingleFlight[Entry[Mapping]] = SingleFlight(self._maps.pin_more, self._maps.unpin)
        self._planner = ReadaheadPlanner(readahead, core.chunk_size) if readahead is not None else None
        self._planner_lock = threading.Lock()
        self._lazy: npt.NDArray[np.int64] | None = None

    def prefetch_counts(self) -> tuple[int, int]:
        """Chunks asked for ahead, and how many of them were read."""
        with self._planner_lock:
            return (self._planner.issued, self._planner.used) if self._planner else (0, 0)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a range."""
        core = self._core
        offset, size = check_range(offset, size, core.size)
        if size < _RELEASE_GIL_FROM:
            index, start = divmod(offset, core.chunk_size)
            if not size:
                return b""
            if start + size <= core.chunk_size:
                return self._read_small(index, start, size)
        # Filling a new bytes object before anyone else sees it is what PyBytes_FromStringAndSize(NULL, n) is
        # for; it saves a second copy and, through calloc, the work for holes.
        result = bytes(size)
        target = cast("int", ctypes.cast(ctypes.c_char_p(result), ctypes.c_void_p).value)
        for index, start, position, length in pieces(offset, size, core.chunk_size):
            kind = core.states.kind[index]
            if kind == BASE:
                area = (ctypes.c_char * length).from_address(target + position)
                self._read_base(index, start, memoryview(area).cast("B"))
                continue
            entry = self.pin(index)
            if entry is None:
                self._count_hole(index)
                continue
            try:
                ctypes.memmove(target + position, self._address(entry, start, length), length)
            finally:
                self._maps.unpin(entry)
        return result

    def readinto(self, offset: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` from `offset`."""
        core = self._core
        offset, size = check_range(offset, len(target), core.size)
        for index, start, position, length in pieces(offset, size, core.chunk_size):
            part = target[position : position + length]
            if core.states.kind[index] == BASE:
                self._read_base(index, start, part.data)
                continue
            entry = self.pin(index)
            if entry is None:
                self._count_hole(index)
                part.fill(0)
                continue
            try:
                self._address(entry, start, length)
                np.copyto(part, entry.value.array[start : start + length])
            finally:
                self._maps.unpin(entry)

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A read-only array of a range, without a copy when it lies in one chunk."""
        core = self._core
        offset, size = check_range(offset, size, core.size)
        index, start = divmod(offset, core.chunk_size)
        if start + size > core.chunk_size:
            copy = np.empty(size, np.uint8)
            self.readinto(offset, copy)
        else:
            entry = self.pin(index) if size else None
            if entry is not None:
                try:
                    self._address(entry, start, size)
                except BaseException:
                    self._maps.unpin(entry)
                    raise
                return np.asarray(_PinnedArray(self._maps, entry, start, size))
            if size:
                self._count_hole(index)
            copy = np.zeros(size, np.uint8)
        copy.flags.writeable = False
        return copy

    def pin(self, index: int) -> Entry[Mapping] | None:
        """The mapping of a chunk, pinned; None for a hole. The caller unpins it.

        Bounds must have been checked before: the store may grow, and then its last chunk is mapped anew.
        """
        core = self._core
        key = core.key(index)
        entry = self._maps.pin(key)
        while entry is None:
            kind = core.states.kind[index]
            if kind == HOLE:
                return None
            if kind == LAZY:
                return self._flights.run(index, lambda: self._maps.pin(key) or self._map_lazy(index))
            with core.locks.hold(index):
                entry = self._maps.pin(key)
                kind = core.states.kind[index]
                if entry is None and kind not in (HOLE, LAZY):
                    entry = self._map_local(index, int(kind))
        return entry

    def unpin(self, entry: Entry[Mapping]) -> None:
        """Undo `pin`."""
        self._maps.unpin(entry)

    def _address(self, entry: Entry[Mapping], start: int, length: int) -> int:
        # Reading behind a mapping would kill the process, so a broken invariant must end here.
        if start + length > entry.value.length:
            raise COWError(
                f"internal error: {length} bytes at {start} are not in a mapping of {entry.value.length}"
            )
        return entry.value.address + start

    def _read_small(self, index: int, start: int, size: int) -> bytes:
        kind = self._core.states.kind[index]
        if kind == BASE:
            return self._read_base_bytes(index, start, size)
        entry = self.pin(index) if kind != HOLE else None
        if entry is None:
            self._count_hole(index)
            return bytes(size)
        try:
            return ctypes.string_at(self._address(entry, start, size), size)
        finally:
            self._maps.unpin(entry)

    def _read_base(self, index: int, start: int, target: memoryview) -> None:
        core = self._core
        assert core.base is not None
        read_all(core.base.fd, target, index * core.chunk_size + start, f"the file {core.base.path!r}")
        core.count_origin(index, BASE_ORIGIN)

    def _read_base_bytes(self, index: int, start: int, size: int) -> bytes:
        core = self._core
        assert core.base is not None
        data = os.pread(core.base.fd, size, index * core.chunk_size + start)
        if len(data) == size:
            core.count_origin(index, BASE_ORIGIN)
            return data
        buffer = bytearray(size)
        self._read_base(index, start, memoryview(buffer))
        return bytes(buffer)

    def _map_local(self, index: int, kind: int) -> Entry[Mapping]:
        """Map a chunk that is in a local file. The caller holds its lock."""
        core = self._core
        if kind == BASE:
            assert core.base is not None
            offset = index * core.chunk_size
            mapping = Mapping(core.base.fd, offset, core.length(index), f"the file {core.base.path!r}")
            core.count_origin(index, BASE_ORIGIN)
        else:
            fd = core.files.open(core.name(index))
            try:
                mapping = Mapping(fd, 0, core.length(index), f"the file of {core.describe(index)}")
            finally:
                os.close(fd)
        return self._maps.add(core.serial, core.key(index), mapping, mapping.mapped_bytes)

    def _map_lazy(self, index: int) -> Entry[Mapping]:
        """Open a chunk from the source, asking for those ahead first, so that both go on at the same time."""
        core = self._core
        source = core.source
        assert source is not None
        length = core.length(index)
        self._read_ahead(index)
        opened = source.open_chunk(index)
        try:
            mapping = Mapping(
                opened.fd, 0, length, f"{core.describe(index)}, from its source ({opened.origin}),"
            )
        finally:
            os.close(opened.fd)
        core.count_open(index, opened)
        with core.locks.hold(index):
            # A write may have replaced the chunk meanwhile: then this mapping is for those who began before.
            key = core.key(index) if core.states.kind[index] == LAZY else None
            return self._maps.add(core.serial, key, mapping, mapping.mapped_bytes)

    def _read_ahead(self, index: int) -> None:
        states = self._core.states
        if self._planner is None or states.touched[index]:
            return
        with self._planner_lock:
            if self._lazy is None:
                self._lazy = np.flatnonzero(states.kind == LAZY)
            lazy = self._lazy
            position = int(np.searchsorted(lazy, index))
            if position == len(lazy) or lazy[position] != index:
                return

            def skip(other: int) -> bool:
                return bool(states.touched[lazy[other]]) or states.kind[lazy[other]] != LAZY

            plan = self._planner.touched(position, len(lazy), skip)
        if plan:
            self._core.prefetch([int(lazy[position]) for position in plan])

    def _count_hole(self, index: int) -> None:
        with self._core.counters.lock:
            self._core.counters.hole_reads += 1
        self._core.count_origin(index, HOLE_ORIGIN)
