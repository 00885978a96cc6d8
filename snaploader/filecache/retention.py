"""What eviction leaves alone: what a lease or a pin of any process names, and groups with a damaged pin.

A lease keeps blobs while their user lives. It is a file `leases/<token>.<number>` with the first eight bytes
of each hash, sorted, little-endian; two hashes that begin alike only protect each other. It holds as long as
the owner of its token lives, so the lease of a killed process ends with it.

Pins (`pins`) are read once, then only those that changed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from snaploader.filecache import recency
from snaploader.filecache.layout import Layout, Space
from snaploader.filecache.openfolder import is_alive
from snaploader.filecache.pins import UNKNOWN_SIZE, is_pin_name, load_pin
from snaploader.filecache.scan import Scan
from snaploader.filecache.usage import CacheContext, PinTotals, Section
from snaploader.files import OddEntry, open_regular, read_file
from snaploader.formats.digests import Prefixes, are_among, distinct, to_prefixes, to_words

_MAX_LEASE_BYTES = 8 << 24
"""Of hashes as many as a pin may keep; what is larger is no lease."""


class Lease:
    """A promise that blobs are not evicted until it is released. A context manager. Thread-safe.

    What is in the cache when the lease begins stays, and so does what is added while it lasts. It does not
    keep a blob from `FileCache.remove` or from quarantine.
    """

    def __init__(self, context: CacheContext, prefixes: Prefixes) -> None:
        folder, ledger = context.folder, context.ledger
        self._ledger = ledger
        self._path: str | None = None
        if not len(prefixes):
            return
        path = f"{context.layout.leases}/{folder.unique_name()}"
        # Evictions happen in sections too, so none is under way that has not seen this lease.
        data = distinct(prefixes).astype("<u8").tobytes()
        with folder.staged(data) as temporary, ledger.section() as section:
            os.rename(temporary, path)
            # Killed here, the lease ends with its owner.
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
        """Read the leases if they changed, in a section of the ledger; return whether they did.

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
                alive[token] = is_alive(self._layout, token)
            if alive[token]:
                with suppress(FileNotFoundError, OddEntry):
                    held.append(_load(f"{self._layout.leases}/{name}"))
        self._prefixes = distinct(np.concatenate(held))
        self._generation = generation
        return True

    def protected(self, prefixes: Prefixes) -> npt.NDArray[np.bool_]:
        """Tell of each whether it is leased."""
        return are_among(prefixes, self._prefixes)


