"""Blobs from the nearest tier that has them: the file cache, then what is behind it.

Behind the file cache is any `BlobStore`: a remote cache, or a `TieredStore` of several. The file cache is a
tier of its own kind, because chunks are mapped and files linked from where it keeps them.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cow import OpenedChunk, SingleFlight, write_all
from snaploader import files
from snaploader.blobstore import BlobStore
from snaploader.digest import Buffer, Digest
from snaploader.errors import DataLoss, Internal, NotFound, SnaploaderError, translate_os_errors
from snaploader.filecache import FileCache
from snaploader.formats.chunktable import DEFAULT_MODE, ChunkTable
from snaploader.loader.prefetch import BlobFlight, BlobFlights, Prefetcher
from snaploader.workers import WorkerPool

log = logging.getLogger(__name__)

FILE_CACHE = "file_cache"
REMOTE = "remote"


class BlobFetcher:
    """Opens blobs, fetching each at most once at a time. Thread-safe.

    What comes from behind is kept in the file cache. When the cache cannot take it (it is
    full of leased blobs, or the disk is full or failing), the bytes are served all the same.
    """

    def __init__(self, file_cache: FileCache, remote: BlobStore | None, pool: WorkerPool) -> None:
        self.file_cache = file_cache
        self.remote = remote
        self._flights = flights_into(file_cache)
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
            flight, leads = self._flights.join(digest)
            if leads:
                return self._open_as_leader(self.remote, flight, local_error)
            flight.wait()
            if flight.result is not None:
                return OpenedChunk(_in_memory_file(flight.result), REMOTE)
            _raise_again(flight)

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
        mode: int,
        allow_remote: bool,
        fetched: Callable[[int], None] | None = None,
    ) -> None:
        """Make a blob, of any size, appear as the file `target`, which must not exist.

        It shares its bytes with the file cache where it can: a link when nobody may write to it and its
        mode is that of cached blobs, else a clone or copy.

        Args:
            mode: Permission bits; those for writing count only if `writable`.
            fetched: Called with the size when the blob came from the remote store.
        """
        mode = mode | 0o200 if writable else mode & 0o555
        while True:
            try:
                came = self._bring(digest, allow_remote=allow_remote)
            except _CacheRefused as error:
                log.warning(
                    "the file cache cannot take blob %s, so it is not kept there: %s", digest, error.__cause__
                )
                self._place_uncached(digest, target, mode)
                came = True
            else:
                try:
                    self.file_cache.materialize(digest, target, writable=writable, mode=mode)
                except NotFound:
                    # Evicted since. The next round fetches it, or says that it is gone.
                    continue
            break
        if came and fetched is not None:
            fetched(digest.size_bytes)

    def keep(self, digest: Digest, data: bytes) -> bool:
        """Put a verified blob into the file cache; False when that cannot take it."""
        try:
            self.file_cache.put_verified(digest, data)
        except SnaploaderError as error:
            log.warning("a blob that was fetched cannot be cached: %s", error)
            return False
        return True

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
        if self._prefetcher is not None and self._prefetcher.is_first_use(digest):
            return OpenedChunk(fd, REMOTE, prefetched=True), None
        return OpenedChunk(fd, FILE_CACHE), None

    def _open_as_leader(
        self, remote: BlobStore, flight: BlobFlight, local_error: SnaploaderError | None
    ) -> OpenedChunk:
        digest = flight.key
        error: BaseException | None = None
        uncached: bytes | None = None
        try:
            # Another flight may have ended since this thread looked.
            opened, _ = self._open_local(digest)
            if opened is not None:
                return opened
            data = self._fetch(remote, digest, local_error)
            if self.keep(digest, data):
                with suppress(SnaploaderError):
                    return OpenedChunk(self.file_cache.open(digest), REMOTE)
            uncached = data
            return OpenedChunk(_in_memory_file(data), REMOTE)
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._flights.finish(flight, uncached, error)

    def _fetch(self, remote: BlobStore, digest: Digest, local_error: SnaploaderError | None) -> bytes:
        demand = self._prefetcher.demand(digest) if self._prefetcher is not None else nullcontext()
        with demand:
            try:
                with lost_blobs():
                    return remote.read(digest)
            except (NotFound, DataLoss) as error:
                if isinstance(local_error, DataLoss):
                    error.add_note(f"in the file cache: {local_error.message}")
                raise

    def _bring(self, digest: Digest, *, allow_remote: bool) -> bool:
        """Bring a blob of any size into the file cache, as a stream; returns whether it was fetched."""
        while True:
            try:
                os.close(self.file_cache.open(digest))
                return False
            except (NotFound, DataLoss):
                if self.remote is None or not allow_remote:
                    raise
            flight, leads = self._flights.join(digest)
            if not leads:
                flight.wait()
                _raise_again(flight)
                continue
            error: BaseException | None = None
            try:
                self._stream_to_cache(self.remote, digest)
                return True
            except BaseException as caught:
                error = caught
                raise
            finally:
                self._flights.finish(flight, error=error)

    def _stream_to_cache(self, remote: BlobStore, digest: Digest) -> None:
        def attempt() -> None:
            with _refusals():
                writer = self.file_cache.writer(digest, verify=False)  # `read_to` does
            with writer:

                def write(data: Buffer) -> None:
                    with _refusals():
                        writer.write(data)

                with lost_blobs():
                    remote.read_to(digest, write)
                with _refusals():
                    writer.commit()

        _twice(attempt)

    def _place_uncached(self, digest: Digest, target: Path, mode: int) -> None:
        remote = self.remote
        assert remote is not None

        def attempt() -> None:
            with (
                translate_os_errors(f"cannot write {str(target)!r}"),
                files.replacing(target, mode=mode) as fd,
                lost_blobs(),
            ):
                remote.read_to(digest, lambda data: files.write_all(fd, data))

        _twice(attempt)


_flights_by_cache: weakref.WeakKeyDictionary[FileCache, BlobFlights] = weakref.WeakKeyDictionary()
_flights_lock = threading.Lock()


def flights_into(file_cache: FileCache) -> BlobFlights:
    """The fetches under way of all loaders that share this file cache: one for each blob."""
    with _flights_lock:
        return _flights_by_cache.setdefault(file_cache, SingleFlight())


class _CacheRefused(Exception):
    """The file cache cannot take a blob; the cause says why. It is then streamed past the cache."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Tells a cache that cannot take a blob (full, or its disk failing) from a blob with wrong bytes."""
    try:
        yield
    except SnaploaderError as error:
        if isinstance(error, DataLoss) and not isinstance(error.__cause__, OSError):
            raise
        raise _CacheRefused from error


