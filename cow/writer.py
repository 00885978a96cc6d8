"""The writing half of a store: pwrite into private files, which a chunk gets when it is first written."""

from __future__ import annotations

import os

from cow.core import StoreCore
from cow.files import file_name
from cow.geometry import check_range, check_store_size, pieces
from cow.lru import Entry
from cow.memory import Mapping
from cow.reader import ChunkReader
from cow.sparse import Copier, write_all
from cow.states import FROZEN, HOLE, LAZY, PRIVATE
from cow.zero import is_zero


class ChunkWriter:
    """Writes and growth for one store. Thread-safe; the caller is in the gate as a reader.

    What may be slow, fetching chunks that are written in part, happens before the gate is entered as a
    writer, so that a checkpoint never waits for a source.
    """

    def __init__(self, core: StoreCore, reader: ChunkReader) -> None:
        self._core = core
        self._reader = reader
        self._descriptors = core.budget._files

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, or raise."""
        core = self._core
        offset, size = check_range(offset, len(data), core.size)
        if not size:
            return
        fetched = self._fetch_edges(offset, size)
        try:
            core.gate.enter_write()
            try:
                for index, start, position, length in pieces(offset, size, core.chunk_size):
                    self._write_piece(index, start, data[position : position + length], fetched.get(index))
            finally:
                core.gate.leave_write()
        finally:
            for entry in fetched.values():
                self._reader.unpin(entry)

    def grow(self, size: int) -> None:
        """Make the store bigger; what is new reads as zeros."""
        core = self._core
        with core.resize_lock:
            size = check_store_size(size, core.chunk_size)
            if size < core.size:
                raise ValueError(
                    f"a store cannot shrink, from {core.size} to {size} bytes: export it instead"
                )
            last, short = divmod(core.size, core.chunk_size)
            # Only the last chunk can be short, and only then does its content change: it gets longer.
            entry = self._reader.pin(last) if short and core.states.kind[last] == LAZY else None
            try:
                with core.gate.exclusive():
                    if short:
                        with core.locks.hold(last):
                            self._lengthen(
                                last, short, min(core.chunk_size, size - last * core.chunk_size), entry
                            )
                            core.budget._maps.discard(core.key(last))
                            self._set_size(size)
                    else:
                        self._set_size(size)
            finally:
                if entry is not None:
                    self._reader.unpin(entry)

    def hole(self, index: int) -> None:
        """Make a chunk a hole. The caller holds its lock and has marked it."""
        core = self._core
        kind = int(core.states.kind[index])
        core.states.kind[index] = HOLE
        core.budget._maps.discard(core.key(index))
        self._descriptors.discard(core.key(index))
        core.drop_file(core.name(index), kind)

    def _set_size(self, size: int) -> None:
        core = self._core
        with core.tables_lock:
            core.states.grow(size)
            core.size = size

    def _fetch_edges(self, offset: int, size: int) -> dict[int, Entry[Mapping]]:
        """Pin the lazy chunks that the range covers in part; only its first and last one can be such."""
        core = self._core
        chunk_size = core.chunk_size
        end = offset + size
        edges = []
        if offset % chunk_size:
            edges.append(offset // chunk_size)
        if end % chunk_size and end < core.size and end // chunk_size not in edges:
            edges.append(end // chunk_size)
        fetched: dict[int, Entry[Mapping]] = {}
        try:
            for index in edges:
                entry = self._reader.pin(index) if core.states.kind[index] == LAZY else None
                if entry is not None:
                    fetched[index] = entry
        except BaseException:
            for entry in fetched.values():
                self._reader.unpin(entry)
            raise
        return fetched

    def _write_piece(self, index: int, start: int, data: memoryview, fetched: Entry[Mapping] | None) -> None:
        core = self._core
        states = core.states
        whole = len(data) == core.length(index)
        zero = is_zero(data) if whole or states.kind[index] == HOLE else False
        if states.kind[index] == PRIVATE and not zero:
            entry = self._descriptors.pin(core.key(index))
            if entry is not None:
                self._write_in_place(index, start, data, entry)
                return
        with core.locks.hold(index):
            kind = int(states.kind[index])
            if zero and kind == HOLE:
                return
            if zero and whole:
                states.mark(index, 0, len(data))
                self.hole(index)
            elif kind == PRIVATE:
                self._write_in_place(index, start, data, self._open_private(index))
            else:
                self._replace(index, kind, start, data, core.length(index), None if whole else fetched)
                states.mark(index, start, start + len(data))

    def _write_in_place(self, index: int, start: int, data: memoryview, entry: Entry[int]) -> None:
        try:
            # Marked before, because a failing write may have changed something.
            self._core.states.mark(index, start, start + len(data))
            write_all(entry.value, [data], start)
        finally:
            # Again, because a sync may have come between.
            self._core.states.unsynced[index] = True
            self._descriptors.unpin(entry)

    def _open_private(self, index: int) -> Entry[int]:
        core = self._core
        entry = self._descriptors.pin(core.key(index))
        if entry is None:
            fd = core.files.open(core.name(index), writable=True)
            entry = self._descriptors.add(core.serial, core.key(index), fd, 1)
        return entry

    def _replace(
        self, index: int, kind: int, start: int, data: memoryview, length: int, fetched: Entry[Mapping] | None
    ) -> None:
        """Give a chunk a new private file: its content as it is, made `length` long, with `data` at `start`.

        The chunk changes only when the file is complete. The caller holds the chunk's lock.
        """
        core = self._core
        old_name = core.name(index)
        name = file_name(index, core.epoch)
        fd = core.files.create(name, length)
        try:
            covered = len(data) == length
            if not covered and kind != HOLE:
                self._copy_old(index, kind, fd, fetched)
            write_all(fd, [data], start)
        except BaseException:
            core.files.abandon(name, fd)
            raise
        core.states.epoch[index] = core.epoch
        core.states.kind[index] = PRIVATE
        core.budget._maps.discard(core.key(index))
        self._descriptors.unpin(self._descriptors.add(core.serial, core.key(index), fd, 1))
        core.drop_file(old_name, kind)

    def _copy_old(self, index: int, kind: int, target: int, fetched: Entry[Mapping] | None) -> None:
        core = self._core
        length = core.length(index)
        what = core.describe(index)
        if kind == LAZY:
            assert fetched is not None
            write_all(target, [fetched.value.array[:length].data], 0)
        elif kind == FROZEN:
            source = core.files.open(core.name(index))
            try:
                Copier().copy_sparse(source, 0, length, target, 0, f"the file of {what}")
            finally:
                os.close(source)
        else:
            assert core.base is not None
            offset = index * core.chunk_size
            # Not sparsely: looking for holes in a big file may take longer than copying one chunk.
            Copier().copy(core.base.fd, offset, length, target, 0, f"the file {core.base.path!r}")
        core.counters.count_copy(length)

    def _lengthen(self, index: int, old: int, new: int, fetched: Entry[Mapping] | None) -> None:
        """Make the short last chunk longer. The caller holds its lock and the exclusive section."""
        core = self._core
        kind = int(core.states.kind[index])
        if new == old or kind == HOLE:
            return
        if kind == PRIVATE:
            entry = self._open_private(index)
            try:
                os.ftruncate(entry.value, new)
            finally:
                self._descriptors.unpin(entry)
        else:
            self._replace(index, kind, 0, memoryview(b""), new, fetched)
        core.states.mark(index, old - 1, old)
