"""What eviction leaves alone: what a lease or a pin names, and every group with a damaged pin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from snaploader.filecache.layout import Layout, Space
from snaploader.filecache.leases import LeaseTable
from snaploader.filecache.ledger import Section
from snaploader.filecache.pintable import PinTable
from snaploader.filecache.scan import Scan

Rows = npt.NDArray[np.int64]
"""Places in a scan."""


class Protection:
    """Leases and pins of all processes, as the evictor sees them. For one thread at a time."""

    def __init__(self, layout: Layout, pins: PinTable) -> None:
        self._leases = LeaseTable(layout)
        self._pins = pins
        self._pins_version = -1

    def refresh(self, section: Section, *, again: bool = False) -> bool:
        """Read what changed; whether anything did. What `again` does: see the tables."""
        changed = self._leases.refresh(section.lease_generation, again=again)
        self._pins.refresh(section.pin_generation)
        if self._pins_version != self._pins.version:
            self._pins_version = self._pins.version
            changed = True
        return changed

    def holds(self, scan: Scan, rows: Rows) -> npt.NDArray[np.bool_]:
        """For each of these entries whether it must stay. Directories look after themselves."""
        is_blob = scan.space[rows] <= Space.BLAKE3
        return (self._leases.protected(scan.prefixes[rows]) & is_blob) | self.is_pinned(scan, rows)

    def is_pinned(self, scan: Scan, rows: Rows) -> npt.NDArray[np.bool_]:
        """For each of these entries whether a pin keeps it, or may have before it was damaged."""
        space = scan.space[rows]
        keys = scan.use_keys[rows]
        pinned: npt.NDArray[np.bool_] = self._pins.pinned(Space.SHA256, keys) & (space <= Space.BLAKE3)
        pinned |= self._pins.pinned(Space.REFS, keys) & (space == Space.REFS)
        for group in self._pins.damaged_groups():
            if group in scan.groups:
                pinned |= (scan.group[rows] == scan.groups.index(group)) & (space != Space.TREES)
        return pinned
