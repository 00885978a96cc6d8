"""A snapshot made usable: at once, as lazy stores, or written out in full, holes as holes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cow import COWStore, MappingBudget, StoreStatistics
from snaploader.errors import InvalidArgument, NotFound, translate_os_errors
from snaploader.filecache import Lease
from snaploader.files import ProcessExitStack
from snaploader.formats.chunktable import DEFAULT_MODE
from snaploader.loader.fetch import BlobFetcher, SnapshotChunkSource
from snaploader.loader.place import SnapshotWriter, check_vacant, output_folder
from snaploader.loader.results import ManifestSource, ProgressCallback, ProgressMeter, RestoreResult, Snapshot
from snaploader.loader.scan import write_restored_index

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class UnpackedSnapshot:
    """The files of a snapshot, ready for reading and writing. A context manager.

    Closing it (or leaving the block) closes the stores and removes their private data: writes that
    were not saved with `cache_snapshot` are gone. Plain files and directories stay where they are.
    """

    snapshot: Snapshot
    files: Mapping[str, Path]
    """Path of each plain file, by name."""
    chunked_files: Mapping[str, COWStore]
    """Store of each chunked file, by name."""
    directories: Mapping[str, Path]
    """Path of each directory, by name."""
    _cleanup: contextlib.ExitStack = field(repr=False)

    def statistics(self) -> dict[str, StoreStatistics]:
        """How much of each chunked file came from where, and what the prefetch was good for."""
        return {name: store.statistics() for name, store in self.chunked_files.items()}

    def close(self) -> None:
        """Close the stores and drop what was not saved. Idempotent. In a forked child it does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpack(
    snapshot: Snapshot,
    output_directory: str | os.PathLike[str],
    fetcher: BlobFetcher,
    budget: MappingBudget | None,
    *,
    writable_files: bool,
) -> UnpackedSnapshot:
    """See `SnapshotLoader.unpack_snapshot`."""
    manifest = snapshot.manifest
    with translate_os_errors(f"cannot unpack into {str(output_directory)!r}"), ProcessExitStack() as undo:
        root = output_folder(output_directory, manifest.names, undo)
        cleanup = ProcessExitStack()
        undo.callback(cleanup.close)
        cleanup.enter_context(hold(snapshot, fetcher))
        writer = SnapshotWriter(snapshot, fetcher, ProgressMeter(None, "write", 0))
        files = writer.place_files(root, undo, writable=writable_files)
        directories = writer.place_directories(root, undo)
        stores = {}
        if manifest.chunked_files:
            with translate_os_errors(f"cannot make a folder for written chunks in {str(root)!r}"):
                scratch = Path(tempfile.mkdtemp(prefix=".snaploader-", dir=root))
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
            for number, (name, table) in enumerate(snapshot.tables.items()):
                mode = snapshot.modes.get(name, DEFAULT_MODE)
                source = SnapshotChunkSource(name, table, fetcher, snapshot.allow_remote, mode)
                store = COWStore(
                    scratch / str(number),
                    size=table.size,
                    chunk_size=table.chunk_size,
                    chunks=table.indices,
                    source=source,
                    budget=budget,
                )
                stores[name] = cleanup.enter_context(store)
        undo.pop_all()
    return UnpackedSnapshot(snapshot, files, stores, directories, cleanup)


def restore(
    snapshot: Snapshot,
    output_directory: str | os.PathLike[str],
    fetcher: BlobFetcher,
    progress: ProgressCallback | None,
) -> RestoreResult:
    """See `SnapshotLoader.restore_snapshot`."""
    manifest, tables, trees = snapshot.manifest, snapshot.tables, snapshot.directories
    plain_bytes = sum(file.digest.size_bytes for file in manifest.files.values())
    written_bytes = plain_bytes + sum(table.stored_bytes for table in tables.values())
    written_bytes += sum(tree.size_bytes - tree.hole_bytes for tree in trees.values())
    hole_bytes = sum(table.hole_bytes for table in tables.values())
    hole_bytes += sum(tree.hole_bytes for tree in trees.values())
    writer = SnapshotWriter(snapshot, fetcher, ProgressMeter(progress, "write", written_bytes))
    with hold(snapshot, fetcher), ProcessExitStack() as undo:
        root = output_folder(output_directory, manifest.names, undo)
        files = writer.place_files(root, undo, writable=True)
        writer.meter.add(plain_bytes)
        for name, table in tables.items():
            files[name] = root / name
            mode = snapshot.modes.get(name, DEFAULT_MODE) | 0o200
            writer.write_chunked_file(name, table, mode, files[name])
            undo.callback(files[name].unlink, missing_ok=True)
        directories = writer.place_directories(root, undo)
        undo.pop_all()
    return RestoreResult(
        files, written_bytes, hole_bytes, writer.fetched_blobs, writer.fetched_bytes, directories
    )


def restore_directory(
    snapshot: Snapshot,
    name: str,
    path: str | os.PathLike[str],
    fetcher: BlobFetcher,
    index: str | os.PathLike[str] | None,
    progress: ProgressCallback | None,
) -> RestoreResult:
    """See `SnapshotLoader.restore_directory`."""
    tree = snapshot.directories.get(name)
    if tree is None:
        known = ", ".join(map(repr, snapshot.directories)) or "none"
        raise NotFound(f"the snapshot has no directory {name!r}; it has {known}")
    target = Path(path).absolute()
    if index is not None and Path(index).absolute().parent.resolve().is_relative_to(target.resolve()):
        raise InvalidArgument(f"the capture index {str(index)!r} is in the directory: keep it elsewhere")
    check_vacant(target)
    written = tree.size_bytes - tree.hole_bytes
    writer = SnapshotWriter(snapshot, fetcher, ProgressMeter(progress, "write", written))
    with ProcessExitStack() as undo:
        output_folder(target.parent, [], undo)
        with hold(snapshot.only([name]), fetcher):
            writer.write_directory(tree, target)
        undo.pop_all()
    if index is not None:
        warning = write_restored_index(tree, target, os.path.abspath(os.fspath(index)))
        if warning:
            log.warning("%s", warning)
    return RestoreResult(
        {}, written, tree.hole_bytes, writer.fetched_blobs, writer.fetched_bytes, {name: target}
    )


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
