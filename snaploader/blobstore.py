"""The one interface of everything that keeps blobs: the file cache, a remote server, wrappers of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from snaploader._proto import remote_execution_pb2
from snaploader.digest import Buffer, Digest, DigestFunction

Sink: TypeAlias = Callable[[Digest, bytes], None]
"""Receives verified blobs, from any thread, each once; what it raises ends the transfer and is raised."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob to store."""

    digest: Digest
    source: Buffer | str | os.PathLike[str]
    """Its bytes, or a file that holds exactly them."""
    verified: bool = False
    """Whether the caller has hashed these very bytes, as a file cache has what it gives out. A store may do
    without hashing them once more then; sizes are compared in any case."""


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """What a transfer moved."""

    blobs: int = 0
    """Blobs that went over the wire."""
    content_bytes: int = 0
    """Their size."""
    wire_bytes: int = 0
    """What was sent or received for them, compressed where it was; without protocol overhead."""
    present_blobs: int = 0
    """Blobs that needed no transfer because the store had them."""

    def __add__(self, other: TransferStatistics) -> TransferStatistics:
        return TransferStatistics(
            self.blobs + other.blobs,
            self.content_bytes + other.content_bytes,
            self.wire_bytes + other.wire_bytes,
            self.present_blobs + other.present_blobs,
        )


class BlobStore(Protocol):
    """Content-addressed blobs. Thread-safe. Every blob that comes out is verified against its digest."""

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Those of `digests` that the store does not hold. Counts as a use of those it does."""
        ...

    def read(self, digest: Digest) -> bytes:
        """One blob. NotFound when absent, DataLoss when its bytes are wrong."""
        ...

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Hand each blob to `sink`, in any order. The first error ends it and is raised."""
        ...

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """Store one blob. DataLoss when the bytes do not have this digest."""
        ...

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store many blobs, in any order. The first error ends it and is raised."""
        ...


class RemoteStore(BlobStore, Protocol):
    """A blob store with an action cache, shared by many hosts: what `RemoteCache` offers the loader."""

    @property
    def digest_function(self) -> DigestFunction:
        """The function the store wants digests in. May ask the server, and raise what that raises."""
        ...

    @property
    def update_enabled(self) -> bool:
        """Whether action results may be written, as far as the store says. Raises as `digest_function`."""
        ...

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """Stream one blob, of any size, in order, into `write`. Its bytes were right only if this returns."""
        ...

    def upload_missing(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store those blobs that the store does not hold yet."""
        ...

    def get_action_result(self, action_digest: Digest) -> remote_execution_pb2.ActionResult:
        """The result kept under a key. NotFound when there is none, or when a blob it names is gone."""
        ...

    def update_action_result(
        self, action_digest: Digest, action_result: remote_execution_pb2.ActionResult
    ) -> None:
        """Keep a result under a key, replacing what stood there. FailedPrecondition when not allowed."""
        ...
