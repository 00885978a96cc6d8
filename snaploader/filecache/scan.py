"""Looking at many entries at once: scans of every group, and listings of one group's blob folders.

A scan finds what there is, how big it is and when it was last used. A listing answers which of many blobs
exist. It is kept as long as its folder stands still: a folder's modification time changes when a name in it
appears or goes, whoever does it, so a listing holds for as long as one stat(2) gives the same time. File
systems keep that time in steps of up to some ten milliseconds: a change soon after the listing may leave the
time as it was. So a listing made less than RACY_NS after the folder's last change is not trusted a second
time.
"""

from __future__ import annotations

import os
import re
import stat
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader.errors import InvalidArgument
from snaploader.filecache import recency
from snaploader.filecache.durability import Durability
from snaploader.filecache.layout import (
    ENTRY_NAME_LENGTH,
    SHARDS,
    Layout,
    Space,
    disk_bytes,
    entry_name,
)
from snaploader.filecache.usage import CacheContext
from snaploader.files import OddEntry, open_regular, read_file, remove_tree
from snaploader.formats.digests import HashSet, Prefixes, Words, to_hex, to_words
from snaploader.locks import is_dead, try_lock

_SPACES = tuple(Space)
_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(rf"[0-9a-f]{{{ENTRY_NAME_LENGTH}}}")


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


def entries(layout: Layout, group: str, odd: Callable[[str], None] = lambda _: None) -> Iterator[FoundEntry]:
    """Yield all entries of a group, by folder name, in no order. What goes meanwhile is left out.

    Args:
        odd: Called with the path of what is called like an entry, or a folder of entries, and is none.
    """
    for space in Space:
        folder = layout.group_path(group)
        for name in space.folder.split("/"):
            folder = f"{folder}/{name}"
            if os.path.islink(folder):
                odd(folder)
                folder = os.devnull
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as shards:
            for shard in shards:
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
        fd = open_regular(path)[0]
        try:
            text = read_file(fd, 32)
        finally:
            os.close(fd)
        return int(text) if text.isdigit() else 0
    return 0


class Scan:
    """Every entry of every group, as columns: 58 bytes each.

    Args:
        is_suspect: Tells whether a power failure may have damaged a blob; None where it damaged none.
        check_open: Called now and then; it raises to call the scan off.
    """

    def __init__(
        self,
        layout: Layout,
        is_suspect: Callable[[os.stat_result], bool] | None,
        check_open: Callable[[], None],
    ) -> None:
        self.suspects = 0
        """Blobs that a power failure may have damaged."""
        self.odd: list[str] = []
        """Paths of what is called like an entry and is none."""
        self._layout = layout
        self.groups = group_names(layout)
        """Folder names."""
        hashes: list[str] = []
        columns = (array("H"), array("B"), array("q"), array("q"))
        add_group, add_space, add_size, add_use = (column.append for column in columns)
        words = [np.empty((0, 4), dtype=np.uint64)]
        for number, group in enumerate(self.groups):
            for found in entries(layout, group, self.odd.append):
                space, hash_, size, used_ns, status = found
                add_group(number)
                add_space(space)
                add_size(size)
                add_use(used_ns)
                hashes.append(hash_)
                if is_suspect is not None and status is not None and space is not Space.REFS:
                    self.suspects += is_suspect(status)
                if len(hashes) == 4096:
                    check_open()
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
            self.use_keys[rows] = recency.keys(group, self.prefixes[rows])

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
        sizes = {}
        for row in rows.tolist():
            group, space, hash_ = self.name(row)
            sizes[entry_name(group, space, hash_)] = int(self.disk_bytes[row])
        return {name: sizes[name] for name in names & sizes.keys()}


RACY_NS = 20_000_000
_GROUP = 32
"""Folders that are looked through at once. Numpy takes longer to be called than to look through one of them;
all of them at once would take as much memory again as their listings."""
_HASH = re.compile(r"[0-9a-f]{64}")
_NOTHING: Words = np.empty((0, 4), dtype=np.uint64)


class _Listing(NamedTuple):
    modified_ns: int
    trusted: bool
    words: Words


class ShardListings:
    """The listings of one group's blob folders. 32 bytes per blob. Thread-safe.

    Names vouch for their files, since only whole, verified files get a name here. Where a power failure may
    have undone that, suspects are left out of the listing, at the cost of a stat(2) for each file.
    """

    def __init__(self, layout: Layout, durability: Durability) -> None:
        self._layout = layout
        self._durability = durability
        self._listings: dict[str, _Listing] = {}

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
        fresh: list[tuple[str, int, bool]] = []
        names: list[list[str]] = []
        for shard in shards:
            path = f"{self._layout.group_path()}/{space.folder}/{shard}"
            try:
                modified_ns = os.stat(path, follow_symlinks=False).st_mtime_ns
                known = self._listings.get(path)
                if known is not None and known.trusted and known.modified_ns == modified_ns:
                    listed.append(known.words)
                    continue
                trusted = abs(time.time_ns() - modified_ns) > RACY_NS
                found = self._names(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            fresh.append((path, modified_ns, trusted))
            names.append([shard + name for name in found])
        for (path, modified_ns, trusted), words in zip(fresh, _to_words(names), strict=True):
            self._listings[path] = _Listing(modified_ns, trusted, words)
            listed.append(words)
        return np.concatenate(listed)

    def _names(self, path: str) -> list[str]:
        with os.scandir(path) as found:
            names = [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
        return self._without_suspects(path, names) if self._durability.windows else names

    def _without_suspects(self, path: str, names: list[str]) -> list[str]:
        vouched = []
        for name in names:
            with suppress(FileNotFoundError):
                if not self._durability.is_suspect(os.stat(f"{path}/{name}", follow_symlinks=False)):
                    vouched.append(name)
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
