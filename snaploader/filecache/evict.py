"""Making room: what was used longest ago goes first.

A scan gives all entries in order of last use; the list is kept and used up over many calls. It stays
in the right order: an entry used since has a later time than all that were not, which is seen when its
turn comes and sends it to the back; an entry added since is younger than all that were not used since.
When only entries that were used since are left, the next scan makes a new list. One process evicts at a time.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from typing import NamedTuple, TypeAlias

import numpy as np

from snaploader import locks
from snaploader.errors import ResourceExhausted, translate_os_errors
from snaploader.filecache import directories
from snaploader.filecache.candidates import Candidates
from snaploader.filecache.durability import Durability
from snaploader.filecache.environment import Environment
from snaploader.filecache.layout import Space
from snaploader.filecache.ledger import Section
from snaploader.filecache.pintable import PinTable
from snaploader.filecache.protection import Protection
from snaploader.filecache.recency import UseLog
from snaploader.filecache.scan import Found, Scan, disk_bytes, entry_name, group_names, set_aside_odd
from snaploader.filecache.trash import TrashCan
from snaploader.folders import OddEntry
from snaploader.locks import FileLock

MAX_FRUITLESS_SCANS = 3
"""Scans in a row that others changed the cache during, after which it is believed that nothing can go."""
RETRY_SCAN_S = 1.0
"""How long a scan that found nothing to evict is believed while no entry, lease or pin changes."""

_State: TypeAlias = "tuple[int, int, int]"
"""The ledger's counts of leases, changes and pins."""


class _Exhausted(NamedTuple):
    """A scan found that nothing can go."""

    state: _State
    when_s: float
    pinned_bytes: int


