"""The one interface of everything that keeps blobs: the file cache, a remote server, tiers of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import DataLoss, NotFound, SnaploaderError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from snaploader._proto import remote_execution_pb2

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
    """Content-addressed blobs. Thread-safe. Every blob that comes out is verified against its digest.

    No method takes a context: the loader calls a store in the context of its own call, which a store that
    has to do with deadlines, cancellations or callers finds with `snaploader.context.current`. Others need
    know nothing of it.
    """

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Those of `digests` that the store does not hold. Counts as a use of those it does.

        The loader gives a `snaploader.formats.digests.DigestArray`. A store may look at its arrays instead of
        its digests.
        """

    def read(self, digest: Digest) -> bytes:
        """One blob. NotFound when absent, DataLoss when its bytes are wrong."""

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Hand each blob to `sink`, in any order. The first error ends it and is raised."""

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """Stream one blob, of any size, in order, into `write`. Its bytes were right only if this returns."""

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """Store one blob. DataLoss when the bytes do not have this digest."""

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store many blobs, in any order. The first error ends it and is raised."""


class TieredStore:
    """A near blob store in front of a far one, as one store: `TieredStore(disk, TieredStore(peer, server))`.

    Reads ask the near one first. What it lacks, or has with wrong bytes, comes from the far one and is kept
    in the near one, where that takes it; only when both fail, the far one's error is raised. Writes go to
    both, and only those to the far one must succeed. Thread-safe as far as both are. Both work in the context
    that is current.
    """

    def __init__(self, near: BlobStore, far: BlobStore) -> None:
        self._near = near
        self._far = far

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Those of `digests` that neither store holds."""
        missing = self._near.find_missing(digests)
        return self._far.find_missing(missing) if missing else missing

    def read(self, digest: Digest) -> bytes:
        """One blob, kept in the near store. NotFound or DataLoss when neither has it right."""
        try:
            return self._near.read(digest)
        except (NotFound, DataLoss) as error:
            near_error = error
        try:
            data = self._far.read(digest)
        except (NotFound, DataLoss) as error:
            if isinstance(near_error, DataLoss):
                error.add_note(f"in the store before it: {near_error.message}")
            raise
        self._keep(Upload(digest, data, verified=True))
        return data

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Hand each blob to `sink`: first those of the near store, then the others, which it keeps."""
        rest = dict.fromkeys(digests)
        failures: list[BaseException] = []

        def take(digest: Digest, data: bytes) -> None:
            rest.pop(digest, None)
            try:
                sink(digest, data)
            except BaseException as error:
                failures.append(error)
                raise

        def take_and_keep(digest: Digest, data: bytes) -> None:
            self._keep(Upload(digest, data, verified=True))
            sink(digest, data)

        missing = self._near.find_missing(rest)
        present = [digest for digest in rest if digest not in missing]
        try:
            if present:
                self._near.read_many(present, take)
        except (NotFound, DataLoss) as error:
            if failures:
                raise
            log.info("a near store cannot give all blobs that it has, so the far one is asked: %s", error)
        if rest:
            self._far.read_many(list(rest), take_and_keep)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """Stream one blob into `write`, from the near store if it holds it. What is streamed is not kept."""
        store = self._far if self._near.find_missing([digest]) else self._near
        store.read_to(digest, write)

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """Store one blob in both."""
        self._far.write(digest, source)
        self._keep(Upload(digest, source))

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store many blobs in both. What is returned tells of the far one."""

        def kept() -> Iterator[Upload]:
            for upload in uploads:
                self._keep(upload)
                yield upload

        return self._far.write_many(kept())

    def _keep(self, upload: Upload) -> None:
        try:
            self._near.write_many([upload])
        except SnaploaderError as error:
            log.warning("blob %s is not kept in a near store: %s", upload.digest, error)


class RemoteStore(BlobStore, Protocol):
    """A blob store with an action cache, shared by many hosts: what `RemoteCache` offers the loader."""

    @property
    def digest_function(self) -> DigestFunction:
        """The function the store wants digests in. May ask the server, and raise what that raises."""

    @property
    def update_enabled(self) -> bool:
        """Whether action results may be written, as far as the store says. Raises as `digest_function`."""

    def get_action_result(self, action_digest: Digest) -> remote_execution_pb2.ActionResult:
        """The result kept under a key. NotFound when there is none, or when a blob it names is gone."""

    def update_action_result(
        self, action_digest: Digest, action_result: remote_execution_pb2.ActionResult
    ) -> None:
        """Keep a result under a key, replacing what stood there. FailedPrecondition when not allowed."""
