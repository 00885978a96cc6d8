"""Writing files and directories of a snapshot out, in private places first, then where they are to be.

What the tree of a directory says comes from outside. Its paths are plain names below directories that are
directories (`DirectoryTree` sees to it), they are made in a new folder that nobody else may enter, and
symbolic links come last: so nothing is ever written through one. Modes come after that, and times at the
very end, as both would be in the way, or changed, before. That folder is found by its path, so whoever may
rename it, by owning the folder it is made in, can lead the writing elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from cow import (
    TruncatedFile,
    clone_range,
    read_all,
    write_all,
    write_nonzero,
)
from cow.fileio import Copier
from snaploader.digest import Digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound, translate_os_errors
from snaploader.files import remove_tree
from snaploader.formats.chunktable import ChunkTable
from snaploader.formats.dirtree import ChunkedEntry, DirectoryEntry, DirectoryTree, FileEntry, SymlinkEntry
from snaploader.formats.manifest import Manifest
from snaploader.loader.fetch import REMOTE, BlobFetcher, lost_blobs
from snaploader.loader.results import ProgressMeter, Snapshot
from snaploader.locks import ProcessExitStack
from snaploader.workers import ThreadBuffers, WorkerPool

SMALL_BLOB_BYTES = 4 << 20
"""Blobs up to this size are fetched in bulk and held in memory; bigger ones are streamed."""

_HOLES_FROM_BYTES = 64 << 10
"""Smaller files are not searched for holes, which would take longer than writing them."""

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PRIVATE = 0o700


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


def output_folder(path: str | os.PathLike[str], names: list[str], undo: contextlib.ExitStack) -> Path:
    """The folder, made if need be, in which none of `names` exists yet.

    `undo` removes what was made, unless somebody else put something there.
    """
    root = Path(path).absolute()
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


def place_files(
    manifest: Manifest,
    root: Path,
    fetcher: BlobFetcher,
    snapshot: Snapshot,
    undo: contextlib.ExitStack,
    *,
    writable: bool,
    fetched: Callable[[int], None] | None = None,
) -> dict[str, Path]:
    """Put the plain files into `root`: linked or cloned read-only, or copied when they may be written."""
    placed = {}
    for name, file in manifest.files.items():
        target = root / name
        fetcher.place(
            file.digest,
            target,
            writable=writable,
            mode=file.mode if file.mode is not None else 0o755 if file.is_executable else 0o644,
            allow_remote=snapshot.allow_remote,
            fetched=fetched,
        )
        undo.callback(target.unlink, missing_ok=True)
        placed[name] = target
    return placed


def write_directory(
    tree: DirectoryTree,
    target: Path,
    snapshot: Snapshot,
    fetcher: BlobFetcher,
    pool: WorkerPool,
    fetched: FetchCounter,
    meter: ProgressMeter,
) -> None:
    """Make `target` the directory of `tree`: absent before, or an empty directory.

    All of it appears, or nothing; only when the process is killed, a folder .snaploader-… may stay.

    Raises:
        FailedPrecondition: It is something else, or not empty.
        NotFound, DataLoss: A blob is gone from every cache.
    """
    _DirectoryWriter(tree, snapshot, fetcher, pool, fetched, meter).write(target)


def stored_bytes(tree: DirectoryTree) -> int:
    """What there is to write: all content without the holes."""
    return tree.size_bytes - tree.hole_bytes


class _DirectoryWriter:
    """Writes one directory tree, on the threads of a pool."""

    def __init__(
        self,
        tree: DirectoryTree,
        snapshot: Snapshot,
        fetcher: BlobFetcher,
        pool: WorkerPool,
        fetched: FetchCounter,
        meter: ProgressMeter,
    ) -> None:
        self._tree = tree
        self._allow_remote = snapshot.allow_remote
        self._fetcher = fetcher
        self._pool = pool
        self._fetched = fetched
        self._meter = meter
        self._can_clone = True
        self._files: dict[Digest, list[tuple[str, FileEntry]]] = defaultdict(list)
        for path, entry in tree.items():
            if isinstance(entry, FileEntry):
                self._files[entry.digest].append((path, entry))

    def write(self, target: Path) -> None:
        """See `write_directory`."""
        is_there = check_vacant(target)
        with translate_os_errors(f"cannot write the directory {str(target)!r}"):
            staging = Path(tempfile.mkdtemp(prefix=".snaploader-", dir=target if is_there else target.parent))
            with ProcessExitStack() as undo:
                undo.callback(remove_tree, staging)
                self._fill(staging)
                if is_there:
                    self._move_in(staging, target, undo)
                else:
                    _finish_directories(self._tree, staging, self._tree)
                    os.rename(staging, target)
                undo.pop_all()

    def _fill(self, root: Path) -> None:
        """Everything but the modes and times of directories."""
        for path, entry in self._tree.items():
            if isinstance(entry, DirectoryEntry) and path:
                os.mkdir(root / path, _PRIVATE)
        absent = self._fetcher.file_cache.find_missing(
            [digest for digest in self._files if digest.size_bytes]
        )
        small = {digest for digest in absent if digest.size_bytes <= SMALL_BLOB_BYTES}
        self._fetch(small, root)
        at_hand = [digest for digest in self._files if digest not in small]
        self._pool.for_each(lambda digest: self._copy(digest, root), at_hand)
        for path, entry in self._tree.items():
            if isinstance(entry, ChunkedEntry):
                self._write_chunked(path, entry, root / path)
        for path, entry in self._tree.items():
            if isinstance(entry, SymlinkEntry):
                os.symlink(entry.target, root / path)
                os.utime(root / path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def _fetch(self, digests: set[Digest], root: Path) -> None:
        """Fetch small blobs in bulk, and write the files of each as it comes."""
        if not digests:
            return
        remote = self._fetcher.remote
        if remote is None or not self._allow_remote:
            raise NotFound(
                f"{len(digests)} blobs of a directory are not in the file cache, such as {min(digests)}"
            )

        def keep(digest: Digest, data: bytes) -> None:
            self._fetcher.keep(digest, data)
            self._fetched.add(digest.size_bytes)
            self._write_files(digest, data, root)

        with lost_blobs():
            remote.read_many(digests, keep)

    def _copy(self, digest: Digest, root: Path) -> None:
        """Write the files of one blob, from the nearest tier that has it."""
        if digest.size_bytes > SMALL_BLOB_BYTES:
            self._copy_big(digest, root)
            return
        data = b""
        if digest.size_bytes:
            opened = self._fetcher.open(digest, allow_remote=self._allow_remote)
            with os.fdopen(opened.fd, "rb", buffering=0) as file:
                data = file.read(digest.size_bytes)
            if len(data) != digest.size_bytes:
                raise DataLoss(f"blob {digest} was cut to {len(data)} bytes while it was read; try again")
            if opened.origin == REMOTE:
                self._fetched.add(digest.size_bytes)
        self._write_files(digest, data, root)

    def _write_files(self, digest: Digest, data: bytes, root: Path) -> None:
        for path, entry in self._files[digest]:
            with translate_os_errors(f"cannot write {path!r}"), _new_file(root / path) as fd:
                _write(fd, data)
                _finish_file(fd, entry)
            self._meter.add(len(data))

    def _copy_big(self, digest: Digest, root: Path) -> None:
        (first, first_entry), *others = self._files[digest]
        self._fetcher.place(
            digest,
            root / first,
            writable=True,
            mode=_PRIVATE,
            allow_remote=self._allow_remote,
            fetched=self._fetched.add,
        )
        with _opened(root / first) as source:
            for path, entry in others:
                with _new_file(root / path) as fd:
                    self._clone(source, fd, digest.size_bytes)
                    _finish_file(fd, entry)
            _finish_file(source, first_entry)
        self._meter.add(digest.size_bytes * (1 + len(others)))

    def _clone(self, source: int, fd: int, size: int) -> None:
        if self._can_clone and clone_range(source, 0, size, fd, 0):
            return
        self._can_clone = False
        os.ftruncate(fd, size)
        Copier().copy_sparse(source, 0, size, fd, 0, "a file that was just restored")

    def _write_chunked(self, path: str, entry: ChunkedEntry, target: Path) -> None:
        writer = ChunkedFileWriter(
            path,
            entry.table,
            _PRIVATE,
            self._fetcher,
            self._pool,
            allow_remote=self._allow_remote,
            fetched=self._fetched,
            meter=self._meter,
        )
        writer.write(target)
        with _opened(target) as fd:
            _finish_file(fd, entry)

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


def _write(fd: int, data: bytes) -> None:
    if len(data) < _HOLES_FROM_BYTES:
        write_all(fd, data, 0)
        return
    os.ftruncate(fd, len(data))
    write_nonzero(fd, data, 0)


def _finish_directories(tree: DirectoryTree, root: Path, paths: Iterable[str]) -> None:
    """Give directories their modes and times, the deepest first."""
    for path in reversed(list(paths)):
        entry = tree[path]
        if isinstance(entry, DirectoryEntry):
            with _opened(root / path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                os.fchmod(fd, entry.mode)
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _finish_file(fd: int, entry: FileEntry | ChunkedEntry) -> None:
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    fd = os.open(path, _NEW_FILE, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(path: Path, how: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, how | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
