"""Writing a chunked file out in full."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from cow import TruncatedFile, clone_range, read_all, write_nonzero
from snaploader.digest import Digest
from snaploader.errors import DataLoss, NotFound, translate_os_errors
from snaploader.formats.chunktable import ChunkTable
from snaploader.loader.fetch import REMOTE, BlobFetcher, lost_blobs
from snaploader.loader.pool import ThreadBuffers, WorkerPool
from snaploader.loader.progress import ProgressMeter
from snaploader.locks import ProcessExitStack


class FetchCounter:
    """Blobs and bytes that came from the remote store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.blobs = 0
        self.bytes = 0

    def add(self, size: int) -> None:
        with self._lock:
            self.blobs += 1
            self.bytes += size


class ChunkedFileWriter:
    """Writes one chunked file: chunks at hand are cloned or copied from the file cache, the others are
    fetched in bulk and written as they arrive. Pages of zeros become holes, also inside a chunk."""

    def __init__(
        self,
        name: str,
        table: ChunkTable,
        mode: int,
        fetcher: BlobFetcher,
        pool: WorkerPool,
        *,
        allow_remote: bool,
        fetched: FetchCounter,
        meter: ProgressMeter,
    ) -> None:
        self._name = name
        self._table = table
        self._mode = mode
        self._allow_remote = allow_remote
        self._fetcher = fetcher
        self._pool = pool
        self._fetched = fetched
        self._meter = meter
        self._can_clone = True
        self._buffers = ThreadBuffers()

    def write(self, target: Path) -> None:
        """Make `target` appear, whole, or raise and leave nothing."""
        with translate_os_errors(f"cannot write {str(target)!r}"):
            fd, temporary = tempfile.mkstemp(prefix=".snaploader-", dir=target.parent)
            with ProcessExitStack() as undo:
                undo.callback(os.unlink, temporary)
                try:
                    os.ftruncate(fd, self._table.size)
                    self._fill(fd)
                finally:
                    os.close(fd)
                os.chmod(temporary, self._mode)
                os.rename(temporary, target)
                undo.pop_all()

    def _fill(self, fd: int) -> None:
        table = self._table
        digests = list(table.digests())
        missing = self._fetcher.file_cache.find_missing(digests)
        places: dict[Digest, list[int]] = defaultdict(list)
        present = []
        for index, digest in zip(table.indices.tolist(), digests, strict=True):
            offset = index * table.chunk_size
            if digest in missing:
                places[digest].append(offset)
            else:
                present.append((digest, offset))
        self._pool.for_each(lambda chunk: self._copy(*chunk, fd), present)
        if places:
            self._fetch(fd, places)

    def _copy(self, digest: Digest, offset: int, fd: int) -> None:
        opened = self._fetcher.open(digest, allow_remote=self._allow_remote)
        try:
            self._copy_chunk(opened.fd, digest, fd, offset)
        except TruncatedFile as error:
            raise DataLoss(f"{error}: it was cut while it was copied; try again") from error
        finally:
            os.close(opened.fd)
        if opened.origin == REMOTE:
            self._fetched.add(digest.size_bytes)
        self._meter.add(digest.size_bytes)

    def _copy_chunk(self, source: int, digest: Digest, fd: int, offset: int) -> None:
        # Shared blocks take less than holes spare. A file system that cannot share says so at once.
        if self._can_clone and clone_range(source, 0, digest.size_bytes, fd, offset):
            return
        self._can_clone = False
        content = self._buffers.get(self._table.chunk_size)[: digest.size_bytes]
        read_all(source, content, 0, f"the cached blob {digest}")
        write_nonzero(fd, content, offset)

    def _fetch(self, fd: int, places: Mapping[Digest, list[int]]) -> None:
        remote = self._fetcher.remote
        if remote is None or not self._allow_remote:
            raise NotFound(f"{len(places)} chunks of {self._name!r} are not in the file cache")

        def keep(digest: Digest, data: bytes) -> None:
            self._fetcher.keep(digest, data)
            self._fetched.add(digest.size_bytes)
            for offset in places[digest]:
                write_nonzero(fd, data, offset)
                self._meter.add(digest.size_bytes)

        with lost_blobs():
            remote.read_many(places, keep)
