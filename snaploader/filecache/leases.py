"""Leases: blobs that no process may evict while their user lives.

A lease is a file `leases/<token>.<number>` with the first eight bytes of each hash, sorted,
little-endian; two hashes that begin alike only protect each other. It holds as long as the session
of its token lives, so the lease of a killed process ends with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from snaploader.filecache import session as sessions
from snaploader.filecache.hashes import Prefixes, are_among, distinct
from snaploader.filecache.layout import Layout
from snaploader.filecache.ledger import Ledger
from snaploader.filecache.session import Session
from snaploader.files import read_file
from snaploader.folders import OddEntry, open_regular

_MAX_LEASE_BYTES = 8 << 24
"""Of hashes as many as a pin may keep; what is larger is no lease."""


class Lease:
    """Keeps blobs from eviction until it is released. A context manager. Thread-safe.

    What is in the cache when the lease begins stays, and so does what is added while it lasts. It does not
    keep a blob from `FileCache.remove` or from quarantine.
    """

    def __init__(self, layout: Layout, session: Session, ledger: Ledger, prefixes: Prefixes) -> None:
        self._ledger = ledger
        self._path: str | None = None
        if not len(prefixes):
            return
        path = f"{layout.leases}/{session.unique_name()}"
        # Evictions happen in sections too, so none is under way that has not seen this lease.
        data = distinct(prefixes).astype("<u8").tobytes()
        with session.staged(data) as temporary, ledger.section() as section:
            os.rename(temporary, path)
            # Killed here, the lease ends with its session.
            try:
                section.leases_changed()
            except BaseException:
                os.unlink(path)
                raise
        self._path = path

    def release(self) -> None:
        """End the lease. Again is fine."""
        path, self._path = self._path, None
        # Closing the cache ends its leases; a forked child has none.
        if path is None or self._ledger.closed:
            return
        with self._ledger.section() as section:
            with suppress(FileNotFoundError):
                os.unlink(path)
            section.leases_changed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LeaseTable:
    """All leases of all processes, as the evictor sees them. For one thread at a time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._generation = -1
        self._prefixes: Prefixes = np.empty(0, dtype=np.uint64)

    def refresh(self, generation: int, *, again: bool = False) -> bool:
        """Read the leases if they changed; whether they did. The caller is in a section of the ledger.

        Args:
            again: Read them in any case: an owner may have died, which changes no generation.
        """
        if generation == self._generation and not again:
            return False
        held = [np.empty(0, dtype=np.uint64)]
        alive: dict[str, bool] = {}
        for name in os.listdir(self._layout.leases):
            token = name.partition(".")[0]
            if token not in alive:
                alive[token] = sessions.is_alive(self._layout, token)
            if alive[token]:
                with suppress(FileNotFoundError, OddEntry):
                    held.append(_load(f"{self._layout.leases}/{name}"))
        self._prefixes = distinct(np.concatenate(held))
        self._generation = generation
        return True

    def protected(self, prefixes: Prefixes) -> npt.NDArray[np.bool_]:
        """For each whether it is leased."""
        return are_among(prefixes, self._prefixes)


def _load(path: str) -> Prefixes:
    """What a lease keeps; nothing if no cache wrote such a file."""
    fd, status = open_regular(path)
    try:
        if status.st_size > _MAX_LEASE_BYTES:
            return np.empty(0, dtype=np.uint64)
        data = read_file(fd, status.st_size)
    finally:
        os.close(fd)
    return np.frombuffer(data, dtype="<u8", count=len(data) // 8).astype(np.uint64)
