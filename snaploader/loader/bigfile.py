"""One big file of a directory, read in chunks by several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from cow import is_zero
from cow.fileio import chunk_extents
from snaploader.digest import HASH_BYTES, Digest, DigestFunction
from snaploader.formats.chunktable import ChunkTable
from snaploader.loader.pool import ThreadBuffers

PutChunk = Callable[[Digest, memoryview], object]
"""Takes a chunk that was hashed."""


class BigFileReader:
    """Hashes the chunks of an open file that hold data; holes are not read. Thread-safe.

    Args:
        fd: Of the file; closed by the reader.
        chunk_size: In bytes, as a ChunkTable has it.
        buffers: What chunks are read into.
        put: Called with every chunk that is not zeros.
        finished: Called with the reader when all chunks that `chunks` gave were read, on the thread
            that read the last one.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        chunk_size: int,
        function: DigestFunction,
        buffers: ThreadBuffers,
        put: PutChunk,
        finished: Callable[[BigFileReader], None],
    ) -> None:
        self.fd = fd
        self._size = size
        self._chunk_size = chunk_size
        self._function = function
        self._buffers = buffers
        self._put = put
        self._finished = finished
        self._lock = threading.Lock()
        self._pending = 1  # the listing of chunks itself
        self._hashes: dict[int, bytes] = {}
        self.read_bytes = 0
        """What was read so far."""

    def chunks(self) -> Iterator[Callable[[], int]]:
        """A call for each chunk that may hold data, which reads it and returns how many bytes were read."""
        for index, ranges in chunk_extents(self.fd, self._size, self._chunk_size):
            with self._lock:
                self._pending += 1
            yield partial(self._read, index, ranges)
        self._done()

    def table(self) -> ChunkTable:
        """All chunks; whole when it is finished."""
        indices = sorted(self._hashes)
        rows = b"".join(self._hashes[index] for index in indices)
        hashes = np.frombuffer(rows, np.uint8).reshape(-1, HASH_BYTES)
        return ChunkTable(
            self._size, self._chunk_size, self._function, np.array(indices, dtype=np.int64), hashes
        )

    def close(self) -> None:
        """Close the file. Idempotent; not while chunks are being read."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _read(self, index: int, ranges: list[tuple[int, int]]) -> int:
        offset = index * self._chunk_size
        data = self._buffers.get(min(self._chunk_size, self._size - offset))
        count = read_ranges(self.fd, data, offset, ranges)
        # Looking for zeros is several times faster than hashing them.
        hash_ = b""
        if not is_zero(data):
            digest = Digest.of(data, self._function)
            self._put(digest, data)
            hash_ = bytes.fromhex(digest.hash)
        with self._lock:
            self.read_bytes += count
            if hash_:
                self._hashes[index] = hash_
        self._done()
        return count

    def _done(self) -> None:
        with self._lock:
            self._pending -= 1
            is_last = not self._pending
        if is_last:
            self._finished(self)


def read_ranges(fd: int, data: memoryview, offset: int, ranges: list[tuple[int, int]]) -> int:
    """Fill `data` with the file's content from `offset` on, zeros but for `ranges`; the bytes read.

    What is past the end of a file that was cut short reads as zeros; its identity tells of it.
    """
    position = count = 0
    for start, end in ranges:
        data[position : start - offset] = bytes(start - offset - position)
        position = start - offset
        while position < end - offset:
            done = os.preadv(fd, [data[position : end - offset]], offset + position)
            if not done:
                break
            position += done
            count += done
    data[position:] = bytes(len(data) - position)
    return count
