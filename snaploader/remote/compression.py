"""zstd, with bounds: hostile input must not blow up memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import IO, cast

import zstandard

from snaploader.digest import Buffer
from snaploader.errors import DataLoss

LEVEL = 1
"""Fast enough to keep up with a network; higher levels gain a few per cent."""

MIN_BYTES = 256
"""Smaller blobs are not worth compressing."""

_WINDOW_LIMIT_BYTES = 128 * 1024 * 1024
_OUTPUT_BYTES = 1024 * 1024
_local = threading.local()


def compress(data: Buffer) -> bytes | None:
    """One zstd frame; None when that is not smaller. Releases the GIL."""
    if len(data) < MIN_BYTES:
        return None
    compressor = getattr(_local, "compressor", None)  # contexts are costly to make, and not thread-safe
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    compressed = cast("bytes", compressor.compress(data))
    return compressed if len(compressed) < len(data) else None


def decompress(data: Buffer, size_bytes: int) -> bytes:
    """The content of zstd frames, which must have this size. DataLoss for any other, or no zstd."""
    return b"".join(decompress_frames([data], size_bytes))


def compress_frames(content: Iterable[Buffer], frame_bytes: int) -> Iterator[bytes]:
    """A compressed stream in pieces of `frame_bytes`, the last one shorter, from content in pieces."""
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    pending = bytearray()
    for piece in content:
        pending += compressor.compress(piece)
        while len(pending) >= frame_bytes:
            yield bytes(pending[:frame_bytes])
            del pending[:frame_bytes]
    pending += compressor.flush()
    for start in range(0, len(pending), frame_bytes):
        yield bytes(pending[start : start + frame_bytes])


def decompress_frames(compressed: Iterable[Buffer], size_bytes: int) -> Iterator[bytes]:
    """The content of a compressed stream, piece by piece, as it comes.

    Args:
        compressed: The stream in pieces of any size; may hold several zstd frames, also skippable ones.
        size_bytes: The size the whole content must have.

    DataLoss as soon as there is more than that, at the end when there is less, or when it is no zstd; also
    when the stream is far longer than any compressor makes it, as a row of empty frames could go on for ever.
    """
    source = _Pieces(compressed, 2 * size_bytes + _OUTPUT_BYTES)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)
    produced = 0
    try:
        with decompressor.stream_reader(
            cast("IO[bytes]", source), read_size=_OUTPUT_BYTES, read_across_frames=True
        ) as reader:
            while piece := reader.read1(min(_OUTPUT_BYTES, size_bytes - produced + 1)):
                produced += len(piece)
                if produced > size_bytes:
                    raise DataLoss(f"compressed data holds more than the {size_bytes} bytes it should")
                yield piece
    except zstandard.ZstdError as error:
        raise DataLoss(f"compressed data is damaged: {error}") from error
    if produced != size_bytes:
        raise DataLoss(f"compressed data ends after {produced} of {size_bytes} bytes")


class _Pieces:
    """Pieces as a file to read from. DataLoss when they have more than `limit_bytes` in all."""

    def __init__(self, pieces: Iterable[Buffer], limit_bytes: int) -> None:
        self._pieces = iter(pieces)
        self._limit_bytes = self._left_bytes = limit_bytes
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> memoryview:
        while not len(self._rest):
            piece = next(self._pieces, None)
            if piece is None:
                return memoryview(b"")
            self._rest = memoryview(piece).cast("B")
            self._left_bytes -= len(self._rest)
            if self._left_bytes < 0:
                raise DataLoss(f"compressed data has more than {self._limit_bytes} bytes")
        size = len(self._rest) if size < 0 else size
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken
