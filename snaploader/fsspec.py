"""Snapshots as a read-only file system of fsspec, for pandas, zarr, dask, pyarrow and others.

    pandas.read_csv("snap://main/data/table.csv", storage_options={"file_cache": "/var/cache/snaploader"})

A path is `<snapshot>/<file>`, or `<snapshot>/<directory>/<path in it>`. What names the snapshot is
percent-encoded, as a branch may have slashes in its name; all that follows stands as it is.

    snap://main/disk                    the file disk of the snapshot of branch main
    snap://feature%2Fx/home/etc/hosts   etc/hosts in the directory home, of branch feature/x
    snap://%40next/disk                 of a branch that is called @next
    snap://@4f0c9a2e/disk               of exactly the snapshot with this id
    snap://@/disk                       of the best snapshot of the option `key_set`, or without a branch

`snapshot_url` makes such a URL. Of a chunked file only the chunks that are read are fetched.

Needs fsspec (the `fsspec` extra), which finds this module by the protocol `snap`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, Self, TypeAlias
from urllib.parse import unquote
from weakref import WeakSet

try:
    from fsspec.spec import AbstractFileSystem
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "snaploader.fsspec needs fsspec: install snaploader[fsspec]", name=error.name
    ) from error

from cow import SingleFlight
from snaploader.blobstore import RemoteStore
from snaploader.context import current, own_errors
from snaploader.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    Unavailable,
)
from snaploader.filecache import FileCache
from snaploader.files import ProcessExitStack
from snaploader.formats.dirtree import ChunkedEntry, DirectoryEntry, Entry, FileEntry, SymlinkEntry
from snaploader.keys import BRANCH_VARIABLE, Properties, SnapshotKeySet, SnapshotTask
from snaploader.loader import Snapshot, SnapshotLoader, SnapshotReader
from snaploader.loader.fetch import wait
from snaploader.loader.read import DEFAULT_BUFFER_BYTES
from snaploader.policy import ReadPolicy

ID_MARK = "@"
"""Begins the name of a snapshot that is named by its id."""

MAX_SNAPSHOTS = 1000
"""Snapshots that are kept for reading by one process and with the same options; the latest ones stay, and
those that files are open on."""

_PlaceKey: TypeAlias = "tuple[str, object]"


def snapshot_url(path: str = "", *, ref: str | None = None, snapshot_id: str | None = None) -> str:
    """The URL of a path in a snapshot: in that of a branch, or in exactly the one with an id.

    Args:
        path: "disk", "home/etc/hosts", or empty for the snapshot itself.
        ref: The branch.
        snapshot_id: The id. With neither, the snapshot is that of the option `key_set`.

    Raises:
        InvalidArgument: Both are given, or one of them is empty.
    """
    if (ref is not None and snapshot_id is not None) or "" in {ref, snapshot_id}:
        raise InvalidArgument("name one snapshot: by ref, by snapshot_id, or by neither")
    name = _named(ref) if ref is not None else ID_MARK + _quoted(snapshot_id or "")
    return f"snap://{name}/{path}".rstrip("/")


def _quoted(text: str) -> str:
    """Encodes what would be read as something else, and no more: names stay readable."""
    return text.replace("%", "%25").replace("/", "%2F").replace("::", ":%3A")


def _named(ref: str) -> str:
    """A branch as a path begins with it."""
    quoted = _quoted(ref)
    return "%40" + quoted.removeprefix(ID_MARK) if quoted.startswith(ID_MARK) else quoted


@dataclass(frozen=True)
class _Options:
    """The storage options, which `SnapshotFileSystem` documents."""

    file_cache: str | os.PathLike[str] | FileCache | None = None
    remote_cache: str | RemoteStore | None = None
    loader: SnapshotLoader | None = None
    key_set: SnapshotKeySet | None = None
    platform: Properties = ()
    configuration_hash: str = ""
    runner_id: str = ""
    instance_name: str = ""
    read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST
    file_cache_options: Mapping[str, Any] = field(default_factory=dict)
    remote_cache_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self.platform.items() if isinstance(self.platform, Mapping) else self.platform
        object.__setattr__(self, "platform", tuple(pairs))
        if self.loader is not None and (self.file_cache is not None or self.remote_cache is not None):
            raise InvalidArgument("give either a loader or what to make one of: file_cache and remote_cache")
        if self.loader is None and self.file_cache is None:
            raise InvalidArgument("the option file_cache is missing: name a folder to keep blobs in")
        if isinstance(self.file_cache, FileCache) and self.file_cache_options:
            raise InvalidArgument("file_cache_options belong to a folder, not to a FileCache")
        if self.remote_cache_options and not isinstance(self.remote_cache, str):
            raise InvalidArgument("remote_cache_options belong to the URL of a remote cache")
        if not isinstance(self.read_policy, ReadPolicy):
            ReadPolicy.parse(self.read_policy)


class SnapshotFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Snapshots as a read-only file system. Thread-safe; can be pickled if its options can.

    The module's docstring has the grammar of paths. A branch's snapshot is looked for when it is first used,
    and stays the same until `invalidate_cache`: files that belong together are read from one snapshot. Where
    several processes must read the same one, name it by its id.

    File systems with equal options share caches and a loader, which are opened at the first use, and again
    after `close` or in a forked child. Use it as a context manager, or `close` it, where that matters before
    the process ends. Calls run in the context around them (`snaploader.CallContext.use`).

    Symbolic links are followed within their directory. A listing shows one that leads to a directory, or
    nowhere, as a "link", so that walking ends.

    Args:
        file_cache: Where blobs are kept: a folder, or a `FileCache`, which stays the caller's to close.
        remote_cache: Where snapshots come from: a URL, as `RemoteCache` takes it, or a remote store.
        loader: Does the reading, instead of one that is made of these two.
        key_set: The keys of the snapshot that is called "@".
        platform: Platform properties of the tasks that saved: a mapping, or pairs. A part of the keys of
            branches, as the next three are.
        configuration_hash: What else the machines were configured with.
        runner_id: Whose snapshots are read, where runners do not share them.
        instance_name: The instance on the server.
        read_policy: Which manifest is taken where there are two; see `SnapshotLoader.get_snapshot`.
        file_cache_options: More arguments of `FileCache`, such as `max_bytes` and `group_id`.
        remote_cache_options: More arguments of `RemoteCache`, such as `netrc`, `headers` and `tls`.
        **fsspec_options: What fsspec takes for all file systems, such as `skip_instance_cache`.

    Raises:
        InvalidArgument: The options do not say what to read from, or contradict each other.
        FileNotFoundError: By all methods, where a snapshot has nothing of that name.
        OSError: With EROFS, by all methods that would write.
        NotFound: By all methods, where there is no such snapshot, or content of it is lost.
        SnaploaderError: By all methods, where a cache fails. Like NotFound, that is no OSError: zarr reads
            zeros where it is told that a file is not there.
    """

    protocol = "snap"
    root_marker = ""

    def __init__(
        self,
        file_cache: str | os.PathLike[str] | FileCache | None = None,
        remote_cache: str | RemoteStore | None = None,
        *,
        loader: SnapshotLoader | None = None,
        key_set: SnapshotKeySet | None = None,
        platform: Properties = (),
        configuration_hash: str = "",
        runner_id: str = "",
        instance_name: str = "",
        read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST,
        file_cache_options: Mapping[str, Any] | None = None,
        remote_cache_options: Mapping[str, Any] | None = None,
        **fsspec_options: Any,
    ) -> None:
        super().__init__(**fsspec_options)
        self._options = _Options(
            file_cache,
            remote_cache,
            loader,
            key_set,
            platform,
            configuration_hash,
            runner_id,
            instance_name,
            read_policy,
            file_cache_options or {},
            remote_cache_options or {},
        )

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        root, slash, inside = str(super()._strip_protocol(path)).partition("/")
        if root.startswith(ID_MARK):
            return ID_MARK + _quoted(unquote(root[1:])) + slash + inside
        return _named(unquote(root)) + slash + inside

    def snapshot(self, path: str) -> Snapshot:
        """The snapshot that a path or URL is in, as it is being read: its key, metadata and source."""
        return self._at(path)[1].snapshot

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What stands at a path: `name`, `size`, `type` ("file", "directory", "link"), `mode` and `islink`.

        Also, where they are known: `mtime` in seconds, `digest` of a file that is kept whole, and the
        `destination` of a symbolic link.
        """
        name, reader, inside = self._at(path)
        parent, _slash, last = inside.rpartition("/")
        with _missing(name):
            return _info(reader, name, f"{reader.resolve(parent)}/{last}" if parent else last)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is in a directory, sorted: `info` of each, or only names. A file is listed as itself."""
        name, reader, inside = self._at(path)
        with _missing(name):
            folder = reader.resolve(inside)
            if not isinstance(reader.snapshot.entry(folder), DirectoryEntry):
                return [self.info(name)] if detail else [name]
            names = reader.names(folder)
        if not detail:
            return [f"{name}/{each}" for each in names]
        inside = f"{folder}/" if folder else ""
        return [_info(reader, f"{name}/{each}", inside + each, is_listed=True) for each in names]

    def lexists(self, path: str, **_: Any) -> bool:
        """Whether there is something, be it a link that leads nowhere. An outage is raised."""
        return self._type(path) is not None

    def exists(self, path: str, **_: Any) -> bool:
        """Whether there is a file or a directory, also at the end of a link. An outage is raised."""
        return self._type(path) in {"file", "directory"}

    def isfile(self, path: str) -> bool:
        """Whether there is a file, also at the end of a link. An outage is raised."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether there is a directory, also at the end of a link. An outage is raised."""
        return self._type(path) == "directory"

    def modified(self, path: str) -> datetime:
        """When a file or directory of a directory was last written. NotImplementedError where unknown."""
        seconds = self.info(path).get("mtime")
        if seconds is None:
            raise NotImplementedError(f"a snapshot keeps no time of {path!r}")
        return datetime.fromtimestamp(seconds, UTC)

    def ukey(self, path: str) -> str:
        """What changes with the content of a file, in hexadecimal, and with nothing else."""
        name, reader, inside = self._at(path)
        with _missing(name):
            entry = reader.entry(inside)
        if isinstance(entry, FileEntry):
            return entry.digest.hash
        if isinstance(entry, ChunkedEntry):
            table = entry.table
            what = f"{table.size} {table.chunk_size} {table.function.name} ".encode()
            return hashlib.sha256(what + table.indices.tobytes() + table.hashes.tobytes()).hexdigest()
        return str(super().ukey(path))

    def checksum(self, path: str) -> int:
        """`ukey` as a number."""
        return int(self.ukey(path), 16)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """A part of a file, or all of it; negative numbers count from its end. Chunks come in parallel."""
        data: bytes = self.cat_ranges([path], [start], [end], on_error="raise")[0]
        return data

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | Sequence[int | None] | None,
        ends: int | Sequence[int | None] | None,
        max_gap: int | None = None,  # noqa: ARG002 - a chunk is fetched once anyway
        on_error: str = "return",
        **_: Any,
    ) -> list[Any]:
        """Parts of files, all in parallel; what fails is an exception in the list, or raised at once."""
        if not isinstance(paths, list):
            raise TypeError("paths must be a list")
        all_starts = starts if isinstance(starts, Sequence) else [starts] * len(paths)
        all_ends = ends if isinstance(ends, Sequence) else [ends] * len(paths)
        if not len(paths) == len(all_starts) == len(all_ends):
            raise ValueError("there must be as many starts and ends as paths")
        results: list[Any] = [None] * len(paths)
        wanted: dict[SnapshotReader, dict[int, tuple[str, int, int]]] = {}
        for place, (path, start, end) in enumerate(zip(paths, all_starts, all_ends, strict=True)):
            try:
                reader, inside, size = self._file_at(path)
                first, stop, _step = slice(start, end).indices(size)
                wanted.setdefault(reader, {})[place] = inside, first, max(0, stop - first)
            except Exception as failure:
                if on_error != "return":
                    raise
                results[place] = failure
        for reader, ranges in wanted.items():
            try:
                read: Sequence[Any] = reader.read_ranges(ranges.values())
            except SnaploaderError:
                if on_error != "return":
                    raise
                read = [_read_or_error(reader, each) for each in ranges.values()]
            for place, data in zip(ranges, read, strict=True):
                results[place] = data
        return results

    def cat(
        self, path: str | list[str], recursive: bool = False, on_error: str = "raise", **_: Any
    ) -> bytes | dict[str, Any]:
        """Files' contents, all in parallel: of one path as bytes, of several by their paths."""
        paths = self.expand_path(path, recursive=recursive)
        if isinstance(path, str) and paths == [self._strip_protocol(path)] and not recursive:
            return self.cat_file(path)
        if recursive:
            paths = [each for each in paths if self.isfile(each)]
        contents = self.cat_ranges(paths, None, None, on_error="raise" if on_error == "raise" else "return")
        found = dict(zip(paths, contents, strict=True))
        if on_error == "omit":
            return {each: data for each, data in found.items() if isinstance(data, bytes)}
        return found

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any
    ) -> io.BufferedReader:
        if mode != "rb":
            self._refuse()
        reader, inside, size = self._file_at(path)
        file = reader.open(inside, buffer_bytes=block_size or DEFAULT_BUFFER_BYTES)
        file.size = size  # type: ignore[attr-defined] # fsspec's own methods ask for it
        return file

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise OSError(
            errno.EROFS, "a snapshot cannot be changed: save another one with SnapshotLoader.cache_snapshot"
        )

    mkdir = makedirs = rmdir = rm = rm_file = _rm = cp_file = mv = touch = pipe_file = put_file = _refuse

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look for snapshots again at their next use: all, or that of one path.

        Where there is a new one by then, files that are open on the old one cannot be read any more.
        """
        opened = _registry.find(self._options)
        if opened is not None:
            opened.invalidate(None if path is None else self._split(path)[1])
        super().invalidate_cache(path)

    def close(self) -> None:
        """Close what this and equal file systems have opened. Idempotent; another use opens it again."""
        _registry.close(self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, path: str) -> tuple[str, SnapshotReader, str]:
        """A path as fsspec gives it, the reader of its snapshot, and the path in that."""
        name, root, inside = self._split(path)
        if not root:
            raise InvalidArgument(f"{path!r} names no snapshot: snap://<ref>/<file> or snap://@<id>/<file>")
        try:
            return name, _registry.opened(self._options).reader(root), inside
        except DeadlineExceeded as failure:
            raise Unavailable(failure.message) from failure  # fsspec passes over the other, an OSError

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except (FileNotFoundError, NotFound):
            return None

    def _file_at(self, path: str) -> tuple[SnapshotReader, str, int]:
        name, reader, inside = self._at(path)
        with _missing(name):
            entry = reader.entry(inside)
        if not isinstance(entry, FileEntry | ChunkedEntry):
            raise IsADirectoryError(errno.EISDIR, "is a directory", name)
        return reader, inside, entry.size_bytes

    def _split(self, path: str) -> tuple[str, str, str]:
        name = self._strip_protocol(path)
        root, _, inside = name.partition("/")
        return name, root, inside


def _info(reader: SnapshotReader, name: str, inside: str, *, is_listed: bool = False) -> dict[str, Any]:
    """What `info` says of what is `inside` a snapshot, in a directory without links on the way."""
    own = entry = reader.snapshot.entry(inside)
    if isinstance(own, SymlinkEntry):
        with suppress(NotFound):
            entry = reader.entry(inside)
        # Who walks along listings could go in circles.
        if is_listed and isinstance(entry, DirectoryEntry):
            entry = own
    details = {"name": name, "islink": isinstance(own, SymlinkEntry), **_described(entry)}
    if isinstance(own, SymlinkEntry):
        details["destination"] = own.target
    if "/" in inside or (isinstance(entry, DirectoryEntry) and inside):
        details["mtime"] = entry.mtime_ns / 1e9  # of files that stand alone, none is kept
    return details


def _described(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, DirectoryEntry):
        return {"type": "directory", "size": 0, "mode": stat.S_IFDIR | entry.mode}
    if isinstance(entry, SymlinkEntry):
        return {"type": "link", "size": len(os.fsencode(entry.target)), "mode": stat.S_IFLNK | 0o777}
    found = {"type": "file", "size": entry.size_bytes, "mode": stat.S_IFREG | entry.mode}
    return found | ({"digest": str(entry.digest)} if isinstance(entry, FileEntry) else {})


def _read_or_error(reader: SnapshotReader, wanted: tuple[str, int, int]) -> bytes | SnaploaderError:
    try:
        return reader.read_at(*wanted)
    except SnaploaderError as failure:
        return failure


@contextmanager
def _missing(name: str) -> Iterator[None]:
    """Raise what callers of file systems expect where a name leads nowhere in a snapshot."""
    try:
        yield
    except NotFound as failure:
        raise FileNotFoundError(errno.ENOENT, failure.message, name) from failure


@dataclass(eq=False)
class _Place:
    """The reader of one snapshot, once it was looked for."""

    reader: SnapshotReader | None = None
    is_stale: bool = False


class _Opened:
    """A loader, and readers of the snapshots that it has found. Thread-safe.

    Nothing is opened or looked for under the lock: a call waits for another's work as long as it may itself.
    """

    def __init__(self, options: _Options) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._places: OrderedDict[_PlaceKey, _Place] = OrderedDict()
        """By what the path begins with and who asks, the latest last."""
        self._searches: SingleFlight[_PlaceKey, SnapshotReader] = SingleFlight()
        self._evicted: WeakSet[SnapshotReader] = WeakSet()
        """Readers that files may still be open on."""
        self._unused: deque[ExitStack] = deque()
        """What readers held that nobody has any more. A garbage collection may add to it at any time."""
        self._opening: SingleFlight[str, SnapshotLoader] = SingleFlight()
        self._loader: SnapshotLoader | None = None
        self._open = ExitStack()
        self._closed = False

    def reader(self, root: str) -> SnapshotReader:
        """The reader of the snapshot that a path begins with; each caller's is looked for once."""
        key = root, current().caller
        self._drop_unused()
        with self._lock:
            self._check_open()
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
            if len(self._places) > MAX_SNAPSHOTS:
                self._evict(self._places.popitem(last=False)[1].reader)
            if place.reader is not None and not place.is_stale:
                return place.reader

        def search() -> SnapshotReader:
            with own_errors():
                return self._look(key, place)

        return self._searches.run(key, search, wait)

    def _look(self, key: _PlaceKey, place: _Place) -> SnapshotReader:
        before = place.reader
        if before is not None and not place.is_stale:
            return before  # another thread has looked since
        loader = self._opened_loader()
        snapshot = self._find(loader, key[0])
        place.is_stale = False
        if before is not None and before.snapshot.manifest == snapshot.manifest:
            return before
        with ExitStack() as undo:
            reader = undo.enter_context(loader.read_snapshot(snapshot))
            with self._lock:
                self._check_open()
                place.reader = reader
                if self._places.get(key) is not place:
                    self._evict(reader)
            undo.pop_all()
        if before is not None:
            before.close()
        return reader

    def _evict(self, reader: SnapshotReader | None) -> None:
        """Close a reader when no file or call uses it any more."""
        if reader is not None:
            self._evicted.add(reader)
            weakref.finalize(reader, self._unused.append, reader.held).atexit = False

    def _drop_unused(self) -> None:
        with suppress(IndexError):
            while True:
                self._unused.popleft().close()

    def _opened_loader(self) -> SnapshotLoader:
        def open_loader() -> SnapshotLoader:
            if self._loader is not None:
                return self._loader
            with own_errors(), ProcessExitStack() as undo:
                loader = self.options.loader or undo.enter_context(_new_loader(self.options, undo))
                with self._lock:
                    self._check_open()
                    self._loader, self._open = loader, undo.pop_all()
            return loader

        return self._loader or self._opening.run("loader", open_loader, wait)

    def _check_open(self) -> None:
        if self._closed:
            raise FailedPrecondition("the file system was closed meanwhile")

    def invalidate(self, root: str | None) -> None:
        """Look for the snapshot of one path, or for all, when they are used next."""
        with self._lock:
            for (name, _), place in self._places.items():
                place.is_stale = place.is_stale or root in {None, name}

    def close(self) -> None:
        """Close readers, then what was opened for them."""
        with self._lock:
            self._closed = True
            readers = {place.reader for place in self._places.values()} | set(self._evicted)
        for reader in readers:
            if reader is not None:
                reader.close()
        self._drop_unused()
        self._open.close()

    def _find(self, loader: SnapshotLoader, root: str) -> Snapshot:
        options = self.options
        name = unquote(root.removeprefix(ID_MARK))
        if root.startswith(ID_MARK) and name:
            return loader.get_snapshot_by_id(
                name, instance_name=options.instance_name, read_policy=options.read_policy
            )
        key_set = None if name else options.key_set
        if key_set is None:
            environment = {BRANCH_VARIABLE: name} if name else {}
            task = SnapshotTask.from_mapping(
                options.platform, environment, instance_name=options.instance_name
            )
            key_set = loader.snapshot_key_set(task, options.configuration_hash, options.runner_id)
        return loader.get_snapshot(key_set, options.read_policy)


