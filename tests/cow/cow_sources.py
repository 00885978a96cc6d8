"""Chunk sources for tests: from memory, with counts, gates and faults."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from cow import COWStore, OpenedChunk


class MemorySource:
    """Serves the chunks of a bytes object, each from a file in memory."""

    def __init__(self, content: bytes, chunk_size: int) -> None:
        self.content = content
        self.chunk_size = chunk_size
        self.opens: Counter[int] = Counter()
        self.prefetched: list[list[int]] = []
        self.before_open: Callable[[int], None] = lambda index: None
        self._lock = threading.Lock()

    def open_chunk(self, index: int) -> OpenedChunk:
        with self._lock:
            self.opens[index] += 1
        self.before_open(index)
        fd = os.memfd_create("chunk")
        os.write(fd, self.content[index * self.chunk_size : (index + 1) * self.chunk_size])
        return OpenedChunk(fd, "remote", any(index in batch for batch in self.prefetched))

    def prefetch(self, indices: Sequence[int]) -> None:
        self.prefetched.append(list(indices))


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes without zeros, different in every chunk."""
    import numpy as np

    return np.random.default_rng(seed).integers(1, 256, size, np.uint8).tobytes()


def wait_until(condition: Callable[[], bool], patience_s: float = 60) -> None:
    """Wait for what another thread does."""
    give_up_at = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up_at, "nothing happened"
        time.sleep(0.001)


def open_files() -> int:
    """Descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def read_chunk(store: COWStore, index: int) -> bytes:
    """A whole chunk of a store."""
    start = index * store.chunk_size
    return store.read_at(start, min(store.chunk_size, store.size - start))
