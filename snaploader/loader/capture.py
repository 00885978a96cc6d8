"""Saving, the local part: files become blobs in the file cache, and tables of chunks."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from google.protobuf.message import Message

from cow import DEFAULT_CHUNK_SIZE, Checkpoint, COWError, COWStore, TruncatedFile, is_zero
from snaploader.context import CallContext, current
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    translate_os_errors,
)
from snaploader.files import (
    ProcessExitStack,
    ThreadBuffers,
    check_path,
    closing_fd,
    hash_file,
    open_source,
    remove_tree,
)
from snaploader.formats.chunktable import DEFAULT_MODE, ChunkTable, encode_tree
from snaploader.formats.dirtree import DirectoryTree, check_entry_count
from snaploader.formats.manifest import PlainFile
from snaploader.keys import SnapshotKeySet, SnapshotTask
from snaploader.loader.directory import DirectoryCapture, DirectorySource
from snaploader.loader.fetch import BlobFetcher, SnapshotChunkSource
from snaploader.loader.results import ProgressCallback, ProgressMeter, SavedFile
from snaploader.loader.scan import changed
from snaploader.policy import SavePolicy
from snaploader.protocols import FileCacheProtocol
from snaploader.workers import WorkerPool


@dataclass(frozen=True)
class SaveOptions:
    """The arguments of `SnapshotLoader.cache_snapshot`, which documents them."""

    files: Mapping[str, str | os.PathLike[str]]
    chunked_files: Mapping[str, COWStore | str | os.PathLike[str]]
    directories: Mapping[str, DirectorySource]
    vm_configuration: Message | None = None
    vm_metadata: Message | None = None
    task: SnapshotTask | None = None
    snapshot_id: str | None = None
    save_policy: SavePolicy = SavePolicy.ALWAYS
    key_set: SnapshotKeySet | None = None
    default_ref: str = ""
    min_refresh_interval_s: float = 0.0
    remote: bool | None = None
    local: bool = True
    local_manifest: bool = True
    link_files: bool = False
    recycled: bool = False
    chunk_size: int | None = None
    pin: str | None = None
    progress: ProgressCallback | None = None

    @property
    def stands_locally(self) -> bool:
        """Whether the snapshot is to be found and loaded on this host without the remote cache."""
        return self.local and self.local_manifest


@dataclass
class ChunkedCapture:
    """A chunked file on its way into the file cache."""

    name: str
    checkpoint: Checkpoint
    known: ChunkTable | None
    """What the store held when it was last saved or loaded, if that is known with this digest function."""
    unchanged: Callable[[], None] | None
    """Raises FailedPrecondition when the file behind a checkpoint was changed meanwhile; None for a store."""
    allow_remote: bool
    """Whether the store may fetch chunks from the remote store."""
    mode: int
    """Permission bits of the file."""
    identity: CallContext
    """The caller that reads of the store are made as: who unpacked it, whoever saves it."""
    hashes: dict[int, bytes | None] = field(default_factory=dict)
    """Of every chunk that was read; None is a hole."""
    hashed_bytes: int = 0
    stored_bytes: int = 0

    def pending(self) -> list[int]:
        """The chunks whose content has no known digest, in order."""
        if self.known is not None:
            return [int(index) for index in self.checkpoint.chunks]
        return [index for index in range(self.checkpoint.chunk_count) if not self.checkpoint.is_hole(index)]

    def table(self, function: DigestFunction) -> ChunkTable:
        """The chunks of the file; only complete after every pending chunk was hashed."""
        base = self.known or ChunkTable.empty(self.checkpoint.size, self.checkpoint.chunk_size, function)
        return base.replace(self.hashes, size=self.checkpoint.size)


class StateCapture:
    """Reads, hashes and keeps in the file cache what a save does not know yet. One object per save.

    With `SaveOptions.local` off nothing is kept: what is to be uploaded is read once more (`sources`).

    A context manager: all files are opened when it is made and each store's chunks are frozen at that
    moment; leaving it without `commit` gives them back to their stores as unsaved.
    """

    def __init__(
        self,
        file_cache: FileCacheProtocol,
        function: DigestFunction,
        pool: WorkerPool,
        options: SaveOptions,
        private_hash: Callable[[str], str] | None = None,
    ) -> None:
        self._file_cache = file_cache
        self._keeps = options.local
        self._links = options.link_files
        self._private_hash = private_hash if options.local else None
        self._function = function
        self._pool = pool
        self._files = {name: os.fspath(path) for name, path in options.files.items()}
        for name, path in self._files.items():
            check_path(path, f"the path of {name!r},")
        self._progress = options.progress
        self._lock = threading.Lock()
        self._buffers = ThreadBuffers()
        self._saved: dict[str, SavedFile] = {}
        self._open = ProcessExitStack()
        self.plain_files: dict[str, PlainFile] = {}
        """What the manifest says of every plain file; filled by `store_all`."""
        self.tables: dict[str, ChunkTable] = {}
        """The chunks of every chunked file; filled by `store_all`."""
        self._chunked: list[ChunkedCapture] = []
        self.directories: dict[str, DirectoryCapture] = {}
        """Every directory; their trees are made by `store_all`."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._open.close)
            for name, source in options.chunked_files.items():
                with _translate_cow_errors(name):
                    self._chunked.append(self._begin(name, source, options.chunk_size))
            for name, directory in options.directories.items():
                size = options.chunk_size or DEFAULT_CHUNK_SIZE
                capture = DirectoryCapture(name, directory, file_cache, function, size, keeps=options.local)
                self._open.callback(capture.close)
                self.directories[name] = capture
                check_entry_count(sum(one.entry_count for one in self.directories.values()))
            undo.pop_all()

    @property
    def hashed_bytes(self) -> int:
        """What was read and hashed so far of files and directories that are stored."""
        directories = sum(capture.result().hashed_bytes for capture in self.directories.values())
        return directories + sum(file.hashed_bytes for file in self._saved.values())

    def store_all(self) -> dict[str, SavedFile]:
        """Bring everything into the file cache, in parallel. The first error stops it and is raised."""
        meter = ProgressMeter(self._progress, "store", self._total_bytes())
        self._pool.for_each(lambda task: task(), self._tasks(meter))
        for chunked in self._chunked:
            if chunked.unchanged is not None:
                chunked.unchanged()
            self._finish(chunked)
        for capture in self.directories.values():
            capture.finish()
        if self.directories:
            trees = self.trees.values()
            check_entry_count(sum(map(len, trees)), sum(tree.decoded_bytes for tree in trees))
        return self._saved

    @property
    def trees(self) -> dict[str, DirectoryTree]:
        """What is in every directory; there after `store_all`."""
        return {name: capture.tree for name, capture in self.directories.items()}

    def commit(self, fetcher: BlobFetcher) -> list[str]:
        """Tell the stores that their chunks are saved: they are clean from now on. Write the capture indexes.

        What went wrong with an index is returned.
        """
        for chunked in self._chunked:
            allow_remote = chunked.allow_remote and fetcher.behind is not None
            table = self.tables[chunked.name]
            source = SnapshotChunkSource(
                chunked.name, table, fetcher, allow_remote, chunked.mode, chunked.identity
            )
            with _translate_cow_errors(chunked.name):
                chunked.checkpoint.commit(source)
        return [*filter(None, (directory.remember() for directory in self.directories.values()))]

    def rescue(self, digests: Collection[Digest]) -> None:
        """Put blobs into the file cache again that are in no cache, from what is being saved.

        NotFound, DataLoss or FailedPrecondition when something does not hold any more what it did.
        """
        for digest, read in self.sources(digests).items():
            self._file_cache.write(digest, read())

    def rescue_from_directories(self, wanted: set[Digest]) -> None:
        """Do as `rescue` does for what is in directories, and take it out of `wanted`."""
        for capture in self.directories.values():
            for digest, read in capture.sources(wanted).items():
                self._file_cache.write(digest, read())
                wanted.remove(digest)

    def sources(self, wanted: Collection[Digest]) -> dict[Digest, Callable[[], Buffer | str]]:
        """How to read blobs again from what is being saved: each call gives verified bytes, or a file's path.

        The calls raise NotFound, DataLoss or FailedPrecondition when something does not hold any more what
        it did. What is at a path is for the caller to verify.
        """
        wanted = set(wanted)
        found: dict[Digest, Callable[[], Buffer | str]] = {}
        for capture in self.directories.values():
            found |= capture.sources(wanted)
        for name, file in self.plain_files.items():
            if file.digest in wanted:
                found[file.digest] = partial(str, self._files[name])
        for chunked in self._chunked:
            table, tree = self.tables[chunked.name], self._saved[chunked.name].digest
            if tree in wanted:
                found[tree] = partial(encode_tree, table, chunked.mode)
            for index, digest in zip(table.indices.tolist(), table.digests(), strict=True):
                if digest in wanted:
                    found.setdefault(digest, partial(self._read_chunk, chunked, index, digest))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _read_chunk(self, chunked: ChunkedCapture, index: int, digest: Digest) -> Buffer:
        data = bytearray(chunked.checkpoint.chunk_length(index))
        try:
            with _translate_cow_errors(chunked.name):
                chunked.checkpoint.readinto(index, data)
        except (NotFound, DataLoss) as error:
            raise type(error)(
                f"chunk {index} of {chunked.name!r} ({digest}), which did not change since it was loaded, is "
                f"in no cache any more: {error.message}"
            ) from error
        if Digest.of(data, digest.function) != digest:
            raise FailedPrecondition(
                f"{chunked.name!r} was changed while it was saved: stop what writes to it and save again"
            )
        return data

    def _begin(
        self, name: str, source: COWStore | str | os.PathLike[str], chunk_size: int | None
    ) -> ChunkedCapture:
        unchanged: Callable[[], None] | None = None
        mode = DEFAULT_MODE
        if isinstance(source, COWStore):
            store = source
        else:
            path = os.fspath(source)
            before = os.stat(path)
            unchanged = partial(_check_unchanged, path, name, before)
            mode = before.st_mode & 0o777
            # Nothing is written to the store, so its folder stays empty.
            scratch = tempfile.mkdtemp(prefix="snaploader-")
            self._open.callback(remove_tree, scratch)
            size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
            store = COWStore.from_file(path, scratch, size, copy=False)
            self._open.enter_context(store)
        checkpoint = self._open.enter_context(store.checkpoint())
        loaded = store.source
        if not isinstance(loaded, SnapshotChunkSource):
            return ChunkedCapture(name, checkpoint, None, unchanged, True, mode, current().identity())
        known = loaded.table if loaded.table.function is self._function else None
        return ChunkedCapture(
            name, checkpoint, known, unchanged, loaded.allow_remote, loaded.mode, loaded.identity
        )

    def _total_bytes(self) -> int:
        with translate_os_errors("cannot read a file to save"):
            plain = sum(os.stat(path).st_size for path in self._files.values())
        chunked = sum(
            chunked.checkpoint.chunk_length(index) for chunked in self._chunked for index in chunked.pending()
        )
        return plain + chunked + sum(capture.pending_bytes for capture in self.directories.values())

    def _tasks(self, meter: ProgressMeter) -> Iterator[Callable[[], None]]:
        for name, path in self._files.items():
            yield partial(self._store_plain, name, path, meter)
        for chunked in self._chunked:
            for index in chunked.pending():
                yield partial(self._store_chunk, chunked, index, meter)
        for capture in self.directories.values():
            yield from capture.tasks(meter)

    def _store_plain(self, name: str, path: str, meter: ProgressMeter) -> None:
        with translate_os_errors(f"cannot read {name!r}"):
            before = os.stat(path)
        hashed_bytes = before.st_size
        if self._private_hash is not None:
            hashed_bytes = 0
            digest = Digest(self._private_hash(name), before.st_size, self._function)
            added = self._file_cache.put_private(digest, path, link=self._links)
            if not self._links:
                _check_unchanged(path, name, before)
        elif self._keeps and not self._links:
            digest, added = self._file_cache.add_file(path, self._function)
            _check_unchanged(path, name, before)
        else:
            digest = _digest_of_file(path, self._function)
            # A link gives the file another time, and others may be linking it just now.
            _check_unchanged(path, name, before, has_its_time=not self._links)
            added = self._keeps and self._file_cache.put_file(digest, path, link=True, verify=False)
        size = digest.size_bytes
        self._saved[name] = SavedFile(
            name,
            size,
            chunked=False,
            digest=digest,
            hashed_bytes=hashed_bytes,
            stored_bytes=size if added else 0,
            deduplicated_bytes=0 if added else size,
        )
        mode = before.st_mode & 0o777
        self.plain_files[name] = PlainFile(digest, is_executable=bool(mode & 0o100), mode=mode)
        meter.add(size)

    def _store_chunk(self, chunked: ChunkedCapture, index: int, meter: ProgressMeter) -> None:
        buffer = self._buffers.get(chunked.checkpoint.chunk_size)
        with _translate_cow_errors(chunked.name):
            count = chunked.checkpoint.readinto(index, buffer)
        data = buffer[:count]
        # Looking for zeros is several times faster than hashing them.
        if is_zero(data):
            chunked.hashes[index] = None
            meter.add(count)
            return
        digest = Digest.of(data, self._function)
        path = chunked.checkpoint.path(index)
        if not self._keeps:
            added = False
        elif path is not None:
            added = self._file_cache.put_file(digest, path, link=True, verify=False)
        else:
            added = self._file_cache.put_verified(digest, data)
        with self._lock:
            chunked.hashes[index] = bytes.fromhex(digest.hash)
            chunked.hashed_bytes += count
            if added:
                chunked.stored_bytes += count
        meter.add(count)

    def _finish(self, chunked: ChunkedCapture) -> None:
        table = chunked.table(self._function)
        tree = encode_tree(table, chunked.mode)
        digest = Digest.of(tree, self._function)
        if self._keeps:
            self._file_cache.put_verified(digest, tree)
        self.tables[chunked.name] = table
        self._saved[chunked.name] = SavedFile(
            chunked.name,
            table.size,
            chunked=True,
            digest=digest,
            chunks=len(table.indices),
            hashed_chunks=sum(hash_ is not None for hash_ in chunked.hashes.values()),
            hashed_bytes=chunked.hashed_bytes,
            hole_bytes=table.hole_bytes,
            stored_bytes=chunked.stored_bytes,
            deduplicated_bytes=chunked.hashed_bytes - chunked.stored_bytes,
        )


