"""The loader: from a task to its machine's state, and back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn, Self

from google.protobuf.message import Message

from cow import COWStore, MappingBudget
from snaploader import keys
from snaploader.blobstore import BlobStore, RemoteStore, TieredStore
from snaploader.context import CallContext, in_context
from snaploader.digest import DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.files import ProcessExitStack
from snaploader.keys import SnapshotKey, SnapshotKeySet, SnapshotTask
from snaploader.loader.capture import SaveOptions
from snaploader.loader.derive import SnapshotDeriver
from snaploader.loader.directory import DirectorySource
from snaploader.loader.explain import Explanation, SnapshotExplainer
from snaploader.loader.fetch import BlobFetcher, UncachedFetcher
from snaploader.loader.find import SnapshotFinder
from snaploader.loader.manifests import ManifestStore, Stores
from snaploader.loader.observe import ObservedStore, observed
from snaploader.loader.read import SnapshotReader
from snaploader.loader.results import (
    DeleteResult,
    DeriveResult,
    ProgressCallback,
    RestoreResult,
    SaveResult,
    Snapshot,
)
from snaploader.loader.save import SnapshotSaver
from snaploader.loader.unpack import UnpackedSnapshot, restore, restore_directory, unpack
from snaploader.loader.versions import VersionStore
from snaploader.policy import (
    DEFAULT_MAX_STALE_FALLBACK_AGE_S,
    EVERY_SOURCE,
    PolicyOverrides,
    ReadPolicy,
    ReadSources,
    SavePolicy,
)
from snaploader.protocols import FileCacheProtocol
from snaploader.telemetry import NOBODY, Observer
from snaploader.workers import DEFAULT_WORKERS, WorkerPool

DEFAULT_DIGEST_FUNCTION = DigestFunction.BLAKE3
"""Where no remote store has a say. A remote store that speaks only SHA-256 cannot take such snapshots."""


class SnapshotLoader:
    """Saves, finds and unpacks snapshots. Thread-safe; no call depends on an earlier one.

    Every call may bring a `context` of its own: a deadline, a cancellation, who asks, credentials, a group.

    Close it (or use it as a context manager) after everything it unpacked was closed. The caches are
    the caller's to close.

    Args:
        file_cache: Where blobs and manifests are kept on this host; its group is the loader's.
        remote_cache: Where they are shared between hosts; None works on this host alone.
        peers: Stores to read blobs from before the remote cache is asked, the nearest first, such as another
            host's file cache. What they lack and the remote cache gives is kept in them. Saves, manifests and
            versions do not go there.
        digest_function: For what is saved without a remote cache. With one, the remote cache decides.
        share_snapshots: Whether runners share snapshots by branch. If not, a key has no ref and is
            bound to the runner's id, whatever a task asks for; and its snapshots stay on this host unless
            `remote=True` says otherwise. Plain files of those that stay are not hashed.
        universal_ref: Whether a ref common to all branches is the last fallback; every save updates it.
        readonly: Publish nothing: no manifests, no versions, here or remotely. Blobs that were fetched
            are still cached. Versions that are missing are made up for one call.
        remote_readonly: Publish nothing remotely: what others shared is used, what is saved stays here.
            While no version stands remotely, this host has one of its own, and finds what it saves by that.
        read_sources: What may be read where; bounds what a call asks for. Default: everything everywhere.
        max_stale_fallback_age_s: Local snapshots of fallback keys that are older are passed over.
            Default: a day.
        workers: Most threads for hashing and copying. Default: the number of processors, at most 8.
        mapping_budget: Bound on the mapped memory of all stores that share it. Default: cow's
            process-wide budget.
        clock: Seconds since the epoch.
        context: What each call goes by where its own `context` leaves something open; see
            `snaploader.CallContext`.
        observer: Is told of calls, stages, fetches and stalls; see docs/monitoring.md. The caches have
            observers of their own.
    """

    def __init__(
        self,
        file_cache: FileCacheProtocol,
        remote_cache: RemoteStore | None = None,
        *,
        peers: Sequence[BlobStore] = (),
        digest_function: DigestFunction = DEFAULT_DIGEST_FUNCTION,
        share_snapshots: bool = True,
        universal_ref: bool = False,
        readonly: bool = False,
        remote_readonly: bool = False,
        read_sources: ReadSources = EVERY_SOURCE,
        max_stale_fallback_age_s: float = DEFAULT_MAX_STALE_FALLBACK_AGE_S,
        workers: int = DEFAULT_WORKERS,
        mapping_budget: MappingBudget | None = None,
        clock: Callable[[], float] = time.time,
        context: CallContext | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or NOBODY
        self._open = ProcessExitStack()
        pool = self._open.enter_context(WorkerPool(workers))
        stores = Stores(
            file_cache, remote_cache, readonly, remote_readonly, clock, pool, observer=self._observer
        )
        self._default_context = context
        self.remote_cache = remote_cache
        """Where snapshots are shared between hosts; None: on this host alone."""
        self.manifests = ManifestStore(stores)
        """What stands under the keys of snapshots, on this host and remotely."""
        self._share = share_snapshots
        self._universal = universal_ref
        self._budget = mapping_budget
        behind: BlobStore | None = remote_cache
        for peer in reversed(peers):
            if behind is None:
                raise InvalidArgument("peers stand between the file cache and a remote cache: give one too")
            behind = TieredStore(peer, behind)
        if behind is not None and observer is not None:
            behind = ObservedStore(behind, observer)
        self._fetcher = BlobFetcher(file_cache, behind, pool, self._observer)
        self._uncached = UncachedFetcher(self._fetcher)
        self._open.callback(self._fetcher.prefetcher.close)
        self._versions = VersionStore(stores)
        self._finder = SnapshotFinder(
            stores, self._fetcher, self.manifests, max_stale_fallback_age_s, read_sources
        )
        self._saver = SnapshotSaver(
            stores,
            self._fetcher,
            self._finder,
            self.manifests,
            self._versions,
            digest_function,
            universal_ref,
        )
        self._deriver = SnapshotDeriver(stores, self.manifests)
        self._explainer = SnapshotExplainer(stores, self._finder, self.manifests, self._versions)

    @in_context
    @observed
    def snapshot_key_set(
        self,
        task: SnapshotTask,
        configuration_hash: str,
        runner_id: str = "",
        *,
        allow_stale_version: bool = False,
        context: CallContext | None = None,
    ) -> SnapshotKeySet:
        """The keys of a task: where to look for its snapshot, in order, and where to write it.

        Asks the remote cache for the version of the keys, at every call. Platform properties of the task
        may give up sharing, but not ask for it where the loader has none, and choose the universal fallback
        (see `snaploader.policy`); what they say of other policies is for the caller to pass on:
        `PolicyOverrides.from_platform(task.platform)`.

        Args:
            configuration_hash: Hash of all that makes the machine what it is and is not in the platform,
                such as image, kernel and sizes. Machines that may not load each other's state differ in it.
            runner_id: Required when snapshots are not shared.
            allow_stale_version: Work with the version last seen on this host when the remote cache
                cannot be reached. An invalidation made since then goes unnoticed.

        Raises:
            InvalidArgument: a part of the task is malformed.
            Unavailable, DeadlineExceeded: the remote cache cannot be reached.
        """
        base = keys.base_key(task, configuration_hash)
        version = self._versions.current(base, allow_stale=allow_stale_version)
        wished = PolicyOverrides.from_platform(task.platform)
        return keys.snapshot_key_set(
            task,
            configuration_hash,
            runner_id,
            version,
            share=self._share and wished.share is not False,
            universal=self._universal if wished.universal is None else wished.universal,
        )

    @in_context
    @observed
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
        """The best snapshot of the set: the first key, in order, with a manifest of which nothing is missing.

        Args:
            read_policy: `newest` prefers the remote manifest of a key to the local one; `local-first`
                the other way round; `local-only` takes no remote manifest, `remote-only` no local one. Blobs
                that are not here come from the remote cache under each of them, unless `sources` says
                otherwise.
            sources: What of the snapshot may be read where, within the loader's `read_sources`. It also
                holds for what is read of the snapshot later.
            allow_degraded: Go on to the next key when one fails for another reason than that it has no
                snapshot. The result then says so (`Snapshot.degraded`, `Snapshot.failures`).
            max_stale_fallback_age_s: Instead of the loader's, for this call.

        Raises:
            NotFound: no key has a whole snapshot; the message names every key and its reason.
            FailedPrecondition: the policy, `sources` and the loader's leave nothing to read.
            SnaploaderError: of the kind of the first failure that is no NotFound.
        """
        return self._finder.find(
            key_set,
            _read_policy(read_policy),
            sources,
            allow_degraded=allow_degraded,
            max_stale_fallback_age_s=max_stale_fallback_age_s,
        )

    @in_context
    @observed
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
        """Say what `get_snapshot` with these arguments finds under each key, and which snapshot it takes.

        Looks at every manifest that may be read, also behind the one that serves. Keeps nothing and removes
        nothing; of what the file cache has, only trees that are read count as used. What cannot be asked, as
        in an outage, is a line of the result.

        Raises:
            FailedPrecondition: as `get_snapshot`: nothing may be read.
        """
        return self._explainer.explain(
            key_set,
            _read_policy(read_policy),
            sources,
            allow_degraded=allow_degraded,
            max_stale_fallback_age_s=max_stale_fallback_age_s,
        )

    @in_context
    @observed
    def get_snapshot_by_id(
        self,
        snapshot_id: str,
        *,
        instance_name: str = "",
        read_policy: ReadPolicy | str = ReadPolicy.LOCAL_FIRST,
        sources: ReadSources = EVERY_SOURCE,
        context: CallContext | None = None,
    ) -> Snapshot:
        """Exactly the snapshot that a save called `snapshot_id`, whatever was saved or invalidated since.

        `read_policy`, `sources` and errors are as for `get_snapshot`.
        """
        key = keys.snapshot_id_key(SnapshotKey(instance_name=instance_name, snapshot_id=snapshot_id))
        key_set = SnapshotKeySet(key, (), key)
        return self._finder.find(key_set, _read_policy(read_policy), sources, allow_degraded=False)

    @in_context
    @observed
    def unpack_snapshot(
        self,
        snapshot: Snapshot,
        output_directory: str | os.PathLike[str],
        *,
        writable_files: bool = False,
        context: CallContext | None = None,
    ) -> UnpackedSnapshot:
        """Make a snapshot usable, at once: no chunk of a chunked file is read before it is touched.

        Use the result as a context manager. Its `chunked_files[name]` are `cow.COWStore`s whose writes are
        their own: two unpacks of one snapshot do not see each other's.

        Args:
            output_directory: Made if need be. Plain files and directories appear in it under their names, and
                a hidden folder with the written chunks, until the result is closed. Directories are written
                in full and may be changed.
            writable_files: Copy plain files so that they may be written. By default they are read-only and
                share their bytes with the file cache.

        Raises:
            FailedPrecondition: a file of that name exists; nothing was changed.
            NotFound, DataLoss: a plain file, or one in a directory, is gone from every cache; nothing is left
                behind.
        """
        fetcher = self._fetcher_for(snapshot)
        return unpack(snapshot, output_directory, fetcher, self._budget, writable_files=writable_files)

    @in_context
    @observed
    def read_snapshot(self, snapshot: Snapshot, *, context: CallContext | None = None) -> SnapshotReader:
        """Read files of a snapshot in place, without unpacking it: nothing is fetched before it is asked for.

        Use the result as a context manager: what only this host has is kept from eviction until it is closed.

        Raises:
            NotFound: A blob that only this host had was evicted since the snapshot was found.
        """
        return SnapshotReader(snapshot, self._fetcher_for(snapshot))

    @in_context
    @observed
    def restore_snapshot(
        self,
        snapshot: Snapshot,
        output_directory: str | os.PathLike[str],
        *,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> RestoreResult:
        """Write all files and directories of a snapshot out in full, holes as holes; all of them or none."""
        return restore(snapshot, output_directory, self._fetcher_for(snapshot), progress)

    @in_context
    @observed
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
        """Write one directory of a snapshot out, with modes, times, symbolic links and holes as they were.

        Owners are not kept: everything belongs to the caller. All of it appears, or nothing; only when the
        process is killed, a folder .snaploader-… may stay in `path` or beside it.

        Args:
            name: Of the directory in the snapshot.
            path: Where to write it: an empty directory, or nothing yet. Nobody who is not trusted with the
                caller's rights may own it or the folder it is in, or write to them, but for a sticky one.
            index: A file outside of `path` to write a capture index to, so that a save of `path` with it
                (`DirectorySource.index`) reads only what was changed since. A failure
                to write it is logged, not raised.

        Raises:
            NotFound: The snapshot has no such directory, or a blob is gone from every cache.
            FailedPrecondition: Something is at `path`; nothing was changed.
            DataLoss, ResourceExhausted, …: As for every read and write.
        """
        return restore_directory(snapshot, name, path, self._fetcher_for(snapshot), index, progress)

    @in_context
    @observed
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
        """Save files and directories as the snapshot of `key`: in the file cache, then in the remote cache.

        A store that was unpacked or saved before is saved at the cost of what was written to it since.
        After the call its chunks are clean; a later write never changes what was saved.

        Args:
            key: Usually the `write_key` of a key set. One that names nothing but perhaps an instance belongs
                to no branch: the snapshot is found by its id only.
            files: Kept whole, by name. Paths of regular files.
            chunked_files: Kept in chunks, by name. Stores, or paths of regular files, which must not change
                during the call.
            directories: Kept whole, by name, with all that is in them; see `DirectorySource`. They must not
                change during the call, nor hold the file cache.
            vm_configuration: What the machine is made of: any protobuf message, such as
                `snaploader.VMConfiguration`, or an Any. Default: an empty VMConfiguration.
            vm_metadata: Where the state comes from; likewise. `last_executed_task.completed_timestamp` of
                a `snaploader.VMMetadata` is the age of the snapshot as a fallback. What such a message leaves
                open is filled in: id and key of the snapshot, the present time as that of its creation, and
                the invocation of the call's request metadata. `Snapshot.metadata` gives it back.
            task: What the machine ran last. Its ids and the digest of its action are recorded in
                `last_executed_task` of the metadata, with the present time, where `vm_metadata` says
                nothing of them. InvalidArgument when that is a message of another type.
            recycled: Record that the machine had been used before: that it started from a snapshot, or had
                run an earlier task.
            snapshot_id: Under which exactly this snapshot is found again, for ever. Default: a new UUID.
                When another host takes it during the save, that one keeps it
                (`SaveResult.snapshot_id_taken`).
            save_policy: Whether a snapshot that stands remotely is replaced.
            key_set: The keys that `none-available` looks at. If the universal ref is among them it is
                updated too.
            default_ref: The branch that always saves.
            min_refresh_interval_s: Leave the default branch's remote snapshot alone when it is younger.
            remote: Whether to save remotely. Default: if there is a remote cache that this loader may write
                to, and the key is of no single runner.
            local: Whether to keep blobs in the file cache. If not, what the remote cache lacks is read twice,
                once to be hashed and once to be sent, and the snapshot is saved remotely or nowhere.
            local_manifest: Whether this host is to find the snapshot without asking the remote cache.
                Default: as `local`. Without a manifest here, nothing is done where the save policy keeps the
                snapshot from the remote cache; without blobs, the manifest here is written last.
            link_files: Take plain files into the file cache as they are, by a hard link, where they are on
                its file system; else copy them. The caller promises not to write to them again. They become
                read-only, and their times change.
            chunk_size: In bytes, for paths; a power of two times the page size. Default: cow's.
            pin: Name of a pin of the file cache that keeps the snapshot from eviction, even when this process
                ended; `FileCache.unpin` ends it. What was pinned under the name before is unpinned, unless
                the save fails locally. All content of directories is in the file cache then; chunks
                of stores that did not change since they were loaded may still be in the remote cache alone.

        Raises:
            InvalidArgument: names, keys or options are malformed, or nothing would be stored, or neither
                the remote cache nor a local manifest would name it.
            FailedPrecondition: the loader is read-only, a file changed while it was read, the remote cache
                takes no updates, or (`SnapshotIdTaken`) the snapshot id is taken.
            ResourceExhausted: the disk is full, or the file cache too small for the snapshot.
            SnaploaderError: the remote cache failed; the local snapshot then stands, as a note on the
                error says.
        """
        options = SaveOptions(
            files=dict(files or {}),
            chunked_files=dict(chunked_files or {}),
            directories={name: _directory_source(source) for name, source in (directories or {}).items()},
            vm_configuration=vm_configuration,
            vm_metadata=vm_metadata,
            task=task,
            recycled=recycled,
            snapshot_id=snapshot_id,
            save_policy=save_policy if isinstance(save_policy, SavePolicy) else SavePolicy.parse(save_policy),
            key_set=key_set,
            default_ref=default_ref,
            min_refresh_interval_s=min_refresh_interval_s,
            remote=remote,
            local=local,
            local_manifest=local if local_manifest is None else local_manifest,
            link_files=link_files,
            chunk_size=chunk_size,
            pin=pin,
            progress=progress,
        )
        return self._saver.save(key, options)

    @in_context
    @observed
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
        """Make a snapshot of its own out of all or some of another one, without reading or copying content.

        It is found by its id only, lives on when the other one is deleted, and shares all blobs with it. When
        it is made remotely too, what the remote cache lacks is uploaded first; nothing is downloaded. If
        anything fails there, the snapshot is found nowhere.

        Args:
            snapshot_id: Default: a new UUID.
            names: Of the files and directories to take. Default: all.
            vm_metadata: Where the state comes from: any protobuf message. Default: what the other one says
                of the machine and its last task. What a `snaploader.VMMetadata` leaves open of the snapshot's
                id, key and time is completed.
            pin: Name of a pin, as for `cache_snapshot`.
            remote: Whether to save it remotely. Default: if there is a remote cache that this loader may
                write to, and the key of the other snapshot is of no single runner.

        Raises:
            InvalidArgument: names or options are malformed.
            NotFound: a name is not in the snapshot, or a blob of it is gone from every cache.
            FailedPrecondition: the loader is read-only, the snapshot id is taken or was, or the remote cache
                takes no updates or wants other digests.
            SnaploaderError: the remote cache failed. `uploaded` of the error tells what was on its way there.
        """
        return self._deriver.derive(snapshot, snapshot_id, names, vm_metadata, pin, remote, progress)

    @in_context
    @observed
    def upload_snapshot(
        self,
        snapshot: Snapshot,
        *,
        progress: ProgressCallback | None = None,
        context: CallContext | None = None,
    ) -> DeriveResult:
        """Put a snapshot that this host saved into the remote cache, under the id that it has here.

        So a machine can run on between the save (`remote=False`) and the upload, which may take long. What
        the remote cache lacks is uploaded first. If anything fails, the snapshot is not found there, and
        stays here. Where the manifest may have arrived nevertheless, the id is given up there: derive another
        snapshot then.

        Args:
            snapshot: One that was found by its id.

        Raises:
            InvalidArgument: it was found by another key, or the loader has no remote cache.
            SnaploaderError: as `derive_snapshot`.
        """
        return self._deriver.upload(snapshot, progress)

    @in_context
    @observed
    def delete_snapshot(
        self,
        snapshot_id: str,
        *,
        instance_name: str = "",
        remote: bool | None = None,
        context: CallContext | None = None,
    ) -> DeleteResult:
        """Delete the snapshot of this id, so that it is not found by it any more. Again is fine.

        First the remote manifest, then the local one; each is replaced by a tombstone, so that the id is
        never used again. Blobs stay, for other snapshots share them; those that none shares age out. What
        was saved under the key of a branch stays as well, and so do pins. Another host finds its local copy
        until it asks the remote cache (read policy `newest`) or evicts it.

        Args:
            remote: Whether to delete it in the remote cache too. Default: if there is one. False only forgets
                the local copy: others still find the snapshot, and so does this host, remotely.

        Raises:
            InvalidArgument: the id is malformed, or there is no remote cache to delete from.
            FailedPrecondition, PermissionDenied: the loader is read-only, or the remote cache takes no
                updates; nothing was deleted, here or there.
            SnaploaderError: the remote cache failed. Nothing was deleted locally; try again.
        """
        return self.manifests.delete(snapshot_id, instance_name, remote)

    @in_context
    @observed
    def invalidate_snapshot(self, key: SnapshotKey, *, context: CallContext | None = None) -> str:
        """Drop all snapshots of the key's instance, platform and configuration, on all branches.

        Returns the new version. Key sets computed from now on carry it, on every host.
        """
        return self._versions.renew(key)

    def _fetcher_for(self, snapshot: Snapshot) -> BlobFetcher:
        return self._fetcher if snapshot.allow_local else self._uncached

    def close(self) -> None:
        """Stop prefetching and end the loader's threads. Idempotent.

        Waits for what is under way; a fetch that hangs ends by its deadline, or at once when the remote
        cache is closed first. Not to be called from a progress callback. In a forked child it does nothing.
        """
        self._open.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SnapshotLoader cannot be pickled or copied, as it has threads: make one in each process, with "
            "the same arguments; what it returns can be pickled"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_policy(policy: ReadPolicy | str) -> ReadPolicy:
    return policy if isinstance(policy, ReadPolicy) else ReadPolicy.parse(policy)


def _directory_source(source: DirectorySource | str | os.PathLike[str]) -> DirectorySource:
    return source if isinstance(source, DirectorySource) else DirectorySource(source)
