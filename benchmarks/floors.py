"""The least that work on these bytes can cost on this machine, measured in the same run."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import blake3
import numpy as np
import zstandard

MIB = 1 << 20


def seconds(function: Callable[[], object], repeat: int = 3) -> float:
    """The median time of `repeat` calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def memcpy(size: int) -> float:
    """Copying `size` bytes in memory, 1 MiB at a time, on one thread."""
    source, target = np.ones(MIB, np.uint8), np.empty(MIB, np.uint8)

    def run() -> None:
        for _ in range(size // MIB):
            np.copyto(target, source)

    return seconds(run)


def hash_blake3(size: int) -> float:
    """BLAKE3 of `size` bytes in chunks of 512 KiB, on one thread."""
    return _hash(size, lambda data: blake3.blake3(data).digest())


def hash_sha256(size: int) -> float:
    """SHA-256 of `size` bytes in chunks of 512 KiB, on one thread."""
    return _hash(size, lambda data: hashlib.sha256(data).digest())


def compress(size: int) -> float:
    """zstd, level 1, of `size` memory-like bytes in chunks of 512 KiB, on one thread."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 256, np.uint32)
    block = words[np.random.default_rng(2).integers(0, 256, MIB // 8)].tobytes()
    compressor = zstandard.ZstdCompressor(level=1)
    return _per_block(size, lambda: compressor.compress(block))


def copy_file(source: Path, target: Path) -> float:
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
        return seconds(run)
    finally:
        target.unlink(missing_ok=True)


def _hash(size: int, function: Callable[[bytes], object]) -> float:
    block = np.random.default_rng(1).bytes(MIB // 2)
    return _per_block(size, lambda: function(block))


def _per_block(size: int, function: Callable[[], object]) -> float:
    """The time for `size` bytes, from a part of them."""
    sample = min(size, 256 * MIB)

    def run() -> None:
        for _ in range(sample // (MIB // 2)):
            function()

    return seconds(run) * size / sample
