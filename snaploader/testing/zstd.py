"""zstd as the server uses it: decompression whose output is bounded, compression of a range in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, cast

import zstandard

from snaploader.digest import Buffer
from snaploader.errors import InvalidArgument
from snaploader.testing.storage import BlobReader, StagedBlob

_LEVEL = 1
_PIECE_BYTES = 1024 * 1024
_MAX_WINDOW_BYTES = 128 * 1024 * 1024


class Inflater:
    """Decompresses into a staged blob. Memory is bounded; too much output is the blob's error."""

    def __init__(self, staged: StagedBlob) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._writer = decompressor.stream_writer(
            cast("IO[bytes]", _Out(staged)), write_size=_PIECE_BYTES, closefd=False
        )

    def write(self, data: Buffer) -> None:
        """Add compressed bytes. InvalidArgument when they are not zstd."""
        try:
            self._writer.write(data)
        except zstandard.ZstdError as error:
            raise InvalidArgument(f"the data is not zstd: {error}") from error


class _Out:
    """A file-like object over a staged blob."""

    def __init__(self, staged: StagedBlob) -> None:
        self._staged = staged

    def write(self, data: bytes) -> int:
        self._staged.write(data)
        return len(data)

    def flush(self) -> None:
        pass


def decompress(data: bytes, size: int) -> bytes:
    """The content of one frame that must hold `size` bytes. InvalidArgument when it does not."""
    try:
        stated = zstandard.frame_content_size(data)
        if stated not in (-1, size):
            raise InvalidArgument(f"the compressed data holds {stated} bytes, the digest says {size}")
        if size == 0:
            return b""
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        return decompressor.decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise InvalidArgument(f"the data is not zstd: {error}") from error


def compress(data: bytes) -> bytes:
    """One frame."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def compressed_pieces(reader: BlobReader, offset: int, piece_bytes: int) -> Iterator[bytes]:
    """The blob from `offset`, compressed, in pieces of at most `piece_bytes`."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    pending = bytearray()
    while data := reader.read(offset, _PIECE_BYTES):
        offset += len(data)
        pending += compressor.compress(data)
        while len(pending) >= piece_bytes:
            yield bytes(pending[:piece_bytes])
            del pending[:piece_bytes]
    pending += compressor.flush()
    while pending:
        yield bytes(pending[:piece_bytes])
        del pending[:piece_bytes]
