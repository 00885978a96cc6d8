"""Writes under way: buffered, staged by worker threads, and kept for a while when the stream breaks."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from snaploader.digest import Digest
from snaploader.testing import zstd
from snaploader.testing.backend import Backend
from snaploader.testing.storage import Partition, StagedBlob

BUFFER_BYTES = 1024 * 1024
"""What an upload holds in memory before a worker thread stages it."""

MAX_PARTIAL_UPLOADS = 256
"""Broken uploads kept; the oldest goes first."""


class Upload:
    """One write. Used on the server's loop; only the staging runs on worker threads, one at a time."""

    def __init__(
        self, backend: Backend, partition: Partition, digest: Digest, *, is_compressed: bool
    ) -> None:
        self._backend = backend
        self._partition = partition
        self._digest = digest
        self._is_compressed = is_compressed
        self._staged: StagedBlob | None = None
        self._inflater: zstd.Inflater | None = None
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._work: asyncio.Future[None] | None = None
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
            await self._do_stage()

    async def commit(self) -> None:
        """Verify the whole and make it visible."""
        if self._staged is None and not self._is_compressed:
            pieces, self._buffer = self._buffer, []
            await self._run(self._put, pieces)
            return
        await self._do_stage()
        assert self._staged is not None
        await self._run(self._staged.commit)

    async def settle(self) -> None:
        """Wait for the worker thread that a broken stream left behind. Raises what it raised."""
        if self._work is not None:
            await asyncio.shield(self._work)

    async def discard(self) -> None:
        """Forget it all."""
        self._buffer = []
        if self._work is not None:
            await asyncio.wait([self._work])
        if self._staged is not None:
            await self._backend.run(self._staged.discard)

    async def _do_stage(self) -> None:
        pieces, self._buffer, self._buffered = self._buffer, [], 0
        await self._run(self._stage, pieces)

    async def _run(self, work: object, *args: object) -> None:
        # Shielded: when the stream is cancelled, the thread goes on, and `settle` or `discard` wait for it.
        assert callable(work)
        self._work = self._backend.run(work, *args)
        await asyncio.shield(self._work)

    def _put(self, pieces: list[bytes]) -> None:
        self._partition.put(self._digest, pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _stage(self, pieces: list[bytes]) -> None:
        if self._staged is None:
            self._staged = self._partition.stage(self._digest)
            if self._is_compressed:
                self._inflater = zstd.Inflater(self._staged)
        target = self._inflater or self._staged
        for piece in pieces:
            target.write(piece)


class Uploads:
    """The writes of a server by instance and resource name. Used on the server's loop."""

    def __init__(self) -> None:
        self._uploads: OrderedDict[tuple[str, str], Upload] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Upload | None:
        """The upload of that name, active or broken."""
        return self._uploads.get(key)

    async def keep(self, key: tuple[str, str], upload: Upload) -> None:
        """Remember an upload; the oldest broken ones make room."""
        self._uploads[key] = upload
        self._uploads.move_to_end(key)
        idle = [name for name, kept in self._uploads.items() if not kept.is_active]
        for name in idle[: max(0, len(idle) - MAX_PARTIAL_UPLOADS)]:
            await self._uploads.pop(name).discard()

    def forget(self, key: tuple[str, str], upload: Upload) -> None:
        """Drop the name, if it still stands for this upload."""
        if self._uploads.get(key) is upload:
            del self._uploads[key]

    async def close(self) -> None:
        """Discard all."""
        while self._uploads:
            await self._uploads.popitem()[1].discard()
