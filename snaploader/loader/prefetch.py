"""Chunks that will likely be wanted soon, fetched while nobody waits for one.

Hints are queued and fetched in the background, in bulk. A demand fetch runs on the thread that
needs the bytes, so it never queues behind a prefetch; and while one runs no new prefetch is started.
When the last demand ends, its thread hands the next batch over before it returns to its reader:
a sequential reader that comes back for the next chunk then finds it in flight and waits for that,
instead of overtaking its own readahead for ever.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from cow import Flight, SingleFlight
from snaploader.blobstore import BlobStore
from snaploader.digest import Digest
from snaploader.errors import Cancelled, NotFound, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.workers import WorkerPool

log = logging.getLogger(__name__)

MAX_QUEUED_HINTS = 1024
"""Hints beyond this push out the oldest ones."""

MAX_BATCH_BYTES = 8 << 20
"""What one background fetch asks for at most; more than one remote batch, so that batches overlap."""

MAX_REMEMBERED = 65_536
"""Prefetched blobs whose first use is still to be counted."""


BlobFlight: TypeAlias = "Flight[Digest, bytes]"
"""A blob on its way. Its result is its bytes where no cache took them; otherwise the file cache has them."""

BlobFlights: TypeAlias = "SingleFlight[Digest, bytes]"


class PrefetchFailedError(Exception):
    """Ends the flight of a prefetch that failed: a reader that waits for the blob fetches it for itself."""


class Prefetcher:
    """Fetches hinted blobs from the remote store into the file cache. Thread-safe."""

    def __init__(
        self, file_cache: FileCache, remote: BlobStore, pool: WorkerPool, flights: BlobFlights
    ) -> None:
        self._file_cache = file_cache
        self._remote = remote
        self._pool = pool
        self._flights = flights
        self._lock = threading.Lock()
        self._queue: OrderedDict[Digest, None] = OrderedDict()
        self._unused: OrderedDict[Digest, None] = OrderedDict()
        self._demands = 0
        self._busy = False
        self._closed = False

    def hint(self, digests: Sequence[Digest]) -> None:
        """Say that these are likely wanted soon, the first one first. Returns at once."""
        with self._lock:
            if self._closed:
                return
            for digest in reversed(digests):
                self._queue[digest] = None
                self._queue.move_to_end(digest, last=False)
            while len(self._queue) > MAX_QUEUED_HINTS:
                self._queue.popitem()
        self._start()

    @contextmanager
    def demand(self, digest: Digest) -> Iterator[None]:
        """Holds prefetching back for as long as the block, a demand fetch of `digest`, runs."""
        with self._lock:
            self._demands += 1
            self._queue.pop(digest, None)
        try:
            yield
        finally:
            with self._lock:
                self._demands -= 1
            self._start()

    def is_first_use(self, digest: Digest) -> bool:
        """Whether `digest` was brought by a prefetch and is used for the first time."""
        with self._lock:
            if digest not in self._unused:
                return False
            del self._unused[digest]
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
            batch = self._take_batch()
            self._busy = bool(batch)
        if not batch:
            return
        try:
            future = self._pool.submit(lambda: self._fetch(batch))
        except SnaploaderError as error:
            self._give_up(batch, error)
            return
        # A pool that closes drops what has not begun; those who wait for these blobs must hear of it.
        closed = Cancelled("the loader was closed")
        future.add_done_callback(lambda done: self._give_up(batch, closed) if done.cancelled() else None)

    def _take_batch(self) -> dict[Digest, BlobFlight]:
        batch: dict[Digest, BlobFlight] = {}
        size = 0
        while self._queue:
            digest = next(iter(self._queue))
            if batch and size + digest.size_bytes > MAX_BATCH_BYTES:
                break
            del self._queue[digest]
            flight, leads = self._flights.join(digest)
            if leads:
                batch[digest] = flight
                size += digest.size_bytes
        return batch

    def _fetch(self, batch: dict[Digest, BlobFlight]) -> None:
        error: SnaploaderError | None = None

        def keep(digest: Digest, data: bytes) -> None:
            if self._closed:
                raise Cancelled("the loader was closed")
            self._keep(digest, data)
            self._flights.finish(batch[digest])

        try:
            missing = self._file_cache.find_missing(batch)
            for digest, flight in batch.items():
                if digest not in missing:
                    self._flights.finish(flight)
            if missing:
                self._remote.read_many([d for d in batch if d in missing], keep)
        except SnaploaderError as caught:
            # No reader asked for these bytes yet. One that does fetches them again and sees the error.
            log.debug("prefetch of %d blobs failed: %s", len(batch), caught)
            error = caught
        finally:
            self._give_up(batch, error or NotFound("the prefetch ended without this blob"))
        self._start()

    def _keep(self, digest: Digest, data: bytes) -> None:
        # Before it can be seen: a reader may open it at once.
        with self._lock:
            self._unused[digest] = None
            if len(self._unused) > MAX_REMEMBERED:
                self._unused.popitem(last=False)
        try:
            added = self._file_cache.put_verified(digest, data)
        except BaseException:
            self.is_first_use(digest)
            raise
        if not added:
            self.is_first_use(digest)

    def _give_up(self, batch: dict[Digest, BlobFlight], error: SnaploaderError) -> None:
        for flight in batch.values():
            self._flights.finish(flight, error=PrefetchFailedError(str(error)))
        with self._lock:
            self._busy = False
