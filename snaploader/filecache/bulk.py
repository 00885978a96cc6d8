"""Many entries at once: scans of every group, listings of blob folders, the log of uses.

A scan finds what there is, how big it is and when it was last used.

A listing answers which of many blobs exist. It is kept as long as its folder stands still: a folder's
modification time changes when a name in it appears or goes, whoever does it, so a listing holds for as long
as one stat(2) gives the same time. File systems keep that time in steps of up to some ten milliseconds: a
change soon after the listing may leave the time as it was. So a listing made less than RACY_NS after the
folder's last change is not trusted a second time.

An entry's file says when it was last used (`layout.touch`). Setting that for each of 200,000 blobs takes most
of a second, so uses in bulk are appended to one file instead, `usage/uses`, by keys
(docs/formats/filecache.md); two entries of one key only keep each other young. The later time counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader import files
from snaploader.context import current
from snaploader.errors import InvalidArgument
from snaploader.filecache.durability import Durability
from snaploader.filecache.layout import (
    ENTRY_NAME_LENGTH,
    SHARDS,
    Layout,
    OpenFolder,
    Space,
    disk_bytes,
    entry_name,
)
from snaploader.filecache.usage import CacheContext
from snaploader.files import FileLock, OddEntry, is_dead, open_regular, read_regular, remove_tree, try_lock
from snaploader.formats.digests import HashSet, Prefixes, Words, is_first, to_hex, to_words

RACY_NS = 20_000_000
COMPACT_BYTES = 32 << 20
"""Size from which the log is rewritten with one record per key."""

_SPACES = tuple(Space)
_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(rf"[0-9a-f]{{{ENTRY_NAME_LENGTH}}}")
_HASH = re.compile(r"[0-9a-f]{64}")
_GROUP = 32
"""Folders that are looked through at once. Numpy takes longer to be called than to look through one of them;
all of them at once would take as much memory again as their listings."""
_NOTHING: Words = np.empty((0, 4), dtype=np.uint64)
_RECORD = np.dtype([("key", "<u8"), ("time_ns", "<i8")])
_MAX_READ_BYTES = 1 << 30
Records = npt.NDArray[np.void]


class FoundEntry(NamedTuple):
    """One entry, as a scan sees it."""

    space: Space
    hash: str
    disk_bytes: int
    used_ns: int
    status: os.stat_result | None
    """None where nobody asks for it."""


def group_names(layout: Layout) -> list[str]:
    """Return the folder names of all groups, sorted."""
    with os.scandir(layout.groups) as found:
        return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))


def entries(
    layout: Layout,
    group: str,
    odd: Callable[[str], None] = lambda _: None,
    *,
    spaces: Iterable[Space] = tuple(Space),
) -> Iterator[FoundEntry]:
    """Yield a group's entries, in no order; call `odd` with the path of what only is called like one."""
    for space in spaces:
        folder = layout.group_path(group)
        for name in space.folder.split("/"):
            folder = f"{folder}/{name}"
            if os.path.islink(folder):
                odd(folder)
                folder = os.devnull
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as shards:
            for shard in shards:
                current().check()
                if _SHARD.fullmatch(shard.name):
                    if shard.is_dir(follow_symlinks=False):
                        yield from _shard_entries(shard.path, space, shard.name, odd)
                    else:
                        odd(shard.path)


