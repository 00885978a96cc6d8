"""What a file cache tells about itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from snaploader.digest import Digest
from snaploader.filecache.layout import Space


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

    def snapshot(self, total_bytes: int | None, max_bytes: int) -> CacheStatistics:
        """All counts at one moment."""
        with self._lock:
            values = dict(self._values)
        names = CacheStatistics.__slots__[2:]
        return CacheStatistics(total_bytes, max_bytes, *(values.get(name, 0) for name in names))


def kind_name(space: Space) -> str:
    """How users call the entries of a space."""
    return {Space.REFS: "ref", Space.TREES: "directory"}.get(space, "blob")
