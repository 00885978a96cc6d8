"""Blobs from the nearest tier that has them: the file cache, then the remote store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from cow import OpenedChunk
from snaploader.blobstore import RemoteStore
from snaploader.digest import Digest
from snaploader.errors import (
    Cancelled,
    DataLoss,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
    translate_os_errors,
)
from snaploader.filecache import FileCache
from snaploader.loader.flight import SingleFlight
from snaploader.loader.pool import WorkerPool
from snaploader.loader.prefetch import Prefetcher

FILE_CACHE = "file_cache"
REMOTE = "remote"


class BlobFetcher:
    """Opens blobs, fetching each at most once at a time. Thread-safe.

    What comes from the remote store is kept in the file cache. When the cache cannot take it (it is
    full of leased blobs, or the disk is), the bytes are served from memory instead of failing the read.
    """

    def __init__(self, file_cache: FileCache, remote: RemoteStore | None, pool: WorkerPool) -> None:
        self.file_cache = file_cache
        self.remote = remote
        self._flights = SingleFlight()
        self._prefetcher = Prefetcher(file_cache, remote, pool, self._flights) if remote is not None else None

    def open(self, digest: Digest, *, allow_remote: bool = True) -> OpenedChunk:
        """A read-only descriptor of the verified blob, owned by the caller, and the tier it came from.

        NotFound or DataLoss when no tier has it right; the remote store's own errors otherwise.
        """
        while True:
            opened, local_error = self._open_local(digest)
            if opened is not None:
                return opened
            if self.remote is None or not allow_remote:
                raise local_error or NotFound(f"blob {digest} is not in the file cache")
            flight, is_owner = self._flights.board(digest)
            if not is_owner:
                flight.wait()
                if flight.error is None or flight.background:
                    continue
                raise _again(flight.error)
            error: BaseException | None = None
            try:
                return self._open_local(digest)[0] or self._fetch(self.remote, digest, local_error)
            except BaseException as caught:
                error = caught
                raise
            finally:
                self._flights.land(digest, error)

    def read(self, digest: Digest, *, allow_remote: bool = True) -> bytes:
        """The verified bytes of a blob, from the nearest tier; errors as `open`."""
        if digest.size_bytes == 0:
            return b""
        opened = self.open(digest, allow_remote=allow_remote)
        with translate_os_errors(f"cannot read blob {digest}"), os.fdopen(opened.fd, "rb") as file:
            data = file.read(digest.size_bytes)
        if len(data) != digest.size_bytes:
            raise DataLoss(f"blob {digest} was cut to {len(data)} bytes while it was read; try again")
        return data

    def place(
        self,
        digest: Digest,
        target: Path,
        *,
        writable: bool,
        executable: bool,
        allow_remote: bool,
        fetched: Callable[[int], None] | None = None,
    ) -> None:
        """Make a blob appear as the file `target`, which must not exist.

        It shares its bytes with the file cache where it can: a link when nobody may write to it, else a
        clone or copy. A file that is executable has a mode of its own, so it cannot be a link.

        Args:
            fetched: Called with the size when the blob came from the remote store.
        """
        if self._bring(digest, allow_remote=allow_remote) and fetched is not None:
            fetched(digest.size_bytes)
        self.file_cache.materialize(digest, target, writable=writable or executable)
        if executable:
            with translate_os_errors(f"cannot make {str(target)!r} executable"):
                target.chmod(0o755 if writable else 0o555)

    def keep(self, digest: Digest, data: bytes) -> None:
        """Put a verified blob into the file cache, if that has room: the caller has the bytes in any case."""
        with suppress(ResourceExhausted):
            self.file_cache.put_verified(digest, data)

    def prefetch(self, digests: Sequence[Digest]) -> None:
        """A hint: these will likely be opened soon. Returns at once, never raises."""
        if self._prefetcher is not None:
            self._prefetcher.hint(digests)

    def _bring(self, digest: Digest, *, allow_remote: bool) -> bool:
        """Have a blob in the file cache, streaming it there, however big; whether it was fetched."""
        while True:
            try:
                os.close(self.file_cache.open(digest))
                return False
            except (NotFound, DataLoss):
                if self.remote is None or not allow_remote:
                    raise
            flight, is_owner = self._flights.board(digest)
            if not is_owner:
                flight.wait()
                if flight.error is None or flight.background:
                    continue
                raise _again(flight.error)
            error: BaseException | None = None
            try:
                self._stream(self.remote, digest)
                return True
            except BaseException as caught:
                error = caught
                raise
            finally:
                self._flights.land(digest, error)

    def _stream(self, remote: RemoteStore, digest: Digest) -> None:
        for attempt in (1, 2):
            try:
                with self.file_cache.writer(digest) as writer:
                    remote.read_to(digest, writer.write)
                    writer.commit()
                return
            except DataLoss:
                # Pieces cannot be taken back, so the stream leaves it to its caller to begin again;
                # once, in case the damage was done on the way.
                if attempt == 2:
                    raise

    def close(self) -> None:
        """Drop all hints."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _open_local(self, digest: Digest) -> tuple[OpenedChunk | None, SnaploaderError | None]:
        try:
            fd = self.file_cache.open(digest)
        except (NotFound, DataLoss) as error:
            return None, error
        if self._prefetcher is not None and self._prefetcher.take_credit(digest):
            return OpenedChunk(fd, REMOTE, prefetched=True), None
        return OpenedChunk(fd, FILE_CACHE), None

    def _fetch(self, remote: RemoteStore, digest: Digest, local_error: SnaploaderError | None) -> OpenedChunk:
        demand = self._prefetcher.demand(digest) if self._prefetcher is not None else nullcontext()
        with demand:
            try:
                data = remote.read(digest)
            except (NotFound, DataLoss) as error:
                if isinstance(local_error, DataLoss):
                    error.add_note(f"in the file cache: {local_error.message}")
                raise
            try:
                self.file_cache.put_verified(digest, data)
                return OpenedChunk(self.file_cache.open(digest), REMOTE)
            except (ResourceExhausted, NotFound):
                # Full, or evicted again at once: the reader still gets its bytes.
                return OpenedChunk(_in_memory_file(data), REMOTE)


def _again(error: BaseException) -> BaseException:
    """A copy of another thread's error, to raise on this one with a traceback of its own."""
    if not isinstance(error, SnaploaderError):
        return Cancelled("another thread that was fetching the same blob was interrupted; try again")
    copy = type(error)(error.message, transient=error.transient)
    copy.__cause__ = error
    return copy


def _in_memory_file(data: bytes) -> int:
    with translate_os_errors("cannot hold a blob in memory"):
        fd = os.memfd_create("snaploader-blob", os.MFD_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.lseek(fd, 0, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
    return fd
