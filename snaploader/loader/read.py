"""Files of a snapshot, read in place: nothing is unpacked, and no blob fetched before it is asked for."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self, TypeAlias

from cow import DEFAULT_READAHEAD, ReadaheadPlanner, SingleFlight, TruncatedFile, new_bytes, read_all
from snaploader.context import CallContext, current, in_context, own_errors
from snaploader.digest import Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    translate_os_errors,
)
from snaploader.files import closing_fd_on_error
from snaploader.formats.chunktable import ChunkTable
from snaploader.formats.dirtree import (
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    Entry,
    FileEntry,
    SymlinkEntry,
)
from snaploader.loader.fetch import BlobFetcher, wait
from snaploader.loader.results import Snapshot
from snaploader.loader.unpack import hold

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DEFAULT_BUFFER_BYTES = 128 << 10
"""What an open file reads at least, but for the end of a chunk."""

MAX_LINKS = 40
"""Symbolic links followed for one path; those of Linux."""

_STREAMED_FROM_BYTES = 4 << 20
"""Plain files from this size on go to the file cache as a stream, and not through memory."""

_MAX_SPOOLED = 64
"""Blobs, and so descriptors, that a reader keeps where the file cache may not be used."""

FileLike: TypeAlias = FileEntry | ChunkedEntry


class SnapshotReader:
    """Reads files of a snapshot in place, without unpacking it. Thread-safe. A context manager.

    A path is "disk", or "home/etc/hosts" in a directory. Symbolic links are followed as far as they lead to
    something in the same directory of the snapshot. Of a chunked file no more chunks are fetched than are
    read; a plain file is fetched whole. Who reads is the caller that opened it, unless the context around a
    read says otherwise.

    `SnapshotLoader.read_snapshot` makes it. Close it before the loader.
    """

    def __init__(self, snapshot: Snapshot, fetcher: BlobFetcher) -> None:
        self.snapshot = snapshot
        """The snapshot that is read."""
        self._fetcher = fetcher
        self._names: dict[str, dict[str, list[str]]] = {}
        self._closed = False
        identity = current().identity()
        self._default_context = None if identity == CallContext() else identity
        self.held = ExitStack()
        """What `close` lets go of. It does not refer to the reader."""
        self.held.callback(hold(snapshot, fetcher).release)
        self._spool = None if snapshot.allow_local else _Spool(fetcher)
        if self._spool is not None:
            self.held.callback(self._spool.close)

    def entry(self, path: str) -> Entry:
        """What stands at a path, at the end of all symbolic links; "" is the snapshot, a `DirectoryEntry`.

        NotFound when nothing does, or a link leads elsewhere.
        """
        return self.snapshot.entry(self.resolve(path))

    def resolve(self, path: str) -> str:
        """The path without symbolic links in it. NotFound as `entry`."""
        top, slash, inside = path.partition("/")
        tree = self.snapshot.directories.get(top)
        if tree is None or not slash:
            return path
        try:
            return f"{top}/{_resolved(tree, inside)}".rstrip("/")
        except NotFound as error:
            raise NotFound(f"the snapshot has no file {path[:200]!r}: {error.message}") from error

    def names(self, path: str) -> Sequence[str]:
        """The names in a directory, sorted; those of all files and directories for "".

        NotFound as `entry`; InvalidArgument when something else is there.
        """
        path = self.resolve(path)
        if not isinstance(self.snapshot.entry(path), DirectoryEntry):
            raise InvalidArgument(f"{path[:200]!r} is no directory")
        if not path:
            return sorted(self.snapshot.manifest.names)
        top, _, inside = path.partition("/")
        if top not in self._names:
            # Looking for what is in one directory takes as long as for all of them.
            found: dict[str, list[str]] = defaultdict(list)
            for below in self.snapshot.directories[top]:
                if below:
                    parent, _, name = below.rpartition("/")
                    found[parent].append(name)
            self._names[top] = dict(found)
        return tuple(self._names[top].get(inside, ()))

    @in_context
    def read_at(self, path: str, offset: int, size: int, *, context: CallContext | None = None) -> bytes:
        """`size` bytes of a file from `offset`; fewer where it ends before. Chunks are fetched in parallel.

        Raises:
            NotFound: As `entry`; or the snapshot has lost content.
            InvalidArgument: There is no file, or `offset` or `size` is negative.
            DataLoss, Unavailable, …: As for every read.
        """
        return self.read_ranges([(path, offset, size)])[0]

    @in_context
    def read_ranges(
        self, ranges: Iterable[tuple[str, int, int]], *, context: CallContext | None = None
    ) -> list[bytes]:
        """Several parts at once, each as `read_at` gives it: path, offset and size."""
        results: list[bytes] = []
        parts: list[_Part] = []
        for path, offset, size in ranges:
            entry = self._file(path)
            if offset < 0 or size < 0:
                raise InvalidArgument(f"{size} bytes at {offset} of {path[:200]!r} cannot be read")
            result, memory = _new_bytes(min(size, entry.size_bytes - offset))
            results.append(result)
            parts += _parts(path, entry, offset, memory)
        self._read(parts)
        return results

    def open(self, path: str, *, buffer_bytes: int = DEFAULT_BUFFER_BYTES) -> io.BufferedReader:
        """A file to read, seek and close, with readahead, for as long as the reader is open.

        Errors as `read_at`.

        Args:
            buffer_bytes: What is read at least, but never beyond the chunk that is asked for.
        """
        if buffer_bytes < 1:
            raise InvalidArgument(f"a buffer of {buffer_bytes} bytes holds nothing")
        return io.BufferedReader(_SnapshotFile(self, path, self._file(path), buffer_bytes), buffer_bytes)

    def close(self) -> None:
        """Let go of what was kept from eviction; nothing can be read any more. Idempotent."""
        self._closed = True
        self.held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SnapshotReader cannot be pickled or copied: pickle its `snapshot`")

    def _file(self, path: str) -> FileLike:
        entry = self.entry(path)
        if not isinstance(entry, FileEntry | ChunkedEntry):
            raise InvalidArgument(f"{path[:200]!r} is a directory")
        return entry

    def _read(self, parts: Sequence[_Part]) -> None:
        if self._closed:
            raise FailedPrecondition("the reader of the snapshot was closed")
        if len(parts) > 1:
            fetched = self._fetch(parts)
            left = [part for part in parts if part.digest not in fetched]
            self._fetcher.pool.for_each(self._read_part, left)
        elif parts:
            self._read_part(parts[0])

    def _fetch(self, parts: Sequence[_Part]) -> set[Digest]:
        """Fill the parts of what no cache here has, and no others, from as few requests as that takes."""
        by_digest: dict[Digest, list[_Part]] = defaultdict(list)
        for part in parts:
            if part.digest.size_bytes < _STREAMED_FROM_BYTES:
                by_digest[part.digest].append(part)
        fetched: set[Digest] = set()

        def fill(digest: Digest, data: bytes) -> None:
            for part in by_digest[digest]:
                part.target[:] = data[part.start : part.start + len(part.target)]
            fetched.add(digest)

        if self.snapshot.allow_remote and len(by_digest) > 1:
            # Which of them is lost or damaged is told, with its path, when it is read by itself.
            with suppress(NotFound, DataLoss):
                self._fetcher.fetch_many(by_digest, fill, stalls=self._fetcher.observer)
        return fetched

    def _prefetch(self, digests: Sequence[Digest]) -> None:
        if self.snapshot.allow_remote:
            self._fetcher.prefetcher.hint(digests)

    def _read_part(self, part: _Part) -> None:
        what = f"the cached blob {part.digest}"
        try:
            fd = self._open_blob(part.digest)
            try:
                with translate_os_errors(f"cannot read {what}"):
                    read_all(fd, part.target, part.start, what)
            except TruncatedFile as error:
                raise DataLoss(f"{error}: it was cut while it was read; try again") from error
            finally:
                os.close(fd)
        except SnaploaderError as error:
            error.add_note(f"needed for {part.path!r}")
            raise

    def _open_blob(self, digest: Digest) -> int:
        if self._spool is not None:
            return self._spool.open(digest, allow_remote=self.snapshot.allow_remote)
        is_large = digest.size_bytes >= _STREAMED_FROM_BYTES
        open_blob = self._fetcher.open_streamed if is_large else self._fetcher.open
        return open_blob(digest, allow_remote=self.snapshot.allow_remote, stalls=self._fetcher.observer).fd


class _Spool:
    """Blobs that are read past the file cache, in temporary files without names. Thread-safe.

    The latest ones stay, by who may read them. So a file that is read through a buffer is fetched once,
    and not for each filling of the buffer.
    """

    def __init__(self, fetcher: BlobFetcher) -> None:
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._flights: SingleFlight[tuple[object, Digest], None] = SingleFlight()
        self._files: OrderedDict[tuple[object, Digest], int] = OrderedDict()
        self._closed = False

    def open(self, digest: Digest, *, allow_remote: bool) -> int:
        """A descriptor of the blob, owned by the caller. Errors as `BlobFetcher.open`."""
        key = (current().caller, digest)

        def fetch() -> None:
            with own_errors():
                if not self._is_here(key):
                    self._keep(key, self._fetcher.open_streamed(digest, allow_remote=allow_remote).fd)

        while True:
            with self._lock, translate_os_errors(f"cannot open blob {digest} again"):
                if key in self._files:
                    self._files.move_to_end(key)
                    return os.dup(self._files[key])
            # By the next round it may have been pushed out by others, and is fetched again then.
            with self._fetcher.observer.operation("stall"):
                self._flights.run(key, fetch, wait)

    def close(self) -> None:
        """Drop all of them. Idempotent."""
        with self._lock:
            self._closed = True
            while self._files:
                os.close(self._files.popitem()[1])

    def _is_here(self, key: tuple[object, Digest]) -> bool:
        with self._lock:
            return key in self._files

    def _keep(self, key: tuple[object, Digest], fd: int) -> None:
        with closing_fd_on_error(fd), self._lock:
            if self._closed:
                raise FailedPrecondition("the reader of the snapshot was closed")
            self._files[key] = fd
            if len(self._files) > _MAX_SPOOLED:
                os.close(self._files.popitem(last=False)[1])


class _Part(NamedTuple):
    """A part of one blob, and where its bytes go."""

    path: str
    digest: Digest
    start: int
    target: memoryview


def _new_bytes(size: int) -> tuple[bytes, memoryview]:
    """Bytes to be filled through the view, which must not outlive them; none when `size` is not above 0."""
    return new_bytes(size) if size > 0 else (b"", memoryview(b""))


def _parts(path: str, entry: FileLike, offset: int, target: memoryview) -> Iterator[_Part]:
    """The parts of blobs that fill `target` with a file's bytes from `offset`. Holes are filled at once."""
    if not target:
        return
    if isinstance(entry, FileEntry):
        yield _Part(path, entry.digest, offset, target)
        return
    table = entry.table
    while target:
        index, start = divmod(offset, table.chunk_size)
        piece, target = target[: table.chunk_size - start], target[table.chunk_size - start :]
        digest = table.get(index)
        if digest is None:
            piece[:] = bytes(len(piece))
        else:
            yield _Part(path, digest, start, piece)
        offset += len(piece)


