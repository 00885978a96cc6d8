"""What the loader's calls return, and what they tell while they run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from snaploader._proto import any_pb2, timestamp_pb2
from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.formats.chunktable import DEFAULT_MODE, ChunkTable, M
from snaploader.formats.digests import DigestArray, HashSet
from snaploader.formats.dirtree import (
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    Entry,
    FileEntry,
    SymlinkEntry,
)
from snaploader.formats.manifest import Manifest, PlainFile, unpack_any
from snaploader.keys import SnapshotKey


class SnapshotIdTaken(FailedPrecondition):
    """The id that a snapshot is to get names one already, or did: ids are never overwritten."""


class ManifestSource(StrEnum):
    """The tier a manifest came from."""

    LOCAL = "local"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class KeyFailure:
    """A key that was tried and did not serve."""

    key: SnapshotKey
    error: SnaploaderError

    def __eq__(self, other: object) -> bool:
        """Whether the same key failed in the same way, also in another process."""
        return isinstance(other, KeyFailure) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self.key, type(self.error), self.error.message, self.error.transient


@dataclass(frozen=True, slots=True)
class SnapshotMetadata:
    """What a snapshot says of where it comes from; a field is empty or None where it does not say."""

    snapshot_id: str
    key: SnapshotKey | None
    """That it was saved under."""
    vm_id: str
    created: datetime | None
    """When it was saved, in UTC."""
    recycled: bool
    """The machine had been used before: it started from a snapshot, or had run an earlier task."""
    task_id: str
    """Of the task that ran last in the machine, as are the next three."""
    invocation_id: str
    action_digest: str
    completed: datetime | None
    """When that task ended, in UTC: the age of the snapshot as a fallback."""
    properties: Mapping[str, str]

    @classmethod
    def from_message(cls, message: VMMetadata) -> SnapshotMetadata:
        """What a message says. A key or time in it that cannot be one counts as not said."""
        task = message.last_executed_task
        key = None
        if message.HasField("snapshot_key"):
            with contextlib.suppress(InvalidArgument):
                key = SnapshotKey.from_proto(message.snapshot_key)
        return cls(
            message.snapshot_id,
            key,
            message.vm_id,
            _time(message.created_timestamp),
            message.recycled,
            task.task_id,
            task.invocation_id,
            task.action_digest,
            _time(task.completed_timestamp),
            dict(message.properties),
        )


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A manifest that was found, and whose snapshot was not taken."""

    key: SnapshotKey
    source: ManifestSource
    metadata: SnapshotMetadata | None
    """What it says of itself, such as its id and time."""
    reason: str


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was found: complete when it was looked at, and nothing of it read yet.

    Can be pickled, and unpacked in another process by a loader on the same caches.
    """

    key: SnapshotKey
    """The key that served; its `ref` says which branch the state is from."""
    manifest: Manifest
    source: ManifestSource
    tables: Mapping[str, ChunkTable]
    """The chunks of every chunked file, by the file's name."""
    allow_remote: bool
    """Whether chunks may be fetched from the remote store."""
    absent: HashSet = field(default_factory=HashSet.of)
    """Blobs that the file cache did not have when the snapshot was found; they must be fetched."""
    failures: tuple[KeyFailure, ...] = ()
    """Keys tried before this one, in order, and why each did not serve."""
    passed_over: tuple[PassedOver, ...] = ()
    """Snapshots that were found before this one and not taken, in order, such as an incomplete one."""
    directories: Mapping[str, DirectoryTree] = field(default_factory=dict)
    """What is in every directory, by the directory's name."""
    modes: Mapping[str, int] = field(default_factory=dict)
    """Permission bits of every chunked file, by the file's name."""
    allow_local: bool = True
    """Whether chunks may be read from the file cache, and kept in it."""

    @property
    def vm_configuration(self) -> VMConfiguration | None:
        """What the machine was made of; None when a message of another type says it, or it cannot be read."""
        return _readable(self.manifest.vm_configuration, VMConfiguration)

    def unpack_configuration(self, kind: type[M]) -> M | None:
        """The VM configuration as a message of `kind`, from any generated stubs; None when it is of another.

        InvalidArgument when it says that it is a `kind` and cannot be parsed.
        """
        return unpack_any(self.manifest.vm_configuration, kind)

    @property
    def vm_metadata(self) -> VMMetadata | None:
        """Where the state comes from; None when it does not say, or not in a way that can be read."""
        return vm_metadata_of(self.manifest)

    @property
    def metadata(self) -> SnapshotMetadata | None:
        """`vm_metadata`, typed. A save fills in what is left open (see `SnapshotLoader.cache_snapshot`)."""
        return metadata_of(self.manifest)

    @property
    def degraded(self) -> bool:
        """Whether a better key might have served but for an outage or damage. A retry may find it."""
        return any(not isinstance(failure.error, LookupError) for failure in self.failures)

    def debug_string(self, group_id: str = "") -> str:
        """Key and digests in full: a line for the snapshot, and one for each file and directory; for logs.

        Args:
            group_id: Of the file cache; see `SnapshotKey.debug_string`.
        """
        manifest = self.manifest
        named = {name: ("file", file.digest) for name, file in manifest.files.items()}
        named |= {name: ("chunked file", tree) for name, tree in manifest.chunked_files.items()}
        named |= {name: ("directory", tree) for name, tree in manifest.directories.items()}
        function = manifest.digest_function.name
        key = self.key.debug_string(group_id)
        lines = [f"snapshot from the {self.source} manifest, {function} digests, of key {key}"]
        lines += [f"{kind} {name!r} {digest}" for name, (kind, digest) in sorted(named.items())]
        return "\n".join(lines)

    def digests(self) -> DigestArray:
        """Every blob it needs, once: plain files, trees, chunks, what is in directories; no empty blob."""
        function = self.manifest.digest_function
        whole = [*self.manifest.digests()]
        # Equal tables and trees are one object.
        chunked = {id(table): table for table in self.tables.values()}
        for tree in {id(tree): tree for tree in self.directories.values()}.values():
            whole += tree.blobs()
            chunked |= {id(table): table for table in tree.tables()}
        arrays = (table.digests() for table in chunked.values())
        return DigestArray.joined([DigestArray.of(whole, function), *arrays], function)

    def only(self, names: Collection[str]) -> Snapshot:
        """The snapshot with no other files and directories than `names`.

        Args:
            names: Of files and directories. "home/etc" means what stands at "etc" in the directory "home", of
                which nothing else is taken then, but for the directories on the way.

        Raises:
            NotFound: A directory has nothing at such a path.
        """
        paths: dict[str, list[str]] = {}
        for name in names:
            top, _, inside = name.partition("/")
            paths.setdefault(top, []).append(inside.rstrip("/"))
        whole = {name for name, chosen in paths.items() if "" in chosen}
        trees = {name: tree for name, tree in self.directories.items() if name in paths}
        manifest = replace(
            self.manifest,
            files={name: file for name, file in self.manifest.files.items() if name in whole},
            chunked_files={name: tree for name, tree in self.manifest.chunked_files.items() if name in whole},
            directories={name: digest for name, digest in self.manifest.directories.items() if name in trees},
        )
        return replace(
            self,
            manifest=manifest,
            tables={name: table for name, table in self.tables.items() if name in whole},
            directories={n: tree if n in whole else tree.only(paths[n]) for n, tree in trees.items()},
        )

    def entry(self, path: str) -> Entry:
        """What stands at a path: "disk", or "home/etc/hosts" in a directory; "" is the snapshot itself.

        NotFound when nothing does. A file without a recorded mode has 0644, or 0755 when it is executable.
        """
        top, _, inside = path.partition("/")
        if top in self.directories:
            found = self.directories[top].get(inside.rstrip("/"))
        elif top in self.tables and top == path:
            found = ChunkedEntry(self.tables[top], self.modes.get(top, DEFAULT_MODE))
        elif top in self.manifest.files and top == path:
            file = self.manifest.files[top]
            mode = (0o755 if file.is_executable else 0o644) if file.mode is None else file.mode
            found = FileEntry(file.digest, mode)
        else:
            found = None if path else DirectoryEntry()
        if found is None:
            raise NotFound(f"the snapshot has no file {path[:200]!r}")
        return found

    def file(self, path: str) -> Snapshot:
        """The snapshot of one file alone, wherever it stands: "disk", or "home/etc/hosts" in a directory.

        A file of a directory has its own name in it, "hosts"; question marks stand for what is not Unicode.

        Raises:
            NotFound: There is nothing at the path.
            InvalidArgument: What is there is a directory or a symbolic link.
        """
        if path in self.manifest.names and path not in self.directories:
            return self.only([path])
        entry = self.entry(path)
        top, _, inside = path.partition("/")
        name = inside.rpartition("/")[2].encode(errors="replace").decode()
        alone = replace(self, tables={}, directories={}, modes={})
        manifest = replace(self.manifest, files={}, chunked_files={}, directories={})
        if isinstance(entry, FileEntry):
            return replace(alone, manifest=replace(manifest, files={name: PlainFile(entry.digest)}))
        if isinstance(entry, ChunkedEntry):
            # The directory's tree says of the file's chunks what a tree of its own would.
            manifest = replace(manifest, chunked_files={name: self.manifest.directories[top]})
            return replace(alone, manifest=manifest, tables={name: entry.table})
        what = f"a symbolic link to {entry.target!r}" if isinstance(entry, SymlinkEntry) else "a directory"
        raise InvalidArgument(f"{path[:200]!r} is {what}, not a file")


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file of a save, and what it took."""

    name: str
    size_bytes: int
    chunked: bool
    digest: Digest
    """Of the content, or of the tree of a chunked file."""
    chunks: int = 0
    """Chunks with data; a plain file has none."""
    hashed_chunks: int = 0
    """Chunks read and hashed by this save; the others were known to be unchanged."""
    hashed_bytes: int = 0
    hole_bytes: int = 0
    """Bytes in chunks of nothing but zeros."""
    stored_bytes: int = 0
    """Bytes new to the file cache."""
    deduplicated_bytes: int = 0
    """Bytes hashed that the file cache held already."""


@dataclass(frozen=True, slots=True)
class SavedDirectory:
    """One directory of a save, and what it took."""

    name: str
    digest: Digest
    """Of the tree."""
    files: int
    directories: int
    """Below the directory itself."""
    symlinks: int
    size_bytes: int
    """Of all files, holes included."""
    read_bytes: int
    """What was read from files: all of it, but for holes and for files that the capture index knows."""
    hashed_bytes: int
    stored_bytes: int
    """Bytes new to the file cache."""
    deduplicated_bytes: int
    """Bytes hashed that the file cache held already."""
    hole_bytes: int
    """Bytes in chunks of nothing but zeros."""
    skipped: tuple[str, ...] = ()
    """Relative paths of sockets, FIFOs and devices, which are not saved."""


@dataclass(frozen=True, slots=True)
class RemoteManifest:
    """The manifest that stands under a key in the remote cache."""

    digest: Digest
    """Of the deterministic bytes of its ActionResult."""
    is_ours: bool
    """Whether it names what this save has saved; otherwise another host has written it."""


@dataclass(frozen=True, slots=True)
class SaveResult:
    """What `cache_snapshot` did."""

    key: SnapshotKey
    """The key the snapshot was written under."""
    snapshot_id: str
    """Under which exactly this snapshot is found again."""
    files: tuple[SavedFile, ...]
    saved_locally: bool
    """There is a manifest on this host."""
    saved_remotely: bool
    """This snapshot is what other hosts find under `key` (or by its id, where the key names no branch). False
    when another host has saved its own there meanwhile; then this one is still found by its id, unless a
    warning says otherwise."""
    remote_skipped: str = ""
    """Why the snapshot was kept from the remote store, by the save policy or the loader; empty when it was
    not, or when the caller asked for it."""
    uploaded_blobs: int = 0
    uploaded_bytes: int = 0
    """Content that went to the remote store, before compression."""
    uploaded_wire_bytes: int = 0
    """The same as it was sent."""
    warnings: tuple[str, ...] = field(default=())
    """What went wrong without harm to the snapshot under `key`."""
    directories: tuple[SavedDirectory, ...] = ()
    snapshot_id_taken: bool = False
    """Another host took the id during this save, and keeps it: this snapshot is found under `key` only."""
    remote_manifest: RemoteManifest | None = None
    """What stood under `key` remotely when the save ended; None where nothing did, or nobody looked."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files and directories, holes included."""
        return sum(saved.size_bytes for saved in self._everything)

    @property
    def hole_bytes(self) -> int:
        """Bytes in chunks of nothing but zeros."""
        return sum(saved.hole_bytes for saved in self._everything)

    @property
    def hashed_bytes(self) -> int:
        """Bytes that were read and hashed."""
        return sum(saved.hashed_bytes for saved in self._everything)

    @property
    def stored_bytes(self) -> int:
        """Bytes that were new to the file cache."""
        return sum(saved.stored_bytes for saved in self._everything)

    @property
    def deduplicated_bytes(self) -> int:
        """Bytes that were hashed and found in the file cache."""
        return sum(saved.deduplicated_bytes for saved in self._everything)

    @property
    def _everything(self) -> tuple[SavedFile | SavedDirectory, ...]:
        return (*self.files, *self.directories)


