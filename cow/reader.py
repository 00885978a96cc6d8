"""The reading half of a store: mappings of chunks, made once, shared, and bounded by the budget."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cow.chunks import BASE, BASE_ORIGIN, HOLE, HOLE_ORIGIN, LAZY, check_range, pieces
from cow.fileio import read_all
from cow.mapping import FileMapping, new_bytes
from cow.readahead import ReadaheadOptions, StoreReadahead
from cow.state import StoreState
from cow.sync import SingleFlight

_RELEASE_GIL_FROM = 128 * 1024
"""Copies from this size on let other threads run meanwhile; below, that costs more than the copy."""


class ChunkReader:
    """Reads for one store. Thread-safe; the caller is in the gate."""

    def __init__(self, state: StoreState, readahead: ReadaheadOptions | None) -> None:
        self._state = state
        self._mappings = state.mappings
        self._flights: SingleFlight[int, FileMapping] = SingleFlight()
        self.readahead = StoreReadahead(readahead, state.chunk_size)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a range."""
        state = self._state
        offset, size = check_range(offset, size, state.size)
        index, start = divmod(offset, state.chunk_size)
        if size < _RELEASE_GIL_FROM and start + size <= state.chunk_size:
            mapping = self._mappings.get(index)
            if mapping is not None:
                return mapping.slice(start, size).tobytes()
            if not size:
                return b""
            kind = state.chunks.kind_of[index]
            if kind == HOLE:
                self._count_hole(index)
                return bytes(size)
            if kind == BASE:
                assert state.base is not None
                data = os.pread(state.base.fd, size, offset)
                if len(data) == size:
                    state.count_origin(index, BASE_ORIGIN)
                    return data
        result, memory = new_bytes(size)
        self._fill(offset, memory)
        return result

    def readinto(self, offset: int, target: memoryview) -> None:
        """Fill `target`, a view of bytes, from `offset`."""
        state = self._state
        offset, size = check_range(offset, len(target), state.size)
        index, start = divmod(offset, state.chunk_size)
        if size < _RELEASE_GIL_FROM and start + size <= state.chunk_size:
            mapping = self._mappings.get(index)
            if mapping is not None:
                target[:] = mapping.slice(start, size)
                return
        self._fill(offset, target)

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A read-only array of a range, without a copy when it lies in one chunk."""
        state = self._state
        offset, size = check_range(offset, size, state.size)
        index, start = divmod(offset, state.chunk_size)
        if size and start + size <= state.chunk_size:
            mapping = self.map(index)
            if mapping is not None:
                mapping.slice(start, size)
                return np.asarray(mapping)[start : start + size]
        copy = np.empty(size, np.uint8)
        if size:
            self._fill(offset, copy.data)
        copy.flags.writeable = False
        return copy

    def map(self, index: int, on_open: Callable[[int], None] | None = None) -> FileMapping | None:
        """The mapping of a chunk; None for a hole.

        `on_open` is called with a descriptor of the chunk's own file if this thread has to open that.
        Bounds must have been checked before: the store may grow, and then its last chunk is mapped anew.
        """
        state = self._state
        mapping = self._mappings.get(index)
        while mapping is None:
            kind = state.chunks.kind_of[index]
            if kind == HOLE:
                return None
            if kind == LAZY:
                return self._flights.run(
                    index, lambda: self._mappings.get(index) or self._map_lazy(index, on_open)
                )
            with state.locks.hold(index):
                mapping = self._mappings.get(index)
                kind = state.chunks.kind_of[index]
                if mapping is None and kind not in (HOLE, LAZY):
                    mapping = self._map_local(index, kind, on_open)
        return mapping

    def _fill(self, offset: int, target: memoryview) -> None:
        """Fill `target` from a range that is inside the store."""
        state = self._state
        for index, start, position, length in pieces(offset, len(target), state.chunk_size):
            part = target[position : position + length]
            if state.chunks.kind_of[index] == BASE:
                # One system call, and nothing to map: the file is open anyway.
                self._read_base(index, start, part)
            elif length < _RELEASE_GIL_FROM:
                mapping = self.map(index)
                if mapping is None:
                    self._fill_hole(index, part)
                else:
                    part[:] = mapping.slice(start, length)
            else:
                self._fill_much(index, start, part)

    def _fill_much(self, index: int, start: int, target: memoryview) -> None:
        """Fill `target` from a chunk, while other threads run.

        The first time it is read from the file, which is open then: that takes half the time of copying
        out of a mapping whose pages must be faulted in.
        """
        was_read = False

        def read(fd: int) -> None:
            nonlocal was_read
            read_all(fd, target, start, self._state.describe(index))
            was_read = True

        mapping = self.map(index, read)
        if mapping is None:
            self._fill_hole(index, target)
        elif not was_read:
            mapped = mapping.slice(start, len(target))
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(mapped, np.uint8))

    def _fill_hole(self, index: int, target: memoryview) -> None:
        self._count_hole(index)
        np.frombuffer(target, np.uint8).fill(0)

    def _read_base(self, index: int, start: int, target: memoryview) -> None:
        state = self._state
        assert state.base is not None
        read_all(state.base.fd, target, index * state.chunk_size + start, f"the file {state.base.path!r}")
        state.count_origin(index, BASE_ORIGIN)

    def _map_local(self, index: int, kind: int, on_open: Callable[[int], None] | None) -> FileMapping:
        """Map a chunk that is in a local file. The caller holds its lock."""
        state = self._state
        length = state.length(index)
        if kind == BASE:
            assert state.base is not None
            state.count_origin(index, BASE_ORIGIN)
            what = f"the file {state.base.path!r}"
            mapping = self._new_mapping(state.base.fd, index * state.chunk_size, length, what)
            return self._mappings.add(index, mapping)
        fd = state.files.open(state.name(index))
        try:
            mapping = self._new_mapping(fd, 0, length, f"the file of {state.describe(index)}")
            self._mappings.add(index, mapping)
            if on_open is not None:
                on_open(fd)
            return mapping
        finally:
            os.close(fd)

    def _map_lazy(self, index: int, on_open: Callable[[int], None] | None) -> FileMapping:
        """Open a chunk from the source, asking for those ahead first, so that both go on at the same time."""
        state = self._state
        ahead = self.readahead.plan(index, state.chunks)
        if ahead:
            state.prefetch(ahead)
        # Before the source is asked: the store may grow meanwhile, and the source has only what was there.
        length = state.length(index)
        opened = state.open_lazy(index)
        try:
            what = f"{state.describe(index)}, from its source ({opened.origin}),"
            with state.locks.hold(index):
                mapping = self._new_mapping(opened.fd, 0, length, what)
                # A write may have replaced the chunk meanwhile: then this is for those who began before.
                lazy = state.chunks.kind_of[index] == LAZY
                self._mappings.add(index, mapping, findable=lazy)
            if on_open is not None:
                on_open(opened.fd)
            return mapping
        finally:
            os.close(opened.fd)

    def _new_mapping(self, fd: int, offset: int, length: int, what: str) -> FileMapping:
        try:
            return FileMapping(fd, offset, length, what)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        # The process may map no more (RLIMIT_AS, vm.max_map_count), though the budget would allow it.
        self._mappings.make_room()
        return FileMapping(fd, offset, length, what)

    def _count_hole(self, index: int) -> None:
        with self._state.counters.lock:
            self._state.counters.hole_reads += 1
        self._state.count_origin(index, HOLE_ORIGIN)
