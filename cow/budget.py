"""What the stores of a process may keep mapped and open."""

from __future__ import annotations

import os

from cow.lru import PinnedLRU
from cow.memory import Mapping

DEFAULT_MAPPED_BYTES = 128 * 1024 * 1024
DEFAULT_MAPPINGS = 16_384
"""A quarter of Linux's default vm.max_map_count, 65,530."""
DEFAULT_DESCRIPTORS = 64


class MappingBudget:
    """Bounds for the mapped chunks and open files of all stores that share it. Thread-safe.

    Least recently used mappings are dropped first. A mapping in use, by a read in progress or an array
    returned by `view` that is still referenced, is never dropped: the bounds may be exceeded by what is in
    use. Once all stores are closed and all views gone, nothing is mapped.

    Args:
        max_bytes: Mapped bytes, 128 MiB unless told; pages of them that were touched count in the
            process's resident memory.
        max_mappings: Number of mappings, 16,384 unless told; the kernel allows a process 65,530 by default.
        max_descriptors: Files kept open for writing, 64 unless told.
    """

    def __init__(
        self,
        max_bytes: int = DEFAULT_MAPPED_BYTES,
        max_mappings: int = DEFAULT_MAPPINGS,
        max_descriptors: int = DEFAULT_DESCRIPTORS,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_mappings", max_mappings)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        if max_descriptors < 0:
            raise ValueError(f"max_descriptors must not be negative, not {max_descriptors}")
        self._maps: PinnedLRU[Mapping] = PinnedLRU(max_bytes, max_mappings, Mapping.unmap)
        self._files: PinnedLRU[int] = PinnedLRU(max_descriptors, max_descriptors, os.close)

    @property
    def max_bytes(self) -> int:
        """The bound on mapped bytes."""
        return self._maps.max_weight

    @property
    def max_mappings(self) -> int:
        """The bound on the number of mappings."""
        return self._maps.max_entries

    @property
    def max_descriptors(self) -> int:
        """The bound on files kept open for writing."""
        return self._files.max_entries

    @property
    def mapped_bytes(self) -> int:
        """Bytes mapped now, whole pages."""
        return self._maps.weight

    @property
    def mappings(self) -> int:
        """Mappings that exist now."""
        return self._maps.count

    @property
    def open_descriptors(self) -> int:
        """Files open for writing now."""
        return self._files.count

    def trim(self) -> None:
        """Drop every mapping and close every file that is not in use."""
        self._maps.trim()
        self._files.trim()


_default = MappingBudget()


def default_budget() -> MappingBudget:
    """The budget of all stores that were not given one. One per process: a forked child has its own."""
    return _default


def _renew() -> None:
    # Another thread of the parent may have held the old budget's lock at the moment of the fork.
    global _default
    _default = MappingBudget()


os.register_at_fork(after_in_child=_renew)
