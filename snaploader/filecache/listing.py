"""Which blobs exist, for many at once: listings of shard folders, kept as long as the folders stand still.

A folder's modification time changes when a name in it appears or goes, whoever does it, so a listing
holds for as long as one stat(2) gives the same time. File systems keep that time in steps of up to some
ten milliseconds: a change soon after the listing may leave the time as it was. So a listing made less
than RACY_NS after the folder's last change is not trusted a second time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader.errors import InvalidArgument
from snaploader.filecache.durability import Durability
from snaploader.filecache.hashes import HashSet, Words, to_words
from snaploader.filecache.layout import SHARDS, Layout, Space

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
        """For each hash whether a blob of this name exists."""
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
        """The hashes of all that lies in some folders."""
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
        return self._without_suspects(path, names) if self._durability.any_suspects else names

    def _without_suspects(self, path: str, names: list[str]) -> list[str]:
        vouched = []
        for name in names:
            with suppress(FileNotFoundError):
                if not self._durability.is_suspect(os.stat(f"{path}/{name}", follow_symlinks=False)):
                    vouched.append(name)
        return vouched


def _to_words(names: list[list[str]]) -> list[Words]:
    """The hashes that are the names in each folder, decoded all at once."""
    try:
        words = to_words(list(chain.from_iterable(names)))
    except InvalidArgument:
        # Something that is no blob lies in a folder.
        names = [list(filter(_HASH.fullmatch, each)) for each in names]
        words = to_words(list(chain.from_iterable(names)))
    ends = list(accumulate(map(len, names)))
    # Copies, as a part of an array would keep all of it.
    return [words[start:end].copy() for start, end in zip([0, *ends], ends, strict=False)]
