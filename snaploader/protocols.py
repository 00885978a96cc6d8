"""What the loader is to others, and what a file cache is to the loader: protocols, for fakes of either.

`snaploader.RemoteStore` is the third of them. A program that takes a `Loader` can be tested with one of its
own that touches no disk; `snaploader.testing` has a `FakeCAS`, and pytest fixtures for the real ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from snaploader.digest import DigestFunction
from snaploader.policy import EVERY_SOURCE, ReadPolicy, ReadSources, SavePolicy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from google.protobuf.message import Message

    from cow import COWStore
    from snaploader.blobstore import Sink, TransferStatistics, Upload
    from snaploader.context import CallContext
    from snaploader.digest import Buffer, Digest
    from snaploader.filecache import Pin
    from snaploader.keys import SnapshotKey, SnapshotKeySet, SnapshotTask
    from snaploader.loader import (
        DeleteResult,
        DeriveResult,
        DirectorySource,
        Explanation,
        RestoreResult,
        SaveResult,
        Snapshot,
        SnapshotReader,
        UnpackedSnapshot,
    )
    from snaploader.loader.results import ProgressCallback


class LeaseProtocol(Protocol):
    """Keeps blobs from eviction until it is released. A context manager."""

    def release(self) -> None:
        """End the lease. Again is fine."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class BlobWriterProtocol(Protocol):
    """Takes one blob in pieces. A context manager; leaving it without `commit` drops what was written."""

    def write(self, data: Buffer) -> None:
        """Append bytes."""

    def commit(self) -> bool:
        """Add the blob; return False when it was here."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class FileCacheProtocol(Protocol):
    """What the loader asks of a file cache; the docstrings of `FileCache` tell the whole. Thread-safe."""

    @property
    def root(self) -> str:
        """The folder, absolute."""

    @property
    def group_id(self) -> str:
        """The partition worked in: that of the call that runs, else the one that the cache was made with."""

    def find_missing(
        self, digests: Collection[Digest], *, use: bool = True, context: CallContext | None = None
    ) -> set[Digest]:
        """Return those of `digests` that are not here."""

    def read(self, digest: Digest, *, context: CallContext | None = None) -> bytes:
        """Return the bytes of a blob."""

    def read_to(
        self, digest: Digest, write: Callable[[Buffer], object], *, context: CallContext | None = None
    ) -> None:
        """Hand a blob, of any size, to `write` piece by piece."""

    def read_many(self, digests: Iterable[Digest], sink: Sink, *, context: CallContext | None = None) -> None:
        """Hand each blob to `sink`, in order, on this thread."""

    def write(
        self, digest: Digest, source: Buffer | str | os.PathLike[str], *, context: CallContext | None = None
    ) -> None:
        """Add a blob from bytes or from a copy of a file."""

    def write_many(
        self, uploads: Iterable[Upload], *, context: CallContext | None = None
    ) -> TransferStatistics:
        """Add many blobs, in order, on this thread."""

    def open(self, digest: Digest, *, context: CallContext | None = None) -> int:
        """Return a read-only descriptor of a blob's file, for the caller to close."""

    def path(self, digest: Digest, *, context: CallContext | None = None) -> str:
        """Return the path of a verified blob, which may be evicted unless it is leased."""

    def put_verified(self, digest: Digest, data: Buffer, *, context: CallContext | None = None) -> bool:
        """Add bytes that the caller has just hashed, on trust; return False when the blob was here."""

    def put_file(
        self,
        digest: Digest,
        path: str | os.PathLike[str],
        *,
        move: bool = False,
        link: bool = False,
        verify: bool = True,
        context: CallContext | None = None,
    ) -> bool:
        """Add a file, verified before it is visible; return False when the blob was here."""

    def put_private(
        self,
        digest: Digest,
        path: str | os.PathLike[str],
        *,
        link: bool = False,
        context: CallContext | None = None,
    ) -> bool:
        """Add a file under a hash that is not of its bytes."""

    def find_private(self, digests: Iterable[Digest], *, context: CallContext | None = None) -> set[Digest]:
        """Return those of `digests` that are here as private files."""

    def add_file(
        self,
        path: str | os.PathLike[str],
        function: DigestFunction = DigestFunction.SHA256,
        *,
        context: CallContext | None = None,
    ) -> tuple[Digest, bool]:
        """Add a copy of a file, which is read once; return its digest, and whether it was new here."""

    def writer(
        self, digest: Digest, *, verify: bool = True, context: CallContext | None = None
    ) -> BlobWriterProtocol:
        """Return a writer of a blob in pieces."""

    def materialize(
        self,
        digest: Digest,
        destination: str | os.PathLike[str],
        *,
        writable: bool = False,
        mode: int | None = None,
        context: CallContext | None = None,
    ) -> None:
        """Make a blob appear as a file, whole or not at all."""

    def lease(
        self,
        digests: Iterable[Digest],
        *,
        hashes: Iterable[npt.NDArray[np.uint8]] = (),
        context: CallContext | None = None,
    ) -> LeaseProtocol:
        """Keep these blobs from eviction by any process until the lease is released or this process ends."""

    def get_ref(self, key: str, *, use: bool = True, context: CallContext | None = None) -> bytes:
        """Return the value of a ref."""

    def put_ref(
        self, key: str, data: bytes, *, overwrite: bool = True, context: CallContext | None = None
    ) -> bool:
        """Set a ref in one step; return whether it was set."""

    def delete_ref(self, key: str, *, context: CallContext | None = None) -> bool:
        """Remove a ref; return whether there was one."""

    def pin(
        self,
        name: str,
        digests: Iterable[Digest] = (),
        *,
        hashes: Iterable[npt.NDArray[np.uint8]] = (),
        refs: Iterable[str] = (),
        context: CallContext | None = None,
    ) -> None:
        """Keep blobs and refs of this group from eviction by any process until the name is unpinned."""

    def unpin(self, name: str, *, context: CallContext | None = None) -> bool:
        """Let go what a name keeps, even when its pin is damaged; return whether there was one."""

    def pinned(self, name: str, *, context: CallContext | None = None) -> Pin:
        """Return what a name keeps from eviction."""


