"""Blobs from the nearest tier that has them: the file cache, then what is behind it; demand before prefetch.

Behind the file cache is any `BlobStore`: a remote cache, or a `TieredStore` of several. The file cache is a
tier of its own kind, because chunks are mapped and files linked from where it keeps them.

Hints of what will likely be wanted soon are queued and fetched in the background, in bulk. A demand fetch
runs on the thread that needs the bytes, so it never queues behind a prefetch; and while one runs no new
prefetch is started. When the last demand ends, its thread hands the next batch over before it returns to its
reader: a sequential reader that comes back for the next chunk then finds it in flight and waits for that,
instead of overtaking its own readahead for ever.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cow import Flight, OpenedChunk, SingleFlight, write_all
from snaploader import files
from snaploader.blobstore import BlobStore, Sink
from snaploader.context import CallContext, current, own_errors
from snaploader.digest import Buffer, Digest
from snaploader.errors import Cancelled, DataLoss, Internal, NotFound, SnaploaderError, translate_os_errors
from snaploader.formats.chunktable import DEFAULT_MODE, ChunkTable
from snaploader.protocols import FileCacheProtocol
from snaploader.telemetry import NOBODY, Observer
from snaploader.workers import WorkerPool

log = logging.getLogger(__name__)

FILE_CACHE = "file_cache"
REMOTE = "remote"

MAX_QUEUED_HINTS = 1024
"""Hints beyond this push out the oldest ones."""

MAX_BATCH_BYTES = 8 << 20
"""What one background fetch asks for at most; more than one remote batch, so that batches overlap."""

MAX_REMEMBERED = 65_536
"""Prefetched blobs whose first use is still to be counted."""

FlightKey: TypeAlias = "tuple[str, Digest]"
"""A group and a blob: what is fetched for one group is nothing to another."""

BlobFlight: TypeAlias = "Flight[FlightKey, bytes]"
"""A blob on its way. Its result is its bytes where no cache took them; otherwise the file cache has them."""

BlobFlights: TypeAlias = "SingleFlight[FlightKey, bytes]"

_flights_by_cache: weakref.WeakKeyDictionary[FileCacheProtocol, BlobFlights] = weakref.WeakKeyDictionary()
_flights_lock = threading.Lock()


def flights_into(file_cache: FileCacheProtocol) -> BlobFlights:
    """The fetches under way of all loaders that share this file cache: one for each blob."""
    with _flights_lock:
        return _flights_by_cache.setdefault(file_cache, SingleFlight())


class BlobFetcher:
    """Opens blobs, fetching each at most once at a time. Thread-safe.

    What comes from behind is kept in the file cache. When the cache cannot take it (it is
    full of leased blobs, or the disk is full or failing), the bytes are served all the same.
    """

    def __init__(
        self,
        file_cache: FileCacheProtocol,
        behind: BlobStore | None,
        pool: WorkerPool,
        observer: Observer = NOBODY,
    ) -> None:
        self.file_cache = file_cache
        self.behind = behind
        """The remote cache, perhaps with peers before it; None: nothing."""
        self.pool = pool
        """Threads for whoever reads or writes what is fetched."""
        self.observer = observer
        self._flights = flights_into(file_cache)
        self.prefetcher = Prefetcher(file_cache, behind, pool, self._flights)

    def open(self, digest: Digest, *, allow_remote: bool = True, stalls: Observer = NOBODY) -> OpenedChunk:
        """A read-only descriptor of the verified blob, owned by the caller, and the tier it came from.

        NotFound or DataLoss when no tier has it right; the remote store's own errors otherwise.

        Args:
            stalls: Is told of an operation "stall" where the blob is not at hand. Readers say so; what is
                read to find a snapshot, or to write it out, is no stall.
        """
        while True:
            try:
                return self._open_local(digest)
            except (NotFound, DataLoss) as error:
                if self.behind is None or not allow_remote:
                    raise
                # Not the error itself: it would hold this frame, and its callers' with what they have read.
                damage = error.message if isinstance(error, DataLoss) else ""
            flight, leads = self._flights.join((self.file_cache.group_id, digest))
            with stalls.operation("stall"):
                if leads:
                    return self._open_as_leader(self.behind, flight, damage)
                wait(flight)
            if flight.result is not None:
                return OpenedChunk(_in_memory_file(flight.result), REMOTE)
            _raise_again(flight)

    def read(self, digest: Digest) -> bytes:
        """The verified bytes of a blob, from the nearest tier; errors as `open`."""
        return read_blob(self.open(digest).fd, digest)

    def place(self, digest: Digest, target: Path, *, writable: bool, mode: int, allow_remote: bool) -> bool:
        """Make a blob, of any size, appear as a new file `target`; whether it was fetched.

        It shares its bytes with the file cache where it can: a link when nobody may write to it and its
        mode is that of cached blobs, else a clone or copy. Only if `writable`, bits for writing count.
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
                return True
            # When it was evicted since, the next round fetches it, or says that it is gone.
            with suppress(NotFound):
                self.file_cache.materialize(digest, target, writable=writable, mode=mode)
                return came

    def open_streamed(
        self, digest: Digest, *, allow_remote: bool = True, stalls: Observer = NOBODY
    ) -> OpenedChunk:
        """As `open`, for a blob of any size: in memory only where the file cache cannot take it."""
        while True:
            try:
                came = self._bring(digest, allow_remote=allow_remote, stalls=stalls)
            except _CacheRefused:
                return self.open(digest, allow_remote=allow_remote, stalls=stalls)
            # When it was evicted since, the next round fetches it, or says that it is gone.
            with suppress(NotFound):
                return OpenedChunk(self.file_cache.open(digest), REMOTE if came else FILE_CACHE)

    def fetch_many(self, digests: Collection[Digest], sink: Sink, *, stalls: Observer = NOBODY) -> None:
        """Fetch in bulk what the file cache lacks of some blobs, but for what is on its way already.

        Each is kept in the file cache, where that takes it, and given to `sink`, from any thread, however
        many others wait for it. Errors as `BlobStore.read_many`.
        """
        if self.behind is None:
            return
        flights: dict[Digest, BlobFlight] = {}
        group_id = self.file_cache.group_id

        def keep(digest: Digest, data: bytes) -> None:
            kept = self.keep(digest, data)
            sink(digest, data)
            self._flights.finish(flights[digest], None if kept else data)

        try:
            for digest in self.file_cache.find_missing(digests):
                flight, leads = self._flights.join((group_id, digest))
                if leads:
                    flights[digest] = flight
            if flights:
                with self.prefetcher.demand(*flights), stalls.operation("stall"), lost_blobs():
                    self.behind.read_many(flights, keep)
        finally:
            for flight in flights.values():
                self._flights.finish(flight, error=PrefetchFailedError("the fetch of many ended without it"))

    def absent(self, digests: Collection[Digest]) -> set[Digest]:
        """Those of `digests` that must be fetched."""
        return self.file_cache.find_missing(digests)

    def keep(self, digest: Digest, data: bytes) -> bool:
        """Put a verified blob into the file cache; False when that cannot take it."""
        try:
            self.file_cache.put_verified(digest, data)
        except SnaploaderError as error:
            current().check()
            log.warning("a blob that was fetched cannot be cached: %s", error)
            return False
        return True

    def _open_local(self, digest: Digest) -> OpenedChunk:
        fd = self.file_cache.open(digest)
        if self.prefetcher.is_first_use((self.file_cache.group_id, digest)):
            return OpenedChunk(fd, REMOTE, prefetched=True)
        return OpenedChunk(fd, FILE_CACHE)

    def _open_as_leader(self, behind: BlobStore, flight: BlobFlight, damage: str) -> OpenedChunk:
        _, digest = flight.key
        with self._leading(flight):
            # Another flight may have ended since this thread looked.
            with suppress(NotFound, DataLoss):
                return self._open_local(digest)
            try:
                with self.prefetcher.demand(digest), lost_blobs():
                    data = behind.read(digest)
            except (NotFound, DataLoss) as error:
                if damage:
                    error.add_note(f"in the file cache: {damage}")
                raise
            if self.keep(digest, data):
                with suppress(SnaploaderError):
                    return OpenedChunk(self.file_cache.open(digest), REMOTE)
            self._flights.finish(flight, data)
            return OpenedChunk(_in_memory_file(data), REMOTE)

    @contextmanager
    def _leading(self, flight: BlobFlight) -> Iterator[None]:
        """Ends the flight with the block, and with what that raises."""
        try:
            with own_errors():
                yield
        except SnaploaderError as error:
            self._flights.finish(flight, error=_LeaderFailedError(error, current().caller))
            raise
        except BaseException as error:
            self._flights.finish(flight, error=error)
            raise
        self._flights.finish(flight)

    def _bring(self, digest: Digest, *, allow_remote: bool, stalls: Observer = NOBODY) -> bool:
        """Bring a blob of any size into the file cache, as a stream; whether it was fetched."""
        while True:
            try:
                os.close(self.file_cache.open(digest))
                return False
            except (NotFound, DataLoss):
                if self.behind is None or not allow_remote:
                    raise
            flight, leads = self._flights.join((self.file_cache.group_id, digest))
            with stalls.operation("stall"):
                if leads:
                    with self._leading(flight):
                        self._stream_to_cache(self.behind, digest)
                    return True
                wait(flight)
            _raise_again(flight)

    def _stream_to_cache(self, behind: BlobStore, digest: Digest) -> None:
        def attempt() -> None:
            with _refusals():
                writer = self.file_cache.writer(digest, verify=False)  # `read_to` does
            with writer:

                def write(data: Buffer) -> None:
                    with _refusals():
                        writer.write(data)

                with lost_blobs():
                    behind.read_to(digest, write)
                with _refusals():
                    writer.commit()

        _twice(attempt)

    def _place_uncached(self, digest: Digest, target: Path, mode: int) -> None:
        behind = self.behind
        assert behind is not None

        def attempt() -> None:
            with (
                translate_os_errors(f"cannot write {str(target)!r}"),
                files.replacing(target, mode=mode) as fd,
                lost_blobs(),
            ):
                behind.read_to(digest, lambda data: files.write_all(fd, data))

        _twice(attempt)