def _shard_entries(path: str, space: Space, shard: str, odd: Callable[[str], None]) -> Iterator[FoundEntry]:
    with suppress(FileNotFoundError), os.scandir(path) as found:
        for entry in found:
            if not _NAME.fullmatch(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield FoundEntry(space, shard + entry.name, disk_bytes(status), status.st_atime_ns, status)
            else:
                odd(entry.path)


def sweep_trees(context: CacheContext) -> int:
    """Remove the tracked directories of all groups; return the disk blocks, in bytes, of those in use.

    Earlier releases kept whole directories as entries `trees/<2 hex>/<62 hex>/`, with `data/`, their `size`
    as text, and a `lock` that their users hold (flock). One that a process of such a release uses stays.
    """
    layout, in_use_bytes = context.layout, 0
    for group in group_names(layout):
        for shard in _folders(f"{layout.group_path(group)}/trees"):
            for entry in _folders(shard):
                lock = try_lock(f"{entry}/lock")
                if lock is None and not is_dead(f"{entry}/lock"):
                    in_use_bytes += _recorded_bytes(f"{entry}/size")
                    continue
                try:
                    removed = f"{layout.trash}/{context.folder.unique_name()}"
                    with suppress(FileNotFoundError):
                        os.rename(entry, removed)
                finally:
                    if lock is not None:
                        os.close(lock)
                remove_tree(removed)
    return in_use_bytes


def _folders(path: str) -> list[str]:
    """Return the paths of the folders in a folder; none when it is not there, or a link."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if not os.path.islink(path):
            with os.scandir(path) as found:
                return [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    return []


def _recorded_bytes(path: str) -> int:
    with suppress(FileNotFoundError, OddEntry):
        text = read_regular(path, 32)
        return int(text) if text.isdigit() else 0
    return 0


class Scan:
    """Every entry of every group, as columns: 58 bytes each.

    `is_suspect` is None where no power failure can have damaged a blob. `check` raises to call the scan off.
    """

    def __init__(
        self, layout: Layout, is_suspect: Callable[[os.stat_result], bool] | None, check: Callable[[], None]
    ) -> None:
        self.suspects = 0
        """Blobs that a power failure may have damaged."""
        self.odd: list[str] = []
        """Paths of what is called like an entry and is none."""
        self.lost: list[tuple[str, str]] = []
        """Group and hash of private files that a power failure may have damaged: nothing can verify them."""
        self.groups = group_names(layout)
        """Folder names."""
        hashes: list[str] = []
        columns = (array("H"), array("B"), array("q"), array("q"))
        add_group, add_space, add_size, add_use = (column.append for column in columns)
        words = [_NOTHING]
        for number, group in enumerate(self.groups):
            for found in entries(layout, group, self.odd.append):
                space, hash_, size, used_ns, status = found
                add_group(number)
                add_space(space)
                add_size(size)
                add_use(used_ns)
                hashes.append(hash_)
                if is_suspect is not None and status is not None and is_suspect(status):
                    self.suspects += space.function is not None
                    if space is Space.PRIVATE:
                        self.lost.append((group, hash_))
                if len(hashes) == 4096:
                    check()
                    words.append(to_words(hashes))
                    hashes.clear()
        words.append(to_words(hashes))
        self.words = np.concatenate(words)
        self.group, self.space, self.disk_bytes, self.used_ns = (
            np.array(column, dtype=kind)
            for column, kind in zip(columns, ("u2", "u1", "i8", "i8"), strict=True)
        )
        self.prefixes: Prefixes = np.ascontiguousarray(self.words[:, 0])
        self.use_keys = self.prefixes.copy()
        """As the log of uses names the entries."""
        for number, group in enumerate(self.groups):
            rows = self.group == number
            self.use_keys[rows] = use_keys(group, self.prefixes[rows])

    def __len__(self) -> int:
        return len(self.group)

    def name(self, row: int) -> tuple[str, Space, str]:
        """Return the group's folder, the space and the hash of an entry."""
        return self.groups[self.group[row]], _SPACES[self.space[row]], to_hex(self.words[row])

    def sizes_by_entry(self, names: set[str]) -> dict[str, int]:
        """Return the sizes of the named entries (as the ledger names them) that the scan saw."""
        if not names:
            return {}
        wanted = np.array([int(name.replace("/", "")[-64:][:16], 16) for name in names], dtype=np.uint64)
        rows: npt.NDArray[np.intp] = np.flatnonzero(np.isin(self.prefixes, wanted))
        sizes = {entry_name(*self.name(row)): int(self.disk_bytes[row]) for row in rows.tolist()}
        return {name: sizes[name] for name in names & sizes.keys()}


class ShardListings:
    """The listings of one group's blob folders. 32 bytes per blob. Thread-safe.

    Names vouch for their files, since only whole, verified files get a name here. Where a power failure may
    have undone that, suspects are left out of the listing, at the cost of a stat(2) for each file.
    """

    def __init__(self, layout: Layout, durability: Durability) -> None:
        self._layout = layout
        self._durability = durability
        self._listings: dict[str, tuple[int | None, Words]] = {}
        """By folder: when it was changed last, None if that is not to be trusted, and what is there."""

    def contains(self, space: Space, words: Words) -> npt.NDArray[np.bool_]:
        """Tell of each hash whether a blob of this name exists."""
        present = np.zeros(len(words), dtype=np.bool_)
        # Bytes are sorted by radix, thirty times faster than words.
        shards = (words[:, 0] >> np.uint64(56)).astype(np.uint8)
        order = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[order], np.arange(0, len(SHARDS) + 1, _GROUP))
        for number, (start, end) in enumerate(pairwise(bounds.tolist())):
            rows = order[start:end]
            if len(rows):
                listed = self._listed(space, SHARDS[number * _GROUP : (number + 1) * _GROUP])
                present[rows] = HashSet(listed).contains(words[rows])
        return present

    def _listed(self, space: Space, shards: Sequence[str]) -> Words:
        """Return the hashes of all that lies in some folders."""
        listed: list[Words] = [_NOTHING]
        fresh: list[tuple[str, int | None]] = []
        names: list[list[str]] = []
        for shard in shards:
            current().check()
            path = f"{self._layout.group_path()}/{space.folder}/{shard}"
            try:
                modified_ns = os.stat(path, follow_symlinks=False).st_mtime_ns
                known = self._listings.get(path)
                if known is not None and known[0] == modified_ns:
                    listed.append(known[1])
                    continue
                is_racy = abs(time.time_ns() - modified_ns) <= RACY_NS
                found = self._names(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            fresh.append((path, None if is_racy else modified_ns))
            names.append([shard + name for name in found])
        for (path, trusted_ns), words in zip(fresh, _to_words(names), strict=True):
            self._listings[path] = trusted_ns, words
            listed.append(words)
        return np.concatenate(listed)

    def _names(self, path: str) -> list[str]:
        with os.scandir(path) as found:
            if not self._durability.windows:
                return [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
            vouched = []
            for entry in found:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and not self._durability.is_suspect(status):
                        vouched.append(entry.name)
            return vouched


def _to_words(names: list[list[str]]) -> list[Words]:
    """Return the hashes that are the names in each folder, decoded all at once."""
    try:
        words = to_words(list(chain.from_iterable(names)))
    except InvalidArgument:
        # Something that is no blob lies in a folder.
        names = [list(filter(_HASH.fullmatch, each)) for each in names]
        words = to_words(list(chain.from_iterable(names)))
    ends = list(accumulate(map(len, names)))
    # Copies, as a part of an array would keep all of it.
    return [words[start:end].copy() for start, end in zip([0, *ends], ends, strict=False)]


class Position(NamedTuple):
    """How far a reader got in the log: a file and a place in it."""

    inode: int = 0
    offset: int = 0


class UseLog:
    """Uses in bulk. Thread-safe, process-safe."""

    def __init__(self, folder: OpenFolder) -> None:
        self._folder = folder
        self._path = f"{folder.layout.usage}/uses"
        self._lock = FileLock(folder.open_written(f"{self._path}.lock"))

    def close(self) -> None:
        """Give up the descriptor."""
        self._lock.close()

    def append(self, group: str, prefixes: Prefixes, now_ns: int) -> None:
        """Record that all of these entries of a group were used now."""
        records = np.empty(len(prefixes), dtype=_RECORD)
        records["key"] = use_keys(group, prefixes)
        records["time_ns"] = now_ns
        with self._lock.held():
            fd = self._folder.open_written(self._path)
            try:
                size = os.fstat(fd).st_size
                if size > COMPACT_BYTES:
                    new_fd, size = self._compacted()
                    os.close(fd)
                    fd = new_fd
                # What a writer that was killed or met a full disk left of a record is overwritten.
                os.lseek(fd, size - size % _RECORD.itemsize, os.SEEK_SET)
                files.write_all(fd, records.tobytes())
            finally:
                os.close(fd)

    def read(self, since: Position = Position()) -> tuple[Records, Position]:  # noqa: B008
        """Return the records after `since`, or all when the log was rewritten, and how far they go."""
        try:
            fd, status = open_regular(self._path)
        except (FileNotFoundError, OddEntry):
            return np.empty(0, dtype=_RECORD), since
        with os.fdopen(fd, "rb") as file:
            offset = since.offset if since.inode == status.st_ino else 0
            if status.st_size - offset > _MAX_READ_BYTES:
                # Nobody's log grows so far: it is compacted long before.
                return np.empty(0, dtype=_RECORD), Position(status.st_ino, status.st_size)
            file.seek(offset)
            data = file.read(max(0, status.st_size - offset))
        whole = len(data) - len(data) % _RECORD.itemsize
        return np.frombuffer(data[:whole], dtype=_RECORD), Position(status.st_ino, offset + whole)

    def grew(self, since: Position) -> bool:
        """Tell whether there is anything after `since`."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return False
        return status.st_ino != since.inode or status.st_size >= since.offset + _RECORD.itemsize

    def _compacted(self) -> tuple[int, int]:
        """Replace the log by one with the newest record of each key; return its descriptor and size."""
        latest = newest(self.read()[0])
        if latest.nbytes > COMPACT_BYTES // 2:
            # More than any cache holds blobs: the ones unused for longest do not matter any more.
            latest = latest[np.argsort(latest["time_ns"])][-(COMPACT_BYTES // 2 // _RECORD.itemsize) :]
        with self._folder.staged(latest.tobytes()) as temporary:
            os.rename(temporary, self._path)
        return self._folder.open_written(self._path), latest.nbytes


def use_keys(group: str, prefixes: Prefixes) -> Prefixes:
    """Return the log's keys for entries of a group, by folder name."""
    salt = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    return prefixes ^ np.uint64(salt)


def newest(records: Records) -> Records:
    """Return the newest record of each key, sorted by key."""
    order = np.argsort(records["key"])
    ordered = records["key"][order]
    first = is_first(ordered)
    latest = np.empty(int(first.sum()), dtype=_RECORD)
    if len(latest):
        latest["key"] = ordered[first]
        latest["time_ns"] = np.maximum.reduceat(records["time_ns"][order], np.flatnonzero(first))
    return latest


def apply_uses(
    times_ns: npt.NDArray[np.int64], entry_keys: Prefixes, records: Records, now_ns: int
) -> npt.NDArray[np.int64]:
    """Return each time, or that of the newest record of its key if later. A future time counts as now."""
    if not len(records):
        return times_ns
    latest = newest(records)
    places = np.searchsorted(latest["key"], entry_keys)
    places[places == len(latest)] = 0
    known = latest["key"][places] == entry_keys
    logged = np.minimum(latest["time_ns"][places], now_ns)
    return np.where(known, np.maximum(times_ns, logged), times_ns)
