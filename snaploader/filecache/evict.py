"""Making room: what was used longest ago goes first.

A scan gives all entries in order of last use; the list is kept and used up over many calls. It stays
in the right order: an entry used since has a later time than all that were not, which is seen when its
turn comes and sends it to the back; an entry added since is younger than all that were not used since.
When only entries that were used since are left, the next scan makes a new list. One process evicts at a time.

A big cache is scanned for a second, so a thread does that ahead, and evicts, before an addition waits for
room: it scans when a quarter of the room is left and the list is missing or nearly used up, and evicts when
little room is left. In a small cache each addition makes its own room.
"""

from __future__ import annotations

import heapq
import os
import stat
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from snaploader.context import current, unbounded
from snaploader.errors import Cancelled, ResourceExhausted, SnaploaderError, translate_os_errors
from snaploader.filecache.bulk import FoundEntry, Position, Scan, UseLog, apply_uses, sweep_trees
from snaploader.filecache.durability import Durability
from snaploader.filecache.layout import Layout, Space, disk_bytes, entry_name
from snaploader.filecache.retention import PinTable, Protection
from snaploader.filecache.usage import CacheContext, Section
from snaploader.files import FileLock

MAX_FRUITLESS_SCANS = 3
"""Scans in a row that others changed the cache during, after which it is believed that nothing can go."""
RETRY_SCAN_S = 1.0
"""How long a scan that found nothing to evict is believed while no entry, lease or pin changes."""

EVICTS_AHEAD_FROM_BYTES = 1 << 30
"""Size of a cache from which a part of it is kept free, unless the user says how much."""
AHEAD_PART = 16
"""The part that is kept free then: one in so many bytes."""
AHEAD_ENTRIES = 64
"""Entries that the thread evicts before it lets others have the lock."""
AHEAD_PAUSE_S = 0.001
"""How long it then lets them."""
AHEAD_REST = 4
"""How long the thread rests after its work, as a multiple of the time that it took."""
AHEAD_LONG_REST = 40
"""The same when the work was of no use, as when nearly all is leased or pinned."""

_State: TypeAlias = "tuple[int, int, int]"
"""The ledger's counts of leases, changes and pins."""


class _Exhausted(NamedTuple):
    """What a scan found when nothing could go."""

    state: _State
    until_s: float
    """How long it is believed."""
    pinned_bytes: int