class UncachedFetcher(BlobFetcher):
    """Opens blobs past the file cache: each comes from behind it, every time, and is not kept."""

    def __init__(self, cached: BlobFetcher) -> None:
        super().__init__(cached.file_cache, cached.behind, cached.pool, cached.observer)
        # What is fetched ahead would be kept.
        self.prefetcher = Prefetcher(cached.file_cache, None, cached.pool, SingleFlight())

    def open(self, digest: Digest, *, allow_remote: bool = True, stalls: Observer = NOBODY) -> OpenedChunk:
        """See `BlobFetcher.open`; the blob is held in memory."""
        source = self._source(digest, allow_remote)
        with stalls.operation("stall"), lost_blobs():
            data = source.read(digest)
        return OpenedChunk(_in_memory_file(data), REMOTE)

    def place(self, digest: Digest, target: Path, *, writable: bool, mode: int, allow_remote: bool) -> bool:
        """See `BlobFetcher.place`; the file shares nothing with the file cache."""
        self._source(digest, allow_remote)
        self._place_uncached(digest, target, mode | 0o200 if writable else mode & 0o555)
        return True

    def open_streamed(
        self, digest: Digest, *, allow_remote: bool = True, stalls: Observer = NOBODY
    ) -> OpenedChunk:
        """As `open`, but the blob is in a temporary file without a name."""
        source = self._source(digest, allow_remote)
        with translate_os_errors("cannot write a temporary file"), tempfile.TemporaryFile() as file:
            fd = file.fileno()

            def attempt() -> None:
                os.ftruncate(fd, 0)
                os.lseek(fd, 0, os.SEEK_SET)
                with lost_blobs():
                    source.read_to(digest, lambda data: files.write_all(fd, data))

            with stalls.operation("stall"):
                _twice(attempt)
            return OpenedChunk(os.dup(fd), REMOTE)

    def fetch_many(self, digests: Collection[Digest], sink: Sink, *, stalls: Observer = NOBODY) -> None:
        """See `BlobFetcher.fetch_many`."""
        if self.behind is not None:
            with stalls.operation("stall"), lost_blobs():
                self.behind.read_many(digests, sink)

    def absent(self, digests: Collection[Digest]) -> set[Digest]:
        """All of `digests`."""
        return set(digests)

    def keep(self, digest: Digest, data: bytes) -> bool:  # noqa: ARG002
        """False: nothing is kept."""
        return False

    def _source(self, digest: Digest, allow_remote: bool) -> BlobStore:
        if self.behind is None or not allow_remote:
            raise NotFound(f"blob {digest} may only be read from a remote cache, which may not be asked")
        return self.behind