def _load(path: str) -> Prefixes:
    """Read what a lease keeps; nothing if no cache wrote such a file."""
    fd, status = open_regular(path)
    try:
        if status.st_size > _MAX_LEASE_BYTES:
            return np.empty(0, dtype=np.uint64)
        data = read_file(fd, status.st_size)
    finally:
        os.close(fd)
    return np.frombuffer(data, dtype="<u8", count=len(data) // 8).astype(np.uint64)


_logger = logging.getLogger(__name__)

_NO_KEYS: Prefixes = np.empty(0, dtype=np.uint64)
_NO_NUMBERS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


_Name: TypeAlias = "tuple[str, str]"
"""Folder of the group, and name."""
_Identity: TypeAlias = "tuple[int, int, int]"
"""Inode, time of last write and size: a pin is never written again, but replaced."""
_UNREAD: _Identity = (-1, -1, -1)
"""That of no file: the pin could not be read, and is tried again."""


class CountedKeys:
    """A set of keys, each with how many pins name it, and the size of its blob. For one thread at a time."""

    def __init__(self) -> None:
        self.keys = _NO_KEYS
        self.sizes_bytes = _NO_NUMBERS
        self._counts = _NO_NUMBERS

    def __len__(self) -> int:
        return len(self.keys)

    def change(
        self, removed: list[Prefixes], added: list[Prefixes], sizes_bytes: list[npt.NDArray[np.int64]]
    ) -> None:
        """Take in that pins with these keys went and came. What none names any more is forgotten.

        Args:
            sizes_bytes: Of the blobs added; unknown when there are none.
        """
        keys = np.concatenate([self.keys, *removed, *added])
        by = np.ones(len(keys), dtype=np.int64)
        by[: len(self.keys)] = self._counts
        by[len(self.keys) : len(keys) - sum(map(len, added))] = -1
        sizes = np.full(len(keys), UNKNOWN_SIZE, dtype=np.int64)
        sizes[: len(self.keys)] = self.sizes_bytes
        known = np.concatenate([_NO_NUMBERS, *sizes_bytes])
        sizes[len(keys) - len(known) :] = known
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        is_first = np.ones(len(keys), dtype=np.bool_)
        is_first[1:] = keys[1:] != keys[:-1]
        starts = np.flatnonzero(is_first)
        if len(starts):
            by, sizes = np.add.reduceat(by[order], starts), np.maximum.reduceat(sizes[order], starts)
        named = by > 0
        self.keys, self.sizes_bytes, self._counts = keys[starts][named], sizes[named], by[named]


class _Known(NamedTuple):
    """A pin that was read. Its keys are kept for when it goes, and its file with it."""

    identity: _Identity
    blobs: Prefixes
    refs: Prefixes
    is_damaged: bool


class PinTable:
    """All pins of all groups: 8 bytes for each hash of each pin, 24 for each pinned blob. Thread-safe.

    Entries go by the key that the log of uses gives them (`recency.keys`): a pin keeps only what is in its
    own group, and two entries whose keys are equal by chance only protect each other.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._generation = -1
        self._known: dict[_Name, _Known] = {}
        self._blobs = CountedKeys()
        self._refs = CountedKeys()
        self.version = 0
        """Rises whenever the table changes."""

    def refresh(self, generation: int, *, again: bool = False) -> None:
        """Read what changed. In a section of the ledger nothing changes meanwhile.

        Args:
            generation: The ledger's count of changes of pins, read before or in this very section.
            again: Look in any case, as some hand may have moved files.
        """
        with self._lock:
            if generation != self._generation or again:
                self._update()
                self._generation = generation

    def pinned(self, space: Space, keys: Prefixes) -> npt.NDArray[np.bool_]:
        """Tell of each key whether a pin names an entry of that key."""
        with self._lock:
            pinned = (self._refs if space is Space.REFS else self._blobs).keys
        return are_among(keys, pinned)

    def damaged_groups(self) -> set[str]:
        """Return the folder names of groups with a damaged pin, which may have kept anything there."""
        with self._lock:
            return {group for (group, _), known in self._known.items() if known.is_damaged}

    def totals(self) -> PinTotals:
        """Return what the pins kept together at the last refresh."""
        with self._lock:
            sizes = self._blobs.sizes_bytes
            damaged = (self._path(name) for name, known in self._known.items() if known.is_damaged)
            return PinTotals(
                len(self._known),
                len(self._blobs),
                int(sizes[sizes > 0].sum()),
                len(self._refs),
                tuple(sorted(damaged)),
            )

    def _update(self) -> None:
        gone = dict(self._known)
        came: dict[_Name, tuple[_Known, npt.NDArray[np.int64]]] = {}
        # A folder that changes meanwhile may be listed with a name twice.
        for name, identity in dict(self._listed()).items():
            known = gone.get(name)
            if known is not None and known.identity == identity:
                del gone[name]
                continue
            with suppress(FileNotFoundError):
                came[name] = self._read(name, identity)
        if not gone and not came:
            return
        old, new = list(gone.values()), [known for known, _ in came.values()]
        sizes = [size for _, size in came.values()]
        self._blobs.change([one.blobs for one in old], [one.blobs for one in new], sizes)
        self._refs.change([one.refs for one in old], [one.refs for one in new], [])
        for name in gone:
            del self._known[name]
        self._known.update((name, known) for name, (known, _) in came.items())
        self.version += 1

    def _listed(self) -> Iterator[tuple[_Name, _Identity]]:
        for group in os.listdir(self._layout.groups):
            with (
                suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(self._layout.pins(group)) as found,
            ):
                for entry in found:
                    if is_pin_name(entry.name):
                        with suppress(FileNotFoundError):
                            yield (group, entry.name), _identity(entry.stat(follow_symlinks=False))

    def _read(self, name: _Name, identity: _Identity) -> tuple[_Known, npt.NDArray[np.int64]]:
        """Read a pin; return what is kept of it, and the sizes of its blobs. Raises FileNotFoundError."""
        group = name[0]
        pin = None
        try:
            status, pin = load_pin(self._path(name))
            identity = _identity(status)
        except FileNotFoundError:
            raise
        except OSError:
            _logger.warning("pin %r cannot be read", self._path(name), exc_info=True)
            identity = _UNREAD
        if pin is None:
            return _Known(identity, _NO_KEYS, _NO_KEYS, is_damaged=True), _NO_NUMBERS
        blobs = recency.keys(group, to_prefixes(pin.hashes))
        refs = recency.keys(group, to_words(pin.refs)[:, 0])
        return _Known(identity, blobs, refs, is_damaged=False), pin.sizes_bytes

    def _path(self, name: _Name) -> str:
        return f"{self._layout.pins(name[0])}/{name[1]}"


def _identity(status: os.stat_result) -> _Identity:
    return status.st_ino, status.st_mtime_ns, status.st_size


Rows = npt.NDArray[np.int64]
"""Places in a scan."""


class Protection:
    """Leases and pins of all processes, as the evictor sees them. For one thread at a time."""

    def __init__(self, layout: Layout, pins: PinTable) -> None:
        self._leases = LeaseTable(layout)
        self._pins = pins
        self._pins_version = -1

    def refresh(self, section: Section, *, again: bool = False) -> bool:
        """Read what changed; return whether anything did. What `again` does: see the tables."""
        changed = self._leases.refresh(section.lease_generation, again=again)
        self._pins.refresh(section.pin_generation)
        if self._pins_version != self._pins.version:
            self._pins_version = self._pins.version
            changed = True
        return changed

    def holds(self, scan: Scan, rows: Rows) -> npt.NDArray[np.bool_]:
        """Tell of each of these entries whether it must stay."""
        is_blob = scan.space[rows] <= Space.BLAKE3
        return (self._leases.protected(scan.prefixes[rows]) & is_blob) | self.is_pinned(scan, rows)

    def is_pinned(self, scan: Scan, rows: Rows) -> npt.NDArray[np.bool_]:
        """Tell of each of these entries whether a pin keeps it, or may have before it was damaged."""
        space = scan.space[rows]
        keys = scan.use_keys[rows]
        pinned: npt.NDArray[np.bool_] = self._pins.pinned(Space.SHA256, keys) & (space <= Space.BLAKE3)
        pinned |= self._pins.pinned(Space.REFS, keys) & (space == Space.REFS)
        for group in self._pins.damaged_groups():
            if group in scan.groups:
                pinned |= scan.group[rows] == scan.groups.index(group)
        return pinned
