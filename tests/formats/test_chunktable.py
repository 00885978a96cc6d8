from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader.digest import MAX_BLOB_BYTES, Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.chunktable import (
    MAX_CHUNK_SIZE,
    MAX_CHUNKS,
    MAX_STORED_CHUNKS,
    MIN_CHUNK_SIZE,
    ChunkTable,
)

CHUNK = 4096
SHA256 = DigestFunction.SHA256


def hash_of(number: int) -> bytes:
    return bytes([number]) * 32


def table(size: int, chunks: Mapping[int, int], function: DigestFunction = SHA256) -> ChunkTable:
    """A table in which each stored chunk has a hash of one repeated byte."""
    empty = ChunkTable.empty(size, CHUNK, function)
    return empty.replace({index: hash_of(number) for index, number in chunks.items()})


def content(of: ChunkTable) -> dict[int, int]:
    return {int(index): int(hash_[0]) for index, hash_ in zip(of.indices, of.hashes, strict=True)}


def test_a_table_knows_every_chunk() -> None:
    chunks = table(10 * CHUNK + 5, {1: 11, 4: 44, 10: 99}, DigestFunction.BLAKE3)
    assert (chunks.chunk_count, chunks.stored_count) == (11, 3)
    assert chunks.get(4) == Digest(hash_of(44).hex(), CHUNK, DigestFunction.BLAKE3)
    assert chunks.get(10) == Digest(hash_of(99).hex(), 5, DigestFunction.BLAKE3)
    assert [chunks.get(index) is None for index in range(11)] == [
        index not in {1, 4, 10} for index in range(11)
    ]
    assert list(chunks.digests()) == [chunks.digest(row) for row in range(3)]
    assert (chunks.chunk_length(9), chunks.chunk_length(10)) == (CHUNK, 5)


@pytest.mark.parametrize(
    ("size", "stored", "stored_bytes"),
    [
        (0, (), 0),
        (1, (), 0),
        (1, (0,), 1),
        (CHUNK, (0,), CHUNK),
        (3 * CHUNK, (0, 2), 2 * CHUNK),
        (2 * CHUNK + 7, (0, 2), CHUNK + 7),
        (2 * CHUNK + 7, (1,), CHUNK),
    ],
)
def test_stored_and_hole_bytes_add_up_to_the_size(
    size: int, stored: tuple[int, ...], stored_bytes: int
) -> None:
    chunks = table(size, dict.fromkeys(stored, 1))
    assert chunks.stored_bytes == stored_bytes == sum(digest.size_bytes for digest in chunks.digests())
    assert chunks.hole_bytes == size - stored_bytes


@pytest.mark.parametrize("index", [-1, 3, 1 << 62])
def test_chunks_outside_the_file_are_an_index_error(index: int) -> None:
    chunks = table(2 * CHUNK + 1, {0: 1})
    for ask in (chunks.get, chunks.chunk_length):
        with pytest.raises(IndexError, match="outside"):
            ask(index)


def test_digests_of_many_chunks_come_in_order() -> None:
    count = 10_000  # more than one block
    hashes = np.random.default_rng(1).integers(0, 256, (count, 32), dtype=np.uint8)
    chunks = ChunkTable(count * 2 * CHUNK - CHUNK - 1, CHUNK, SHA256, np.arange(count) * 2, hashes)
    digests = list(chunks.digests())
    assert [digest.hash for digest in digests] == [hash_.tobytes().hex() for hash_ in hashes]
    assert {digest.size_bytes for digest in digests[:-1]} == {CHUNK}
    assert digests[-1].size_bytes == CHUNK - 1


