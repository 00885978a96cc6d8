"""zstd within bounds: round trips, bombs, damage."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, strategies as st

from snaploader.errors import DataLoss, Unavailable
from snaploader.remote.codec import compress, compress_frames, decompress, decompress_frames

RANDOM = random.Random(1).randbytes(300_000)


def collect(pieces: Iterator[bytes], into: bytearray) -> None:
    for piece in pieces:
        into += piece


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_streams_round_trip_in_pieces_of_any_size(data: bytes, piece: int) -> None:
    pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
    wire = b"".join(compress_frames(pieces, piece))
    cut = [wire[start : start + piece] for start in range(0, len(wire), piece)]
    assert b"".join(decompress_frames(cut, len(data))) == data


def test_stream_frames_are_bounded() -> None:
    frames = list(compress_frames([RANDOM], 1000))
    assert {len(frame) for frame in frames[:-1]} == {1000}
    assert len(frames[-1]) <= 1000


def test_compress_keeps_only_what_is_smaller() -> None:
    assert compress(b"a" * 10) is None
    assert compress(RANDOM) is None
    small = compress(bytes(100_000))
    assert small is not None
    assert decompress(small, 100_000) == bytes(100_000)


def test_several_frames_are_one_content() -> None:
    one, two = zstandard.compress(b"one"), zstandard.compress(b"two")
    assert decompress(one + two, 6) == b"onetwo"


def test_skippable_frames_are_passed_over_wherever_they_stand() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"extra"
    one, two = zstandard.compress(b"one"), zstandard.compress(b"two")
    for wire in (skippable + one + two, one + skippable * 2 + two, one + two + skippable):
        assert decompress(wire, 6) == b"onetwo"
        assert b"".join(decompress_frames([bytes([byte]) for byte in wire], 6)) == b"onetwo"


def test_frames_without_content_do_not_go_on_for_ever() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (65_536).to_bytes(4, "little") + bytes(65_536)
    with pytest.raises(DataLoss, match="more than"):
        collect(decompress_frames(itertools.repeat(skippable), 1000), bytearray())


def test_bomb_ends_at_the_size_expected() -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    produced = bytearray()
    with pytest.raises(DataLoss, match="more than the 1000 bytes"):
        collect(decompress_frames([bomb], 1000), produced)
    assert len(produced) <= 1000


def test_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wire = compressor.compress(b"x" * 1000) + compressor.flush()
    with pytest.raises(DataLoss, match="damaged"):
        decompress(wire, 1000)


def test_damage_is_data_loss() -> None:
    wire = zstandard.compress(bytes(10_000) + RANDOM[:1000])
    for bad in (b"no zstd at all", wire[:-5], wire[:20]):
        with pytest.raises(DataLoss):
            decompress(bad, 11_000)
    with pytest.raises(DataLoss, match="ends after 11000 of 11001"):
        decompress(wire, 11_001)


def test_error_of_the_source_passes_through_after_what_came_before() -> None:
    wire = b"".join(compress_frames([RANDOM], 1 << 20))

    def source() -> Iterator[bytes]:
        yield wire[: len(wire) // 2]
        raise Unavailable("cut")

    got = bytearray()
    with pytest.raises(Unavailable, match="cut"):
        collect(decompress_frames(source(), len(RANDOM)), got)
    assert got
    assert RANDOM.startswith(got)
