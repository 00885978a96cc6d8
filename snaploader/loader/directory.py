"""Saving a directory: its files become blobs in the file cache, and it becomes a tree."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

from cow import TruncatedFile, chunk_extents, is_zero, read_all
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.files import ThreadBuffers, check_path, closing_fd, hash_file, read_file
from snaploader.formats.chunktable import ChunkTable, check_geometry
from snaploader.formats.dirtree import (
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    Entry,
    FileEntry,
    encode_directory_tree,
)
from snaploader.loader.results import ProgressMeter, SavedDirectory
from snaploader.loader.scan import (
    Content,
    FileIdentity,
    FoundFile,
    Scan,
    changed,
    is_settled,
    read_index,
    shown_path,
    still_there,
    write_index,
)
from snaploader.protocols import FileCacheProtocol

DEFAULT_CHUNK_THRESHOLD_BYTES = 4 << 20
"""Files from this size on are kept in chunks. Smaller ones are loaded whole in one batch at no more cost."""

_IN_MEMORY_BYTES = 4 << 20
"""Files that are kept whole are read in one piece up to this size; bigger ones are streamed."""

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A directory to save, and how. Immutable.

    Raises:
        InvalidArgument: An excluded path is not relative and plain, or the threshold is not positive.
    """

    path: str | os.PathLike[str]
    """Of the directory, which must not change during the save. Symbolic links in it are kept as such and
    not followed. Files with several names become files of their own."""
    exclude: Collection[str] = ()
    """Paths relative to it. Of a directory named here only the directory is kept, empty; of anything else
    nothing."""
    index: str | os.PathLike[str] | None = None
    """A file outside the directory that remembers what the last save found. With it, only files that
    changed since are read again. Written anew by every save; None reads everything. Not for files that a
    process keeps mapped for writing (mmap(2)) from one save to the next: their times need not tell."""
    chunk_threshold_bytes: int = DEFAULT_CHUNK_THRESHOLD_BYTES
    """Files of this size or more are kept in chunks, their holes left out. Default: 4 MiB."""

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise InvalidArgument("exclude is a list of paths, not one path")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for path in self.exclude:
            if any(name in {"", ".", ".."} for name in path.split("/")):
                raise InvalidArgument(
                    f"{path!r} cannot be excluded: name it relative to the directory, as in 'var/cache'"
                )
        if self.chunk_threshold_bytes < 1:
            raise InvalidArgument(f"chunk_threshold_bytes is {self.chunk_threshold_bytes}, not positive")


@dataclass(eq=False)
class _BigFile:
    """A file while its chunks are read."""

    file: FoundFile
    fd: int
    pending: int = 1
    """Chunks that are to be read, and the listing of chunks itself."""
    hashes: dict[int, bytes] = field(default_factory=dict)
    """Of all chunks but zeros."""
    read_bytes: int = 0


