"""What a cache takes: the ledger of bytes that all processes share, entries that come and go, statistics.

Every change of the cache (an entry, lease or pin comes or goes) happens in a section: under the exclusive
lock of `usage/ledger` (docs/formats/filecache.md), for some ten microseconds. Within a section the total is
changed before the file system is, when an entry appears, and after it, when one goes. So a process killed in
between leaves a total that is too high, never too low, until the next scan puts it right.

A scan takes seconds in a big cache and nobody waits for it. While one runs, sections also note what
they change in `usage/journal`; the scan ends with a section that takes, for each entry noted, the
last word of the journal over what the scan saw or missed.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from snaploader._environment import HostEnvironment
from snaploader.digest import Digest
from snaploader.errors import NotFound
from snaploader.filecache.layout import ENTRY_NAME_LENGTH, Layout, OpenFolder, Space, disk_bytes, entry_name
from snaploader.files import FileLock, OddEntry, closing_fd, open_regular, read_regular, remove_tree

_FORMAT = struct.Struct("<8sqqqqq")
_MAGIC = b"snapled1"
_UNKNOWN = -1
_MAX_JOURNAL_BYTES = 256 << 20
"""A scan during which more than a million entries change is put right by the next one."""


class Section:
    """What the holder of the ledger's lock may see and change."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        data = os.pread(ledger.lock.fd, _FORMAT.size, 0)
        fields: tuple[bytes, int, int, int, int, int] = (_MAGIC, _UNKNOWN, 0, 0, 0, 0)
        if len(data) == _FORMAT.size and data.startswith(_MAGIC):
            fields = _FORMAT.unpack(data)
        _, self._total, self.lease_generation, self.changes, self._scanning, self.pin_generation = fields
        ledger.seen_bytes = self._total

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
        """Count that an entry (of this `entry_name`) has so many bytes of disk blocks now; 0 is absent."""
        if self._total >= 0:
            self._total = max(0, self._total - old_bytes + new_bytes)
        self.changes += 1
        if self._scanning:
            flags = os.O_WRONLY | os.O_APPEND
            with closing_fd(self._ledger.folder.open_written(self._ledger.journal, flags)) as fd:
                os.write(fd, f"{new_bytes} {entry}\n".encode())
        self._store()

    def leases_changed(self) -> None:
        """Count that a lease began or ended."""
        self.lease_generation += 1
        self._store()

    def pins_changed(self) -> None:
        """Count that a pin is about to come or go."""
        self.pin_generation += 1
        self._store()

    def begin_scan(self) -> None:
        """Note changes from now on. Only the holder of the eviction lock scans."""
        remove_tree(self._ledger.journal)
        self._scanning = 1
        self._store()

    def abandon_scan(self) -> None:
        """Note nothing any more, as the scan failed or its process died."""
        if self._scanning:
            self._scanning = 0
            remove_tree(self._ledger.journal)
            self._store()

    def end_scan(self) -> dict[str, int]:
        """Return what changed since `begin_scan`: entry to its size now. `set_total` must follow."""
        self._scanning = 0
        changed = {}
        with suppress(FileNotFoundError, OddEntry):
            data = read_regular(self._ledger.journal, _MAX_JOURNAL_BYTES)
            for line in data.decode(errors="replace").splitlines():
                # A writer that met a full disk may have left a part of a line, and then changed nothing.
                size, _, entry = line.partition(" ")
                if size.isdigit() and entry:
                    changed[entry] = int(size)
        remove_tree(self._ledger.journal)
        return changed

    def set_total(self, total_bytes: int | None) -> None:
        """Set the total that a scan found; None when it is not to be trusted, as after a power failure."""
        self._total = _UNKNOWN if total_bytes is None else total_bytes
        self._store()