def read_blob(fd: int, digest: Digest) -> bytes:
    """The bytes of a blob that is open; closes it. DataLoss when it was cut short meanwhile."""
    with translate_os_errors(f"cannot read blob {digest}"), os.fdopen(fd, "rb") as file:
        data = file.read(digest.size_bytes)
    if len(data) != digest.size_bytes:
        raise DataLoss(f"blob {digest} was cut to {len(data)} bytes while it was read; try again")
    return data


class _CacheRefused(Exception):
    """The file cache cannot take a blob; the cause says why. It is then streamed past the cache."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Tells a cache that cannot take a blob (full, or its disk failing) from a blob with wrong bytes."""
    try:
        yield
    except SnaploaderError as error:
        if current().is_over or (isinstance(error, DataLoss) and not isinstance(error.__cause__, OSError)):
            raise
        raise _CacheRefused from error


@contextmanager
def lost_blobs() -> Iterator[None]:
    """Say what it means when the remote store lacks what the file cache lacks too, and what to do."""
    try:
        yield
    except NotFound as error:
        raise NotFound(
            "the snapshot has lost content: no cache that may be read has a blob of it any more. Look for a "
            "snapshot again, as another one may be whole, or save the state anew "
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

    Nothing is raised where the failure was that thread's alone: a prefetch, an interrupt, a call that was
    called off, a cache that refused the blob, or a server that may have refused another's credentials. The
    caller tries for itself then.
    """
    failed = flight.error
    if isinstance(failed, _LeaderFailedError) and failed.caller == current().caller:
        error = failed.error
        if not error.is_callers_own:
            raise type(error)(error.message, transient=error.transient) from error


def wait(flight: Flight[Any, Any]) -> None:
    """Wait for a flight, for as long as the call that runs may take. Errors as `CallContext.check`."""
    context = current()
    if not context.is_bounded:
        flight.wait()
        return
    ended = threading.Event()
    flight.when_finished(ended.set)
    context.wait(ended)


def _in_memory_file(data: bytes) -> int:
    with translate_os_errors("cannot hold a blob in memory"):
        fd = os.memfd_create("snaploader-blob", os.MFD_CLOEXEC)
        try:
            write_all(fd, data, 0)  # at its place, so that the file is read from its start
        except BaseException:
            os.close(fd)
            raise
    return fd


class _LeaderFailedError(Exception):
    """Ends a flight that failed: with what error, and for whom."""

    def __init__(self, error: SnaploaderError, caller: object) -> None:
        super().__init__(error.message)
        self.error = error
        self.caller = caller


class PrefetchFailedError(Exception):
    """Ends a flight of one fetch of many that failed: who waits for the blob fetches it for itself."""


class Prefetcher:
    """Fetches hinted blobs into the file cache. Thread-safe. With nothing behind that, hints are void."""

    def __init__(
        self, file_cache: FileCacheProtocol, behind: BlobStore | None, pool: WorkerPool, flights: BlobFlights
    ) -> None:
        self._file_cache = file_cache
        self._behind = behind
        self._pool = pool
        self._flights = flights
        self._lock = threading.Lock()
        self._queue: OrderedDict[tuple[CallContext, Digest], None] = OrderedDict()
        """Who hinted, and at what."""
        self._unused: OrderedDict[FlightKey, None] = OrderedDict()
        self._demands = 0
        self._busy = False
        self._closed = False

    def hint(self, digests: Sequence[Digest]) -> None:
        """These will likely be opened soon, the first one first. Returns at once, never raises.

        They are fetched as the caller of the call that runs.
        """
        identity = current().identity()
        with self._lock:
            if self._closed or self._behind is None:
                return
            for digest in reversed(digests):
                self._queue[identity, digest] = None
                self._queue.move_to_end((identity, digest), last=False)
            while len(self._queue) > MAX_QUEUED_HINTS:
                self._queue.popitem()
        self._start()

    @contextmanager
    def demand(self, *digests: Digest) -> Iterator[None]:
        """Holds prefetching back for as long as the block, a demand fetch of `digests`, runs."""
        identity = current().identity()
        with self._lock:
            self._demands += 1
            for digest in digests:
                self._queue.pop((identity, digest), None)
        try:
            yield
        finally:
            with self._lock:
                self._demands -= 1
            self._start()

    def is_first_use(self, key: FlightKey) -> bool:
        """Whether a blob was brought to its group by a prefetch and is used for the first time."""
        with self._lock:
            if key not in self._unused:
                return False
            del self._unused[key]
            return True

    def close(self) -> None:
        """Forget all hints. What is being fetched ends with the pool."""
        with self._lock:
            self._closed = True
            self._queue.clear()

    def _start(self) -> None:
        with self._lock:
            if self._busy or self._demands or self._closed or not self._queue:
                return
            identity, batch = self._take_batch()
            self._busy = bool(batch)
        if not batch:
            return
        try:
            future = self._pool.submit(lambda: self._fetch(identity, batch))
        except SnaploaderError as error:
            self._give_up(batch, error)
            return
        # A pool that closes drops what has not begun; those who wait for these blobs must hear of it.
        closed = Cancelled("the loader was closed")
        future.add_done_callback(lambda done: self._give_up(batch, closed) if done.cancelled() else None)

    def _take_batch(self) -> tuple[CallContext, dict[Digest, BlobFlight]]:
        """What one caller is to have next."""
        caller, batch, size = CallContext(), dict[Digest, BlobFlight](), 0
        while self._queue:
            identity, digest = next(iter(self._queue))
            if batch and (identity != caller or size + digest.size_bytes > MAX_BATCH_BYTES):
                break
            caller = identity
            del self._queue[identity, digest]
            with caller.on_behalf():
                group_id = self._file_cache.group_id
            flight, leads = self._flights.join((group_id, digest))
            if leads:
                batch[digest] = flight
                size += digest.size_bytes
        return caller, batch

    def _fetch(self, identity: CallContext, batch: dict[Digest, BlobFlight]) -> None:
        error: SnaploaderError | None = None

        def keep(digest: Digest, data: bytes) -> None:
            if self._closed:
                raise Cancelled("the loader was closed")
            self._keep(batch[digest].key, data)
            self._flights.finish(batch[digest])

        try:
            with identity.on_behalf():
                missing = self._file_cache.find_missing(batch)
                for digest, flight in batch.items():
                    if digest not in missing:
                        self._flights.finish(flight)
                if missing and self._behind is not None:
                    self._behind.read_many([d for d in batch if d in missing], keep)
        except SnaploaderError as caught:
            # No reader asked for these bytes yet. One that does fetches them again and sees the error.
            log.debug("prefetch of %d blobs failed: %s", len(batch), caught)
            error = caught
        except Exception:
            # Nobody would hear of it on this thread: a store of an embedder's own may raise anything.
            log.exception("prefetch of %d blobs failed", len(batch))
        finally:
            self._give_up(batch, error or NotFound("the prefetch ended without this blob"))
        self._start()

    def _keep(self, key: FlightKey, data: bytes) -> None:
        # Before it can be seen: a reader may open it at once.
        with self._lock:
            self._unused[key] = None
            if len(self._unused) > MAX_REMEMBERED:
                self._unused.popitem(last=False)
        added = False
        try:
            added = self._file_cache.put_verified(key[1], data)
        finally:
            if not added:
                self.is_first_use(key)

    def _give_up(self, batch: dict[Digest, BlobFlight], error: SnaploaderError) -> None:
        for flight in batch.values():
            self._flights.finish(flight, error=PrefetchFailedError(str(error)))
        with self._lock:
            self._busy = False


@dataclass(frozen=True, eq=False)
class SnapshotChunkSource:
    """The chunks of a table, as a `cow.ChunkSource`. Thread-safe, immutable.

    They are fetched as the caller in whose call this is made, whoever reads; a read that is part of a call
    ends with that.
    """

    name: str
    table: ChunkTable
    fetcher: BlobFetcher
    allow_remote: bool
    mode: int = DEFAULT_MODE
    """Permission bits of the file, which the next save of its store keeps."""

    identity: CallContext = field(default_factory=lambda: current().identity())
    """The caller."""

    def open_chunk(self, index: int) -> OpenedChunk:
        """Open the chunk, from the nearest tier. Errors say which chunk of which file it was."""
        digest = self._digest(index)
        try:
            with self.identity.on_behalf(), own_errors():
                fetcher = self.fetcher
                return fetcher.open(digest, allow_remote=self.allow_remote, stalls=fetcher.observer)
        except SnaploaderError as error:
            error.add_note(f"needed for chunk {index} of {self.name!r}")
            raise

    def wait(self, flight: Flight[int, Any]) -> None:
        """Wait for a chunk that another reader opens, for as long as the call that runs may take."""
        with self.fetcher.observer.operation("stall"):
            wait(flight)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Pass the hint on to the fetcher."""
        if self.allow_remote:
            with self.identity.on_behalf():
                self.fetcher.prefetcher.hint([self._digest(index) for index in indices])

    def _digest(self, index: int) -> Digest:
        digest = self.table.get(index)
        if digest is None:
            raise Internal(f"chunk {index} of {self.name!r} is a hole and was asked for")
        return digest