class Loader(Protocol):
    """What a `SnapshotLoader` does; its docstrings tell the whole. Thread-safe."""

    def snapshot_key_set(
        self,
        task: SnapshotTask,
        configuration_hash: str,
        runner_id: str = "",
        *,
        allow_stale_version: bool = False,
        context: CallContext | None = None,
    ) -> SnapshotKeySet:
        """The keys of a task: where to look for its snapshot, in order, and where to write it."""

    def get_snapshot(
        self,
        key_set: SnapshotKeySet,
        read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST,
        *,
        sources: ReadSources = EVERY_SOURCE,
        allow_degraded: bool = False,
        max_stale_fallback_age_s: float | None = None,
        context: CallContext | None = None,
    ) -> Snapshot:
        """The best snapshot of the set: the first key, in order, with a manifest that is whole."""

    def explain(
        self,
        key_set: SnapshotKeySet,
        read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST,
        *,
        sources: ReadSources = EVERY_SOURCE,
        allow_degraded: bool = False,
        max_stale_fallback_age_s: float | None = None,
        context: CallContext | None = None,
    ) -> Explanation:
        """Say what `get_snapshot` with these arguments finds under each key, and which snapshot it takes."""

    def get_snapshot_by_id(
        self,
        snapshot_id: str,
        *,
        instance_name: str = "",
        read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST,
        sources: ReadSources = EVERY_SOURCE,
        context: CallContext | None = None,
    ) -> Snapshot:
        """Exactly the snapshot that a save called `snapshot_id`, whatever was saved or invalidated since."""

    def unpack_snapshot(
        self,
        snapshot: Snapshot,
        output_directory: str | os.PathLike[str],
        *,
        writable_files: bool = False,
        context: CallContext | None = None,
    ) -> UnpackedSnapshot:
        """Make a snapshot usable, at once: no chunk of a chunked file is read before it is touched."""

    def read_snapshot(self, snapshot: Snapshot, *, context: CallContext | None = None) -> SnapshotReader:
        """Read files of a snapshot in place: nothing is fetched before it is asked for."""

    def restore_snapshot(
        self,
        snapshot: Snapshot,
        output_directory: str | os.PathLike[str],
        *,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> RestoreResult:
        """Write all files and directories of a snapshot out in full, holes as holes; all of them or none."""

    def restore_directory(
        self,
        snapshot: Snapshot,
        name: str,
        path: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> RestoreResult:
        """Write one directory of a snapshot out, with modes, times, symbolic links and holes as they were."""

    def cache_snapshot(
        self,
        key: SnapshotKey,
        *,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        chunked_files: Mapping[str, COWStore | str | os.PathLike[str]] | None = None,
        directories: Mapping[str, DirectorySource | str | os.PathLike[str]] | None = None,
        vm_configuration: Message | None = None,
        vm_metadata: Message | None = None,
        task: SnapshotTask | None = None,
        recycled: bool = False,
        snapshot_id: str | None = None,
        save_policy: SavePolicy | str = SavePolicy.ALWAYS,
        key_set: SnapshotKeySet | None = None,
        default_ref: str = "",
        min_refresh_interval_s: float = 0.0,
        remote: bool | None = None,
        local: bool = True,
        local_manifest: bool | None = None,
        link_files: bool = False,
        chunk_size: int | None = None,
        pin: str | None = None,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> SaveResult:
        """Save files and directories as the snapshot of `key`, in the file cache, then remotely."""

    def derive_snapshot(
        self,
        snapshot: Snapshot,
        *,
        snapshot_id: str | None = None,
        names: Collection[str] | None = None,
        vm_metadata: Message | None = None,
        pin: str | None = None,
        remote: bool | None = None,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> DeriveResult:
        """Make a snapshot of its own out of all or some of another one; no content is read or copied."""

    def upload_snapshot(
        self,
        snapshot: Snapshot,
        *,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> DeriveResult:
        """Put a snapshot that this host saved into the remote cache, under the id that it has here."""

    def delete_snapshot(
        self,
        snapshot_id: str,
        *,
        instance_name: str = "",
        remote: bool | None = None,
        context: CallContext | None = None,
    ) -> DeleteResult:
        """Delete the snapshot of this id, so that it is not found by it any more."""

    def invalidate_snapshot(self, key: SnapshotKey, *, context: CallContext | None = None) -> str:
        """Drop all snapshots of the key's instance, platform and configuration, on all branches."""

    def close(self) -> None:
        """Stop prefetching and end the loader's threads."""
