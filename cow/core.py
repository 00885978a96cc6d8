"""What the parts of one store share. Data and the smallest helpers only; the parts do the work.

Locks are taken in this order, and never the other way round:

    resize lock → checkpoint's gate → store's gate → chunk lock → those inside budget, flights and counters

A chunk source is asked with nothing held but the place in the gate as a reader.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cow.budget import MappingBudget
from cow.errors import StoreClosed
from cow.files import PrivateFiles, file_name
from cow.gate import Gate
from cow.geometry import chunk_length
from cow.lru import Key
from cow.perchunk import ChunkLocks
from cow.source import ChunkSource, OpenedChunk
from cow.states import FROZEN, PRIVATE, ChunkStates
from cow.statistics import Counters

if TYPE_CHECKING:
    from cow.checkpoint import Checkpoint

_log = logging.getLogger(__name__)
_serials = itertools.count(1)


class BaseFile:
    """The original file of a store that did not copy it: one descriptor, closed with the store."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.fd = -1
        self.path = os.fspath(path)
        # A pipe would block when opened, so ask before.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{self.path!r} is not a regular file")
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class StoreCore:
    """The shared state of a store. `size`, `states` and `source` change only as their comments say."""

    def __init__(
        self,
        files: PrivateFiles,
        *,
        size: int,
        chunk_size: int,
        budget: MappingBudget,
        source: ChunkSource | None = None,
        base: BaseFile | None = None,
    ) -> None:
        self.serial = next(_serials)
        self.files = files
        self.size = size
        """Grows, in the gate's exclusive section."""
        self.chunk_size = chunk_size
        self.budget = budget
        self.source = source
        """Replaced, in the gate's exclusive section, by one that serves the same bytes."""
        self.base = base
        self.states = ChunkStates(size, chunk_size)
        self.epoch = 0
        """Number of checkpoints begun; names the files made since."""
        self.checkpoint: Checkpoint | None = None
        """The open one. Set and cleared in the gate's exclusive section."""
        self.gate = Gate(lambda: StoreClosed(f"the store in {files.folder!r} is closed"))
        self.locks = ChunkLocks()
        self.counters = Counters()
        self.resize_lock = threading.Lock()
        self.tables_lock = threading.Lock()
        """Held where several tables must be seen together, and to set `touched`, which readers do."""

    def key(self, index: int) -> Key:
        """The key of a chunk in the budget."""
        return self.serial, index

    def length(self, index: int) -> int:
        """Length of a chunk."""
        return chunk_length(index, self.size, self.chunk_size)

    def has_file(self, kind: int) -> bool:
        """Whether a chunk in this state has a file of its own."""
        return kind in (PRIVATE, FROZEN)

    def name(self, index: int) -> str:
        """Name of a chunk's own file."""
        return file_name(index, int(self.states.epoch[index]))

    def describe(self, index: int) -> str:
        """A chunk, for messages."""
        return f"chunk {index} of the store in {self.files.folder!r}"

    def prefetch(self, indices: list[int]) -> None:
        """Tell the source what will be read soon."""
        source = self.source
        if source is None:
            return
        try:
            source.prefetch(indices)
        except Exception:  # noqa: BLE001  (hints are optional, whatever goes wrong with them)
            _log.exception("a chunk source failed to take a hint; reading goes on without")

    def count_origin(self, index: int, origin: str, prefetched: bool = False) -> None:
        """Count where a chunk came from, the first time it is read."""
        if self.states.touched[index]:
            return
        with self.tables_lock:
            if self.states.touched[index]:
                return
            self.states.touched[index] = True
        with self.counters.lock:
            self.counters.count_origin(origin, self.length(index), prefetched)

    def count_first_reads(self, mask: npt.NDArray[np.bool_], origin: str) -> None:
        """Count those of many chunks that had not been read, all of one origin."""
        with self.tables_lock:
            fresh = mask & ~self.states.touched[: len(mask)]
            self.states.touched[: len(mask)] |= fresh
        if fresh.any():
            length = self.masked_bytes(fresh)
            with self.counters.lock:
                self.counters.count_origin(origin, length, False, int(fresh.sum()))

    def masked_bytes(self, mask: npt.NDArray[np.bool_]) -> int:
        """Total length of the chunks in a mask of the first ones, or all."""
        total = int(mask.sum()) * self.chunk_size
        if len(mask) and mask[-1]:
            total -= self.chunk_size - self.length(len(mask) - 1)
        return total

    def count_open(self, index: int, opened: OpenedChunk) -> None:
        """Count a chunk that the source opened."""
        with self.counters.lock:
            self.counters.source_opens += 1
        self.count_origin(index, opened.origin, opened.prefetched)

    def drop_file(self, name: str, kind: int) -> None:
        """Remove the file of a chunk that was in state `kind` and has other content now; or let the open
        checkpoint do it, if it may need it."""
        if not self.has_file(kind):
            return
        if kind == FROZEN and self.checkpoint is not None:
            self.checkpoint.keep_until_end(name)
        else:
            self.files.remove([name])
