"""Which blobs exist, for many at once: listings of shard folders, kept as long as the folders stand still.

A folder's modification time changes when a name in it appears or goes, whoever does it, so a listing
holds for as long as one stat(2) gives the same time. File systems keep that time in steps of up to some
ten milliseconds: a change soon after the listing may leave the time as it was. So a listing made less
than RACY_NS after the folder's last change is not trusted a second time.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from snaploader.errors import InvalidArgument
from snaploader.filecache.durability import Durability
from snaploader.filecache.hashes import HashSet, Words, to_words
from snaploader.filecache.layout import SHARDS, Layout, Space

RACY_NS = 20_000_000
_NAME = re.compile(r"[0-9a-f]{62}")
_EMPTY = HashSet(np.empty((0, 4), dtype=np.uint64))


class _Listing(NamedTuple):
    modified_ns: int
    trusted: bool
    hashes: HashSet


class ShardListings:
    """The listings of one group's blob folders. 32 bytes per blob. Thread-safe.

    Names vouch for their files, since only whole, verified files get a name here. Where a power failure may
    have undone that, suspects are left out of the listing, at the cost of a stat(2) for each file.
    """

    def __init__(self, layout: Layout, durability: Durability) -> None:
        self._layout = layout
        self._durability = durability
        self._lock = threading.Lock()
        self._listings: dict[str, _Listing] = {}

    def contains(self, space: Space, words: Words) -> npt.NDArray[np.bool_]:
        """For each hash whether a blob of this name exists."""
        present = np.zeros(len(words), dtype=np.bool_)
        # Bytes are sorted by radix, thirty times faster than words.
        shards = (words[:, 0] >> np.uint64(56)).astype(np.uint8)
        order = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[order], np.arange(257))
        for number, shard in enumerate(SHARDS):
            rows = order[bounds[number] : bounds[number + 1]]
            if len(rows):
                hashes = self._hashes(space, shard)
                if len(hashes):
                    present[rows] = hashes.contains(words[rows])
        return present

    def _hashes(self, space: Space, shard: str) -> HashSet:
        path = f"{self._layout.group_path()}/{space.folder}/{shard}"
        try:
            modified_ns = os.stat(path, follow_symlinks=False).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return _EMPTY
        known = self._listings.get(path)
        if known is not None and known.trusted and known.modified_ns == modified_ns:
            return known.hashes
        trusted = abs(time.time_ns() - modified_ns) > RACY_NS
        try:
            with os.scandir(path) as found:
                names = [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
            if self._durability.any_suspects:
                names = self._without_suspects(path, names)
            hashes = HashSet(_to_words(shard, names))
        except (FileNotFoundError, NotADirectoryError):
            return _EMPTY
        with self._lock:
            self._listings[path] = _Listing(modified_ns, trusted, hashes)
        return hashes

    def _without_suspects(self, path: str, names: list[str]) -> list[str]:
        vouched = []
        for name in names:
            with suppress(FileNotFoundError):
                if not self._durability.is_suspect(os.stat(f"{path}/{name}", follow_symlinks=False)):
                    vouched.append(name)
        return vouched


def _to_words(shard: str, names: list[str]) -> Words:
    try:
        return to_words([shard + name for name in names])
    except InvalidArgument:
        # Something that is no blob lies in the folder.
        return to_words([shard + name for name in names if _NAME.fullmatch(name)])
