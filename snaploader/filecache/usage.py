"""What a cache takes and counts: the ledger of bytes that all processes share, and statistics.

The file `usage/ledger` is 48 bytes: a magic, the total of all entries in bytes of disk blocks, and four
counters. Every change of the cache (an entry, lease or pin comes or goes) happens in a section: under an
exclusive lock, for some ten microseconds. Within a section the total is changed before the file system is,
when an entry appears, and after it, when one goes. So a process killed in between leaves a total that is
too high, never too low, until the next scan puts it right.

A scan takes seconds in a big cache and nobody waits for it. While one runs, sections also note what
they change in `usage/journal`; the scan ends with a section that takes, for each entry noted, the
last word of the journal over what the scan saw or missed.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from snaploader._environment import HostEnvironment
from snaploader.digest import Digest
from snaploader.filecache.layout import Layout
from snaploader.filecache.openfolder import OpenFolder
from snaploader.files import OddEntry, open_regular, remove_tree
from snaploader.locks import FileLock

_FORMAT = struct.Struct("<8sqqqqq")
_MAGIC = b"snapled1"
_UNKNOWN = -1
_MAX_JOURNAL_CHARACTERS = 256 << 20
"""A scan during which more than a million entries change is put right by the next one."""


class Section:
    """What the holder of the ledger's lock may see and change."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._load()

    def _load(self) -> None:
        data = os.pread(self._ledger.lock.fd, _FORMAT.size, 0)
        fields: tuple[bytes, int, int, int, int, int] = (b"", _UNKNOWN, 0, 0, 0, 0)
        if len(data) == _FORMAT.size:
            fields = _FORMAT.unpack(data)
        if fields[0] != _MAGIC:
            fields = (_MAGIC, _UNKNOWN, 0, 0, 0, 0)
        _, self._total, self.lease_generation, self.changes, self._scanning, self.pin_generation = fields

    def _store(self) -> None:
        data = _FORMAT.pack(
            _MAGIC, self._total, self.lease_generation, self.changes, self._scanning, self.pin_generation
        )
        os.pwrite(self._ledger.lock.fd, data, 0)

    @property
    def total_bytes(self) -> int | None:
        """What all entries take, in bytes of disk blocks; None until a scan has found out."""
        return None if self._total < 0 else self._total

    def change(self, entry: str, old_bytes: int, new_bytes: int) -> None:
        """Count that an entry grew from `old_bytes` to `new_bytes` of disk blocks; 0 is absent.

        Args:
            entry: Its path relative to the folder of all groups.
        """
        if self._total >= 0:
            self._total = max(0, self._total - old_bytes + new_bytes)
        self.changes += 1
        if self._scanning:
            self._ledger.note(entry, new_bytes)
        self._store()

    def leases_changed(self) -> None:
        """Count that a lease began or ended."""
        self.lease_generation += 1
        self._store()

    def pins_changed(self) -> None:
        """Count that a pin is about to come or go."""
        self.pin_generation += 1
        self._store()

    def forget_total(self) -> None:
        """Forget a total that is not to be trusted, as after a power failure."""
        self._total = _UNKNOWN
        self._store()

    def begin_scan(self) -> None:
        """Note changes from now on. Only the holder of the eviction lock scans."""
        self._ledger.clear_journal()
        self._scanning = 1
        self._store()

    def abandon_scan(self) -> None:
        """Note nothing any more, as the scan failed or its process died."""
        if self._scanning:
            self._scanning = 0
            self._ledger.clear_journal()
            self._store()

    def end_scan(self) -> dict[str, int]:
        """Return what changed since `begin_scan`: entry to its size now. `set_total` must follow."""
        self._scanning = 0
        changed = self._ledger.read_journal()
        self._ledger.clear_journal()
        return changed

    def set_total(self, total_bytes: int) -> None:
        """Set the total that a scan found."""
        self._total = total_bytes
        self._store()


