"""Writes under way: buffered, staged by worker threads, and kept for a while when the stream breaks."""

from __future__ import annotations

from collections import OrderedDict
from typing import IO, cast

import zstandard

from snaploader.digest import Buffer, Digest
from snaploader.errors import InvalidArgument
from snaploader.testing.backend import Backend, overloaded
from snaploader.testing.storage import MemoryPartition, Partition, StagedBlob

BUFFER_BYTES = 1024 * 1024
"""What an upload holds in memory before a worker thread stages it."""

_MAX_WINDOW_BYTES = 128 * 1024 * 1024

MAX_PARTIAL_UPLOADS = 64
"""Broken uploads kept; the oldest goes first."""


class Upload:
    """One write. Used on the server's loop by one call at a time; bytes are staged on worker threads."""

    def __init__(
        self, backend: Backend, partition: Partition, digest: Digest, *, is_compressed: bool
    ) -> None:
        self._backend = backend
        self._partition = partition
        self._digest = digest
        self._is_compressed = is_compressed
        self._staged: StagedBlob | None = None
        self._inflater: _Inflater | None = None
        self._buffer: list[bytes] = []
        self._buffered = 0
        in_memory = isinstance(partition, MemoryPartition)
        buffered = BUFFER_BYTES + backend.options.max_message_bytes
        self.needed_bytes = digest.size_bytes if in_memory else min(digest.size_bytes, buffered)
        """Memory that it may take."""
        self.granted_bytes = 0
        """Memory that it was given; the business of `Uploads`."""
        self.received = 0
        """Bytes on the wire so far."""
        self.is_active = True
        """Whether a stream feeds it."""

    async def feed(self, data: bytes) -> None:
        """Add bytes of the stream."""
        self._buffer.append(data)
        self._buffered += len(data)
        self.received += len(data)
        if self._buffered >= BUFFER_BYTES:
            await self._backend.run_to_end(self._stage)

    async def commit(self) -> None:
        """Verify the whole and make it visible. DataLoss when it does not match, then only discard it."""
        await self._backend.run_to_end(self._commit)

    async def discard(self) -> None:
        """Forget it all."""
        self._buffer = []
        if self._staged is not None:
            await self._backend.run_to_end(self._staged.discard)

    def _commit(self) -> None:
        if self._staged is None and not self._is_compressed:
            data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
            self._partition.put(self._digest, data, verify=self._backend.options.verify_writes)
            return
        self._stage().commit()

    def _stage(self) -> StagedBlob:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        if self._staged is None:
            self._staged = self._partition.stage(self._digest, verify=self._backend.options.verify_writes)
            if self._is_compressed:
                self._inflater = _Inflater(self._staged)
        target = self._inflater or self._staged
        for piece in pieces:
            target.write(piece)
        return self._staged


class _Inflater:
    """Decompresses frames into a staged blob. Memory is bounded; too much output is the blob's error."""

    def __init__(self, staged: StagedBlob) -> None:
        self._writer = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_writer(
            cast("IO[bytes]", self._Out(staged)), write_size=BUFFER_BYTES, closefd=False
        )

    def write(self, data: Buffer) -> None:
        """Add compressed bytes. InvalidArgument when they are not zstd."""
        try:
            self._writer.write(data)
        except zstandard.ZstdError as error:
            raise InvalidArgument(f"the data is not zstd: {error}") from error

    class _Out:
        """A staged blob as a file to write to."""

        def __init__(self, staged: StagedBlob) -> None:
            self._staged = staged

        def write(self, data: bytes) -> int:
            self._staged.write(data)
            return len(data)

        def flush(self) -> None:
            pass


class Uploads:
    """The writes of a server by instance and resource name. Used on the server's loop.

    Args:
        max_memory_bytes: Bound of what they hold in memory together.
    """

    def __init__(self, max_memory_bytes: int) -> None:
        self._uploads: OrderedDict[tuple[str, str], Upload] = OrderedDict()
        self._max_memory_bytes = max_memory_bytes
        self._granted_bytes = 0

    def get(self, key: tuple[str, str]) -> Upload | None:
        """The upload of that name, active or broken."""
        return self._uploads.get(key)

    async def admit(self, key: tuple[str, str], upload: Upload) -> None:
        """Remember a new upload. Failure (RESOURCE_EXHAUSTED) when there is no memory for it."""
        while self._granted_bytes and self._granted_bytes + upload.needed_bytes > self._max_memory_bytes:
            broken = next((name for name, kept in self._uploads.items() if not kept.is_active), None)
            if broken is None:
                raise overloaded("the open uploads take all the memory there is for them")
            await self._discard(self._uploads.pop(broken))
        upload.granted_bytes = upload.needed_bytes
        self._granted_bytes += upload.granted_bytes
        await self.keep(key, upload)

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
        self._granted_bytes -= upload.granted_bytes
        upload.granted_bytes = 0
        await upload.discard()
