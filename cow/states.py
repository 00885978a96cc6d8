"""What is known of each chunk, in flat numpy tables: about 10 bytes a chunk, nothing per chunk in Python."""

from __future__ import annotations

from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from cow.geometry import PAGE_SIZE, chunk_count, page_count

HOLE: Final = 0
"""Zeros, no file."""
LAZY: Final = 1
"""In the chunk source."""
BASE: Final = 2
"""In the original file."""
PRIVATE: Final = 3
"""In a file of its own, which is written in place."""
FROZEN: Final = 4
"""In a file of its own that a checkpoint has seen: the next write makes a new one."""


class ChunkStates:
    """The tables. `np.zeros` gets fresh pages from the kernel, so what is never written takes no memory.

    Single elements are set under the GIL without a lock; the arrays themselves are replaced only in
    the exclusive section of the store's gate, which keeps writers out.
    """

    def __init__(self, size: int, chunk_size: int) -> None:
        count = chunk_count(size, chunk_size)
        self.chunk_size = chunk_size
        self.kind: npt.NDArray[np.uint8] = np.zeros(count, np.uint8)
        self.epoch: npt.NDArray[np.uint32] = np.zeros(count, np.uint32)
        """Checkpoint epoch in which the file was made; with the index it names the file."""
        self.saved: npt.NDArray[np.bool_] = np.ones(count, np.bool_)
        """The content is known to the source, or is a hole: nothing to save."""
        self.written: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        """Modified since the last checkpoint began."""
        self.unsynced: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        self.touched: npt.NDArray[np.bool_] = np.zeros(count, np.bool_)
        """Has been read, and its origin counted, or written."""
        self.pages: npt.NDArray[np.bool_] = np.zeros(page_count(size), np.bool_)
        """Pages modified since the last checkpoint began; chunks begin at page borders."""

    def __len__(self) -> int:
        return len(self.kind)

    def mark(self, index: int, start: int, end: int) -> None:
        """Note that bytes `start` to `end` of a chunk are being modified."""
        first = index * self.chunk_size
        self.pages[(first + start) // PAGE_SIZE : page_count(first + end)] = True
        self.written[index] = True
        self.touched[index] = True
        self.saved[index] = False
        self.unsynced[index] = True

    def adopt(self, index: int) -> None:
        """Note that a chunk of a converted file got its private file."""
        self.kind[index] = PRIVATE
        self.saved[index] = False
        self.unsynced[index] = True
        self.touched[index] = True

    def grow(self, size: int) -> None:
        """Make room for a bigger store; what is new is a hole."""
        count = chunk_count(size, self.chunk_size)
        self.kind = _grown(self.kind, count)
        self.epoch = _grown(self.epoch, count)
        saved = np.ones(count, np.bool_)
        saved[: len(self.saved)] = self.saved
        self.saved = saved
        self.written = _grown(self.written, count)
        self.unsynced = _grown(self.unsynced, count)
        self.touched = _grown(self.touched, count)
        self.pages = _grown(self.pages, page_count(size))

    def begin_epoch(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Freeze all private files and start new tables of modifications; returns the old two."""
        written, pages = self.written, self.pages
        self.kind[self.kind == PRIVATE] = FROZEN
        self.written = np.zeros(len(written), np.bool_)
        self.pages = np.zeros(len(pages), np.bool_)
        return written, pages


S = TypeVar("S", bound=np.generic)


def _grown(array: npt.NDArray[S], count: int) -> npt.NDArray[S]:
    bigger = np.zeros(count, array.dtype)
    bigger[: len(array)] = array
    return bigger