def _resolved(tree: DirectoryTree, path: str) -> str:
    """The path in a tree that is free of symbolic links. NotFound when there is nothing at its end."""
    found = tree.get(path)
    if found is not None and not isinstance(found, SymlinkEntry):
        return path
    done: list[str] = []
    pending = path.split("/")[::-1]
    links = 0
    while pending:
        name = pending.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            if not done:
                raise NotFound("a symbolic link leads out of the directory")
            done.pop()
            continue
        at = "/".join((*done, name))
        entry = tree.get(at)
        if isinstance(entry, SymlinkEntry):
            links += 1
            if links > MAX_LINKS:
                raise NotFound(f"there are more than {MAX_LINKS} symbolic links on the way")
            if entry.target.startswith("/"):
                raise NotFound(f"{at[:200]!r} is a symbolic link to {entry.target[:200]!r}")
            pending += entry.target.split("/")[::-1]
        elif entry is None or (pending and not isinstance(entry, DirectoryEntry)):
            raise NotFound(f"there is no {at[:200]!r}" if entry is None else f"{at[:200]!r} is no directory")
        else:
            done.append(name)
    return "/".join(done)


class _SnapshotFile(io.RawIOBase):
    """An unbuffered file over a reader. Not thread-safe: it has a position."""

    def __init__(self, reader: SnapshotReader, path: str, entry: FileLike, buffer_bytes: int) -> None:
        super().__init__()
        self.name = path
        self._reader = reader
        self._default_context = reader._default_context
        self._entry = entry
        self._buffer_bytes = buffer_bytes
        self._position = 0
        self._row = -1
        table = entry.table if isinstance(entry, ChunkedEntry) else None
        self._table: ChunkTable | None = table
        self._planner = ReadaheadPlanner(DEFAULT_READAHEAD, table.chunk_size) if table is not None else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check()
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._entry.size_bytes}
        if whence not in starts:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        if starts[whence] + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {starts[whence] + offset}")
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._check()
        target = memoryview(buffer).cast("B")
        size = max(0, min(len(target), self._entry.size_bytes - self._position))
        if size <= self._buffer_bytes and self._table is not None:
            # What only fills the buffer must not fetch a chunk that nobody asked for.
            size = min(size, self._table.chunk_size - self._position % self._table.chunk_size)
        self._fill(target[:size])
        return size

    def readall(self) -> bytes:
        self._check()
        data, memory = _new_bytes(self._entry.size_bytes - self._position)
        self._fill(memory)
        return data

    @in_context
    def _fill(self, target: memoryview) -> None:
        parts = list(_parts(self.name, self._entry, self._position, target))
        self._read_ahead(self._position, len(target))
        self._reader._read(parts)
        self._position += len(target)

    def _read_ahead(self, position: int, size: int) -> None:
        """Ask for the chunks after one that is read in a sequence. Holes do not break it."""
        table, planner = self._table, self._planner
        if table is None or planner is None or not size:
            return
        last = (position + size - 1) // table.chunk_size
        row = int(table.indices.searchsorted(last))
        if row == self._row or row >= table.stored_count:
            return
        self._row = row
        ahead = planner.touched(row, table.stored_count, lambda _: False)
        if ahead:
            self._reader._prefetch([table.digest(row) for row in ahead])

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed file")