class Evictor:
    """Keeps the cache within its bound. Thread-safe, process-safe."""

    def __init__(
        self, context: CacheContext, durability: Durability, uses: UseLog, pins: PinTable, ahead_bytes: int
    ) -> None:
        self._context = context
        self._is_closing = threading.Event()
        self._max_bytes = context.ledger.max_bytes
        self._goal_bytes = self._max_bytes - ahead_bytes
        self._evict_from_bytes = self._max_bytes - ahead_bytes // 2
        self._scan_from_bytes = self._max_bytes - 4 * ahead_bytes
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._rests_until_s = 0.0
        self._durability = durability
        self._uses = uses
        self._pins = pins
        self._protection = Protection(context.layout, pins)
        self._candidates: Candidates | None = None
        self._exhausted: _Exhausted | None = None
        self._lock = FileLock(context.folder.open_written(f"{context.layout.usage}/evict.lock"))
        context.ledger.evict_with(self._make_room, self._fill, self._scan_from_bytes)
        with self._lock.held_now() as held:
            if held:
                # Nobody scans; if the ledger says so, that process was killed.
                with context.ledger.section() as section:
                    section.abandon_scan()

    def _fill(self, total_bytes: int) -> None:
        """Start the thread that evicts ahead if it is time, unless it runs already or rests."""
        if self._thread is not None or time.monotonic() < self._rests_until_s:
            return
        if total_bytes <= self._evict_from_bytes and not self._should_scan(total_bytes):
            return
        with self._thread_lock:
            if self._thread is None and not self._is_closing.is_set():
                thread = threading.Thread(target=self._work, name="snaploader-evict", daemon=True)
                # When no thread can be had, each addition makes its own room.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _work(self) -> None:
        """Evict ahead, on the thread, which ends afterwards."""
        begun_s = time.monotonic()
        is_of_use = False
        # Whoever adds something and needs the room meets the same error, and can be told.
        with suppress(SnaploaderError):
            is_of_use = self._evict_ahead()
        ended_s = time.monotonic()
        rest = AHEAD_REST if is_of_use else AHEAD_LONG_REST
        with self._thread_lock:
            self._rests_until_s = ended_s + rest * (ended_s - begun_s)
            self._thread = None

    def _should_scan(self, total_bytes: int) -> bool:
        """Tell whether this process may need candidates soon: it adds much, and there is little room left."""
        candidates = self._candidates
        room_bytes = self._max_bytes - total_bytes
        return (
            total_bytes > self._scan_from_bytes
            and 4 * self._context.ledger.added_bytes > room_bytes
            and (candidates is None or candidates.are_few)
        )

    def _make_room(self, extra_bytes: int) -> None:
        limit = self._max_bytes - extra_bytes
        if limit < 0:
            raise ResourceExhausted(
                f"{extra_bytes} bytes do not fit into a file cache of {self._max_bytes}: raise its max_bytes"
            )
        with translate_os_errors("cannot evict from the file cache"), self._lock.held():
            left = self._reduce(limit)
        if left is not None:
            raise ResourceExhausted(
                f"the file cache is full: of {left} bytes all that could go is in use by running work"
                f"{self._tell_pins()}, and {extra_bytes} more do not fit into its {self._max_bytes}: "
                "raise its max_bytes"
            )

    def prune(self, target_bytes: int) -> int:
        """Evict until the cache takes no more than this, or all else is in use; return its size then."""
        with translate_os_errors("cannot prune the file cache"), self._lock.held():
            self._rescan()
            self._reduce(target_bytes)
            return self._context.ledger.total_bytes() or 0

    def plan(self, target_bytes: int) -> list[tuple[str, FoundEntry]]:
        """List what `prune` would evict now, in that order: the group's folder and the entry."""
        planned = []
        with translate_os_errors("cannot look through the file cache"), self._lock.held():
            self._rescan()
            candidates, self._candidates = self._candidates, None  # used up below
            assert candidates is not None
            candidates.read_uses(self._uses, self._context.host.now_ns())
            scan = candidates.scan
            left = self._context.ledger.total_bytes() or 0
            while left > target_bytes and (row := candidates.next_row(is_fresh=True)) is not None:
                group, space, hash_ = scan.name(row)
                size = int(scan.disk_bytes[row])
                planned.append((group, FoundEntry(space, hash_, size, int(scan.used_ns[row]), None)))
                left -= size
        return planned

    def close(self) -> None:
        """End the thread and give up the descriptor. A forked child leaves the thread to its parent."""
        if self._context.folder.is_own:
            with self._thread_lock:
                self._is_closing.set()
                thread = self._thread
            if thread is not None:
                thread.join()
        self._lock.close()

    def _evict_ahead(self) -> bool:
        """Scan if it is time, and evict to the goal, in turns with others; return whether it was of use."""
        with translate_os_errors("cannot evict from the file cache"):
            total = self._context.ledger.total_bytes() or 0
            with self._lock.held_now() as held:
                if held and self._should_scan(total):
                    self._rescan()
                    if self._should_scan(total):
                        return False
            if total <= self._evict_from_bytes:
                return held
            while not self._is_closing.wait(AHEAD_PAUSE_S):
                if (self._context.ledger.total_bytes() or 0) <= self._goal_bytes:
                    return True
                with self._lock.held_now() as held:
                    if not held or self._reduce(self._goal_bytes, AHEAD_ENTRIES) is not None:
                        return False
        return True

    def _check_open(self) -> None:
        if self._is_closing.is_set():
            raise Cancelled("the file cache was closed while it was used")
        current().check()

    def _reduce(self, limit: int, most: int | None = None) -> int | None:
        """Evict down to `limit` bytes; return the size when no more could go, and None otherwise.

        Ends, with None, also after `most` evictions. The caller holds the eviction lock.
        """
        scanned = False
        fruitless = 0
        # Reading pins may take a while, for which nobody should have to wait: sections find them read.
        self._pins.refresh(self._context.ledger.pin_generation())
        while True:
            self._check_open()
            candidates = self._candidates
            with self._context.ledger.section() as section:
                total = section.total_bytes
                state = (section.lease_generation, section.changes, section.pin_generation)
                # Else an entry that others added since the scan began may go, and the next scan finds it.
                is_complete = candidates is not None and candidates.changes == section.changes
                if candidates is not None:
                    self._refresh_protection(section, candidates)
            if (total is not None and total <= limit) or most == 0:
                return None
            known = self._exhausted
            is_known = known is not None and known.state == state and time.monotonic() < known.until_s
            if total is not None and is_known:
                return total
            if total is None or candidates is None:
                self._rescan()
                scanned = True
                fruitless += 1
                continue
            candidates.read_uses(self._uses, self._context.host.now_ns())
            if self._evict_one(candidates, is_fresh=scanned):
                fruitless = 0
                most = None if most is None else most - 1
                continue
            self._candidates = None
            if scanned and (is_complete or fruitless >= MAX_FRUITLESS_SCANS):
                scan = candidates.scan
                pinned = self._protection.is_pinned(scan, np.arange(len(scan)))
                pinned_bytes = int(scan.disk_bytes[pinned].sum())
                self._exhausted = _Exhausted(state, time.monotonic() + RETRY_SCAN_S, pinned_bytes)
                return total

    def _tell_pins(self) -> str:
        """Return what an error says of pins."""
        totals = self._pins.totals()
        if damaged := totals.damaged_pins:
            return (
                f" or held because {damaged[0]!r} is damaged, one of {len(damaged)} such pins "
                "(pin again what it kept, or unpin it)"
            )
        if not totals.pins:
            return ""
        pinned_bytes = self._exhausted.pinned_bytes if self._exhausted else 0
        return f" or pinned ({pinned_bytes} bytes by {totals.pins} pins)"

    def _evict_one(self, candidates: Candidates, *, is_fresh: bool) -> bool:
        """Evict the next entry that may go; return False when there is none."""
        while (row := candidates.next_row(is_fresh=is_fresh)) is not None:
            with self._context.ledger.section() as section:
                size = self._evict_file(section, candidates, row)
            if size is not None:
                candidates.changes += 1
                self._context.counters.add(evicted_entries=1, evicted_bytes=size)
                return True
        return False

    def _evict_file(self, section: Section, candidates: Candidates, row: int) -> int | None:
        self._refresh_protection(section, candidates)
        if self._protection.holds(candidates.scan, np.array([row]))[0]:
            candidates.set_aside(row)
            return None
        group, space, hash_ = candidates.scan.name(row)
        path = self._context.layout.entry(space, hash_, group)
        try:
            status = os.stat(path, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                self._context.folder.set_aside(path)
                return None
            if status.st_atime_ns > candidates.scan.used_ns[row]:
                candidates.put_back(row, status.st_atime_ns)
                return None
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._context.host.after_step("evict.unlinked")
        size = disk_bytes(status)
        section.change(entry_name(group, space, hash_), size, 0)
        return size

    def _refresh_protection(self, section: Section, candidates: Candidates) -> None:
        if self._protection.refresh(section):
            candidates.set_protection(self._protection)

    def _rescan(self) -> None:
        """Scan, set the ledger right, and order what was found. The caller holds the eviction lock."""
        layout = self._context.layout
        self._context.folder.sweep()
        trees_bytes = sweep_trees(self._context)
        ledger = self._context.ledger
        # Here too, so that nobody waits; and again, as some hand may have moved files.
        self._pins.refresh(ledger.pin_generation(), again=True)
        with ledger.section() as section:
            section.begin_scan()
            changes = section.changes
        try:
            self._context.host.after_step("scan.begun")
            begun_ns = self._context.host.now_ns()
            is_suspect = self._durability.is_suspect if self._durability.windows else None
            scan = Scan(layout, is_suspect, self._check_open)
            self._context.host.after_step("scan.listed")
            with ledger.section() as section:
                changed = section.end_scan()
                seen = scan.sizes_by_entry(set(changed))
                total = trees_bytes + int(scan.disk_bytes.sum())
                total += sum(size - seen.get(name, 0) for name, size in changed.items())
                section.set_total(total)
                self._protection.refresh(section, again=True)
        except BaseException:
            with unbounded(), ledger.section() as section:
                section.abandon_scan()
            raise
        self._context.counters.add(scans=1)
        for path in scan.odd:
            self._context.set_aside_odd(path)
        for group, hash_ in scan.lost:
            of_group = replace(self._context, layout=Layout(layout.root, group))
            of_group.remove_entry(Space.PRIVATE, hash_)
        if is_suspect is not None and not scan.suspects:
            self._durability.clear()
        self._candidates = Candidates(scan, self._protection, begun_ns, changes)
        self._exhausted = None


class Candidates:
    """The entries that a scan found, in order of last use, and how far they are used up. For one thread."""

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

    @property
    def are_few(self) -> bool:
        """Whether nearly all of them are used up or set aside."""
        return len(self._order) - self._next + len(self._later) <= len(self.scan) // AHEAD_PART

    def next_row(self, *, is_fresh: bool) -> int | None:
        """Return the row of the entry that was used longest ago, which is then no candidate any more.

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
        """Make an entry a candidate again, last used at this time."""
        self.scan.used_ns[row] = used_ns
        heapq.heappush(self._later, (used_ns, row))

    def set_aside(self, row: int) -> None:
        """Keep an entry that is leased or pinned for later."""
        self._aside.append(row)

    def set_protection(self, protection: Protection) -> None:
        """Set aside what leases and pins protect now, and take back what they do not."""
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
        scan.used_ns = apply_uses(scan.used_ns, scan.use_keys, records, now_ns)
        self._sort(np.array(self._take_rest(), dtype=np.int64))

    def _take_rest(self) -> list[int]:
        return self._order[self._next :] + [row for _, row in self._later]

    def _sort(self, rows: npt.NDArray[np.int64]) -> None:
        self._later = []
        self._next = 0
        self._order = rows[np.argsort(self.scan.used_ns[rows], kind="stable")].tolist()