@contextlib.contextmanager
def _translate_cow_errors(name: str) -> Iterator[None]:
    """Raise what `cow` and the operating system say of a file as errors of this library."""
    try:
        with translate_os_errors(f"cannot save {name!r}"):
            yield
    except TruncatedFile as error:
        raise FailedPrecondition(
            f"{name!r} was cut short while it was saved: stop what writes to it and save again ({error})"
        ) from error
    except COWError as error:
        raise FailedPrecondition(f"cannot save {name!r}: {error}") from error
    except SnaploaderError:
        raise
    except ValueError as error:
        raise InvalidArgument(f"cannot save {name!r} in chunks: {error}") from error


def _digest_of_file(path: str, function: DigestFunction) -> Digest:
    with translate_os_errors(f"cannot read {path!r}"), closing_fd(open_source(path)[0]) as fd:
        return Digest(*hash_file(fd, function), function)


def _check_unchanged(path: str, name: str, before: os.stat_result, *, has_its_time: bool = True) -> None:
    """FailedPrecondition when a file is not any more what it was, as far as that shows."""
    with translate_os_errors(f"cannot look at {name!r} again after reading it"):
        now = os.stat(path)
        is_same = os.path.samestat(now, before) and now.st_size == before.st_size
        if not is_same or (has_its_time and now.st_mtime_ns != before.st_mtime_ns):
            raise changed(path)
