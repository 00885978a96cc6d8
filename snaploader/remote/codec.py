"""How blobs look on the wire: names and digests in messages, zstd, the bytes of uploads and their requests.

Upload requests are written by hand: building these messages through protobuf copies every blob twice more,
and one join here saves a third of the processor time of an upload. The field numbers are those of the .proto
files; a test compares the bytes with protobuf's own.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import IO, NamedTuple, cast

import zstandard

from snaploader.blobstore import Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import Cancelled, DataLoss, translate_os_errors
from snaploader.formats.digests import varint


def read_name(instance_name: str, digest: Digest, *, zstd: bool = False) -> str:
    """Return the name under which a blob is read; with `zstd`, its compressed form."""
    kind = "compressed-blobs/zstd" if zstd else "blobs"
    name = f"{kind}/{digest.function.resource_name_part}{digest.hash}/{digest.size_bytes}"
    return f"{instance_name}/{name}" if instance_name else name


def upload_name(instance_name: str, digest: Digest, *, zstd: bool = False) -> str:
    """Return a name to write a blob under, a new one at every call: it identifies one upload."""
    upload = f"uploads/{uuid.uuid4()}"
    return read_name(f"{instance_name}/{upload}" if instance_name else upload, digest, zstd=zstd)


_RESERVED = frozenset(
    ("blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs")
)


def instance_name_error(instance_name: str) -> str | None:
    """Say what is wrong with an instance name by the REAPI's rules; None when it is fine."""
    parts = instance_name.split("/") if instance_name else []
    if any(not part or not part.isprintable() for part in parts):
        return "has empty or unprintable parts"
    reserved = _RESERVED.intersection(parts)
    return f"contains the reserved part {min(reserved)!r}" if reserved else None


MIN_BYTES = 256
"""Smaller blobs are not worth compressing."""

_LEVEL = 1  # fast enough to keep up with a network; higher levels gain a few per cent
_WINDOW_LIMIT_BYTES = 128 * 1024 * 1024
_OUTPUT_BYTES = 1024 * 1024


class _Local(threading.local):
    """A compressor and a decompressor for each thread: they are costly to make, and not thread-safe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = _new_decompressor()


def _new_decompressor() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT_BYTES)


_local = _Local()


def compress(data: Buffer) -> bytes | None:
    """Compress to one zstd frame; None when that is not smaller. Releases the GIL."""
    if len(data) < MIN_BYTES:
        return None
    compressed = _local.compressor.compress(data)
    return compressed if len(compressed) < len(data) else None


def decompress(data: Buffer, size_bytes: int) -> bytes:
    """Decompress zstd frames whose content must have this size. DataLoss for any other, or no zstd."""
    return b"".join(decompress_frames([data], size_bytes, _local.decompressor))


def compress_frames(content: Iterable[Buffer], frame_bytes: int) -> Iterator[bytes]:
    """Compress content that comes in pieces, into pieces of `frame_bytes`, the last one shorter."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    pending = bytearray()
    for piece in content:
        pending += compressor.compress(piece)
        while len(pending) >= frame_bytes:
            yield bytes(pending[:frame_bytes])
            del pending[:frame_bytes]
    pending += compressor.flush()
    for start in range(0, len(pending), frame_bytes):
        yield bytes(pending[start : start + frame_bytes])


