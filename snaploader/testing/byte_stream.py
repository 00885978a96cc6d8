"""The service ByteStream: resource names, reads in pieces, and writes that are staged until they are whole.

Data is plain or compressed with zstd. A write whose stream breaks is kept for a while, so that it can go on.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import IO, cast

import grpc
import zstandard

from snaploader._proto import bytestream_pb2 as bytestream
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument, NotFound
from snaploader.remote.codec import compress_frames
from snaploader.testing.services import SKIPPABLE_FRAME, Backend, Failure, logger, overloaded
from snaploader.testing.storage import BlobReader, MemoryPartition, Partition, StagedBlob

BUFFER_BYTES = 1024 * 1024
"""What an upload holds in memory before a worker thread stages it."""

_MAX_WINDOW_BYTES = 128 * 1024 * 1024

MAX_PARTIAL_UPLOADS = 64
"""Broken uploads kept; the oldest goes first."""

_NAME = re.compile(
    r"(?:(?P<instance>.+?)/)??"
    r"(?:uploads/(?P<upload>[^/]+)/)?"
    r"(?:blobs|compressed-blobs/(?P<compressor>[^/]+))/"
    r"(?:(?P<function>[a-z][a-z0-9]*)/)?"
    r"(?P<hash>[0-9a-f]{64})/(?P<size>[0-9]{1,16})"
    r"(?P<rest>/.*)?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class ResourceName:
    """What a resource name says."""

    instance_name: str
    digest: Digest
    is_compressed: bool
    """Whether the bytes on the wire are zstd."""
    is_upload: bool


def parse_resource_name(name: str) -> ResourceName:
    """Read a name. InvalidArgument when it is malformed.

    A name without a function is one of SHA-256, which must not be spelled out: the specification says so,
    and servers refuse it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgument(f"the resource name {name[:200]!r} is malformed")
    if match["rest"] is not None and match["upload"] is None:
        raise InvalidArgument(f"the resource name {name[:200]!r} has something after the size")
    compressor = match["compressor"]
    if compressor not in (None, "zstd"):
        raise InvalidArgument(f"the compressor {compressor!r} is not supported")
    if match["function"] not in (None, "blake3"):
        raise InvalidArgument(f"the digest function {match['function']!r} may not stand in a resource name")
    function = DigestFunction.SHA256 if match["function"] is None else DigestFunction.BLAKE3
    digest = Digest.checked(match["hash"], int(match["size"]), function)
    return ResourceName(match["instance"] or "", digest, compressor is not None, match["upload"] is not None)


