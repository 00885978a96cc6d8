"""What a file cache tells about itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from typing import Any

from snaploader.digest import Digest
from snaploader.filecache.layout import Space
from snaploader.filecache.pintable import PinTotals


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
    """Paths of pins that cannot be read. Of their groups nothing is evicted."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry of a group."""

    kind: str
    """"blob", "ref" or "directory"."""
    key: str
    """The hash of a blob, the key of a ref or directory: 64 hexadecimal digits."""
    digest: Digest | None
    """Of a blob."""
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
        """All counts at one moment."""
        with self._lock:
            values = dict(self._values)
        stands: dict[str, Any] = {
            "total_bytes": total_bytes,
            "max_bytes": max_bytes,
            "pins": pins.pins,
            "pinned_blobs": pins.blobs,
            "pinned_bytes": pins.content_bytes,
            "pinned_refs": pins.refs,
            "damaged_pins": pins.damaged,
        }
        counted = (field.name for field in fields(CacheStatistics) if field.name not in stands)
        return CacheStatistics(**stands | {name: values.get(name, 0) for name in counted})


def kind_name(space: Space) -> str:
    """How users call the entries of a space."""
    return {Space.REFS: "ref", Space.TREES: "directory"}.get(space, "blob")
