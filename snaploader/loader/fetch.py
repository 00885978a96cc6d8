"""Blobs from the nearest tier that has them: the file cache, then the remote store."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

from cow import OpenedChunk
from snaploader.blobstore import BlobStore
from snaploader.digest import Digest
from snaploader.errors import DataLoss, NotFound, ResourceExhausted, SnaploaderError, translate_os_errors
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

    def __init__(self, file_cache: FileCache, remote: BlobStore | None, pool: WorkerPool) -> None:
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
                if isinstance(flight.error, SnaploaderError) and not flight.background:
                    raise type(flight.error)(
                        flight.error.message, transient=flight.error.transient
                    ) from flight.error
                continue
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

    def fetch_many(
        self, digests: Collection[Digest], fetched: Callable[[Digest], None] | None = None
    ) -> None:
        """Bring all of `digests` into the file cache, in bulk; those that are there already are left alone.

        Args:
            fetched: Called, from any thread, with each blob that was fetched.
        """
        missing = self.file_cache.find_missing(digests)
        if not missing:
            return
        if self.remote is None:
            raise NotFound(f"{len(missing)} blobs are not in the file cache, such as {min(missing)}")

        def keep(digest: Digest, data: bytes) -> None:
            self.file_cache.put_verified(digest, data)
            if fetched is not None:
                fetched(digest)

        self.remote.read_many(sorted(missing), keep)

    def prefetch(self, digests: Sequence[Digest]) -> None:
        """A hint: these will likely be opened soon. Returns at once, never raises."""
        if self._prefetcher is not None:
            self._prefetcher.hint(digests)

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

    def _fetch(self, remote: BlobStore, digest: Digest, local_error: SnaploaderError | None) -> OpenedChunk:
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