class Ledger:
    """The count of bytes that all processes share. Thread-safe, process-safe."""

    def __init__(self, folder: OpenFolder, path: str) -> None:
        self._folder = folder
        self._journal = f"{path}/journal"
        self.lock = FileLock(folder.open_written(f"{path}/ledger"))

    @contextmanager
    def section(self) -> Iterator[Section]:
        """Change the cache alone. Nothing slow belongs inside."""
        with self.lock.held():
            yield Section(self)

    def total_bytes(self) -> int | None:
        """Return the total as it stands; None until a scan has found out."""
        with self.section() as section:
            return section.total_bytes

    def pin_generation(self) -> int:
        """Return how often pins came or went."""
        with self.section() as section:
            return section.pin_generation

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.lock.closed

    def close(self) -> None:
        """Give up the descriptor."""
        self.lock.close()

    # For sections only

    def note(self, entry: str, new_bytes: int) -> None:
        fd = self._folder.open_written(self._journal, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"{new_bytes} {entry}\n".encode())
        finally:
            os.close(fd)

    def read_journal(self) -> dict[str, int]:
        try:
            with os.fdopen(open_regular(self._journal)[0], encoding="utf-8", errors="replace") as file:
                lines = file.read(_MAX_JOURNAL_CHARACTERS).splitlines()
        except (FileNotFoundError, OddEntry):
            return {}
        changed = {}
        for line in lines:
            # A writer that met a full disk may have left a part of a line, and then changed nothing.
            size, _, entry = line.partition(" ")
            if size.isdigit() and entry:
                changed[entry] = int(size)
        return changed

    def clear_journal(self) -> None:
        remove_tree(self._journal)


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since this object was made, and what the folder holds now. Sizes are bytes."""

    total_bytes: int | None
    """Disk blocks of all entries of all groups; None until the first scan."""
    max_bytes: int
    hits: int
    """Blobs opened or read."""
    misses: int
    """Blobs asked for and absent."""
    added_blobs: int
    added_bytes: int
    """Content of the blobs added."""
    present_blobs: int
    """Blobs that were to be added and were there."""
    verified_blobs: int
    """Blobs hashed on their first use."""
    quarantined_blobs: int
    """Blobs with wrong bytes, taken out of use."""
    evicted_entries: int
    evicted_bytes: int
    """Disk blocks of what was evicted."""
    scans: int
    """Times the whole folder was scanned."""
    pins: int
    """Names under which something is pinned now, in all groups."""
    pinned_blobs: int
    """Blobs that pins name, whether they are here or not; each counts once in a group."""
    pinned_bytes: int
    """Content of those of them whose size the pins tell."""
    pinned_refs: int
    damaged_pins: tuple[str, ...]
    """Paths of pins that cannot be read. Of their groups nothing is evicted."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry of a group."""

    kind: str
    """"blob" or "ref"."""
    key: str
    """The hash of a blob or the key of a ref: 64 hexadecimal digits."""
    digest: Digest | None
    """Of a blob."""
    disk_bytes: int
    """Disk blocks taken."""
    last_used_s: float
    """Seconds since the epoch."""
    pinned: bool = False
    """Whether a pin names it, so that it is not evicted."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `FileCache.verify` found in its group."""

    blobs: int
    content_bytes: int
    bad_blobs: tuple[Digest, ...]
    """Those that were wrong and are in quarantine now."""
    refs: int
    bad_refs: tuple[str, ...]
    """Keys of refs that were damaged and are removed now."""
    pins: int
    bad_pins: tuple[str, ...]
    """Names of pins that are damaged. Until they are mended or unpinned nothing of the group is evicted."""


class PinTotals(NamedTuple):
    """What the pins of all groups keep together."""

    pins: int
    blobs: int
    content_bytes: int
    """Of those blobs whose size the pins tell; each counts once in a group."""
    refs: int
    damaged: tuple[str, ...]
    """Paths of pins that cannot be read, sorted."""


class Counters:
    """Running counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        """Add to counts, by the names of `CacheStatistics`."""
        with self._lock:
            for name, count in counts.items():
                self._values[name] = self._values.get(name, 0) + count

    def snapshot(self, total_bytes: int | None, max_bytes: int, pins: PinTotals) -> CacheStatistics:
        """Return all counts at one moment."""
        with self._lock:
            values = dict(self._values)
        stands: dict[str, Any] = {
            "total_bytes": total_bytes,
            "max_bytes": max_bytes,
            "pins": pins.pins,
            "pinned_blobs": pins.blobs,
            "pinned_bytes": pins.content_bytes,
            "pinned_refs": pins.refs,
            "damaged_pins": pins.damaged,
        }
        counted = (field.name for field in fields(CacheStatistics) if field.name not in stands)
        return CacheStatistics(**stands | {name: values.get(name, 0) for name in counted})


@dataclass(frozen=True)
class CacheContext:
    """What the parts of one open cache share."""

    layout: Layout
    folder: OpenFolder
    ledger: Ledger
    max_bytes: int
    host: HostEnvironment
    counters: Counters = field(default_factory=Counters)
