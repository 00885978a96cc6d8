"""The order in which entries go, in memory."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from snaploader.filecache import recency
from snaploader.filecache.protection import Protection
from snaploader.filecache.recency import Position, UseLog
from snaploader.filecache.scan import Scan


class Candidates:
    """The entries that a scan found, in order of last use, and how far they are used up.

    For one thread at a time.

    Args:
        begun_ns: When the scan began, in nanoseconds since the epoch.
        changes: The ledger's count of changes when the scan began.
    """

    def __init__(self, scan: Scan, protection: Protection, begun_ns: int, changes: int) -> None:
        self.scan = scan
        self.changes = changes
        """The ledger's count, if nothing was added since the scan began that is not known here."""
        self._begun_ns = begun_ns
        self._order = list(range(len(scan)))
        self._next = 0
        self._later: list[tuple[int, int]] = []
        """Heap of (time, row) of entries that were used after the scan."""
        self._aside: list[int] = []
        """Protected."""
        self._log = Position()
        self.set_protection(protection)

    def next_row(self, *, is_fresh: bool) -> int | None:
        """The row of the entry that was used longest ago; it is not a candidate any more.

        None when that was after the scan: what was added since is not known here and may have been used
        longer ago. A scan that `is_fresh` knows all there is, whatever the clock says.
        """
        used_ns, row = self._later[0] if self._later else (None, -1)
        if self._next < len(self._order):
            first = self._order[self._next]
            first_ns = int(self.scan.used_ns[first])
            if used_ns is None or first_ns <= used_ns:
                if first_ns < self._begun_ns or is_fresh:
                    self._next += 1
                    return first
                return None
        if used_ns is None or (used_ns >= self._begun_ns and not is_fresh):
            return None
        heapq.heappop(self._later)
        return row

    def put_back(self, row: int, used_ns: int) -> None:
        """The entry was used at this time."""
        self.scan.used_ns[row] = used_ns
        heapq.heappush(self._later, (used_ns, row))

    def set_aside(self, row: int) -> None:
        """The entry is leased or pinned."""
        self._aside.append(row)

    def set_protection(self, protection: Protection) -> None:
        """Leases or pins changed: what they protect is set aside, what they do not comes back."""
        rest = self._take_rest() + self._aside
        rows = np.array(rest, dtype=np.int64)
        held = protection.holds(self.scan, rows)
        self._aside = rows[held].tolist()
        self._sort(rows[~held])

    def read_uses(self, log: UseLog, now_ns: int) -> None:
        """Take in what the log of uses says since last time."""
        if not log.grew(self._log):
            return
        records, self._log = log.read(self._log)
        scan = self.scan
        scan.used_ns = recency.apply(scan.used_ns, scan.use_keys, records, now_ns)
        self._sort(np.array(self._take_rest(), dtype=np.int64))

    def _take_rest(self) -> list[int]:
        return self._order[self._next :] + [row for _, row in self._later]

    def _sort(self, rows: npt.NDArray[np.int64]) -> None:
        self._later = []
        self._next = 0
        self._order = rows[np.argsort(self.scan.used_ns[rows], kind="stable")].tolist()
