"""Upload requests as bytes, written by hand.

Building these messages through protobuf copies every blob twice more; one join here saves a third
of the processor time of an upload. The field numbers are those of the .proto files; a test
compares the bytes with protobuf's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from snaploader.blobstore import Upload
from snaploader.digest import Buffer, Digest, DigestFunction


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
        """The blob's digest."""
        return self.upload.digest


ITEM_OVERHEAD_BYTES = 128
"""More than a batch item takes beyond its data: hash, size, status, tags and lengths."""


def varint(value: int) -> bytes:
    """Protobuf's variable-length integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def batch_update_request(instance_name: str, items: Iterable[Item], function: DigestFunction) -> bytes:
    """A serialised BatchUpdateBlobsRequest."""
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
    """A serialised WriteRequest; the name is left out when empty, as all but the first may."""
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
