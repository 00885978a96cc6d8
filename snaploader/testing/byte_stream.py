"""The service ByteStream: blobs in pieces, plain or compressed with zstd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc

from snaploader._proto import bytestream_pb2 as bytestream
from snaploader.errors import InvalidArgument, NotFound
from snaploader.remote.compression import compress_frames
from snaploader.testing.backend import Backend, Failure, is_present, logger
from snaploader.testing.names import ResourceName, parse_resource_name
from snaploader.testing.storage import BlobReader, Partition
from snaploader.testing.uploads import Upload, Uploads

SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + bytes(8)
"""A zstd frame that decoders pass over: its magic number, the size of what follows, and that."""


class ByteStream:
    """The methods, to be run on the server's loop; what blocks goes to worker threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._uploads = Uploads(backend.options.max_upload_memory_bytes)

    async def close(self) -> None:
        """Discard the writes that never ended."""
        await self._uploads.close()

    async def read(self, request: bytestream.ReadRequest) -> AsyncIterator[bytestream.ReadResponse]:
        """The messages of Read."""
        name, partition = self._resolve(request.resource_name)
        if name.is_upload:
            raise InvalidArgument(f"{request.resource_name!r} names an upload, which cannot be read")
        offset, limit = self._range(request, name)
        if name.digest.size_bytes == 0 and not name.is_compressed:
            return
        reader = await self._backend.run(self._open, partition, name)
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
            raise Failure(
                self._backend.options.beyond_end_status,
                f"read_offset {offset} is outside of the blob {name.digest}",
            )
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

    def _open(self, partition: Partition, name: ResourceName) -> BlobReader:
        reader = partition.open(name.digest)
        if reader is None:
            if name.digest.size_bytes == 0:
                return _Empty()
            raise NotFound(f"no blob {name.digest}")
        return reader

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
        if options.early_return and await self._backend.run(is_present, partition, name.digest):
            return bytestream.WriteResponse(
                committed_size=-1 if name.is_compressed else name.digest.size_bytes
            )
        key = (name.instance_name, first.resource_name)
        upload = self._resumed(key, first.write_offset)
        is_new = upload is None
        if upload is None:
            upload = Upload(self._backend, partition, name.digest, is_compressed=name.is_compressed)
        is_kept = False
        try:
            if is_new:
                await self._uploads.admit(key, upload)
            is_finished = await self._receive(upload, first, rest, name)
            if is_finished:
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

    def _resumed(self, key: tuple[str, str], offset: int) -> Upload | None:
        """The broken upload that goes on at this offset; None for a write from the start."""
        if offset == 0:
            return None
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
        self,
        upload: Upload,
        first: bytestream.WriteRequest,
        rest: AsyncIterator[bytestream.WriteRequest],
        name: ResourceName,
    ) -> bool:
        """Feed the messages to the upload; whether the last one said that the write is finished."""
        message = first
        while True:
            if message.resource_name not in ("", first.resource_name):
                raise InvalidArgument("the resource name changed within a write")
            if message.write_offset != upload.received:
                raise InvalidArgument(
                    f"write_offset is {message.write_offset}, but {upload.received} bytes have come"
                )
            if message.data:
                await upload.feed(message.data)
            if not name.is_compressed and upload.received > name.digest.size_bytes:
                raise InvalidArgument(f"more bytes came than the digest {name.digest} says")
            if message.finish_write:
                return True
            try:
                message = await anext(rest)
            except StopAsyncIteration:
                return False

    def _committed_size(self, upload: Upload, name: ResourceName) -> int:
        if not name.is_compressed:
            return name.digest.size_bytes
        sizes = {
            "compressed": upload.received,
            "uncompressed": name.digest.size_bytes,
            "minus-one": -1,
        }
        return sizes[self._backend.options.compressed_committed_size]

    async def query_write_status(
        self, request: bytestream.QueryWriteStatusRequest
    ) -> bytestream.QueryWriteStatusResponse:
        """QueryWriteStatus. NOT_FOUND when no write of this name has begun."""
        if not self._backend.options.query_write_status:
            raise Failure(grpc.StatusCode.UNIMPLEMENTED, "QueryWriteStatus is not implemented here")
        name, partition = self._resolve(request.resource_name)
        if await self._backend.run(is_present, partition, name.digest):
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


class _Empty:
    """The empty blob, which exists without being stored."""

    size = 0

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002
        return b""

    def close(self) -> None:
        pass


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