@contextmanager
def lost_blobs() -> Iterator[None]:
    """Say what it means when the remote store lacks what the file cache lacks too, and what to do."""
    try:
        yield
    except NotFound as error:
        raise NotFound(
            "the snapshot has lost content: neither the file cache nor the remote cache has a blob of it "
            "any more. Look for a snapshot again, as another one may be whole, or save the state anew "
            f"({error.message})"
        ) from error


def _twice(attempt: Callable[[], None]) -> None:
    """Begin a stream again, once, when its bytes were wrong: pieces cannot be taken back one by one."""
    try:
        attempt()
    except DataLoss as error:
        log.info("a blob was damaged on its way and is fetched again: %s", error)
        attempt()


def _raise_again(flight: BlobFlight) -> None:
    """Raise what another thread's flight failed with, with a traceback of this thread's own.

    Nothing is raised where the failure was that thread's alone: a prefetch, an interrupt, or a cache that
    refused the blob. The caller tries for itself then.
    """
    error = flight.error
    if isinstance(error, SnaploaderError):
        raise type(error)(error.message, transient=error.transient) from error


def _in_memory_file(data: bytes) -> int:
    with translate_os_errors("cannot hold a blob in memory"):
        fd = os.memfd_create("snaploader-blob", os.MFD_CLOEXEC)
        try:
            write_all(fd, data, 0)  # at its place, so that the file is read from its start
        except BaseException:
            os.close(fd)
            raise
    return fd


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