class DirectoryCapture:
    """A directory on its way into the file cache. It is looked through when this is made.

    Without `keeps` nothing goes into the file cache; `sources` reads it again. To be closed. `tasks` are for
    several threads, everything else is for one. Raises what `Scan` does, NotFound when there is no such
    directory, InvalidArgument when the index or the file cache is inside.
    """

    def __init__(
        self,
        name: str,
        source: DirectorySource,
        file_cache: FileCacheProtocol,
        function: DigestFunction,
        chunk_size: int,
        *,
        keeps: bool = True,
    ) -> None:
        self._name = name
        self._where = os.path.abspath(os.fspath(source.path))
        check_path(self._where, f"the path of {name!r},")
        self._threshold = source.chunk_threshold_bytes
        self._file_cache = file_cache
        self._keeps = keeps
        self._function = function
        self._chunk_size = chunk_size
        self._index_path = None if source.index is None else os.path.abspath(os.fspath(source.index))
        self._lock = threading.Lock()
        self._buffers = ThreadBuffers()
        self._contents: dict[str, Content] = {}
        self._big_files: set[_BigFile] = set()
        self._read_bytes = self._hashed_bytes = self._stored_bytes = 0
        self.tree: DirectoryTree
        """What is in the directory; there after `finish`."""
        self.digest: Digest
        """The digest of the tree; there after `finish`."""
        self._check_places(source.exclude)
        self._started_ns = time.time_ns()
        with translate_os_errors(f"cannot read the directory {self._where!r}"):
            self._root = os.open(self._where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._found = Scan(self._root, self._where, source.exclude)
        except BaseException:
            os.close(self._root)
            raise
        self._pending = self._changed_files()

    @property
    def entry_count(self) -> int:
        """How many entries the tree will hold."""
        return self._found.entry_count

    @property
    def pending_bytes(self) -> int:
        """Size of the files that have to be read."""
        return sum(file.identity.size_bytes for file in self._pending)

    def tasks(self, meter: ProgressMeter) -> Iterator[Callable[[], None]]:
        """What has to be read: a call for each small file and for each chunk of a big one.

        A big file is opened when its first call is taken, so few are open at a time.
        """
        for file in self._pending:
            if self._is_chunked(file):
                yield from self._chunk_tasks(file, meter)
            else:
                yield partial(self._store_file, file, meter)

    def finish(self) -> None:
        """Make the tree, when all tasks are done, and keep it in the file cache.

        FailedPrecondition when a directory changed meanwhile, InvalidArgument when there is too much in it.
        """
        self._found.check_directories()
        entries: dict[str, Entry] = {**self._found.directories, **self._found.symlinks}
        for file in self._found.files:
            content = self._contents[file.path]
            if isinstance(content, ChunkTable):
                entries[file.path] = ChunkedEntry(content, file.mode, file.mtime_ns)
            else:
                entries[file.path] = FileEntry(content, file.mode, file.mtime_ns)
        self.tree = DirectoryTree(entries, self._function)
        data = encode_directory_tree(self.tree)
        self.digest = Digest.of(data, self._function)
        if self._keeps:
            self._file_cache.put_verified(self.digest, data)

    def sources(self, wanted: Collection[Digest]) -> dict[Digest, Callable[[], Buffer | str]]:
        """How to read blobs again from the files that hold them; see `StateCapture.sources`."""
        found: dict[Digest, Callable[[], Buffer | str]] = {}
        if self.digest in wanted:
            found[self.digest] = partial(encode_directory_tree, self.tree)
        for file in self._found.files:
            if len(found) == len(wanted):
                break
            content = self._contents[file.path]
            if isinstance(content, ChunkTable):
                for index, digest in zip(content.indices.tolist(), content.digests(), strict=True):
                    if digest in wanted:
                        found[digest] = partial(self._read_again, file, digest, index * content.chunk_size)
            elif content in wanted:
                is_big = content.size_bytes > _IN_MEMORY_BYTES
                found[content] = (
                    partial(os.path.join, self._where, file.path)
                    if is_big
                    else partial(self._read_again, file, content, 0)
                )
        return found

    def remember(self) -> str:
        """Write the capture index, where one was asked for; what went wrong, or an empty string."""
        if self._index_path is None:
            return ""
        settled = {
            (file.path, file.identity): self._contents[file.path]
            for file in self._found.files
            if is_settled(file.identity, self._started_ns)
        }
        return write_index(self._index_path, settled, self._function)

    def result(self) -> SavedDirectory:
        """What the save of this directory did."""
        directories = sum(isinstance(entry, DirectoryEntry) for entry in self.tree.values())
        return SavedDirectory(
            name=self._name,
            digest=self.digest,
            files=len(self._found.files),
            directories=directories - 1,
            symlinks=len(self._found.symlinks),
            size_bytes=self.tree.size_bytes,
            read_bytes=self._read_bytes,
            hashed_bytes=self._hashed_bytes,
            stored_bytes=self._stored_bytes,
            deduplicated_bytes=self._hashed_bytes - self._stored_bytes,
            hole_bytes=self.tree.hole_bytes,
            skipped=tuple(self._found.skipped),
        )

    def close(self) -> None:
        """Close all files. No task may be running."""
        for big in self._big_files:
            os.close(big.fd)
        self._big_files.clear()
        os.close(self._root)

    def _check_places(self, exclude: Collection[str]) -> None:
        """InvalidArgument when the directory holds what this save writes to."""
        if self._index_path is not None and self._would_save(os.path.dirname(self._index_path), exclude):
            raise InvalidArgument(
                f"the capture index {self._index_path!r} is in the directory to be saved: keep it elsewhere"
            )
        if self._would_save(self._file_cache.root, exclude):
            raise InvalidArgument(
                f"the file cache {self._file_cache.root!r} is in the directory to be saved, {self._where!r}: "
                "keep it elsewhere, or exclude it"
            )

    def _would_save(self, folder: str, exclude: Collection[str]) -> bool:
        """Whether a folder is the directory, or in it and not excluded."""
        inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(self._where))
        excluded = any(inside == path or inside.startswith(f"{path}/") for path in exclude)
        return inside.split("/")[0] != ".." and not excluded

    def _changed_files(self) -> list[FoundFile]:
        """The files to read; the contents of the others are taken from the index."""
        index = {} if self._index_path is None else read_index(self._index_path, self._function)
        pending = []
        for file in self._found.files:
            content = index.get((file.path, file.identity))
            kept_in = content.chunk_size if isinstance(content, ChunkTable) else None
            # It must be cut into the same pieces as today.
            if content is None or kept_in != (self._chunk_size if self._is_chunked(file) else None):
                pending.append(file)
            else:
                self._contents[file.path] = content
        return pending

    def _is_chunked(self, file: FoundFile) -> bool:
        return file.identity.size_bytes >= self._threshold

    def _store_file(self, file: FoundFile, meter: ProgressMeter) -> None:
        size = file.identity.size_bytes
        with self._opened(file) as fd:
            if size > _IN_MEMORY_BYTES:
                # By descriptor, so that it is this very file.
                if self._keeps:
                    digest, added = self._file_cache.add_file(f"/proc/self/fd/{fd}", self._function)
                else:
                    digest, added = Digest(*hash_file(fd, self._function), self._function), False
                self._check_unchanged(file, fd)
            else:
                data = read_file(fd, size)
                self._check_unchanged(file, fd)
                digest = Digest.of(data, self._function)
                added = bool(data) and self._keep(digest, data)
        with self._lock:
            self._contents[file.path] = digest
            self._read_bytes += size
            self._count(size, added=added)
        meter.add(size)

    def _chunk_tasks(self, file: FoundFile, meter: ProgressMeter) -> Iterator[Callable[[], None]]:
        size = file.identity.size_bytes
        check_geometry(size, self._chunk_size)
        big = _BigFile(file, self._open(file))
        with self._lock:
            self._big_files.add(big)
        with translate_os_errors(f"cannot find the holes of {shown_path(self._where, file.path)}"):
            for index, ranges in chunk_extents(big.fd, size, self._chunk_size):
                with self._lock:
                    big.pending += 1
                yield partial(self._store_chunk, big, index, ranges, meter)
            self._chunk_done(big, meter)

    def _store_chunk(
        self, big: _BigFile, index: int, ranges: list[tuple[int, int]], meter: ProgressMeter
    ) -> None:
        offset = index * self._chunk_size
        data = self._buffers.get(min(self._chunk_size, big.file.identity.size_bytes - offset))
        with translate_os_errors(f"cannot read {shown_path(self._where, big.file.path)}"):
            count = self._read(big.file, big.fd, data, offset, ranges)
            # Looking for zeros is several times faster than hashing them.
            digest = None if is_zero(data) else Digest.of(data, self._function)
            added = digest is not None and self._keep(digest, data)
            with self._lock:
                big.read_bytes += count
                if digest is not None:
                    big.hashes[index] = bytes.fromhex(digest.hash)
                    self._count(len(data), added=added)
            meter.add(count)
            self._chunk_done(big, meter)

    def _chunk_done(self, big: _BigFile, meter: ProgressMeter) -> None:
        with self._lock:
            big.pending -= 1
            if big.pending:
                return
        self._check_unchanged(big.file, big.fd)
        size = big.file.identity.size_bytes
        table = ChunkTable.empty(size, self._chunk_size, self._function).replace(big.hashes, size=size)
        with self._lock:
            self._big_files.discard(big)
            self._contents[big.file.path] = table
            self._read_bytes += big.read_bytes
        os.close(big.fd)
        meter.add(size - big.read_bytes)

    def _keep(self, digest: Digest, data: Buffer) -> bool:
        return self._keeps and self._file_cache.put_verified(digest, data)

    def _count(self, size: int, *, added: bool) -> None:
        self._hashed_bytes += size
        self._stored_bytes += size if added else 0

    def _read_again(self, file: FoundFile, digest: Digest, offset: int) -> Buffer:
        data = bytearray(digest.size_bytes)
        with self._opened(file) as fd:
            count = self._read(file, fd, memoryview(data), offset, [(offset, offset + len(data))])
        with self._lock:
            self._read_bytes += count
        if Digest.of(data, digest.function) != digest:
            raise FailedPrecondition(
                f"{shown_path(self._where, file.path)} has other content than when it was last saved, and "
                f"the same size and times: remove the capture index {self._index_path!r} and save again"
            )
        return data

    def _open(self, file: FoundFile) -> int:
        with still_there(self._where, file.path):
            fd = os.open(file.path, _FILE, dir_fd=self._root)
        # Also tells when a directory on the way has become a link to elsewhere.
        try:
            self._check_unchanged(file, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextlib.contextmanager
    def _opened(self, file: FoundFile) -> Iterator[int]:
        what = f"cannot read {shown_path(self._where, file.path)}"
        with closing_fd(self._open(file)) as fd, translate_os_errors(what):
            yield fd

    def _check_unchanged(self, file: FoundFile, fd: int) -> None:
        if FileIdentity.of(os.fstat(fd)) != file.identity:
            raise changed(self._where, file.path)

    def _read(
        self, file: FoundFile, fd: int, data: memoryview, offset: int, ranges: list[tuple[int, int]]
    ) -> int:
        """Fill `data` with what is in the file from `offset` on, zeros but for `ranges`; the bytes read."""
        position, end_of_data, count = offset, offset + len(data), 0
        for start, end in (*ranges, (end_of_data, end_of_data)):
            data[position - offset : start - offset] = bytes(start - position)
            try:
                read_all(fd, data[start - offset : end - offset], start, file.path)
            except TruncatedFile as error:
                raise changed(self._where, file.path) from error
            position, count = end, count + end - start
        return count
