"""Zero tests, ranges, extents, copies, writing without pages of zeros."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cow_sources import pattern
from hypothesis import given, strategies as st

from cow import (
    PAGE_SIZE,
    OutOfBounds,
    TruncatedFile,
    copy_sparse,
    data_extents,
    is_zero,
    write_all,
    write_nonzero,
)
from cow.chunks import check_geometry, check_range, chunk_count, chunk_length, pieces
from cow.fileio import copy_range


@given(st.binary(max_size=300), st.integers(0, 9000), st.integers(0, 20))
def test_is_zero_agrees_with_any_at_every_alignment_and_length(data, zeros, skip):
    buffer = bytes(zeros) + data
    assert is_zero(memoryview(buffer)[skip:]) == (not any(buffer[skip:]))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4095, 4096, 4097, 4103, 65536, (1 << 20) + 4096 + 3])
def test_is_zero_sees_a_single_bit_anywhere(size):
    buffer = bytearray(size)
    assert is_zero(buffer)
    for position in {0, size // 2, max(0, size - 9), size - 1}:
        buffer[position] = 1
        assert not is_zero(buffer)
        buffer[position] = 0


def test_is_zero_takes_arrays_of_any_type_and_empty_buffers():
    assert is_zero(b"")
    assert is_zero(np.zeros((3, 5), np.float64))
    assert not is_zero(np.array([0, 0, 1], np.uint16))


@given(st.integers(0, 100_000), st.integers(0, 50_000), st.sampled_from([4096, 8192]))
def test_pieces_cover_a_range_in_order_without_crossing_borders(offset, length, chunk_size):
    position = offset
    for chunk, start, done, size in pieces(offset, length, chunk_size):
        assert chunk * chunk_size + start == position == offset + done
        assert 0 < size <= chunk_size - start
        position += size
    assert position == offset + length


@given(st.integers(0, 1 << 30), st.sampled_from([4096, 1 << 19]))
def test_chunk_lengths_add_up_to_the_size(size, chunk_size):
    count = chunk_count(size, chunk_size)
    assert (count - 1) * chunk_size + (
        chunk_length(count - 1, size, chunk_size) if count else chunk_size
    ) == size


@pytest.mark.parametrize("chunk_size", [0, -4096, 1024, 4097, 12288, 1 << 27])
def test_unusable_chunk_sizes_are_refused(chunk_size):
    with pytest.raises(ValueError, match="power of two"):
        check_geometry(0, chunk_size)


@pytest.mark.parametrize("size", [-1, 1 << 60, 4096 * (1 << 24) + 1])
def test_unusable_store_sizes_are_refused(size):
    with pytest.raises(ValueError, match="out of range"):
        check_geometry(size, 4096)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 11), (10, 1), (1 << 70, 0)])
def test_ranges_outside_are_out_of_bounds(offset, length):
    with pytest.raises(OutOfBounds):
        check_range(offset, length, 10)


def test_a_range_of_another_type_is_a_type_error():
    with pytest.raises(TypeError):
        check_range("0", 1, 10)
    with pytest.raises(TypeError):
        check_range(0.0, 1, 10)


def test_data_extents_skip_holes(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(65536)
        file.write(b"x" * 4096)
    fd = os.open(path, os.O_RDONLY)
    try:
        extents = list(data_extents(fd, 1 << 20))
        assert extents == [(65536, 69632)]
        assert list(data_extents(fd, 1 << 20, 69632)) == []
        assert list(data_extents(fd, 66000, 65600)) == [(65600, 66000)]
    finally:
        os.close(fd)


def test_data_extents_without_support_is_one_range(monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert list(data_extents(0, 100)) == [(0, 100)]
    assert list(data_extents(0, 0)) == []


@pytest.mark.parametrize("kernel", [True, False])
def test_copying_copies_data_and_leaves_holes(tmp_path, monkeypatch, kernel):
    if not kernel:

        def refuse(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    data = pattern(5000)
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(source, 1 << 20)
        os.pwrite(source, data, 300_000)
        os.ftruncate(target, 1 << 20)
        copy_sparse(source, 0, 1 << 20, target, 0, "it")
        assert os.pread(target, 5000, 300_000) == data
        assert os.fstat(target).st_blocks == os.fstat(source).st_blocks
        with pytest.raises(TruncatedFile, match="the thing"):
            copy_sparse(source, 4096, 1 << 20, target, 0, "the thing")
        with pytest.raises(TruncatedFile, match="the thing"):
            copy_range(source, 1 << 20, 1, target, 0, "the thing")
    finally:
        os.close(source)
        os.close(target)


def test_write_all_goes_on_after_short_writes(tmp_path, monkeypatch):
    real = os.pwrite

    def one_byte(fd, data, offset):
        return real(fd, data[:1], offset)

    monkeypatch.setattr(os, "pwrite", one_byte)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        write_all(fd, b"abcde", 2)
        write_all(fd, b"", 9)
        assert os.pread(fd, 9, 0) == b"\0\0abcde"
    finally:
        os.close(fd)


@given(parts=st.lists(st.sampled_from(["zero", "full", "last byte"]), max_size=6), tail=st.integers(0, 9))
def test_what_is_written_without_zeros_reads_back(tmp_path_factory, parts, tail):
    pages = {"zero": bytes(PAGE_SIZE), "full": b"x" * PAGE_SIZE, "last byte": bytes(PAGE_SIZE - 1) + b"x"}
    data = b"".join(pages[part] for part in parts) + b"\0" * tail
    path = tmp_path_factory.mktemp("nonzero") / "file"
    with path.open("wb") as file:
        file.truncate(PAGE_SIZE + len(data))
        write_nonzero(file.fileno(), data, PAGE_SIZE)
    assert path.read_bytes() == bytes(PAGE_SIZE) + data


@pytest.mark.parametrize("tail", [b"", b"tail"])
def test_pages_of_zeros_take_no_blocks(tmp_path, tail):
    data = b"x" * PAGE_SIZE + bytes(30 * PAGE_SIZE) + b"y" * PAGE_SIZE + bytes(30 * PAGE_SIZE) + tail
    with (tmp_path / "file").open("wb") as file:
        file.truncate(len(data))
        write_nonzero(file.fileno(), data, 0)
        assert os.fstat(file.fileno()).st_blocks * 512 <= 3 * PAGE_SIZE
