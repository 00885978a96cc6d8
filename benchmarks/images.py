"""Images to measure with: like the memory of a machine, reproducible, made without holding them in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

MIB = 1 << 20
PAGE = 4096


def memory_like(path: Path, size: int, seed: int = 1) -> None:
    """An image of `size` bytes: 40 % zero (holes), 30 % compressible, a third of it repeated, 30 % less so.

    Kinds lie in runs of 1 MiB, as a guest's memory has long stretches of each.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, 4096, np.uint32)
    repeated = words[rng.integers(0, 64, MIB // 4)].tobytes()
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, MIB):
            length = min(MIB, size - offset)
            kind = rng.random()
            if kind < 0.4:
                continue
            if kind < 0.5:
                block = repeated
            elif kind < 0.7:
                block = words[rng.integers(0, 256, MIB // 4)].tobytes()
            else:
                block = words[rng.integers(0, 4096, MIB // 4)].tobytes()
            os.pwrite(file.fileno(), block[:length], offset)


def sparse(path: Path, size: int, data: int, seed: int = 1) -> None:
    """An image of `size` bytes: `data` of them random, in runs of 8 MiB spread evenly; the rest are holes."""
    rng = np.random.default_rng(seed)
    run = 8 * MIB
    runs = data // run
    stride = size // runs // MIB * MIB
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(runs):
            os.pwrite(file.fileno(), rng.bytes(run), number * stride)


def touched_runs(size: int, share: float, seed: int = 2, mean_pages: int = 32) -> list[tuple[int, int]]:
    """Ranges (offset, length) of pages that a running machine changed: `share` of all, in runs."""
    rng = np.random.default_rng(seed)
    wanted = int(size // PAGE * share)
    runs = []
    while wanted > 0:
        pages = min(int(rng.geometric(1 / mean_pages)), wanted)
        start = int(rng.integers(0, size // PAGE - pages))
        runs.append((start * PAGE, pages * PAGE))
        wanted -= pages
    return runs
