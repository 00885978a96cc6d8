"""Which blobs this process has verified already."""

from __future__ import annotations

import os

import numpy as np

from snaploader.digest import Digest

SLOTS = 1 << 19


class VerifiedMemo:
    """Remembers verified files by inode, size and time of last write. Thread-safe.

    A table of fixed size (4 MiB) with two places per entry; the older makes room. A forgotten entry costs
    one more hash. Fingerprints have 64 bits under Python's per-process random hash seed, so that an
    entry is not mistaken for another by chance or by design.
    """

    def __init__(self) -> None:
        # Zeros that take neither memory nor time before they are touched. A memoryview hands out plain ints.
        self._table = np.zeros(SLOTS, np.uint64).data

    def knows(self, digest: Digest, status: os.stat_result) -> bool:
        """Whether this very file was found to have this digest, and was not written to since."""
        print_, slot = _fingerprint(digest, status)
        return print_ in (self._table[slot], self._table[slot + 1])

    def add(self, digest: Digest, status: os.stat_result) -> None:
        """Remember that the file has this digest."""
        print_, slot = _fingerprint(digest, status)
        if self._table[slot] != print_:
            self._table[slot + 1] = self._table[slot]
            self._table[slot] = print_


def _fingerprint(digest: Digest, status: os.stat_result) -> tuple[int, int]:
    key = (digest.hash, digest.size_bytes, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    # Zero marks a free place, hence the lowest bit. The slot comes from other bits than those compared
    # would miss: all 64 are compared.
    value = hash(key) & 0xFFFF_FFFF_FFFF_FFFF | 1
    return value, (value >> 20) % (SLOTS // 2) * 2
