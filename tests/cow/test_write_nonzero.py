"""Writing without pages of zeros."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, strategies as st

from cow import PAGE_SIZE, write_nonzero


@given(pieces=st.lists(st.sampled_from(["zero", "full", "last byte"]), max_size=6), tail=st.integers(0, 9))
def test_what_is_written_reads_back(tmp_path_factory, pieces, tail):
    pages = {"zero": bytes(PAGE_SIZE), "full": b"x" * PAGE_SIZE, "last byte": bytes(PAGE_SIZE - 1) + b"x"}
    data = b"".join(pages[piece] for piece in pieces) + b"\0" * tail
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
