"""What eviction leaves alone: what a lease or a pin of any process names, and groups with a damaged pin.

A lease keeps blobs while their user lives. It is a file `leases/<token>.<number>` with the first eight bytes
of each hash, sorted, little-endian; two hashes that begin alike only protect each other. It holds as long as
the owner of its token lives, so the lease of a killed process ends with it.

A pin keeps blobs and refs until its name is unpinned, over restarts and crashes. It is a file `pins/<name>`
of its group, replaced in one step by rename(2) and flushed to disk; docs/formats/filecache.md has its
grammar. What a damaged pin was to keep is not known any more, so that nothing of its group is evicted until
it is pinned again or unpinned.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from snaploader.context import current
from snaploader.digest import HASH_BYTES, MAX_BLOB_BYTES, Digest, DigestFunction
from snaploader.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    translate_os_errors,
)
from snaploader.filecache.bulk import Scan, use_keys
from snaploader.filecache.layout import Layout, Space, check_hash, is_alive
from snaploader.filecache.usage import CacheContext, PinTotals, Section
from snaploader.files import (
    OddEntry,
    closing_fd,
    flush_folder,
    hash_bytes,
    held_in_call,
    is_odd,
    open_regular,
    read_file,
    read_regular,
)
from snaploader.formats.digests import (
    Prefixes,
    Words,
    are_among,
    distinct,
    is_first,
    sizes_of,
    to_hex,
    to_prefixes,
    to_rows,
    to_words,
)

UNKNOWN_SIZE = -1
MAX_PIN_ENTRIES = 1 << 24
"""Hashes, and refs, of one pin: 8 TiB in chunks of 512 KiB."""
MAX_NAME_LENGTH = 200

_MAGIC = b"snappin1"
_CHECKED_FROM = len(_MAGIC) + HASH_BYTES
_COUNTS = struct.Struct("<QQ")
_HEADER_BYTES = _CHECKED_FROM + _COUNTS.size
_MAX_FILE_BYTES = _HEADER_BYTES + MAX_PIN_ENTRIES * (HASH_BYTES + 8 + HASH_BYTES)
_NAME = re.compile(rf"[A-Za-z0-9_@-][A-Za-z0-9._@-]{{0,{MAX_NAME_LENGTH - 1}}}")
_MAX_LEASE_BYTES = 8 * MAX_PIN_ENTRIES
"""Of hashes as many as a pin may keep; what is larger is no lease."""
_NO_KEYS: Prefixes = np.empty(0, dtype=np.uint64)
_NO_NUMBERS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

_logger = logging.getLogger(__name__)


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
        if path is None or self._ledger.lock.closed:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        # When the call is over that waits here, the next scan sees it.
        with suppress(Cancelled, DeadlineExceeded), self._ledger.section() as section:
            section.leases_changed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """What one name keeps from eviction."""

    name: str
    hashes: npt.NDArray[np.uint8]
    """Of the blobs, one row of 32 bytes each, sorted, without repetitions. Read-only."""
    sizes_bytes: npt.NDArray[np.int64]
    """Of the blobs; -1 where the size was not given. Read-only."""
    refs: tuple[str, ...]
    """Keys of the refs, sorted."""

    def keeps(self, key: str) -> bool:
        """Tell whether a blob of this hash, or a ref of this key (64 hexadecimal digits), is kept."""
        row = np.frombuffer(bytes.fromhex(check_hash(key)), np.uint8)
        return key in self.refs or bool((self.hashes == row).all(axis=1).any())


def encode_pin(words: Words, sizes_bytes: npt.NDArray[np.int64], refs: Words) -> bytes:
    """Return the file of a pin. The rows are sorted and without repetitions."""
    rest = b"".join(
        (
            _COUNTS.pack(len(words), len(refs)),
            words.astype(">u8").tobytes(),
            sizes_bytes.astype("<i8").tobytes(),
            refs.astype(">u8").tobytes(),
        )
    )
    return _MAGIC + bytes.fromhex(hash_bytes(rest, DigestFunction.SHA256)) + rest


def load_pin(path: str) -> tuple[os.stat_result, Pin | None]:
    """Read a pin's file; return its status and the pin, None when it is damaged. Raises OSError."""
    try:
        fd, status = open_regular(path)
    except OddEntry:
        return os.lstat(path), None
    with closing_fd(fd):
        header = os.pread(fd, _HEADER_BYTES, 0)
        if len(header) < _HEADER_BYTES or status.st_size > _MAX_FILE_BYTES:
            return status, None
        hashes, refs = _COUNTS.unpack_from(header, _CHECKED_FROM)
        sizes_at = _HEADER_BYTES + hashes * HASH_BYTES
        refs_at = sizes_at + hashes * 8
        size = refs_at + refs * HASH_BYTES
        # Nothing more is read into memory unless the beginning fits the file's size.
        data = read_file(fd, size) if size == status.st_size else b""
    checksum = bytes.fromhex(hash_bytes(memoryview(data)[_CHECKED_FROM:], DigestFunction.SHA256))
    if len(data) != size or data[:_CHECKED_FROM] != _MAGIC + checksum:
        return status, None
    return status, Pin(
        os.path.basename(path),
        np.frombuffer(data, np.uint8, hashes * HASH_BYTES, _HEADER_BYTES).reshape(-1, HASH_BYTES),
        # On a big-endian machine this copies.
        np.frombuffer(data, "<i8", hashes, sizes_at).astype(np.int64, copy=False),
        tuple(data[at : at + HASH_BYTES].hex() for at in range(refs_at, len(data), HASH_BYTES)),
    )


