"""How many bytes the cache takes, shared by all processes, and the lock under which that changes.

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
from collections.abc import Iterator
from contextlib import contextmanager

from snaploader.filecache.session import Session
from snaploader.files import remove_tree
from snaploader.folders import OddEntry, open_regular
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
        """An entry grew from `old_bytes` to `new_bytes` of disk blocks; 0 is absent.

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
        """A lease began or ended."""
        self.lease_generation += 1
        self._store()

    def pins_changed(self) -> None:
        """A pin is about to come or go."""
        self.pin_generation += 1
        self._store()

    def forget_total(self) -> None:
        """The total is not to be trusted, as after a power failure."""
        self._total = _UNKNOWN
        self._store()

    def begin_scan(self) -> None:
        """From now on changes are noted. Only the holder of the eviction lock scans."""
        self._ledger.clear_journal()
        self._scanning = 1
        self._store()

    def abandon_scan(self) -> None:
        """The scan failed, or its process died: nothing is noted any more."""
        if self._scanning:
            self._scanning = 0
            self._ledger.clear_journal()
            self._store()

    def end_scan(self) -> dict[str, int]:
        """What changed since `begin_scan`: entry to its size now. `set_total` must follow."""
        self._scanning = 0
        changed = self._ledger.read_journal()
        self._ledger.clear_journal()
        return changed

    def set_total(self, total_bytes: int) -> None:
        """The result of a scan."""
        self._total = total_bytes
        self._store()


class Ledger:
    """The shared count of a cache folder. Thread-safe, process-safe."""

    def __init__(self, session: Session, folder: str) -> None:
        self._session = session
        self._journal = f"{folder}/journal"
        self.lock = FileLock(session.open_written(f"{folder}/ledger"))

    @contextmanager
    def section(self) -> Iterator[Section]:
        """Change the cache alone. Nothing slow belongs inside."""
        with self.lock.held():
            yield Section(self)

    def total_bytes(self) -> int | None:
        """The total as it stands; None until a scan has found out."""
        with self.section() as section:
            return section.total_bytes

    def pin_generation(self) -> int:
        """How often pins came or went."""
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
        fd = self._session.open_written(self._journal, os.O_WRONLY | os.O_APPEND)
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
