"""Looking at every entry of every group: what there is, how big, and when it was last used."""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader.filecache import directories, recency
from snaploader.filecache.environment import Environment
from snaploader.filecache.hashes import Prefixes, to_hex, to_words
from snaploader.filecache.layout import Layout, Space
from snaploader.folders import OddEntry

BLOCK_BYTES = 512
"""Unit of st_blocks; see stat(2)."""

_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME_LENGTH = 62
_NAME = re.compile(rf"[0-9a-f]{{{_NAME_LENGTH}}}")


class Found(NamedTuple):
    """One entry, as a scan sees it."""

    space: Space
    hash: str
    disk_bytes: int
    used_ns: int
    status: os.stat_result | None
    """Of a blob or ref."""


def disk_bytes(status: os.stat_result) -> int:
    """The disk blocks of a file, in bytes."""
    return status.st_blocks * BLOCK_BYTES


def group_names(layout: Layout) -> list[str]:
    """The folder names of all groups, sorted."""
    with os.scandir(layout.groups) as found:
        return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))


def entries(layout: Layout, group: str, odd: Callable[[str], None] = lambda _: None) -> Iterator[Found]:
    """All entries of a group, by folder name, in no order. What goes while it looks is left out.

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


def _shard_entries(path: str, space: Space, shard: str, odd: Callable[[str], None]) -> Iterator[Found]:
    with suppress(FileNotFoundError), os.scandir(path) as found:
        for entry in found:
            if not _NAME.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                if space is Space.TREES:
                    try:
                        size, used_ns = directories.measure_entry(entry.path)
                    except (NotADirectoryError, OddEntry):
                        odd(entry.path)
                    else:
                        yield Found(space, shard + entry.name, size, used_ns, None)
                    continue
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield Found(space, shard + entry.name, disk_bytes(status), status.st_atime_ns, status)
                else:
                    odd(entry.path)


def set_aside_odd(environment: Environment, path: str) -> None:
    """Move what is called like an entry and is none to the quarantine. It counted for nothing."""
    # In a section no entry takes its place meanwhile.
    with environment.ledger.section():
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        is_entry = len(os.path.basename(path)) == _NAME_LENGTH and f"/{Space.TREES.folder}/" not in path
        if not (is_entry and stat.S_ISREG(status.st_mode)):
            environment.session.set_aside(path)


class Scan:
    """Every entry of every group, as columns: 58 bytes each."""

    def __init__(self, layout: Layout, is_suspect: Callable[[os.stat_result], bool]) -> None:
        self.suspects = 0
        """Blobs that a power failure may have damaged."""
        self.odd: list[str] = []
        """Paths of what is called like an entry and is none."""
        self._layout = layout
        self.groups = group_names(layout)
        """Folder names."""
        hashes: list[str] = []
        columns = (array("H"), array("B"), array("q"), array("q"))
        words = [np.empty((0, 4), dtype=np.uint64)]
        for number, group in enumerate(self.groups):
            for found in entries(layout, group, self.odd.append):
                values = (number, found.space, found.disk_bytes, found.used_ns)
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
                if found.status is not None and found.space is not Space.REFS:
                    self.suspects += is_suspect(found.status)
                hashes.append(found.hash)
                if len(hashes) == 4096:
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
        """Group folder, space and hash of an entry."""
        return self.groups[self.group[row]], Space(int(self.space[row])), to_hex(self.words[row])

    def sizes_by_entry(self, names: set[str]) -> dict[str, int]:
        """The sizes of those of the named entries (as the ledger names them) that the scan saw."""
        if not names:
            return {}
        wanted = np.array([int(name.replace("/", "")[-64:][:16], 16) for name in names], dtype=np.uint64)
        rows: npt.NDArray[np.intp] = np.flatnonzero(np.isin(self.prefixes, wanted))
        sizes = {}
        for row in rows.tolist():
            group, space, hash_ = self.name(row)
            sizes[entry_name(group, space, hash_)] = int(self.disk_bytes[row])
        return {name: sizes[name] for name in names & sizes.keys()}


def entry_name(group: str, space: Space, hash_: str) -> str:
    """How the ledger names an entry: its path relative to the folder of all groups."""
    return f"{group}/{space.folder}/{hash_[:2]}/{hash_[2:]}"