class PinSpace:
    """The pins of one group. Thread-safe, process-safe. `FileCache` says what the methods do."""

    def __init__(self, context: CacheContext) -> None:
        self._context = context
        self._folder = context.layout.pins()
        self._parents_flushed = False

    def pin(
        self,
        name: str,
        digests: Iterable[Digest],
        hashes: Iterable[npt.NDArray[np.uint8]],
        refs: Iterable[str],
    ) -> None:
        path = self._path(name)
        words, sizes_bytes = _sorted_hashes(list(digests), hashes)
        keys = to_words(sorted(set(refs)))
        if max(len(words), len(keys)) > MAX_PIN_ENTRIES:
            raise InvalidArgument(
                f"pin {name!r} of {len(words)} blobs and {len(keys)} refs: {MAX_PIN_ENTRIES} of each at most"
            )
        with translate_os_errors(f"cannot pin {name!r}"):
            folder = self._context.folder
            with folder.staged(encode_pin(words, sizes_bytes, keys), flush=True) as temporary:
                self._context.host.after_step("pin.written")
                current().check()
                folder.make_folder(self._folder)
                # Evictions happen in sections too, so none is under way that has not seen this pin.
                with self._context.ledger.section() as section:
                    # First, so that a pin whose process is killed here is seen as well.
                    section.pins_changed()
                    self._context.host.after_step("pin.announced")
                    if is_odd(path):
                        folder.set_aside(path)
                    os.rename(temporary, path)
                self._context.host.after_step("pin.renamed")
                self._flush_folder()

    def unpin(self, name: str) -> bool:
        path = self._path(name)
        with translate_os_errors(f"cannot unpin {name!r}"):
            with self._context.ledger.section() as section:
                if not os.path.lexists(path):
                    return False
                section.pins_changed()
                self._context.host.after_step("unpin.announced")
                if is_odd(path):
                    self._context.folder.set_aside(path)
                else:
                    os.unlink(path)
            self._context.host.after_step("unpin.unlinked")
            self._flush_folder()
        return True

    def names(self, prefix: str) -> list[str]:
        with translate_os_errors("cannot list pins"), suppress(FileNotFoundError):
            return sorted(
                name for name in os.listdir(self._folder) if name.startswith(prefix) and _NAME.fullmatch(name)
            )
        return []

    def get(self, name: str) -> Pin:
        path = self._path(name)
        with translate_os_errors(f"cannot read pin {name!r}"):
            try:
                pin = load_pin(path)[1]
            except FileNotFoundError:
                raise NotFound(f"nothing is pinned as {name!r} in the file cache") from None
        if pin is None:
            raise DataLoss(
                f"pin {name!r} is damaged ({path!r}), so that nothing of its group is evicted: "
                "pin again what it kept, or unpin it"
            )
        return pin

    def verify(self) -> tuple[int, list[str]]:
        """Read all pins; return how many there are, and the names of those that are damaged."""
        names = self.names("")
        bad = []
        for name in names:
            try:
                self.get(name)
            except NotFound:
                continue
            except (Cancelled, DeadlineExceeded):
                raise
            except SnaploaderError:
                bad.append(name)
        return len(names), bad

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"pin name {name[:220]!r} is not 1 to {MAX_NAME_LENGTH} letters, digits or any of . _ @ - "
                "that do not begin with a dot"
            )
        return f"{self._folder}/{name}"

    def _flush_folder(self) -> None:
        """Make the names in the folder of pins survive a power failure."""
        flush_folder(self._folder)
        if not self._parents_flushed:
            # Whoever made these folders need not have flushed them yet.
            layout = self._context.layout
            for folder in (layout.group_path(), layout.groups, layout.base, layout.root):
                flush_folder(folder)
            self._parents_flushed = True


