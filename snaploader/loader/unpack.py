"""A snapshot made usable at once: plain files in a folder, chunked files as lazy stores."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cow import COWStore, MappingBudget, StoreStatistics
from snaploader.errors import NotFound, translate_os_errors
from snaploader.filecache import Lease
from snaploader.files import remove_tree
from snaploader.formats.chunktable import DEFAULT_MODE
from snaploader.loader.fetch import BlobFetcher, SnapshotChunkSource
from snaploader.loader.place import SnapshotWriter, output_folder
from snaploader.loader.results import ManifestSource, ProgressMeter, Snapshot
from snaploader.locks import ProcessExitStack
from snaploader.workers import WorkerPool


class UnpackedSnapshot:
    """The files of a snapshot, ready for reading and writing. A context manager.

    Closing it (or leaving the block) closes the stores and removes their private data: writes that
    were not saved with `cache_snapshot` are gone. Plain files and directories stay where they are.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        files: Mapping[str, Path],
        chunked_files: Mapping[str, COWStore],
        directories: Mapping[str, Path],
        cleanup: contextlib.ExitStack,
    ) -> None:
        self.snapshot = snapshot
        self.files = files
        """Path of each plain file, by name."""
        self.chunked_files = chunked_files
        """Store of each chunked file, by name."""
        self.directories = directories
        """Path of each directory, by name."""
        self._cleanup = cleanup

    def statistics(self) -> dict[str, StoreStatistics]:
        """Tell for each chunked file how much of it came from where, and what the prefetch was good for."""
        return {name: store.statistics() for name, store in self.chunked_files.items()}

    def close(self) -> None:
        """Close the stores and drop what was not saved. Idempotent. In a forked child it does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unpack(
    snapshot: Snapshot,
    output_directory: str | os.PathLike[str],
    fetcher: BlobFetcher,
    pool: WorkerPool,
    *,
    writable_files: bool,
    budget: MappingBudget | None,
) -> UnpackedSnapshot:
    """See `SnapshotLoader.unpack_snapshot`."""
    manifest = snapshot.manifest
    with translate_os_errors(f"cannot unpack into {str(output_directory)!r}"), ProcessExitStack() as undo:
        root = output_folder(output_directory, manifest.names, undo)
        cleanup = ProcessExitStack()
        undo.callback(cleanup.close)
        cleanup.enter_context(hold(snapshot, fetcher))
        writer = SnapshotWriter(snapshot, fetcher, pool, ProgressMeter(None, "write", 0))
        files = writer.place_files(root, undo, writable=writable_files)
        directories = {}
        for name, tree in snapshot.directories.items():
            directories[name] = root / name
            writer.write_directory(tree, directories[name])
            undo.callback(remove_tree, directories[name])
        stores = _open_stores(snapshot, root, fetcher, cleanup, budget) if manifest.chunked_files else {}
        undo.pop_all()
    return UnpackedSnapshot(snapshot, files, stores, directories, cleanup)


def hold(snapshot: Snapshot, fetcher: BlobFetcher) -> Lease:
    """Lease those blobs of a snapshot in the file cache that may be nowhere else.

    What comes from a remote manifest is in the remote store; a local one may be of a snapshot that was
    never saved remotely. NotFound when a blob has been evicted since the snapshot was found, and there
    is nowhere else to fetch it from.
    """
    cache = fetcher.file_cache
    if snapshot.allow_remote and snapshot.source is ManifestSource.REMOTE:
        return cache.lease(())
    blobs = snapshot.digest_array()
    hashes = snapshot.absent.others(blobs.hashes) if snapshot.absent else blobs.hashes
    lease = cache.lease((), hashes=[hashes])
    if snapshot.allow_remote:
        return lease
    gone = cache.find_missing(blobs)
    if gone:
        lease.release()
        raise NotFound(
            f"{len(gone)} blobs of the snapshot were evicted since it was found, such as {min(gone)}: "
            "look for a snapshot again, or raise the size of the file cache"
        )
    return lease


def _open_stores(
    snapshot: Snapshot,
    root: Path,
    fetcher: BlobFetcher,
    cleanup: contextlib.ExitStack,
    budget: MappingBudget | None,
) -> dict[str, COWStore]:
    with translate_os_errors(f"cannot make a folder for written chunks in {str(root)!r}"):
        scratch = Path(tempfile.mkdtemp(prefix=".snaploader-", dir=root))
    cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
    stores = {}
    for number, (name, table) in enumerate(snapshot.tables.items()):
        source = SnapshotChunkSource(
            name,
            table,
            fetcher,
            allow_remote=snapshot.allow_remote,
            mode=snapshot.modes.get(name, DEFAULT_MODE),
        )
        store = COWStore(
            scratch / str(number),
            size=table.size,
            chunk_size=table.chunk_size,
            chunks=table.indices,
            source=source,
            budget=budget,
        )
        stores[name] = cleanup.enter_context(store)
    return stores