def _new_loader(options: _Options, undo: ExitStack) -> SnapshotLoader:
    """A loader that publishes nothing, on caches that `undo` closes where they are opened here."""
    file_cache, remote_cache = options.file_cache, options.remote_cache
    assert file_cache is not None
    if not isinstance(file_cache, FileCache):
        file_cache = undo.enter_context(FileCache(file_cache, **options.file_cache_options))
    if isinstance(remote_cache, str):
        from snaploader.remote import RemoteCache  # gRPC takes its time

        remote_cache = undo.enter_context(
            RemoteCache(remote_cache, instance_name=options.instance_name, **options.remote_cache_options)
        )
    return SnapshotLoader(file_cache, remote_cache, readonly=True)


class _Registry:
    """What is open in this process, by the options that it was opened with. Thread-safe.

    fsspec makes a file system for each thread. It compares their options as text, which may hide a secret.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a forked child must: locks may be held for ever there, caches are its parent's."""
        self._lock = threading.Lock()
        self._opened: list[_Opened] = []

    def opened(self, options: _Options) -> _Opened:
        with self._lock:
            found = self._search(options)
            if found is None:
                found = _Opened(options)
                self._opened.append(found)
            return found

    def find(self, options: _Options) -> _Opened | None:
        with self._lock:
            return self._search(options)

    def close(self, options: _Options) -> None:
        with self._lock:
            found = self._search(options)
            if found is not None:
                self._opened.remove(found)
        if found is not None:
            found.close()

    def _search(self, options: _Options) -> _Opened | None:
        return next((opened for opened in self._opened if opened.options == options), None)


_registry = _Registry()
os.register_at_fork(after_in_child=_registry.forget)