class Evictor:
    """Keeps the cache within its bound. Thread-safe, process-safe."""

    def __init__(
        self,
        environment: Environment,
        durability: Durability,
        trash: TrashCan,
        uses: UseLog,
        pins: PinTable,
    ) -> None:
        self._env = environment
        self._durability = durability
        self._trash = trash
        self._uses = uses
        self._pins = pins
        self._protection = Protection(environment.layout, pins)
        self._candidates: Candidates | None = None
        self._exhausted: _Exhausted | None = None
        self._lock = FileLock(environment.session.open_written(f"{environment.layout.usage}/evict.lock"))
        with self._lock.held_now() as held:
            if held:
                # Nobody scans; if the ledger says so, that process was killed.
                with environment.ledger.section() as section:
                    section.abandon_scan()

    def make_room(self, extra_bytes: int) -> None:
        """Evict until `extra_bytes` more fit. ResourceExhausted when they cannot."""
        limit = self._env.max_bytes - extra_bytes
        if limit < 0:
            raise ResourceExhausted(
                f"{extra_bytes} bytes do not fit into a file cache of {self._env.max_bytes}: "
                "raise its max_bytes"
            )
        left = self._reduce(limit)
        if left is not None:
            raise ResourceExhausted(
                f"the file cache is full: of {left} bytes all that could go is in use by running work"
                f"{self._tell_pins()}, and {extra_bytes} more do not fit into its {self._env.max_bytes}: "
                "raise its max_bytes"
            )

    def prune(self, target_bytes: int) -> int:
        """Evict until the cache takes no more than this, or all else is in use; its size then."""
        with translate_os_errors("cannot prune the file cache"), self._lock.held():
            self._rescan()
        self._reduce(target_bytes)
        return self._env.ledger.total_bytes() or 0

    def plan(self, target_bytes: int) -> list[tuple[str, Found]]:
        """What `prune` would evict now, in that order: the group's folder and the entry. Evicts nothing."""
        planned = []
        with translate_os_errors("cannot look through the file cache"), self._lock.held():
            self._rescan()
            candidates, self._candidates = self._candidates, None  # used up below
            assert candidates is not None
            candidates.read_uses(self._uses, self._env.host.now_ns())
            scan = candidates.scan
            left = self._env.ledger.total_bytes() or 0
            while left > target_bytes and (row := candidates.next_row(is_fresh=True)) is not None:
                group, space, hash_ = scan.name(row)
                if space is Space.TREES:
                    lock = locks.try_lock(f"{self._env.layout.entry(space, hash_, group)}/lock")
                    if lock is None:
                        continue  # in use
                    os.close(lock)
                size = int(scan.disk_bytes[row])
                planned.append((group, Found(space, hash_, size, int(scan.used_ns[row]), None)))
                left -= size
        return planned

    def close(self) -> None:
        """Give up the descriptor."""
        self._lock.close()

    def _reduce(self, limit: int) -> int | None:
        """Evict down to `limit` bytes; None, or the size that was left when there was nothing to evict."""
        with translate_os_errors("cannot evict from the file cache"), self._lock.held():
            scanned = False
            fruitless = 0
            # Reading pins may take a while, for which nobody should have to wait: sections find them read.
            self._pins.refresh(self._env.ledger.pin_generation())
            while True:
                candidates = self._candidates
                with self._env.ledger.section() as section:
                    total = section.total_bytes
                    state = (section.lease_generation, section.changes, section.pin_generation)
                    # Else an entry that others added since the scan began may go, and the next scan finds it.
                    is_complete = candidates is not None and candidates.changes == section.changes
                    if candidates is not None:
                        self._refresh_protection(section, candidates)
                if total is not None and total <= limit:
                    return None
                if total is not None and self._still_exhausted(state):
                    return total
                if total is None or candidates is None:
                    self._rescan()
                    scanned = True
                    fruitless += 1
                    continue
                candidates.read_uses(self._uses, self._env.host.now_ns())
                if self._evict_one(candidates, is_fresh=scanned):
                    fruitless = 0
                    continue
                pinned_bytes = self._pinned_bytes(candidates.scan)
                self._candidates = None
                if scanned and (is_complete or fruitless >= MAX_FRUITLESS_SCANS):
                    self._exhausted = _Exhausted(state, time.monotonic(), pinned_bytes)
                    return total

    def _still_exhausted(self, state: _State) -> bool:
        known = self._exhausted
        return known is not None and known.state == state and time.monotonic() < known.when_s + RETRY_SCAN_S

    def _pinned_bytes(self, scan: Scan) -> int:
        """Disk blocks, in bytes, of the entries that pins keep."""
        return int(scan.disk_bytes[self._protection.is_pinned(scan, np.arange(len(scan)))].sum())

    def _tell_pins(self) -> str:
        """What an error says of pins."""
        totals = self._pins.totals()
        if totals.damaged:
            return (
                f" or held because {totals.damaged[0]!r} is damaged, one of {len(totals.damaged)} such pins "
                "(pin again what it kept, or unpin it)"
            )
        if not totals.pins:
            return ""
        pinned_bytes = self._exhausted.pinned_bytes if self._exhausted else 0
        return f" or pinned ({pinned_bytes} bytes by {totals.pins} pins)"

    def _evict_one(self, candidates: Candidates, *, is_fresh: bool) -> bool:
        """Evict the next entry that may go; False when there is none."""
        while (row := candidates.next_row(is_fresh=is_fresh)) is not None:
            group, space, hash_ = candidates.scan.name(row)
            if space is Space.TREES:
                size = self._evict_directory(group, hash_, candidates, row)
            else:
                with self._env.ledger.section() as section:
                    size = self._evict_file(section, group, space, hash_, candidates, row)
            if size is not None:
                candidates.changes += 1
                self._env.counters.add(evicted_entries=1, evicted_bytes=size)
                return True
        return False

    def _evict_file(
        self, section: Section, group: str, space: Space, hash_: str, candidates: Candidates, row: int
    ) -> int | None:
        self._refresh_protection(section, candidates)
        if self._protection.holds(candidates.scan, np.array([row]))[0]:
            candidates.set_aside(row)
            return None
        path = self._env.layout.entry(space, hash_, group)
        try:
            status = os.stat(path, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                self._env.session.set_aside(path)
                return None
            if status.st_atime_ns > candidates.scan.used_ns[row]:
                candidates.put_back(row, status.st_atime_ns)
                return None
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._env.host.after_step("evict.unlinked")
        size = disk_bytes(status)
        section.change(entry_name(group, space, hash_), size, 0)
        return size

    def _evict_directory(self, group: str, hash_: str, candidates: Candidates, row: int) -> int | None:
        entry = self._env.layout.entry(Space.TREES, hash_, group)
        with suppress(FileNotFoundError, NotADirectoryError, OddEntry):
            _, used_ns = directories.measure_entry(entry)
            if used_ns <= candidates.scan.used_ns[row]:
                return directories.discard_entry(self._env, self._trash, entry)
            candidates.put_back(row, used_ns)
        return None

    def _refresh_protection(self, section: Section, candidates: Candidates) -> None:
        if self._protection.refresh(section):
            candidates.set_protection(self._protection)

    def _rescan(self) -> None:
        """Scan, set the ledger right, and order what was found. The caller holds the eviction lock."""
        layout = self._env.layout
        self._env.session.sweep()
        for group in group_names(layout):
            directories.sweep_doomed(self._env, self._trash, layout, group)
        ledger = self._env.ledger
        # Here too, so that nobody waits; and again, as some hand may have moved files.
        self._pins.refresh(ledger.pin_generation(), again=True)
        with ledger.section() as section:
            section.begin_scan()
            changes = section.changes
        try:
            self._env.host.after_step("scan.begun")
            begun_ns = self._env.host.now_ns()
            scan = Scan(layout, self._durability.is_suspect)
            self._env.host.after_step("scan.listed")
        except BaseException:
            with ledger.section() as section:
                section.abandon_scan()
            raise
        with ledger.section() as section:
            changed = section.end_scan()
            seen = scan.sizes_by_entry(set(changed))
            total = int(scan.disk_bytes.sum())
            total += sum(size - seen.get(name, 0) for name, size in changed.items())
            section.set_total(total)
            self._protection.refresh(section, again=True)
        self._env.counters.add(scans=1)
        for path in scan.odd:
            set_aside_odd(self._env, path)
        if not scan.suspects and self._durability.any_suspects:
            self._durability.clear()
        self._candidates = Candidates(scan, self._protection, begun_ns, changes)
        self._exhausted = None
