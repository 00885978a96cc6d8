"""The writing half of a store: pwrite into private files, which a chunk gets when it is first written."""

from __future__ import annotations

import os

from cow.chunks import BASE, FROZEN, HOLE, LAZY, PRIVATE, StoreState, check_geometry, check_range, pieces
from cow.fileio import (
    BaseFile,
    chunk_extents,
    clone_range,
    copy_range,
    copy_sparse,
    file_name,
    is_zero,
    read_all,
    write_all,
)
from cow.mapping import FileMapping, OpenFile
from cow.reader import ChunkReader


class ChunkWriter:
    """Writes and growth for one store. Thread-safe.

    Chunks that are written in part are fetched before the gate is entered as a writer, so that a checkpoint
    never waits for a source.
    """

    def __init__(self, state: StoreState, reader: ChunkReader) -> None:
        self._state = state
        self._reader = reader
        self._descriptors = state.descriptors

    def adopt_file(self, base: BaseFile) -> None:
        """Make a new store, which nobody else uses yet, show the content of a file by reading it there."""
        state = self._state
        chunks = [index for index, _ in chunk_extents(base.fd, state.size, state.chunk_size)]
        state.chunks.kind[chunks] = BASE
        state.chunks.unsaved[chunks] = True
        state.base = base

    def copy_file(self, base: BaseFile) -> None:
        """Copy the chunks of a file, but for those of only zeros, into private files of such a store."""
        state, chunks = self._state, self._state.chunks
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
            chunks.kind[index] = PRIVATE
            chunks.unsaved[index] = chunks.unsynced[index] = chunks.touched[index] = True
            try:
                # A range that ends inside a block can only be cloned at the end of both files, as here.
                clone = clone and clone_range(base.fd, offset, length, fd, 0)
                if not clone:
                    for start, part in parts:
                        write_all(fd, part, start - offset)
            finally:
                os.close(fd)

    def write(self, offset: int, data: memoryview) -> None:
        state = self._state
        offset, size = check_range(offset, len(data), state.size)
        if not size:
            state.gate.check()
            return
        index, start = divmod(offset, state.chunk_size)
        if start + size <= state.chunk_size and self._write_private(index, start, data):
            return
        with state.gate.reading():
            fetched = self._fetch_edges(offset, size)
            state.gate.enter_write()
            try:
                for index, start, position, length in pieces(offset, size, state.chunk_size):
                    self._write_piece(index, start, data[position : position + length], fetched.get(index))
            finally:
                state.gate.leave_write()

    def grow(self, size: int) -> None:
        """Make the store bigger. The caller is in the gate as a reader."""
        state = self._state
        with state.resize_lock:
            size, _ = check_geometry(size, state.chunk_size)
            if size < state.size:
                raise ValueError(
                    f"a store cannot shrink, from {state.size} to {size} bytes: export it instead"
                )
            last, short = divmod(state.size, state.chunk_size)
            # Only the last chunk can be short, and only then does its content change: it gets longer.
            mapping = self._reader.map(last) if short and state.chunks.kind_of[last] == LAZY else None
            with state.gate.exclusive(), state.locks.hold(last):
                if short:
                    length = min(state.chunk_size, size - last * state.chunk_size)
                    self._lengthen(last, short, length, mapping)
                    state.mappings.discard(last)
                with state.tables_lock:
                    state.chunks.grow(size)
                    state.size = size

    def _fetch_edges(self, offset: int, size: int) -> dict[int, FileMapping]:
        """Map the lazy chunks that the range covers in part; only its first and last one can be such."""
        state = self._state
        fetched: dict[int, FileMapping] = {}
        for index in sorted({offset // state.chunk_size, (offset + size - 1) // state.chunk_size}):
            start = index * state.chunk_size
            whole = offset <= start and start + state.length(index) <= offset + size
            if state.chunks.kind_of[index] == LAZY and not whole and (mapping := self._reader.map(index)):
                fetched[index] = mapping
        return fetched

    def _write_private(self, index: int, start: int, data: memoryview) -> bool:
        """Write a part of a chunk that has a private file: what is done most often, in the fewest steps.

        False, and nothing done, when it is otherwise, or when the chunk might become a hole.
        """
        state = self._state
        state.gate.enter_write()
        try:
            if not start and len(data) == state.length(index):
                return False
            file = self._descriptors.get(index)
            if file is None:
                with state.locks.hold(index):
                    if state.chunks.kind_of[index] != PRIVATE:
                        return False
                    file = self._open_private(index)
            self._write_in_place(index, start, data, file)
            return True
        finally:
            state.gate.leave_write()

    def _write_piece(self, index: int, start: int, data: memoryview, fetched: FileMapping | None) -> None:
        state = self._state
        chunks = state.chunks
        whole = len(data) == state.length(index)
        zero = is_zero(data) if whole or chunks.kind_of[index] == HOLE else False
        with state.locks.hold(index):
            kind = chunks.kind_of[index]
            if zero and kind == HOLE:
                return
            if zero and whole:
                chunks.mark(index, 0, len(data))
                self._make_hole(index, kind)
            elif kind == PRIVATE:
                self._write_in_place(index, start, data, self._open_private(index))
            else:
                self._replace(index, kind, start, data, state.length(index), None if whole else fetched)
                chunks.mark(index, start, start + len(data))

    def _make_hole(self, index: int, kind: int) -> None:
        """Make a chunk a hole. The caller holds its lock and has marked it."""
        state = self._state
        state.chunks.kind[index] = HOLE
        state.mappings.discard(index)
        self._descriptors.discard(index)
        state.drop_file(state.name(index), kind)

    def _write_in_place(self, index: int, start: int, data: memoryview, file: OpenFile) -> None:
        # Marked before, because a failing write may have changed something.
        self._state.chunks.mark(index, start, start + len(data))
        try:
            write_all(file.fd, data, start)
        finally:
            # After it: a sync that began before did not see all of it.
            self._state.chunks.unsynced[index] = True

    def _open_private(self, index: int) -> OpenFile:
        file = self._descriptors.get(index)
        if file is None:
            fd = self._state.files.open(self._state.name(index), writable=True)
            file = self._descriptors.add(index, OpenFile(fd))
        return file

    def _replace(
        self, index: int, kind: int, start: int, data: memoryview, length: int, fetched: FileMapping | None
    ) -> None:
        """Give a chunk a new private file: its content as it is, made `length` long, with `data` at `start`.

        The chunk changes only when the file is complete. The caller holds the chunk's lock.
        """
        state = self._state
        old_name = state.name(index)
        name = file_name(index, state.epoch)
        fd = state.files.create(name, length)
        try:
            if len(data) < length and kind != HOLE:
                self._copy_old(index, kind, fd, fetched)
            write_all(fd, data, start)
        except BaseException:
            state.files.abandon(name, fd)
            raise
        state.chunks.epoch[index] = state.epoch
        state.chunks.kind[index] = PRIVATE
        state.chunks.unsynced[index] = True
        state.mappings.discard(index)
        self._descriptors.add(index, OpenFile(fd))
        state.drop_file(old_name, kind)

    def _copy_old(self, index: int, kind: int, target: int, fetched: FileMapping | None) -> None:
        state = self._state
        length = state.length(index)
        if kind == LAZY:
            assert fetched is not None
            write_all(target, fetched.slice(0, length), 0)
        elif kind == FROZEN:
            source = state.files.open(state.name(index))
            try:
                copy_sparse(source, 0, length, target, 0, f"the file of {state.describe(index)}")
            finally:
                os.close(source)
        else:
            assert state.base is not None
            offset = index * state.chunk_size
            # Not sparsely: looking for holes in a big file may take longer than copying one chunk.
            copy_range(state.base.fd, offset, length, target, 0, str(state.base))
        state.count(copies_on_write=1, copied_bytes=length)

    def _lengthen(self, index: int, old: int, new: int, fetched: FileMapping | None) -> None:
        """Make the short last chunk longer. The caller holds its lock and the exclusive section."""
        state = self._state
        kind = state.chunks.kind_of[index]
        if new == old or kind == HOLE:
            return
        if kind == PRIVATE:
            file = self._open_private(index)
            os.ftruncate(file.fd, new)
            state.chunks.unsynced[index] = True
        else:
            self._replace(index, kind, 0, memoryview(b""), new, fetched)
        state.chunks.mark(index, old - 1, old)