@dataclass(frozen=True, slots=True)
class DeriveResult:
    """What `derive_snapshot` made, or `upload_snapshot` completed."""

    snapshot: Snapshot
    """The new snapshot, as if it had been found."""
    saved_locally: bool
    saved_remotely: bool
    uploaded_blobs: int = 0
    uploaded_bytes: int = 0
    """Content that went to the remote store, before compression."""
    uploaded_wire_bytes: int = 0
    """The same as it was sent."""
    warnings: tuple[str, ...] = ()
    """What went wrong without harm to the snapshot."""

    @property
    def key(self) -> SnapshotKey:
        """The key that the snapshot was written under: that of its id."""
        return self.snapshot.key

    @property
    def snapshot_id(self) -> str:
        """The id under which exactly this snapshot is found again."""
        return self.snapshot.key.snapshot_id


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """What `delete_snapshot` found and did."""

    snapshot_id: str
    deleted_locally: bool
    """A manifest stood in the file cache, and no longer does."""
    deleted_remotely: bool
    """A manifest stood in the remote cache, and no longer does, for any host."""
    was_deleted: bool
    """An earlier call had deleted it, at least in part."""

    @property
    def found(self) -> bool:
        """Whether there was anything: the snapshot, or what is left of one that was deleted."""
        return self.deleted_locally or self.deleted_remotely or self.was_deleted


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What `restore_snapshot` or `restore_directory` wrote, and where it came from."""

    files: Mapping[str, Path]
    """Path of every file, by name."""
    written_bytes: int
    """Content of all files, without the holes."""
    hole_bytes: int
    fetched_blobs: int
    fetched_bytes: int
    """What came from the remote store; the rest was in the file cache."""
    directories: Mapping[str, Path] = field(default_factory=dict)
    """Path of every directory, by name."""


def vm_metadata_of(manifest: Manifest) -> VMMetadata | None:
    """Where the snapshot came from; None when it does not say, or not in a way that can be read."""
    return _readable(manifest.vm_metadata, VMMetadata)


def metadata_of(manifest: Manifest) -> SnapshotMetadata | None:
    """What `vm_metadata_of` returns, typed."""
    message = vm_metadata_of(manifest)
    return None if message is None else SnapshotMetadata.from_message(message)


def _time(timestamp: timestamp_pb2.Timestamp) -> datetime | None:
    try:
        seconds = timestamp.seconds + timestamp.nanos / 1e9
        return datetime.fromtimestamp(seconds, UTC) if seconds else None
    except (ValueError, OverflowError, OSError):
        return None


def _readable(packed: any_pb2.Any | None, kind: type[M]) -> M | None:
    try:
        return unpack_any(packed, kind)
    except InvalidArgument:
        return None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of a call has come."""

    stage: str
    """"store" (hash and keep locally), "upload", "fetch" or "write" (materialise)."""
    done_bytes: int
    """Bytes dealt with so far; holes count as soon as they are recognised."""
    total_bytes: int
    """Bytes the stage will have dealt with at its end."""


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Called from any thread, one call at a time, with rising `done_bytes` within a stage. What it raises
ends the call it reports on."""


class ProgressMeter:
    """Adds up the work of several threads for one callback. Thread-safe."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total_bytes: int) -> None:
        self._callback = callback
        self._stage = stage
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        if self._callback is None:
            return
        with self._lock:
            self._done += count
            self._callback(Progress(self._stage, self._done, self._total))
