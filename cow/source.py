"""What a store needs from the place its missing chunks come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class OpenedChunk(NamedTuple):
    """An open file that holds one chunk, and where it came from."""

    fd: int
    """Read-only file descriptor; the chunk lies at its start. The receiver owns it and closes it."""
    origin: str
    """Where the bytes came from, such as "file_cache" or "remote"; the key under which they are counted."""
    prefetched: bool = False
    """Whether they were there because of an earlier `prefetch`."""


class ChunkSource(Protocol):
    """Serves the chunks of one file, by index. Thread-safe.

    The file behind a descriptor is immutable, as long as the chunk (or, for the last chunk of a
    store, as long as its part inside the store), and verified: a store shows its bytes unchecked.
    """

    def open_chunk(self, index: int) -> OpenedChunk:
        """Open chunk `index`, fetching it first if need be. Blocks.

        May be called again for the same chunk, after the store let go of its mapping; bytes that
        were fetched once should then be near. Whatever is raised reaches the reader unchanged.
        """
        ...

    def prefetch(self, indices: Sequence[int]) -> None:
        """A hint, most wanted first: these will likely be opened soon. Returns at once, never raises."""
        ...