def decompress_frames(
    compressed: Iterable[Buffer], size_bytes: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> Iterator[bytes]:
    """Decompress a stream, in pieces of any size, of zstd frames whose content must have this size.

    DataLoss as soon as there is more than that, at the end when there is less, or when it is no zstd; also
    when the stream is far longer than any compressor makes it, as a row of empty frames could go on for ever.
    """
    source = _Pieces(compressed, 2 * size_bytes + _OUTPUT_BYTES)
    produced = 0
    try:
        with (decompressor or _new_decompressor()).stream_reader(
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


class Content:
    """Content that is read in pieces, from any offset, more than once, by one thread at a time.

    Unless it was verified before, the hash is checked the first time the end is reached, before the last
    piece is given out.

    A thread of gRPC's may still be reading when a call has ended: `close` waits for its read and ends its
    iterator with Cancelled, so the descriptor is never used after.
    """

    def __init__(self, upload: Upload) -> None:
        self._digest = upload.digest
        self._lock = threading.Lock()
        self._closed = False
        self._hasher = None if upload.verified else upload.digest.function.hasher()
        self.read_bytes = 0  # how far the content was read
        self._fd = -1
        self._view = memoryview(b"")
        if isinstance(upload.source, str | os.PathLike):
            self._name = repr(os.fspath(upload.source))
            with translate_os_errors(f"cannot read {self._name} for upload"):
                self._fd = os.open(upload.source, os.O_RDONLY | os.O_CLOEXEC)
                size = os.fstat(self._fd).st_size
        else:
            self._name = "the data given"
            self._view = memoryview(upload.source).cast("B")
            size = len(self._view)
        if size != self._digest.size_bytes:
            self.close()
            raise DataLoss(
                f"{self._name} has {size} bytes, not those of digest {self._digest}; nothing was stored"
            )

    def pieces(self, offset: int, piece_bytes: int) -> Iterator[Buffer]:
        """Give the content from `offset` on. DataLoss, before the last piece, when the hash is wrong."""
        size = self._digest.size_bytes
        while offset < size:
            with self._lock:
                if self._closed:
                    raise Cancelled("the upload has ended")
                piece = self._piece(offset, min(piece_bytes, size - offset))
                self._check(offset, piece)
            yield piece
            offset += len(piece)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._closed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _piece(self, offset: int, length: int) -> Buffer:
        if self._fd < 0:
            return self._view[offset : offset + length]
        with translate_os_errors(f"cannot read {self._name} for upload"):
            piece = os.pread(self._fd, length, offset)
        if not piece:
            raise DataLoss(f"{self._name} became shorter while it was uploaded")
        return piece

    def _check(self, offset: int, piece: Buffer) -> None:
        end = offset + len(piece)
        if not offset <= self.read_bytes < end:
            return
        if self._hasher is not None:
            self._hasher.update(memoryview(piece)[self.read_bytes - offset :])
            if end == self._digest.size_bytes and self._hasher.hexdigest() != self._digest.hash:
                self.read_bytes, self._hasher = 0, self._digest.function.hasher()
                raise DataLoss(f"{self._name} does not have digest {self._digest}; nothing was stored")
        self.read_bytes = end


class Item(NamedTuple):
    """One blob of a batch upload, as it goes on the wire."""

    upload: Upload
    """What it is; its source is read again should the blob have to be streamed."""
    data: Buffer
    """Its content, compressed or not."""
    zstd: bool
    """Which of the two."""

    @property
    def digest(self) -> Digest:
        return self.upload.digest

    @classmethod
    def of(cls, upload: Upload, *, zstd: bool) -> Item:
        """Load an upload, and compress it where that is wanted and helps. DataLoss as `Content`."""
        with closing(Content(upload)) as content:
            pieces = list(content.pieces(0, upload.digest.size_bytes))
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        compressed = compress(data) if zstd else None
        return cls(upload, data if compressed is None else compressed, compressed is not None)


ITEM_OVERHEAD_BYTES = 128
"""More than a batch item takes beyond its data: hash, size, status, tags and lengths."""


def batch_update_request(instance_name: str, items: Iterable[Item], function: DigestFunction) -> bytes:
    """Serialise a BatchUpdateBlobsRequest."""
    instance = instance_name.encode()
    parts: list[Buffer] = [b"\x0a", varint(len(instance)), instance] if instance else []
    for item in items:
        size = b"\x10" + varint(item.digest.size_bytes) if item.digest.size_bytes else b""
        hash_ = item.digest.hash.encode()
        length = len(item.data)
        digest = b"\x0a" + varint(len(hash_)) + hash_ + size
        head = b"\x0a" + varint(len(digest)) + digest + (b"\x12" + varint(length) if length else b"")
        tail = b"\x18\x01" if item.zstd else b""
        parts += (b"\x12", varint(len(head) + length + len(tail)), head, item.data, tail)
    if function is not DigestFunction.SHA256:
        parts.append(b"\x28" + varint(function.value))
    return b"".join(parts)


def write_request(resource_name: str, offset: int, data: Buffer, *, finish: bool) -> bytes:
    """Serialise a WriteRequest; the name is left out when empty, as in all but the first of a stream."""
    parts: list[Buffer] = []
    if resource_name:
        name = resource_name.encode()
        parts += (b"\x0a", varint(len(name)), name)
    if offset:
        parts += (b"\x10", varint(offset))
    if finish:
        parts.append(b"\x18\x01")
    if len(data):
        parts += (b"\x52", varint(len(data)), data)
    return b"".join(parts)
