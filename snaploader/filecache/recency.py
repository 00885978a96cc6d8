"""When entries were last used.

The access time of an entry's file says it, set explicitly (mount options such as noatime do not matter)
and so it survives restarts. Setting it for each of 200,000 blobs takes most of a second, so uses in
bulk are appended to one file per group instead, `groups/<group>/uses`: records of 16 bytes, the first
eight bytes of the hash and the time in nanoseconds since the epoch, little-endian. Two hashes that
begin alike only keep each other young. Eviction takes the later of both times.
"""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from snaploader.filecache.hashes import Prefixes
from snaploader.filecache.locks import FileLock

_RECORD = np.dtype([("prefix", "<u8"), ("time_ns", "<i8")])
Records = npt.NDArray[np.void]
COMPACT_BYTES = 32 << 20
"""Size from which the log is rewritten with one record per hash."""


def touch(path: str | int, status: os.stat_result, now_ns: int) -> None:
    """Record a use in the file itself. Its time of last write stays, for it is part of its identity."""
    # A cache shared with another user can be read without owning its files.
    with suppress(PermissionError):
        os.utime(path, ns=(now_ns, status.st_mtime_ns))


class UseLog:
    """Uses in bulk, of one group. Process-safe; the lock makes it thread-safe too."""

    def __init__(self, group_path: str, lock: FileLock) -> None:
        self._path = f"{group_path}/uses"
        self._lock = lock

    def append(self, prefixes: Prefixes, now_ns: int) -> None:
        """Record that all of these were used now."""
        records = np.empty(len(prefixes), dtype=_RECORD)
        records["prefix"] = prefixes
        records["time_ns"] = now_ns
        with self._lock.held():
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                size = os.fstat(fd).st_size
                if size > COMPACT_BYTES:
                    size = self._compact(fd, size)
                # What a writer that was killed or met a full disk left of a record is overwritten.
                position = size - size % _RECORD.itemsize
                view = memoryview(records.tobytes())
                while view:
                    count = os.pwrite(fd, view, position)
                    view, position = view[count:], position + count
            finally:
                os.close(fd)

    def read(self, offset: int = 0) -> tuple[Records, int]:
        """The records from `offset` bytes on, and where the next ones will be. Starts over if rewritten."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return np.empty(0, dtype=_RECORD), 0
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(fd).st_size
            if size < offset:
                offset = 0
            file.seek(offset)
            data = file.read(size - offset)
        whole = len(data) - len(data) % _RECORD.itemsize
        return np.frombuffer(data[:whole], dtype=_RECORD), offset + whole

    def size(self) -> int:
        """Its size in bytes."""
        try:
            return os.stat(self._path).st_size
        except FileNotFoundError:
            return 0

    def _compact(self, fd: int, size: int) -> int:
        """Keep the newest record of each hash; the new size. In place: losing it loses only recency."""
        data = os.pread(fd, size, 0)
        latest = newest(np.frombuffer(data[: len(data) - len(data) % _RECORD.itemsize], dtype=_RECORD))
        if latest.nbytes > COMPACT_BYTES // 2:
            # So many blobs are not in the cache; the oldest half goes.
            latest = latest[np.argsort(latest["time_ns"])][len(latest) // 2 :]
        os.ftruncate(fd, 0)
        os.pwrite(fd, latest.tobytes(), 0)
        return latest.nbytes


def newest(records: Records) -> Records:
    """One record per hash, the newest, sorted by hash."""
    ordered = records[np.lexsort((records["time_ns"], records["prefix"]))]
    prefixes = ordered["prefix"]
    last = np.ones(len(ordered), dtype=np.bool_)
    last[:-1] = prefixes[1:] != prefixes[:-1]
    return ordered[last]


def apply(times_ns: npt.NDArray[np.int64], prefixes: Prefixes, records: Records, now_ns: int) -> None:
    """Raise each time to that of the newest record of its hash. Times in the future count as now."""
    if not len(records):
        return
    latest = newest(records)
    places = np.searchsorted(latest["prefix"], prefixes)
    places[places == len(latest)] = 0
    known = latest["prefix"][places] == prefixes
    logged = np.minimum(latest["time_ns"][places], now_ns)
    np.maximum(times_ns, np.where(known, logged, 0), out=times_ns)