class Ledger:
    """The count of bytes that all processes share, within `max_bytes`. Thread-safe, process-safe."""

    def __init__(self, folder: OpenFolder, max_bytes: int) -> None:
        self.folder = folder
        self.journal = f"{folder.layout.usage}/journal"
        self.max_bytes = max_bytes
        self.added_bytes = 0
        """What this object added, in bytes of disk blocks."""
        self.lock = FileLock(folder.open_written(f"{folder.layout.usage}/ledger"))
        self.seen_bytes = _UNKNOWN
        """The total that the last section of this object saw first."""
        Section(self)

    def evict_with(
        self, make_room: Callable[[int], None], fill: Callable[[int], None], fills_from_bytes: int
    ) -> None:
        """Have `make_room` called with bytes that do not fit, and `fill` with a total over this bound."""
        self._make_room, self._fill, self._fills_from_bytes = make_room, fill, fills_from_bytes

    def add(self, size_bytes: int, put: Callable[[Section], bool]) -> bool:
        """Call `put` in a section in which so many more bytes fit; return what it returns.

        Evicts until they do. ResourceExhausted when they cannot.
        """
        while True:
            with self.section() as section:
                total = section.total_bytes
                if total is not None and total + size_bytes <= self.max_bytes:
                    is_put = put(section)
                    self.added_bytes += size_bytes
                    break
            self._make_room(size_bytes)
        if total + size_bytes > self._fills_from_bytes:
            self._fill(total + size_bytes)
        return is_put

    def keep_bound(self) -> None:
        """Evict, before anything is written to what may be a full disk, if the bound was lowered."""
        if self.seen_bytes > self.max_bytes:
            self._make_room(0)

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
    """Paths of pins that cannot be read, sorted. Of their groups nothing is evicted."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry of a group."""

    kind: str
    """"blob", "ref", or "private" (see `FileCache.put_private`)."""
    key: str
    """The hash of a blob, the key of a ref or the name of a private file: 64 hexadecimal digits."""
    digest: Digest | None
    """Of a blob, or a private file, whose function does not matter."""
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
    """What the pins of all groups keep together; see `CacheStatistics`."""

    pins: int
    pinned_blobs: int
    pinned_bytes: int
    pinned_refs: int
    damaged_pins: tuple[str, ...]


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
        stands: dict[str, Any] = {"total_bytes": total_bytes, "max_bytes": max_bytes, **pins._asdict()}
        with self._lock:
            counted = {field.name: self._values.get(field.name, 0) for field in fields(CacheStatistics)}
        return CacheStatistics(**counted | stands)


@dataclass(frozen=True)
class CacheContext:
    """What the parts of one open cache share, and what is done alike with blobs and refs."""

    layout: Layout
    folder: OpenFolder
    ledger: Ledger
    host: HostEnvironment
    counters: Counters = field(default_factory=Counters)

    def name(self, space: Space, hash_: str) -> str:
        """Return the ledger's name of an entry of this group."""
        return entry_name(self.layout.group, space, hash_)

    def open_entry(self, path: str, what: str) -> tuple[int, os.stat_result]:
        """Open an entry's file for reading. NotFound when there is none; what is no file is set aside."""
        try:
            return open_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{what} is not in the file cache") from None
        except OddEntry as error:
            self.set_aside_odd(path)
            raise NotFound(f"{what} is not in the file cache: {error}") from error

    def remove_entry(self, space: Space, hash_: str, inode: int | None = None) -> bool:
        """Remove an entry, only that very file if `inode` is given; return whether there was one."""
        path = self.layout.entry(space, hash_)
        with self.ledger.section() as section:
            try:
                status = os.stat(path, follow_symlinks=False)
                if inode not in (None, status.st_ino):
                    return False
                if not stat.S_ISREG(status.st_mode):
                    self.folder.set_aside(path)
                    return True
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            section.change(self.name(space, hash_), disk_bytes(status), 0)
        return True

    def set_aside_odd(self, path: str) -> None:
        """Move what is called like an entry and is none to the quarantine. It was not counted."""
        # In a section no entry takes its place meanwhile.
        with self.ledger.section():
            try:
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            # A file that has the place of a folder of entries has a shorter name than an entry.
            if not stat.S_ISREG(status.st_mode) or len(os.path.basename(path)) != ENTRY_NAME_LENGTH:
                self.folder.set_aside(path)
