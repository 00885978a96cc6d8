"""Writing snapshots, or directories of them, out in full: holes as holes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from snaploader.errors import InvalidArgument, NotFound
from snaploader.files import remove_tree
from snaploader.formats.chunktable import DEFAULT_MODE
from snaploader.loader.fetch import BlobFetcher
from snaploader.loader.place import SnapshotWriter, check_vacant, output_folder, stored_bytes
from snaploader.loader.results import ProgressCallback, ProgressMeter, RestoreResult, Snapshot
from snaploader.loader.scan import write_restored_index
from snaploader.loader.unpack import hold
from snaploader.locks import ProcessExitStack
from snaploader.workers import WorkerPool

log = logging.getLogger(__name__)


def restore(
    snapshot: Snapshot,
    output_directory: str | os.PathLike[str],
    fetcher: BlobFetcher,
    pool: WorkerPool,
    progress: ProgressCallback | None,
) -> RestoreResult:
    """See `SnapshotLoader.restore_snapshot`."""
    manifest, tables = snapshot.manifest, snapshot.tables
    directories = snapshot.directories
    plain_bytes = sum(file.digest.size_bytes for file in manifest.files.values())
    stored = sum(table.stored_bytes for table in tables.values()) + sum(
        map(stored_bytes, directories.values())
    )
    meter = ProgressMeter(progress, "write", plain_bytes + stored)
    writer = SnapshotWriter(snapshot, fetcher, pool, meter)
    with ProcessExitStack() as undo:
        root = output_folder(output_directory, manifest.names, undo)
        held = hold(snapshot, fetcher)
        undo.callback(held.release)
        plain = writer.place_files(root, undo, writable=True)
        meter.add(plain_bytes)
        placed = dict(plain)
        for name, table in tables.items():
            target = root / name
            mode = snapshot.modes.get(name, DEFAULT_MODE) | 0o200
            writer.write_chunked_file(name, table, mode, target)
            undo.callback(target.unlink, missing_ok=True)
            placed[name] = target
        written = {}
        for name, tree in directories.items():
            target = root / name
            writer.write_directory(tree, target)
            undo.callback(remove_tree, target)
            written[name] = target
        undo.pop_all()
    held.release()
    holes = sum(table.hole_bytes for table in tables.values())
    holes += sum(tree.hole_bytes for tree in directories.values())
    return RestoreResult(
        placed, plain_bytes + stored, holes, writer.fetched_blobs, writer.fetched_bytes, written
    )


def restore_directory(
    snapshot: Snapshot,
    name: str,
    path: str | os.PathLike[str],
    fetcher: BlobFetcher,
    pool: WorkerPool,
    *,
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
    written = stored_bytes(tree)
    writer = SnapshotWriter(snapshot, fetcher, pool, ProgressMeter(progress, "write", written))
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
