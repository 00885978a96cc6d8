"""The chunks of one file of a snapshot, served to its copy-on-write store."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cow import OpenedChunk
from snaploader.digest import Digest
from snaploader.errors import Internal, SnaploaderError
from snaploader.formats.chunktable import ChunkTable
from snaploader.formats.chunktree import DEFAULT_MODE
from snaploader.loader.fetch import BlobFetcher

log = logging.getLogger(__name__)


class SnapshotChunkSource:
    """Implements `cow.ChunkSource` with the chunks of a table. Thread-safe, immutable.

    Args:
        mode: Permission bits of the file, which the next save of its store keeps.
    """

    def __init__(
        self,
        name: str,
        table: ChunkTable,
        fetcher: BlobFetcher,
        *,
        allow_remote: bool,
        mode: int = DEFAULT_MODE,
    ) -> None:
        self.name = name
        self.table = table
        self.mode = mode
        self._fetcher = fetcher
        self.allow_remote = allow_remote

    def open_chunk(self, index: int) -> OpenedChunk:
        """Open the chunk, from the nearest tier. Errors say which chunk of which file it was."""
        digest = self._digest(index)
        try:
            return self._fetcher.open(digest, allow_remote=self.allow_remote)
        except SnaploaderError as error:
            error.add_note(f"needed for chunk {index} of {self.name!r}")
            raise

    def prefetch(self, indices: Sequence[int]) -> None:
        """Pass the hint on to the fetcher."""
        if self.allow_remote:
            self._fetcher.prefetch([self._digest(index) for index in indices])

    def _digest(self, index: int) -> Digest:
        digest = self.table.get(index)
        if digest is None:
            raise Internal(f"chunk {index} of {self.name!r} is a hole and was asked for")
        return digest
