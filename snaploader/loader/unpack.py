"""A snapshot made usable: at once, as lazy stores, or written out in full, holes as holes.

What the tree of a directory says comes from outside. Its paths are plain names below directories that are
directories (`DirectoryTree` sees to it), they are made in a new folder that nobody else may enter, and
symbolic links come last: so nothing is ever written through one. Modes come after that, and times at the
very end, as both would be in the way, or changed, before; then all is moved there. That folder is found
by its path, so whoever may rename it, by owning the folder it is made in, can lead the writing elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn, Self

from cow import (
    COWStore,
    MappingBudget,
    StoreStatistics,
    TruncatedFile,
    clone_range,
    copy_sparse,
    read_all,
    write_all,
    write_nonzero,
)
from snaploader.context import current
from snaploader.digest import Digest
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.files import (
    ProcessExitStack,
    ThreadBuffers,
    check_path,
    closing_fd,
    remove_tree,
    replacing,
    spare_descriptors,
)
from snaploader.formats.chunktable import DEFAULT_MODE, ChunkTable
from snaploader.formats.dirtree import ChunkedEntry, DirectoryEntry, DirectoryTree, FileEntry, SymlinkEntry
from snaploader.loader.fetch import REMOTE, BlobFetcher, SnapshotChunkSource, lost_blobs, read_blob
from snaploader.loader.results import ManifestSource, ProgressCallback, ProgressMeter, RestoreResult, Snapshot
from snaploader.loader.scan import write_restored_index
from snaploader.protocols import LeaseProtocol

log = logging.getLogger(__name__)

_BULK_BLOB_BYTES = 4 << 20
"""Blobs up to this size are fetched in bulk and held in memory; bigger ones are streamed."""

_PIECE_BYTES = 4 << 20
"""So much is copied between two looks at whether the call is over."""

_HOLES_FROM_BYTES = 64 << 10
"""Smaller files are not searched for holes, which would take longer than writing them."""

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_PRIVATE = 0o700


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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an UnpackedSnapshot cannot be pickled or copied, as its stores belong to this process: pickle "
            "its `snapshot`, and unpack that again"
        )

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
        undo.callback(cleanup.close)  # before directories are removed: that takes descriptors, as stores do
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
    unpacked = UnpackedSnapshot(snapshot, files, stores, directories, cleanup)
    cleanup.callback(fetcher.observer.watch(unpacked))
    return unpacked


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


def hold(snapshot: Snapshot, fetcher: BlobFetcher) -> LeaseProtocol:
    """Lease those blobs of a snapshot in the file cache that may be nowhere else.

    What comes from a remote manifest is in the remote store; a local one may be of a snapshot that was
    never saved remotely. NotFound when a blob has been evicted since the snapshot was found, and there
    is nowhere else to fetch it from.
    """
    cache = fetcher.file_cache
    if not snapshot.allow_local or (snapshot.allow_remote and snapshot.source is ManifestSource.REMOTE):
        return cache.lease(())
    blobs = snapshot.digests()
    lease = cache.lease((), hashes=[blobs.without(snapshot.absent).hashes])
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


class SnapshotWriter:
    """Writes files and directories of one snapshot, and counts what that takes. Thread-safe.

    Args:
        meter: Told of all content that was written.
    """

    def __init__(self, snapshot: Snapshot, fetcher: BlobFetcher, meter: ProgressMeter) -> None:
        self.snapshot = snapshot
        self.fetcher = fetcher
        self.meter = meter
        self.fetched_blobs = 0
        self.fetched_bytes = 0
        """What came from behind the file cache."""
        self._lock = threading.Lock()
        self._can_clone = True
        self._buffers = ThreadBuffers()

    def place_files(self, root: Path, undo: contextlib.ExitStack, *, writable: bool) -> dict[str, Path]:
        """Put the plain files into `root`: linked or cloned read-only, or copied when they may be written."""
        placed = {}
        for name, file in self.snapshot.manifest.files.items():
            placed[name] = root / name
            mode = file.mode
            if mode is None:
                mode = 0o755 if file.is_executable else 0o644
            self.place(file.digest, placed[name], writable=writable, mode=mode)
            undo.callback(placed[name].unlink, missing_ok=True)
        return placed

    def place_directories(self, root: Path, undo: contextlib.ExitStack) -> dict[str, Path]:
        """Put the directories into `root`."""
        placed = {}
        for name, tree in self.snapshot.directories.items():
            placed[name] = root / name
            self.write_directory(tree, placed[name])
            undo.callback(remove_tree, placed[name])
        return placed

    def write_chunked_file(self, name: str, table: ChunkTable, mode: int, target: Path) -> None:
        """Make `target` appear, whole, or raise and leave nothing.

        Pages of zeros become holes, also inside a chunk. Chunks at hand are cloned or copied from the file
        cache; the others are fetched in bulk and written as they arrive.
        """
        places: dict[Digest, list[int]] = defaultdict(list)
        present = []
        missing = self.fetcher.absent(table.digests())
        for index, digest in zip(table.indices.tolist(), table.digests(), strict=True):
            offset = index * table.chunk_size
            if digest in missing:
                places[digest].append(offset)
            else:
                present.append((digest, offset))
        with translate_os_errors(f"cannot write {str(target)!r}"), replacing(target, mode=mode) as fd:
            os.ftruncate(fd, table.size)
            self.fetcher.pool.for_each(lambda chunk: self._copy_chunk(*chunk, fd), present)

            def write(digest: Digest, data: bytes) -> None:
                for offset in places[digest]:
                    write_nonzero(fd, data, offset)
                    self.meter.add(digest.size_bytes)

            if places:
                self.fetch_many(places, repr(name), write)

    def write_directory(self, tree: DirectoryTree, target: Path) -> None:
        """Make `target`, an empty directory or nothing yet, that of `tree`; see `restore_directory`."""
        _DirectoryWriter(self, tree).write(target)

    def place(self, digest: Digest, target: Path, *, writable: bool, mode: int) -> None:
        """Make one blob appear as a file; see `BlobFetcher.place`."""
        allow_remote = self.snapshot.allow_remote
        if self.fetcher.place(digest, target, writable=writable, mode=mode, allow_remote=allow_remote):
            self._count(digest.size_bytes)

    def open(self, digest: Digest) -> int:
        """A descriptor of one blob, from the nearest tier that has it; see `BlobFetcher.open`."""
        opened = self.fetcher.open(digest, allow_remote=self.snapshot.allow_remote)
        if opened.origin == REMOTE:
            self._count(digest.size_bytes)
        return opened.fd

    def fetch_many(
        self, digests: Collection[Digest], where: str, write: Callable[[Digest, bytes], object]
    ) -> None:
        """Fetch in bulk what the file cache lacks of `where`, and write each blob as it comes."""
        behind = self.fetcher.behind
        if behind is None or not self.snapshot.allow_remote:
            raise NotFound(
                f"{len(digests)} blobs of {where} are not in the file cache, such as {min(digests)}"
            )

        def keep(digest: Digest, data: bytes) -> None:
            self.fetcher.keep(digest, data)
            self._count(digest.size_bytes)
            write(digest, data)

        with lost_blobs():
            behind.read_many(digests, keep)

    def _count(self, size: int) -> None:
        with self._lock:
            self.fetched_blobs += 1
            self.fetched_bytes += size

    def _copy_chunk(self, digest: Digest, offset: int, fd: int) -> None:
        source = self.open(digest)
        try:
            # Shared blocks take less than holes spare. A file system that cannot share says so at once.
            if not self._can_clone or not clone_range(source, 0, digest.size_bytes, fd, offset):
                self._can_clone = False
                content = self._buffers.get(digest.size_bytes)
                read_all(source, content, 0, f"the cached blob {digest}")
                write_nonzero(fd, content, offset)
        except TruncatedFile as error:
            raise DataLoss(f"{error}: it was cut while it was copied; try again") from error
        finally:
            os.close(source)
        self.meter.add(digest.size_bytes)


def output_folder(path: str | os.PathLike[str], names: list[str], undo: contextlib.ExitStack) -> Path:
    """The folder, made if need be, in which none of `names` exists yet.

    `undo` removes what was made, unless somebody else put something there.
    """
    root = Path(path).absolute()
    check_path(str(root), "the output folder")
    with translate_os_errors(f"cannot use the output folder {str(root)!r}", absent=FailedPrecondition):
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
    undo.callback(_remove_empty, made)
    for name in names:
        if os.path.lexists(root / name):
            raise FailedPrecondition(
                f"{str(root / name)!r} exists already: choose an empty output folder, or remove it"
            )
    return root


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class _DirectoryWriter:
    """Writes one directory tree out."""

    def __init__(self, writer: SnapshotWriter, tree: DirectoryTree) -> None:
        self._writer = writer
        self._tree = tree
        self._can_clone = True
        self._files: dict[Digest, list[tuple[str, FileEntry]]] = defaultdict(list)
        for path, entry in tree.items():
            if isinstance(entry, FileEntry):
                self._files[entry.digest].append((path, entry))

    def write(self, target: Path) -> None:
        """See `SnapshotWriter.write_directory`."""
        is_there = check_vacant(target)
        with translate_os_errors(f"cannot write the directory {str(target)!r}"), ProcessExitStack() as undo:
            with spare_descriptors():  # free again before anything is undone
                folder = target if is_there else target.parent
                staging = Path(tempfile.mkdtemp(prefix=".snaploader-", dir=folder))
                undo.callback(remove_tree, staging)
                self._fill(staging)
                if is_there:
                    self._move_in(staging, target, undo)
                else:
                    _finish_directories(self._tree, staging, self._tree)
                    os.rename(staging, target)
            undo.pop_all()

    def _fill(self, root: Path) -> None:
        """Write everything but the modes and times of directories."""
        for path, entry in self._tree.items():
            if isinstance(entry, DirectoryEntry) and path:
                current().check()
                os.mkdir(root / path, _PRIVATE)
        absent = self._writer.fetcher.absent([digest for digest in self._files if digest.size_bytes])
        small = {digest for digest in absent if digest.size_bytes <= _BULK_BLOB_BYTES}
        if small:
            self._writer.fetch_many(small, "a directory", partial(self._write_files, root))
        at_hand = [digest for digest in self._files if digest not in small]
        self._writer.fetcher.pool.for_each(lambda digest: self._copy(digest, root), at_hand)
        for path, entry in self._tree.items():
            if isinstance(entry, ChunkedEntry):
                self._writer.write_chunked_file(path, entry.table, _PRIVATE, root / path)
                with _opened(root / path) as fd:
                    _finish(fd, entry)
        for path, entry in self._tree.items():
            if isinstance(entry, SymlinkEntry):
                current().check()
                os.symlink(entry.target, root / path)
                os.utime(root / path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def _copy(self, digest: Digest, root: Path) -> None:
        """Write the files of one blob, from the nearest tier that has it."""
        if digest.size_bytes > _BULK_BLOB_BYTES:
            self._copy_big(digest, root)
            return
        data = read_blob(self._writer.open(digest), digest) if digest.size_bytes else b""
        self._write_files(root, digest, data)

    def _write_files(self, root: Path, digest: Digest, data: bytes) -> None:
        for path, entry in self._files[digest]:
            current().check()
            with translate_os_errors(f"cannot write {path!r}"), _opened(root / path, _NEW_FILE) as fd:
                if len(data) < _HOLES_FROM_BYTES:
                    write_all(fd, data, 0)
                else:
                    os.ftruncate(fd, len(data))
                    write_nonzero(fd, data, 0)
                _finish(fd, entry)
            self._writer.meter.add(len(data))

    def _copy_big(self, digest: Digest, root: Path) -> None:
        size = digest.size_bytes
        (first, first_entry), *others = self._files[digest]
        self._writer.place(digest, root / first, writable=True, mode=_PRIVATE)
        with _opened(root / first) as source:
            for path, entry in others:
                with _opened(root / path, _NEW_FILE) as fd:
                    if not (self._can_clone and clone_range(source, 0, size, fd, 0)):
                        self._can_clone = False
                        os.ftruncate(fd, size)
                        for start in range(0, size, _PIECE_BYTES):
                            current().check()
                            length = min(_PIECE_BYTES, size - start)
                            copy_sparse(source, start, length, fd, start, "a file that was just restored")
                    _finish(fd, entry)
            _finish(source, first_entry)
        self._writer.meter.add(size * (1 + len(others)))

    def _move_in(self, staging: Path, target: Path, undo: contextlib.ExitStack) -> None:
        """Move everything from `staging` into the directory that was there already.

        A directory that may not be written cannot be moved elsewhere, so the top ones get their modes last.
        """
        top = [path for path in self._tree if path and "/" not in path]
        _finish_directories(self._tree, staging, (path for path in self._tree if "/" in path))
        for name in top:
            if os.path.lexists(target / name):
                raise FailedPrecondition(
                    f"{str(target / name)!r} was made while {str(target)!r} was restored"
                )
            os.rename(staging / name, target / name)
            undo.callback(remove_tree, target / name)
        os.rmdir(staging)
        _finish_directories(self._tree, target, ["", *top])


def check_vacant(target: Path) -> bool:
    """Whether an empty directory is there; False when nothing is. FailedPrecondition for anything else."""
    with translate_os_errors(f"cannot use {str(target)!r} for a directory", absent=FailedPrecondition):
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(status.st_mode) and not os.listdir(target):
            return True
    raise FailedPrecondition(
        f"{str(target)!r} exists and is no empty directory: choose another place, or remove it"
    )


def _finish_directories(tree: DirectoryTree, root: Path, paths: Iterable[str]) -> None:
    """Give directories their modes and times, the deepest first."""
    for path in reversed(list(paths)):
        entry = tree[path]
        if isinstance(entry, DirectoryEntry):
            current().check()
            with _opened(root / path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                _finish(fd, entry)


def _finish(fd: int, entry: FileEntry | ChunkedEntry | DirectoryEntry) -> None:
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _opened(path: Path, how: int = os.O_RDWR) -> contextlib.AbstractContextManager[int]:
    return closing_fd(os.open(path, how | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