def test_a_table_cannot_be_changed() -> None:
    chunks = table(4 * CHUNK, {0: 1, 2: 3})
    with pytest.raises(ValueError, match="read-only"):
        chunks.indices[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        chunks.hashes[0] = 1
    with pytest.raises(AttributeError):
        chunks.size = 0  # type: ignore[misc]


def test_equality_is_of_content() -> None:
    chunks = table(4 * CHUNK, {0: 1, 2: 3})
    assert chunks == table(4 * CHUNK, {2: 3, 0: 1})
    others = [
        table(4 * CHUNK - 1, {0: 1, 2: 3}),
        table(4 * CHUNK, {0: 1, 3: 3}),
        table(4 * CHUNK, {0: 1, 2: 4}),
        table(4 * CHUNK, {0: 1}),
        table(4 * CHUNK, {0: 1, 2: 3}, DigestFunction.BLAKE3),
        "something else",
    ]
    assert chunks not in others
    with pytest.raises(TypeError):
        hash(chunks)


def test_a_table_is_shown_in_short() -> None:
    assert "2 of 4 chunks" in repr(table(4 * CHUNK, {0: 1, 2: 3}))


@pytest.mark.parametrize(
    ("size", "chunk_size"),
    [
        (0, 0),
        (0, -CHUNK),
        (0, MIN_CHUNK_SIZE // 2),
        (0, MAX_CHUNK_SIZE * 2),
        (0, CHUNK + 1),
        (0, 3 * CHUNK),
        (-1, CHUNK),
        (MAX_BLOB_BYTES + 1, MAX_CHUNK_SIZE),
        (MAX_CHUNKS * CHUNK + 1, CHUNK),
    ],
)
def test_absurd_sizes_are_refused(size: int, chunk_size: int) -> None:
    with pytest.raises(InvalidArgument):
        ChunkTable.empty(size, chunk_size, SHA256)


def test_the_largest_sizes_are_allowed() -> None:
    assert ChunkTable.empty(MAX_BLOB_BYTES, MAX_CHUNK_SIZE, SHA256).chunk_count == MAX_CHUNKS
    assert ChunkTable.empty(MAX_CHUNKS * CHUNK, CHUNK, SHA256).chunk_count == MAX_CHUNKS


@pytest.mark.parametrize("indices", [[0, 0], [1, 0], [-1, 0], [0, 3], [3], [-1]])
def test_indices_must_ascend_inside_the_file(indices: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        ChunkTable(3 * CHUNK, CHUNK, SHA256, np.array(indices), np.zeros((len(indices), 32), np.uint8))


@pytest.mark.parametrize("shape", [(2, 32), (1, 31), (32,)])
def test_there_must_be_one_hash_per_index(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="shape"):
        ChunkTable(3 * CHUNK, CHUNK, SHA256, np.array([0]), np.zeros(shape, np.uint8))


def test_too_many_stored_chunks_are_refused() -> None:
    count = MAX_STORED_CHUNKS + 1
    hashes = np.broadcast_to(np.zeros(32, np.uint8), (count, 32))
    with pytest.raises(InvalidArgument, match="larger chunks"):
        ChunkTable(count * CHUNK, CHUNK, SHA256, np.arange(count), hashes)


def test_changes_replace_add_and_remove_chunks() -> None:
    before = table(5 * CHUNK, {0: 1, 2: 3, 4: 5})
    after = before.replace({0: hash_of(9), 1: hash_of(8), 2: None, 3: None})
    assert content(after) == {0: 9, 1: 8, 4: 5}
    assert content(before) == {0: 1, 2: 3, 4: 5}
    assert before.replace({}) == before


@pytest.mark.parametrize("function", list(DigestFunction))
def test_a_grown_file_keeps_its_chunks(function: DigestFunction) -> None:
    before = table(2 * CHUNK, {0: 1, 1: 2}, function)
    after = before.replace({4: hash_of(5)}, size=4 * CHUNK + 1)
    assert (content(after), after.size, after.function) == ({0: 1, 1: 2, 4: 5}, 4 * CHUNK + 1, function)


def test_a_short_last_chunk_that_grows_must_be_given_anew() -> None:
    before = table(CHUNK + 1, {0: 1, 1: 2})
    with pytest.raises(InvalidArgument, match="chunk 1 grew"):
        before.replace({0: hash_of(3)}, size=CHUNK + 2)
    assert content(before.replace({1: hash_of(3)}, size=CHUNK + 2)) == {0: 1, 1: 3}
    assert content(before.replace({1: None}, size=3 * CHUNK)) == {0: 1}


def test_a_short_last_hole_may_grow() -> None:
    assert content(table(CHUNK + 1, {0: 1}).replace({}, size=2 * CHUNK)) == {0: 1}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({0: b"short"}, None),
        ({5: hash_of(1)}, None),
        ({5: None}, None),
        ({-1: hash_of(1)}, None),
        ({-1: None}, None),
        ({}, 5 * CHUNK - 1),
    ],
)
def test_changes_outside_the_rules_are_refused(changes: dict[int, bytes | None], size: int | None) -> None:
    with pytest.raises(InvalidArgument):
        table(5 * CHUNK, {0: 1}).replace(changes, size=size)


@given(
    st.dictionaries(st.integers(0, 20), st.integers(0, 255)),
    st.dictionaries(st.integers(0, 30), st.none() | st.integers(0, 255)),
)
def test_changes_are_as_those_of_a_dict(before: dict[int, int], changes: dict[int, int | None]) -> None:
    changed = {index: None if number is None else hash_of(number) for index, number in changes.items()}
    after = table(21 * CHUNK, before).replace(changed, size=31 * CHUNK)
    merged = before | changes
    assert content(after) == {index: merged[index] for index in sorted(merged) if merged[index] is not None}
