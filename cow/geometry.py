"""Where chunks lie in a store. Pure functions; sizes and offsets in bytes."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

from cow.errors import OutOfBounds

PAGE_SIZE = mmap.PAGESIZE
"""Granularity of dirty pages and of mappings."""

DEFAULT_CHUNK_SIZE = 512 * 1024
"""A compromise between fetches per byte touched (small) and the cost of a file per chunk (large)."""

MAX_CHUNK_SIZE = 64 * 1024 * 1024
MAX_CHUNKS = 1 << 24
"""Keeps the per-chunk tables of a store, about 10 bytes a chunk, within reason: 8 TiB at the default."""
MAX_STORE_SIZE = 1 << 44
"""16 TiB, the largest ext4 file; keeps the table of dirty pages within 4 GiB of address space."""


class Piece(NamedTuple):
    """The part of a range that lies in one chunk."""

    chunk: int
    start: int
    """Offset in the chunk."""
    position: int
    """Offset in the range."""
    length: int


def check_chunk_size(chunk_size: int) -> int:
    """`chunk_size` if it is usable, else ValueError."""
    chunk_size = operator.index(chunk_size)
    if chunk_size < PAGE_SIZE or chunk_size > MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"chunk_size {chunk_size} must be a power of two "
            f"from {PAGE_SIZE} (the page size) to {MAX_CHUNK_SIZE}"
        )
    return chunk_size


def check_store_size(size: int, chunk_size: int) -> int:
    """`size` if a store can have it, else ValueError."""
    size = operator.index(size)
    if not 0 <= size <= MAX_STORE_SIZE or chunk_count(size, chunk_size) > MAX_CHUNKS:
        raise ValueError(
            f"a store of {size} bytes in chunks of {chunk_size} is out of range: "
            f"at most {MAX_STORE_SIZE} bytes and {MAX_CHUNKS} chunks"
        )
    return size


def check_range(offset: SupportsIndex, length: SupportsIndex, size: int) -> tuple[int, int]:
    """The range as plain ints. OutOfBounds unless it lies within `size` bytes."""
    offset = operator.index(offset)
    length = operator.index(length)
    if offset < 0 or length < 0 or offset + length > size:
        raise OutOfBounds(f"{length} bytes at offset {offset} are not inside the store of {size} bytes")
    return offset, length


def chunk_count(size: int, chunk_size: int) -> int:
    """How many chunks hold `size` bytes."""
    return -(-size // chunk_size)


def chunk_length(index: int, size: int, chunk_size: int) -> int:
    """Length of chunk `index`: the chunk size, or less for the last one."""
    return min(chunk_size, size - index * chunk_size)


def page_count(length: int) -> int:
    """How many pages hold `length` bytes."""
    return -(-length // PAGE_SIZE)


def pieces(offset: int, length: int, chunk_size: int) -> Iterator[Piece]:
    """Cut a range at the chunk borders, in order. Nothing for an empty range."""
    position = 0
    while position < length:
        index, start = divmod(offset + position, chunk_size)
        part = min(chunk_size - start, length - position)
        yield Piece(index, start, position, part)
        position += part