class ByteStream:
    """The methods, to be run on the server's loop; what blocks goes to worker threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._uploads = Uploads(backend.options.max_upload_memory_bytes)

    async def close(self) -> None:
        """Discard the writes that never ended."""
        await self._uploads.close()

    async def read(self, request: bytestream.ReadRequest) -> AsyncIterator[bytestream.ReadResponse]:
        name, partition = self._resolve(request.resource_name)
        if name.is_upload:
            raise InvalidArgument(f"{request.resource_name!r} names an upload, which cannot be read")
        offset, limit = self._range(request, name)
        reader = await self._backend.run(partition.open, name.digest)
        if reader is None:
            raise NotFound(f"no blob {name.digest}")
        try:
            if name.is_compressed:
                pieces = self._compressed_pieces(reader, offset, limit)
            else:
                pieces = self._plain_pieces(reader, offset, limit)
            if self._backend.options.verify_reads:
                await self._backend.run_to_end(_verify, reader, name, partition)
            # Each piece is taken out of a list, so that nothing here holds it while it waits to be sent.
            boxes = map(_boxed, pieces)
            while box := await self._backend.run_to_end(next, boxes, None):
                yield bytestream.ReadResponse(data=box.pop())
        finally:
            reader.close()

    def _range(self, request: bytestream.ReadRequest, name: ResourceName) -> tuple[int, int]:
        """The offset and the end of what is asked for."""
        offset, size = request.read_offset, name.digest.size_bytes
        if not 0 <= offset <= size:
            status = self._backend.options.beyond_end_status
            raise Failure(status, f"read_offset {offset} is outside of the blob {name.digest}")
        if request.read_limit < 0:
            raise InvalidArgument(f"read_limit {request.read_limit} is negative")
        if not request.read_limit:
            return offset, size
        if name.is_compressed:
            # REAPI, ContentAddressableStorage: servers refuse a limit on a compressed read.
            raise InvalidArgument("read_limit cannot be given for a compressed read")
        if self._backend.options.read_limit_status is not None:
            raise Failure(self._backend.options.read_limit_status, "read_limit is not supported here")
        return offset, min(size, offset + request.read_limit)

    def _plain_pieces(self, reader: BlobReader, offset: int, end: int) -> Iterator[bytes]:
        step = self._backend.options.read_chunk_bytes
        for start in range(offset, end, step):
            yield reader.read(start, min(step, end - start))

    def _compressed_pieces(self, reader: BlobReader, offset: int, end: int) -> Iterator[bytes]:
        options = self._backend.options
        if options.zstd_skippable_frame:
            yield SKIPPABLE_FRAME
        plain = self._plain_pieces(reader, offset if options.zstd_read_offset else 0, end)
        yield from compress_frames(plain, options.read_chunk_bytes)

    async def write(
        self, first: bytestream.WriteRequest, rest: AsyncIterator[bytestream.WriteRequest]
    ) -> bytestream.WriteResponse:
        """Write. `first` was taken from the stream already, for its resource name."""
        name, partition = self._resolve(first.resource_name)
        if not name.is_upload:
            raise InvalidArgument(
                f"{first.resource_name!r} does not name an upload: …uploads/{{uuid}}/blobs/…"
            )
        self._backend.check_writable()
        self._backend.check_size(name.digest)
        options = self._backend.options
        if options.early_return and await self._backend.run(partition.contains, name.digest):
            size = -1 if name.is_compressed else name.digest.size_bytes
            return bytestream.WriteResponse(committed_size=size)
        key = (name.instance_name, first.resource_name)
        offset = first.write_offset
        upload = self._resumed(key, offset) if offset else Upload(self._backend, partition, name)
        is_kept = False
        try:
            if not offset:
                await self._uploads.admit(key, upload)
            if await self._receive(upload, first, rest):
                await upload.commit()
                return bytestream.WriteResponse(committed_size=self._committed_size(upload, name))
            is_kept = options.resumable_writes
            return bytestream.WriteResponse(committed_size=upload.received)
        except (asyncio.CancelledError, Failure):
            # The client went away, or a scripted fault cut the stream: it may come back.
            is_kept = options.resumable_writes and upload.received > 0
            raise
        finally:
            upload.is_active = False
            if is_kept:
                await self._uploads.keep(key, upload)
            else:
                await self._uploads.drop(key, upload)

    def _resumed(self, key: tuple[str, str], offset: int) -> Upload:
        """The broken upload that goes on at this offset."""
        known = self._uploads.get(key)
        if known is None:
            raise InvalidArgument(
                f"write_offset is {offset}, but no write of this name has begun: start at 0"
            )
        if known.is_active:
            raise Failure(grpc.StatusCode.ABORTED, "another stream is writing under this name")
        if offset != known.received:
            raise InvalidArgument(f"write_offset is {offset}, but {known.received} bytes were committed")
        known.is_active = True
        return known

    async def _receive(
        self, upload: Upload, first: bytestream.WriteRequest, rest: AsyncIterator[bytestream.WriteRequest]
    ) -> bool:
        """Feed the messages to the upload; whether the last one said that the write is finished."""
        message: bytestream.WriteRequest | None = first
        while message is not None:
            if message.resource_name not in ("", first.resource_name):
                raise InvalidArgument("the resource name changed within a write")
            if message.write_offset != upload.received:
                raise InvalidArgument(
                    f"write_offset is {message.write_offset}, but {upload.received} bytes have come"
                )
            if message.data:
                await upload.feed(message.data)
            if message.finish_write:
                return True
            message = await anext(rest, None)
        return False

    def _committed_size(self, upload: Upload, name: ResourceName) -> int:
        size = name.digest.size_bytes
        sizes = {"compressed": upload.received, "uncompressed": size, "minus-one": -1}
        return sizes[self._backend.options.compressed_committed_size] if name.is_compressed else size

    async def query_write_status(
        self, request: bytestream.QueryWriteStatusRequest
    ) -> bytestream.QueryWriteStatusResponse:
        """QueryWriteStatus. NOT_FOUND when no write of this name has begun."""
        if not self._backend.options.query_write_status:
            raise Failure(grpc.StatusCode.UNIMPLEMENTED, "QueryWriteStatus is not implemented here")
        name, partition = self._resolve(request.resource_name)
        if await self._backend.run(partition.contains, name.digest):
            return bytestream.QueryWriteStatusResponse(committed_size=name.digest.size_bytes, complete=True)
        upload = self._uploads.get((name.instance_name, request.resource_name))
        if upload is None:
            raise NotFound("no write of this name has begun")
        return bytestream.QueryWriteStatusResponse(committed_size=upload.received)

    def _resolve(self, resource_name: str) -> tuple[ResourceName, Partition]:
        name = parse_resource_name(resource_name)
        options = self._backend.options
        partition = self._backend.partition(name.instance_name)
        if self._backend.function(name.digest.function.value) is not name.digest.function:
            raise InvalidArgument(f"the digest function of {resource_name[:200]!r} is not offered here")
        if name.is_compressed and not options.zstd_streams:
            raise InvalidArgument("compressed-blobs are not supported here")
        return name, partition


def _boxed(piece: bytes) -> list[bytes]:
    return [piece]


def _verify(reader: BlobReader, name: ResourceName, partition: Partition) -> None:
    """Drop a damaged blob and say so."""
    hasher = name.digest.function.hasher()
    offset = 0
    while data := reader.read(offset, 1024 * 1024):
        hasher.update(data)
        offset += len(data)
    if hasher.hexdigest() != name.digest.hash:
        logger.warning("the stored blob %s was damaged and is dropped", name.digest)
        partition.delete(name.digest)
        raise Failure(grpc.StatusCode.DATA_LOSS, f"the stored blob {name.digest} was damaged")


class Upload:
    """One write. Used on the server's loop by one call at a time; bytes are staged on worker threads."""

    def __init__(self, backend: Backend, partition: Partition, name: ResourceName) -> None:
        self._backend = backend
        self._partition = partition
        self._name = name
        self._staged: StagedBlob | None = None
        self._target: StagedBlob | zstandard.ZstdDecompressionWriter | None = None
        """Where bytes go: the staged blob, or what inflates them into it in bounded memory."""
        self._buffer: list[bytes] = []
        self._buffered = 0
        buffered = BUFFER_BYTES + backend.options.max_message_bytes
        size = name.digest.size_bytes
        self.needed_bytes = size if isinstance(partition, MemoryPartition) else min(size, buffered)
        """Memory that it may take."""
        self.received = 0
        """Bytes on the wire so far."""
        self.is_active = True
        """Whether a stream feeds it."""

    async def feed(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered += len(data)
        self.received += len(data)
        if not self._name.is_compressed and self.received > self._name.digest.size_bytes:
            raise InvalidArgument(f"more bytes came than the digest {self._name.digest} says")
        if self._buffered >= BUFFER_BYTES:
            await self._backend.run_to_end(self._stage)

    async def commit(self) -> None:
        """Verify the whole and make it visible. DataLoss when it does not match."""
        await self._backend.run_to_end(lambda: self._stage().commit())

    async def discard(self) -> None:
        self._buffer = []
        if self._staged is not None:
            await self._backend.run_to_end(self._staged.discard)

    def _stage(self) -> StagedBlob:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        if self._staged is None:
            verify = self._backend.options.verify_writes
            self._target = self._staged = self._partition.stage(self._name.digest, verify=verify)
            if self._name.is_compressed:
                self._target = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_writer(
                    cast("IO[bytes]", self._staged), write_size=BUFFER_BYTES, closefd=False
                )
        assert self._target is not None
        try:
            for piece in pieces:
                self._target.write(piece)
        except zstandard.ZstdError as error:
            raise InvalidArgument(f"the data is not zstd: {error}") from error
        return self._staged


class Uploads:
    """The writes of a server by instance and resource name. Used on the server's loop.

    Args:
        max_memory_bytes: Bound of what they hold in memory together.
    """

    def __init__(self, max_memory_bytes: int) -> None:
        self._uploads: OrderedDict[tuple[str, str], Upload] = OrderedDict()
        self._max_memory_bytes = max_memory_bytes
        self._admitted: set[Upload] = set()

    def get(self, key: tuple[str, str]) -> Upload | None:
        return self._uploads.get(key)

    async def admit(self, key: tuple[str, str], upload: Upload) -> None:
        """Remember a new upload. Failure (RESOURCE_EXHAUSTED) when there is no memory for it."""
        while (taken := self._taken_bytes()) and taken + upload.needed_bytes > self._max_memory_bytes:
            broken = next((name for name, kept in self._uploads.items() if not kept.is_active), None)
            if broken is None:
                raise overloaded("the open uploads take all the memory there is for them")
            await self._discard(self._uploads.pop(broken))
        self._admitted.add(upload)
        await self.keep(key, upload)

    def _taken_bytes(self) -> int:
        return sum(upload.needed_bytes for upload in self._admitted)

    async def keep(self, key: tuple[str, str], upload: Upload) -> None:
        """Remember an upload; one of the same name that is broken goes, and the oldest broken ones."""
        known = self._uploads.pop(key, None)
        self._uploads[key] = upload
        idle = [name for name, kept in self._uploads.items() if not kept.is_active]
        surplus = [self._uploads.pop(name) for name in idle[: max(0, len(idle) - MAX_PARTIAL_UPLOADS)]]
        if known is not None and known is not upload and not known.is_active:
            surplus.append(known)
        for gone in surplus:
            await self._discard(gone)

    async def drop(self, key: tuple[str, str], upload: Upload) -> None:
        """Discard an upload, and its name if it still stands for it."""
        if self._uploads.get(key) is upload:
            del self._uploads[key]
        await self._discard(upload)

    async def close(self) -> None:
        """Discard all."""
        while self._uploads:
            await self._discard(self._uploads.popitem()[1])

    async def _discard(self, upload: Upload) -> None:
        self._admitted.discard(upload)
        await upload.discard()
