"""The log of uses in bulk.

The access time of an entry's file says when it was last used (`layout.touch`). Setting it for each of
200,000 blobs takes most of a second, so uses in bulk are appended to one file instead, `usage/uses`:
records of 16 bytes, a key and the time in nanoseconds since the epoch, little-endian. The key is the first
eight bytes of the hash, exclusive or those of the SHA-256 of the group's folder name; two entries of one key
only keep each other young. Eviction takes the later of both times.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader.filecache.layout import OpenFolder
from snaploader.files import OddEntry, open_regular
from snaploader.formats.digests import Prefixes, is_first
from snaploader.locks import FileLock

_RECORD = np.dtype([("key", "<u8"), ("time_ns", "<i8")])
Records = npt.NDArray[np.void]
COMPACT_BYTES = 32 << 20
"""Size from which the log is rewritten with one record per key."""
_MAX_READ_BYTES = 1 << 30


class Position(NamedTuple):
    """How far a reader got in the log: a file and a place in it."""

    inode: int = 0
    offset: int = 0


class UseLog:
    """Uses in bulk. Thread-safe, process-safe."""

    def __init__(self, folder: OpenFolder) -> None:
        self._folder = folder
        self._path = f"{folder.layout.usage}/uses"
        self._lock = FileLock(folder.open_written(f"{self._path}.lock"))

    def close(self) -> None:
        """Give up the descriptor."""
        self._lock.close()

    def append(self, group: str, prefixes: Prefixes, now_ns: int) -> None:
        """Record that all of these entries of a group were used now."""
        records = np.empty(len(prefixes), dtype=_RECORD)
        records["key"] = keys(group, prefixes)
        records["time_ns"] = now_ns
        with self._lock.held():
            fd = self._folder.open_written(self._path)
            try:
                size = os.fstat(fd).st_size
                if size > COMPACT_BYTES:
                    new_fd, size = self._compacted()
                    os.close(fd)
                    fd = new_fd
                # What a writer that was killed or met a full disk left of a record is overwritten.
                position = size - size % _RECORD.itemsize
                view = memoryview(records.tobytes())
                while view:
                    count = os.pwrite(fd, view, position)
                    view, position = view[count:], position + count
            finally:
                os.close(fd)

    def read(self, since: Position = Position()) -> tuple[Records, Position]:  # noqa: B008
        """Return the records after `since`, or all when the log was rewritten, and how far they go."""
        try:
            fd, status = open_regular(self._path)
        except (FileNotFoundError, OddEntry):
            return np.empty(0, dtype=_RECORD), since
        with os.fdopen(fd, "rb") as file:
            offset = since.offset if since.inode == status.st_ino else 0
            if status.st_size - offset > _MAX_READ_BYTES:
                # Nobody's log grows so far: it is compacted long before.
                return np.empty(0, dtype=_RECORD), Position(status.st_ino, status.st_size)
            file.seek(offset)
            data = file.read(max(0, status.st_size - offset))
        whole = len(data) - len(data) % _RECORD.itemsize
        return np.frombuffer(data[:whole], dtype=_RECORD), Position(status.st_ino, offset + whole)

    def grew(self, since: Position) -> bool:
        """Tell whether there is anything after `since`."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return False
        return status.st_ino != since.inode or status.st_size >= since.offset + _RECORD.itemsize

    def _compacted(self) -> tuple[int, int]:
        """Replace the log by one with the newest record of each key; return its descriptor and size."""
        latest = newest(self.read()[0])
        if latest.nbytes > COMPACT_BYTES // 2:
            # More than any cache holds blobs: the ones unused for longest do not matter any more.
            latest = latest[np.argsort(latest["time_ns"])][-(COMPACT_BYTES // 2 // _RECORD.itemsize) :]
        with self._folder.staged(latest.tobytes()) as temporary:
            os.rename(temporary, self._path)
        return self._folder.open_written(self._path), latest.nbytes


def keys(group: str, prefixes: Prefixes) -> Prefixes:
    """Return the log's keys for entries of a group, by folder name."""
    salt = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return prefixes ^ np.uint64(salt)


def newest(records: Records) -> Records:
    """Return the newest record of each key, sorted by key."""
    order = np.argsort(records["key"])
    ordered = records["key"][order]
    first = is_first(ordered)
    latest = np.empty(int(first.sum()), dtype=_RECORD)
    if len(latest):
        latest["key"] = ordered[first]
        latest["time_ns"] = np.maximum.reduceat(records["time_ns"][order], np.flatnonzero(first))
    return latest


def apply(
    times_ns: npt.NDArray[np.int64], entry_keys: Prefixes, records: Records, now_ns: int
) -> npt.NDArray[np.int64]:
    """Return each time, or that of the newest record of its key if later. A future time counts as now."""
    if not len(records):
        return times_ns
    latest = newest(records)
    places = np.searchsorted(latest["key"], entry_keys)
    places[places == len(latest)] = 0
    known = latest["key"][places] == entry_keys
    logged = np.minimum(latest["time_ns"][places], now_ns)
    return np.where(known, np.maximum(times_ns, logged), times_ns)
