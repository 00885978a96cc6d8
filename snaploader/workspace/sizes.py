"""What workspaces cost on this host: bytes that each has for itself, and bytes that it shares.

Every snapshot of a workspace that is kept here has a pin (`snaploader.workspace.model.pin_name`), which
tells the hash and the size of each of its blobs. Nothing else is asked, and no content is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from snaploader.errors import DataLoss, NotFound
from snaploader.filecache import FileCache
from snaploader.formats.digests import Prefixes, to_prefixes
from snaploader.workspace.model import pin_name

_logger = logging.getLogger(__name__)

MERGE_BLOBS = 1 << 18
"""So many blobs are gathered, at least, before they are merged with those seen before: it takes 5 MiB."""

_PINS = pin_name("")
_SHARED = -1

_Numbers: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class WorkspaceSize:
    """What the snapshots of one workspace take in the file cache, uncompressed. A blob counts once."""

    exclusive_bytes: int = 0
    """In blobs that no other workspace of this host refers to."""
    shared_bytes: int = 0
    """In blobs that others refer to as well."""
    snapshots: int = 0
    """How many are kept here."""

    @property
    def total_bytes(self) -> int:
        """What it would take alone."""
        return self.exclusive_bytes + self.shared_bytes


@dataclass(frozen=True, slots=True)
class HostSizes:
    """What all workspaces of a host take in the file cache."""

    workspaces: Mapping[str, WorkspaceSize] = field(default_factory=dict)
    """By id; those that have a snapshot here."""
    stored_bytes: int = 0
    """All of them together: what is shared counts once."""


def measure(file_cache: FileCache) -> HostSizes:
    """The sizes of all workspaces that have snapshots in this cache, from their pins.

    Takes about 150 bytes of memory for each distinct blob, however many snapshots name it. A pin that is
    damaged, or goes meanwhile, counts for nothing; a damaged one is logged. Blobs are told apart by 64
    bits of their hash, so that a sum is wrong with a probability below 1 in 10,000 for 50 million blobs.
    """
    everything = _Blobs()
    totals: list[tuple[str, int, int]] = []
    for owner, (workspace_id, pins) in enumerate(_pins_by_workspace(file_cache)):
        own = _Blobs()
        snapshots = sum(_add_pin(own, file_cache, pin, owner) for pin in pins)
        own.merge()
        totals.append((workspace_id, snapshots, int(own.sizes_bytes.sum())))
        everything.add(own.keys, own.sizes_bytes, own.owners)
    everything.merge()
    exclusive = everything.exclusive_bytes(len(totals))
    sizes = {
        workspace_id: WorkspaceSize(alone, total - alone, snapshots)
        for (workspace_id, snapshots, total), alone in zip(totals, exclusive, strict=True)
    }
    return HostSizes(sizes, int(everything.sizes_bytes.sum()))


def workspace_id_of(pin: str) -> str:
    """The workspace whose snapshot a pin of that name keeps; empty when it is no such pin."""
    owner, dot, _ = pin.removeprefix(_PINS).partition(".")
    return owner if dot and pin.startswith(_PINS) else ""


def _pins_by_workspace(file_cache: FileCache) -> Iterable[tuple[str, list[str]]]:
    # An id may begin as another does, so that sorted names do not keep an id's together.
    names = sorted((workspace_id_of(name), name) for name in file_cache.pins(_PINS))
    for workspace_id, found in groupby(names, key=lambda pair: pair[0]):
        if workspace_id:
            yield workspace_id, [name for _, name in found]


def _add_pin(blobs: _Blobs, file_cache: FileCache, name: str, owner: int) -> bool:
    """Count what a pin keeps; whether it could be read."""
    try:
        pin = file_cache.pinned(name)
    except NotFound:
        return False
    except DataLoss as error:
        _logger.warning("sizes leave a snapshot out: %s", error)
        return False
    owners = np.full(len(pin.hashes), owner, dtype=np.int32)
    blobs.add(to_prefixes(pin.hashes), np.maximum(pin.sizes_bytes, 0), owners)
    return True


class _Blobs:
    """Distinct blobs, with their sizes and the one workspace that refers to each, or that several do."""

    def __init__(self) -> None:
        self.keys: Prefixes = np.empty(0, dtype=np.uint64)
        self.sizes_bytes: _Numbers = np.empty(0, dtype=np.int64)
        self.owners: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._waiting: list[tuple[Prefixes, _Numbers, npt.NDArray[np.int32]]] = []
        self._waiting_blobs = 0

    def add(self, keys: Prefixes, sizes_bytes: _Numbers, owners: npt.NDArray[np.int32]) -> None:
        """Note more blobs, which may be known already."""
        self._waiting.append((keys, sizes_bytes, owners))
        self._waiting_blobs += len(keys)
        # As many as there are already: then each is moved a few times only, whatever their number.
        if self._waiting_blobs >= max(MERGE_BLOBS, len(self.keys)):
            self.merge()

    def merge(self) -> None:
        """Bring all that was noted into the three arrays, one row for each blob."""
        parts = [(self.keys, self.sizes_bytes, self.owners), *self._waiting]
        keys = np.concatenate([part[0] for part in parts])
        sizes_bytes = np.concatenate([part[1] for part in parts])
        owners = np.concatenate([part[2] for part in parts])
        self._waiting, self._waiting_blobs = [], 0
        del parts  # many blobs are many bytes
        order = np.argsort(keys, kind="stable")
        keys, sizes_bytes, owners = keys[order], sizes_bytes[order], owners[order]
        is_first = np.ones(len(keys), dtype=np.bool_)
        is_first[1:] = keys[1:] != keys[:-1]
        starts = np.flatnonzero(is_first)
        if len(starts) == len(keys):
            self.keys, self.sizes_bytes, self.owners = keys, sizes_bytes, owners
            return
        lowest, highest = np.minimum.reduceat(owners, starts), np.maximum.reduceat(owners, starts)
        self.keys = keys[starts]
        self.sizes_bytes = np.maximum.reduceat(sizes_bytes, starts)
        self.owners = np.where(lowest == highest, lowest, np.int32(_SHARED))

    def exclusive_bytes(self, owners: int) -> list[int]:
        """For each owner, the bytes of the blobs that only it refers to."""
        sums = np.zeros(owners, dtype=np.int64)
        alone = self.owners != _SHARED
        np.add.at(sums, self.owners[alone], self.sizes_bytes[alone])
        return [int(number) for number in sums]
