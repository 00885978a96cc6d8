"""The reading half of a store: what to ask a source for, and mappings of chunks, made once and shared."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    check_range,
    chunk_length,
    pieces,
)
from cow.fileio import copy_sparse, read_all, replaced_file
from cow.mapping import FileMapping, new_bytes
from cow.sync import SingleFlight

_RELEASE_GIL_FROM = 128 * 1024
"""Copies from this size on let other threads run meanwhile; below, that costs more than the copy."""
_PREFETCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ReadaheadOptions:
    """How eagerly a store asks its source for chunks ahead of the reader.

    Reading in steps of one to `max_stride` chunks, forwards or backwards, starts it after `streak` equal
    steps. The window doubles from `min_chunks` up to `max_bytes`. When fewer than `poor_ratio` of the
    chunks asked for are read, it pauses for `pause` chunks, longer each time in a row.
    """

    max_bytes: int = 16 * 1024 * 1024
    min_chunks: int = 2
    streak: int = 2
    max_stride: int = 8
    poor_ratio: float = 0.4
    pause: int = 64

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or self.pause < 0 or not 0 <= self.poor_ratio <= 1:
            raise ValueError("max_bytes and pause must not be negative, poor_ratio must be within 0 and 1")
        if self.min_chunks < 1 or self.streak < 1 or self.max_stride < 1:
            raise ValueError("min_chunks, streak and max_stride must be at least 1")


DEFAULT_READAHEAD = ReadaheadOptions()
_JUDGED = 16
_MAX_PAUSES = 16


class ReadaheadPlanner:
    """Follows one reader through positions 0, 1, 2, … and plans what to ask for. Not thread-safe."""

    def __init__(self, options: ReadaheadOptions, chunk_size: int) -> None:
        self._options = options
        self.max_window = options.max_bytes // chunk_size
        self._window = 0
        self._last: int | None = None
        self._stride = 0
        self._streak = 0
        self._clock = 0
        self._asked: OrderedDict[int, int] = OrderedDict()
        """Positions asked for and not read yet, with the time they were asked for."""
        self._used = 0
        self._wasted = 0
        self._pauses = 0
        self._resume_at = 0
        self.issued = 0
        """How many positions were planned."""
        self.used = 0
        """How many of them were read afterwards."""

    def touched(self, position: int, count: int, skip: Callable[[int], bool]) -> list[int]:
        """Note the first read of one of `count` positions; returns what to ask for now, nearest first."""
        self._clock += 1
        hit = self._asked.pop(position, None) is not None
        if hit:
            self.used += 1
            self._used += 1
        self._follow(position, hit)
        self._judge()
        if self._streak < self._options.streak or self._clock < self._resume_at:
            return []
        return self._plan(position, count, skip)

    def _follow(self, position: int, hit: bool) -> None:
        step = 0 if self._last is None else position - self._last
        if step and step == self._stride:
            self._streak += 1
        elif hit:
            # Several readers share a sequence: what was asked for may be read out of order.
            if (position - (self._last or 0)) * self._stride < 0:
                return
        else:
            near = 0 < abs(step) <= self._options.max_stride
            self._stride = step if near else 0
            self._streak = 1 if near else 0
            self._window = 0
        self._last = position

    def _judge(self) -> None:
        patience = 4 * self.max_window
        while self._asked:
            position, asked_at = next(iter(self._asked.items()))
            if self._clock - asked_at <= patience and len(self._asked) <= patience:
                break
            del self._asked[position]
            self._wasted += 1
        if self._used + self._wasted < _JUDGED:
            return
        if self._used < self._options.poor_ratio * (self._used + self._wasted):
            self._pauses = min(max(2 * self._pauses, 1), _MAX_PAUSES)
            self._resume_at = self._clock + self._pauses * self._options.pause
            self._window = 0
            self._asked.clear()
        else:
            self._pauses = 0
        self._used = self._wasted = 0

    def _plan(self, position: int, count: int, skip: Callable[[int], bool]) -> list[int]:
        # The window grows when half of it is used up, so that requests go out in batches, not one by one.
        ahead = sum(1 for asked in self._asked if (asked - position) * self._stride > 0)
        if 0 < self._window < 2 * ahead:
            return []
        self._window = min(max(2 * self._window, self._options.min_chunks), self.max_window)
        plan: list[int] = []
        for step in range(1, self._window + 1):
            candidate = position + step * self._stride
            if not 0 <= candidate < count:
                break
            if candidate not in self._asked and not skip(candidate):
                plan.append(candidate)
                self._asked[candidate] = self._clock
        self.issued += len(plan)
        return plan


class ChunkReader:
    """Reads for one store. Thread-safe; the caller is in the gate."""

    def __init__(self, state: StoreState, readahead: ReadaheadOptions | None) -> None:
        self._state = state
        self._mappings = state.mappings
        self._flights: SingleFlight[int, FileMapping] = SingleFlight()
        self.planner = ReadaheadPlanner(readahead or ReadaheadOptions(max_bytes=0), state.chunk_size)
        """Its positions are those among the chunks that were lazy at the first read, so a hole between two of
        them does not break a sequence."""
        self._planner_lock = threading.Lock()
        self._lazy: npt.NDArray[np.int64] | None = None

    def read(self, offset: int, size: int) -> bytes:
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
        state = self._state
        offset, size = check_range(offset, size, state.size)
        index, start = divmod(offset, state.chunk_size)
        if size and start + size <= state.chunk_size and (mapping := self.map(index)):
            mapping.slice(start, size)
            return np.asarray(mapping)[start : start + size]
        copy = np.empty(size, np.uint8)
        if size:
            self._fill(offset, copy.data)
        copy.flags.writeable = False
        return copy

    def map(self, index: int, on_open: Callable[[int], None] | None = None) -> FileMapping | None:
        """The mapping of a chunk, which is inside the store; None for a hole.

        `on_open` is called with a descriptor of the chunk's own file if this thread has to open that.
        """
        state = self._state
        mapping = self._mappings.get(index)
        while mapping is None:
            kind = state.chunks.kind_of[index]
            if kind == HOLE:
                return None
            if kind == LAZY:
                return self._flights.run(
                    index,
                    lambda: self._mappings.get(index) or self._map_lazy(index, on_open),
                    getattr(state.source, "wait", None),
                )
            with state.locks.hold(index):
                mapping = self._mappings.get(index) or self._map_local(index, on_open)
        return mapping

    def export(self, path: str | os.PathLike[str], *, durable: bool) -> None:
        """Write the whole store to `path` through a temporary file beside it. Maps nothing."""
        state = self._state
        with replaced_file(os.path.abspath(os.fspath(path)), durable=durable) as target:
            with state.tables_lock:
                size, kinds = state.size, state.chunks.kind.copy()
            os.ftruncate(target, size)
            state.count_origins(kinds == HOLE, HOLE_ORIGIN)
            if state.base is not None:
                is_base = kinds == BASE
                # Each run of neighbours at once.
                edges = np.flatnonzero(np.diff(is_base, prepend=False, append=False)) * state.chunk_size
                for start, end in edges.reshape(-1, 2).tolist():
                    length = min(end, size) - start
                    copy_sparse(state.base.fd, start, length, target, start, str(state.base))
                state.count_origins(is_base, BASE_ORIGIN)
            for index in self._with_prefetch(np.flatnonzero((kinds != HOLE) & (kinds != BASE))):
                self._export_chunk(index, target, size)

    def _with_prefetch(self, present: npt.NDArray[np.int64]) -> Iterator[int]:
        """The chunks in order, naming those that come next to the source, a window ahead."""
        batch = max(1, _PREFETCH_BYTES // self._state.chunk_size)
        for position, index in enumerate(present.tolist()):
            if position % batch == 0:
                window = present[position + batch if position else 0 : position + 2 * batch]
                lazy = window[self._state.chunks.kind[window] == LAZY].tolist()
                if lazy:
                    self._state.prefetch(lazy)
            yield index

    def _export_chunk(self, index: int, target: int, size: int) -> None:
        """Copy a chunk that the source or a file of its own has, or had when the export began."""
        state = self._state
        with state.locks.hold(index):
            kind = state.chunks.kind_of[index]
            if kind == HOLE:
                return
            fd = state.files.open(state.name(index)) if kind in OWN_FILE else -1
        if fd < 0:
            fd = state.open_lazy(index).fd
        try:
            length = chunk_length(index, size, state.chunk_size)
            copy_sparse(fd, 0, length, target, index * state.chunk_size, state.describe(index))
        finally:
            os.close(fd)

    def _fill(self, offset: int, target: memoryview) -> None:
        """Fill `target` from a range that is inside the store."""
        state = self._state
        for index, start, position, length in pieces(offset, len(target), state.chunk_size):
            part = target[position : position + length]
            if state.chunks.kind_of[index] == BASE:
                # One system call, and nothing to map: the file is open anyway.
                state.read_base(index, start, part)
                state.count_origin(index, BASE_ORIGIN)
            elif length < _RELEASE_GIL_FROM:
                mapping = self.map(index)
                if mapping is None:
                    self._fill_hole(index, part)
                else:
                    part[:] = mapping.slice(start, length)
            else:
                self._fill_much(index, start, part)

    def _fill_much(self, index: int, start: int, target: memoryview) -> None:
        """Fill `target` from a chunk, while other threads run."""
        # The first time it is read from the file, which is open then: that takes half the time of copying
        # out of a mapping whose pages must be faulted in.
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

    def _map_local(self, index: int, on_open: Callable[[int], None] | None) -> FileMapping | None:
        """Map a chunk if it is in a local file. The caller holds its lock."""
        state = self._state
        length = state.length(index)
        kind = state.chunks.kind_of[index]
        if kind in (HOLE, LAZY):
            return None
        if kind == BASE:
            assert state.base is not None
            state.count_origin(index, BASE_ORIGIN)
            mapping = self._new_mapping(state.base.fd, index * state.chunk_size, length, str(state.base))
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
        if ahead := self._plan(index):
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

    def _plan(self, index: int) -> list[int]:
        """What to ask for now that a lazy chunk is about to be opened, nearest first."""
        chunks = self._state.chunks
        if not self.planner.max_window or chunks.touched_of[index]:
            return []
        with self._planner_lock:
            if self._lazy is None:
                self._lazy = np.flatnonzero(chunks.kind == LAZY)
            lazy = self._lazy
            position = int(np.searchsorted(lazy, index))
            if position == len(lazy) or lazy[position] != index:
                return []

            def skip(other: int) -> bool:
                return bool(chunks.touched[lazy[other]]) or chunks.kind[lazy[other]] != LAZY

            plan = self.planner.touched(position, len(lazy), skip)
        return [int(lazy[position]) for position in plan]

    def _new_mapping(self, fd: int, offset: int, length: int, what: str) -> FileMapping:
        try:
            return FileMapping(fd, offset, length, what)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        # The process may map no more (RLIMIT_AS, vm.max_map_count), though the budget would allow it.
        self._mappings.cache.trim()
        return FileMapping(fd, offset, length, what)

    def _count_hole(self, index: int) -> None:
        self._state.count(hole_reads=1)
        self._state.count_origin(index, HOLE_ORIGIN)
