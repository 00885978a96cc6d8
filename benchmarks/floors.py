"""The least that work on these bytes can cost on this machine, measured in the same run."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import blake3
import numpy as np
import zstandard

T = TypeVar("T")

MIB = 1 << 20


class Cost(NamedTuple):
    """What some work took: on the clock, and of all processors. On a busy machine the latter is firmer."""

    wall_s: float
    cpu_s: float

    def scaled(self, factor: float) -> Cost:
        """The cost of `factor` times the work."""
        return Cost(self.wall_s * factor, self.cpu_s * factor)


def timed(function: Callable[[], T]) -> tuple[Cost, T]:
    """What a call took in this process, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu), result


def cost(function: Callable[[], object], repeat: int = 3) -> Cost:
    """The median of `repeat` calls."""
    return median([timed(function)[0] for _ in range(repeat)])


def median(costs: list[Cost]) -> Cost:
    """The median, on the clock and of the processors each by itself."""
    return Cost(*(sorted(column)[len(costs) // 2] for column in zip(*costs, strict=True)))


def memcpy(size: int) -> Cost:
    """Copying `size` bytes in memory, 1 MiB at a time, on one thread."""
    source, target = np.ones(MIB, np.uint8), np.empty(MIB, np.uint8)

    def run() -> None:
        for _ in range(size // MIB):
            np.copyto(target, source)

    return cost(run)


def hash_blake3(size: int) -> Cost:
    """BLAKE3 of `size` bytes in chunks of 512 KiB, on one thread."""
    return _hash(size, lambda data: blake3.blake3(data).digest())


def hash_sha256(size: int) -> Cost:
    """SHA-256 of `size` bytes in chunks of 512 KiB, on one thread."""
    return _hash(size, lambda data: hashlib.sha256(data).digest())


def compress(size: int) -> Cost:
    """zstd, level 1, of `size` memory-like bytes in chunks of 512 KiB, on one thread."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 256, np.uint32)
    block = words[np.random.default_rng(2).integers(0, 256, MIB // 8)].tobytes()
    compressor = zstandard.ZstdCompressor(level=1)
    return _per_block(size, lambda: compressor.compress(block))


def copy_file(source: Path, target: Path) -> Cost:
    """Copying a file as `cp --sparse` does: its data, into a new file."""

    def run() -> None:
        target.unlink(missing_ok=True)
        with source.open("rb") as reader, target.open("wb") as writer:
            size = os.fstat(reader.fileno()).st_size
            writer.truncate(size)
            position = 0
            while position < size:
                try:
                    start = os.lseek(reader.fileno(), position, os.SEEK_DATA)
                except OSError:
                    break
                position = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
                while start < position:
                    start += os.copy_file_range(
                        reader.fileno(), writer.fileno(), position - start, start, start
                    )

    try:
        return cost(run)
    finally:
        target.unlink(missing_ok=True)


def write_file(folder: Path, size: int) -> Cost:
    """Writing `size` bytes as files of 512 KiB, which is what a cache of chunks must at least do."""
    block = np.random.default_rng(1).bytes(MIB // 2)

    def run() -> None:
        folder.mkdir()
        for number in range(size // len(block)):
            (folder / str(number)).write_bytes(block)

    def timed_and_removed() -> Cost:
        spent, _ = timed(run)
        shutil.rmtree(folder)
        return spent

    return median([timed_and_removed() for _ in range(3)])


def _hash(size: int, function: Callable[[bytes], object]) -> Cost:
    block = np.random.default_rng(1).bytes(MIB // 2)
    return _per_block(size, lambda: function(block))


def _per_block(size: int, function: Callable[[], object]) -> Cost:
    """The time for `size` bytes, from a part of them."""
    sample = min(size, 256 * MIB)

    def run() -> None:
        for _ in range(sample // (MIB // 2)):
            function()

    return cost(run).scaled(size / sample)