def _sorted_hashes(
    digests: list[Digest], hashes: Iterable[npt.NDArray[np.uint8]]
) -> tuple[Words, npt.NDArray[np.int64]]:
    """Return each hash once, sorted, and their sizes."""
    words = [to_words([digest.hash for digest in digests])]
    sizes = [sizes_of(digests)]
    if sizes[0].max(initial=0) > MAX_BLOB_BYTES:
        raise InvalidArgument("a digest to be pinned has a size that no blob has")
    for rows in hashes:
        if rows.ndim != 2 or rows.shape[1] != HASH_BYTES or rows.dtype != np.uint8:
            raise InvalidArgument(f"hashes to be pinned are not rows of {HASH_BYTES} bytes (uint8)")
        words.append(to_rows(rows))
        sizes.append(np.full(len(rows), UNKNOWN_SIZE, dtype=np.int64))
    all_words, all_sizes = np.concatenate(words), np.concatenate(sizes)
    order = np.lexsort((all_sizes, *all_words.T[::-1]))
    all_words, all_sizes = all_words[order], all_sizes[order]
    is_last = np.ones(len(all_words), dtype=np.bool_)
    is_last[:-1] = (all_words[1:] != all_words[:-1]).any(axis=1)
    clash = ~is_last[:-1] & (all_sizes[:-1] != UNKNOWN_SIZE) & (all_sizes[:-1] != all_sizes[1:])
    if clash.any():
        row = int(np.flatnonzero(clash)[0])
        raise InvalidArgument(f"hash {to_hex(all_words[row])} is to be pinned with two sizes")
    # Of equal hashes the last is the one whose size is known, if any is.
    return all_words[is_last], all_sizes[is_last]


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

    def change(
        self, removed: list[Prefixes], added: list[Prefixes], sizes_bytes: list[npt.NDArray[np.int64]]
    ) -> None:
        """Take in that pins with these keys went and came. What none names any more is forgotten."""
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
        starts = np.flatnonzero(is_first(keys))
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

    Entries go by the key that the log of uses gives them (`use_keys`): a pin keeps only what is in its
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
        """Read what changed since this generation, or `again` in any case, as some hand may move files."""
        with held_in_call(self._lock):
            if generation != self._generation or again:
                self._update()
                self._generation = generation

    def named(self, spaces: npt.NDArray[np.uint8], keys: Prefixes) -> npt.NDArray[np.bool_]:
        """Tell of each entry, by its space and key, whether a pin names it."""
        with self._lock:
            blobs, refs = self._blobs.keys, self._refs.keys
        named = are_among(keys, blobs)
        is_ref = spaces == Space.REFS
        named[is_ref] = are_among(keys[is_ref], refs)
        return named

    def damaged_groups(self) -> set[str]:
        """Return the folder names of groups with a damaged pin, which may have kept anything there."""
        with self._lock:
            return {group for (group, _), known in self._known.items() if known.is_damaged}

    def totals(self) -> PinTotals:
        """Return what the pins kept together at the last refresh."""
        with self._lock:
            sizes = self._blobs.sizes_bytes
            pinned_bytes = int(sizes[sizes > 0].sum())
            damaged = sorted(self._path(name) for name, known in self._known.items() if known.is_damaged)
            return PinTotals(
                len(self._known), len(self._blobs.keys), pinned_bytes, len(self._refs.keys), tuple(damaged)
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
                    if _NAME.fullmatch(entry.name):
                        with suppress(FileNotFoundError):
                            yield (group, entry.name), _identity(entry.stat(follow_symlinks=False))

    def _read(self, name: _Name, identity: _Identity) -> tuple[_Known, npt.NDArray[np.int64]]:
        """Read a pin; return what is kept of it, and the sizes of its blobs. Raises FileNotFoundError."""
        group = name[0]
        pin = None
        try:
            status, pin = load_pin(self._path(name))
            identity = _identity(status)
        except (FileNotFoundError, DeadlineExceeded):
            raise
        except OSError:
            _logger.warning("pin %r cannot be read", self._path(name), exc_info=True)
            identity = _UNREAD
        if pin is None:
            return _Known(identity, _NO_KEYS, _NO_KEYS, is_damaged=True), _NO_NUMBERS
        blobs = use_keys(group, to_prefixes(pin.hashes))
        refs = use_keys(group, to_words(pin.refs)[:, 0])
        return _Known(identity, blobs, refs, is_damaged=False), pin.sizes_bytes

    def _path(self, name: _Name) -> str:
        return f"{self._layout.pins(name[0])}/{name[1]}"


def _identity(status: os.stat_result) -> _Identity:
    return status.st_ino, status.st_mtime_ns, status.st_size


class Protection:
    """Leases and pins of all processes, as the evictor sees them. For one thread at a time."""

    def __init__(self, layout: Layout, pins: PinTable) -> None:
        self._layout = layout
        self._lease_generation = -1
        self._leased = _NO_KEYS
        self._pins = pins
        self._pins_version = -1

    def refresh(self, section: Section, *, again: bool = False) -> bool:
        """Read what changed, in a section; return whether anything did. `again`: an owner may have died."""
        changed = again or section.lease_generation != self._lease_generation
        if changed:
            self._leased = self._read_leases()
            self._lease_generation = section.lease_generation
        self._pins.refresh(section.pin_generation)
        if self._pins_version != self._pins.version:
            self._pins_version = self._pins.version
            changed = True
        return changed

    def holds(self, scan: Scan, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Tell of each of these entries, by their places in a scan, whether it must stay."""
        held = are_among(scan.prefixes[rows], self._leased)
        held &= scan.space[rows] != Space.REFS
        held |= self.is_pinned(scan, rows)
        return held

    def is_pinned(self, scan: Scan, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Tell of each of these entries whether a pin keeps it, or may have before it was damaged."""
        pinned: npt.NDArray[np.bool_] = self._pins.named(scan.space[rows], scan.use_keys[rows])
        for group in self._pins.damaged_groups():
            if group in scan.groups:
                pinned |= scan.group[rows] == scan.groups.index(group)
        return pinned

    def _read_leases(self) -> Prefixes:
        leased = [_NO_KEYS]
        alive: dict[str, bool] = {}
        for name in os.listdir(self._layout.leases):
            token = name.partition(".")[0]
            if token not in alive:
                alive[token] = is_alive(self._layout, token)
            if alive[token]:
                with suppress(FileNotFoundError, OddEntry):
                    leased.append(_read_lease(f"{self._layout.leases}/{name}"))
        return distinct(np.concatenate(leased))


def _read_lease(path: str) -> Prefixes:
    """Read what a lease keeps; nothing if no cache wrote such a file."""
    data = read_regular(path, _MAX_LEASE_BYTES)
    count = len(data) // 8 if len(data) <= _MAX_LEASE_BYTES else 0
    return np.frombuffer(data, dtype="<u8", count=count).astype(np.uint64)
