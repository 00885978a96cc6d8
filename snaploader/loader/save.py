"""Saving a snapshot: keep everything locally, publish it locally, then the same remotely.

The local part ends with the local manifest before the remote part begins, so an outage costs the
remote snapshot and not the local one. Within each part a manifest is written last, when everything
it names is stored.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cow import COWStore
from snaploader import keys
from snaploader._proto import any_pb2
from snaploader._proto.snaploader_pb2 import VMMetadata
from snaploader.blobstore import RemoteStore, TransferStatistics
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
)
from snaploader.formats.chunktable import ChunkTable, check_geometry
from snaploader.formats.digests import DigestArray
from snaploader.formats.manifest import Manifest, check_name, pack_any, unpack_any
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader.capture import StateCapture
from snaploader.loader.directory import DirectorySource
from snaploader.loader.fetch import BlobFetcher, SnapshotChunkSource
from snaploader.loader.find import SnapshotFinder
from snaploader.loader.manifests import REMOTE_READONLY, Before, ManifestStore, taken
from snaploader.loader.results import (
    ProgressCallback,
    RemoteManifest,
    SaveResult,
    distinct_artefacts,
    vm_metadata_of,
)
from snaploader.loader.upload import upload_blobs, upload_source
from snaploader.loader.versions import VersionStore
from snaploader.policy import SavePolicy, completed_s, should_save_remotely
from snaploader.task import SnapshotTask
from snaploader.workers import WorkerPool


@dataclass(frozen=True)
class SaveOptions:
    """The arguments of `SnapshotLoader.cache_snapshot`, which documents them."""

    files: Mapping[str, str | os.PathLike[str]]
    chunked_files: Mapping[str, COWStore | str | os.PathLike[str]]
    directories: Mapping[str, DirectorySource]
    vm_configuration: Any
    vm_metadata: Any = None
    task: SnapshotTask | None = None
    snapshot_id: str | None = None
    save_policy: SavePolicy = SavePolicy.ALWAYS
    key_set: SnapshotKeySet | None = None
    default_ref: str = ""
    min_refresh_interval_s: float = 0.0
    remote: bool | None = None
    chunk_size: int | None = None
    pin: str | None = None
    progress: ProgressCallback | None = None

    @property
    def names(self) -> list[str]:
        """Names of all files and directories, as they were given: one that was given twice is there twice."""
        return [*self.files, *self.chunked_files, *self.directories]


@dataclass(frozen=True)
class _Plan:
    """What a save does remotely."""

    function: DigestFunction
    remote: RemoteStore | None = None
    """Where to save to, if anywhere."""
    skipped: str = ""
    """Why nothing is saved remotely; empty otherwise."""
    standing: RemoteManifest | None = None
    """What the policy has found under the key."""
    before: Mapping[SnapshotKey, Before] = field(default_factory=dict)
    """What stood under each key to write to."""
    id_is_new: bool = False
    """Whether this save has made up the snapshot's id, which nobody else can know."""
    versioned: SnapshotKey | None = None
    """The key, if the remote store has a version for it."""
    failure: SnaploaderError | None = None
    """What kept this save from finding out; raised when the local part is done."""


class SnapshotSaver:
    """Does the saving for a loader. Thread-safe, stateless between calls.

    Args:
        local_digest_function: Where there is no remote store to say.
        universal_ref: Whether every save also updates the universal ref.
        readonly: Refuse to save.
        remote_readonly: Save locally only.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        fetcher: BlobFetcher,
        finder: SnapshotFinder,
        manifests: ManifestStore,
        versions: VersionStore,
        pool: WorkerPool,
        remote: RemoteStore | None,
        *,
        local_digest_function: DigestFunction,
        universal_ref: bool,
        readonly: bool,
        remote_readonly: bool,
        clock: Callable[[], float],
    ) -> None:
        self._fetcher = fetcher
        self._file_cache = fetcher.file_cache
        self._finder = finder
        self._manifests = manifests
        self._versions = versions
        self._pool = pool
        self._remote = remote
        self._local_function = local_digest_function
        self._universal = universal_ref
        self._readonly = readonly
        self._remote_readonly = remote_readonly
        self._clock = clock

    def save(self, key: SnapshotKey, options: SaveOptions) -> SaveResult:
        """See `SnapshotLoader.cache_snapshot`."""
        self._check(key, options)
        configuration = pack_any(options.vm_configuration)
        metadata = _metadata(options.vm_metadata, options.task, self._clock())
        id_key = keys.snapshot_id_key(replace(key, snapshot_id=options.snapshot_id or str(uuid.uuid4())))
        write_keys = self._write_keys(key, options.key_set)
        plan = self._plan(key, id_key, write_keys, options)
        self._manifests.check_unused(id_key)
        pinned_before = self._manifests.pinned_before(options.pin)
        with StateCapture(
            self._file_cache,
            plan.function,
            self._pool,
            files=options.files,
            chunked_files=options.chunked_files,
            directories=options.directories,
            chunk_size=options.chunk_size,
            progress=options.progress,
        ) as capture:
            saved = capture.store_all()
            manifest = Manifest(
                configuration,
                plan.function,
                vm_metadata=metadata,
                files={name: capture.plain_files[name] for name in options.files},
                chunked_files={name: saved[name].digest for name in options.chunked_files},
                directories={name: directory.digest for name, directory in capture.directories.items()},
            )
            blobs = distinct_artefacts(manifest, capture.tables, capture.trees)
            uploaded, standing = TransferStatistics(), plan.standing
            with self._file_cache.lease((), hashes=[blobs.hashes]):
                warnings = self._complete_locally(
                    capture, blobs, plan.function, is_pinned=options.pin is not None
                )
                refs = [self._manifests.local_ref(written) for written in (*write_keys, id_key)]
                if key.version_id:
                    # Only this host may know it, and without it the snapshot is not found.
                    refs.append(keys.version_key(key))
                with self._manifests.pinned(options.pin, pinned_before, blobs, refs):
                    warnings += self._publish_locally(manifest, write_keys, id_key)
                capture.commit(self._make_source)
                warnings += filter(None, (directory.remember() for directory in capture.directories.values()))
                try:
                    if plan.failure is not None:
                        raise plan.failure
                    if plan.remote is not None:
                        uploaded = self._upload(plan.remote, manifest, blobs, capture, options.progress)
                        standing = self._publish_remotely(plan.remote, plan, manifest, id_key, warnings)
                except SnaploaderError as error:
                    error.add_note("the snapshot is saved in the local cache")
                    raise
        return SaveResult(
            key=key,
            snapshot_id=id_key.snapshot_id,
            files=tuple(saved[name] for name in (*options.files, *options.chunked_files)),
            saved_locally=True,
            saved_remotely=plan.remote is not None and standing is not None and standing.is_ours,
            remote_skipped=plan.skipped,
            uploaded_blobs=uploaded.blobs,
            uploaded_bytes=uploaded.content_bytes,
            uploaded_wire_bytes=uploaded.wire_bytes,
            warnings=tuple(warnings),
            directories=tuple(directory.result() for directory in capture.directories.values()),
            remote_manifest=standing,
        )

    def _check(self, key: SnapshotKey, options: SaveOptions) -> None:
        if self._readonly:
            raise FailedPrecondition("this loader is read-only: it cannot save snapshots")
        if key.snapshot_id:
            raise InvalidArgument("the key to save under names a snapshot id: pass snapshot_id= instead")
        if not options.names:
            raise InvalidArgument("there is nothing to save: name at least one file or directory")
        for name, count in Counter(options.names).items():
            check_name(name)
            if count > 1:
                raise InvalidArgument(
                    f"{name!r} cannot be saved both whole and in chunks, or as a directory too: choose one"
                )
        if options.chunk_size is not None:
            check_geometry(0, options.chunk_size)
        if options.remote and self._remote is None:
            raise InvalidArgument("a remote save was asked for and the loader has no remote cache")
        if options.remote and self._remote_readonly:
            raise FailedPrecondition(REMOTE_READONLY)
        if options.save_policy is SavePolicy.NONE_AVAILABLE and options.key_set is None:
            raise InvalidArgument("save policy none-available needs key_set, the keys to look at")

    def _plan(
        self, key: SnapshotKey, id_key: SnapshotKey, write_keys: list[SnapshotKey], options: SaveOptions
    ) -> _Plan:
        """Decide what to do remotely. A failure to find out does not keep the local part from being done."""
        if self._remote is None:
            return _Plan(self._local_function)
        wanted = options.remote is not False
        function = self._local_function
        try:
            function = self._remote.digest_function
            if not wanted:
                return _Plan(function)
            skipped, standing = self._reason_to_skip(key, options)
            if skipped:
                return _Plan(function, skipped=skipped, standing=standing)
            if not self._remote.update_enabled:
                raise FailedPrecondition(
                    "the remote cache takes no action results, so nothing was uploaded: use an endpoint, an "
                    "instance or credentials that may write"
                )
            id_is_new = options.snapshot_id is None
            is_taken = not id_is_new and self._manifests.is_taken_remotely(id_key)
            before = {written: self._manifests.before(self._remote, written) for written in write_keys}
            versioned = key if key.version_id and self._versions.stood(self._remote, key) else None
        except SnaploaderError as error:
            return _Plan(function, failure=error if wanted else None)
        if is_taken:
            raise taken(id_key)
        return _Plan(function, self._remote, before=before, id_is_new=id_is_new, versioned=versioned)

    def _reason_to_skip(self, key: SnapshotKey, options: SaveOptions) -> tuple[str, RemoteManifest | None]:
        """Why this snapshot is kept from the remote store, and what stands there; empty when it is not."""
        if self._remote_readonly:
            return "the remote cache is only read (remote_readonly)", None
        if key.runner_id and not options.remote:
            return f"snapshots of runner {key.runner_id!r} are not shared", None
        policy = options.save_policy
        if policy is SavePolicy.ALWAYS and not options.min_refresh_interval_s:
            return "", None
        standing = self._finder.whole_remote_manifest(key)
        others = options.key_set if policy is SavePolicy.NONE_AVAILABLE and options.key_set else ()
        any_exists = standing is not None or any(
            self._finder.whole_remote_manifest(other) is not None for other in others if other != key
        )
        wanted = should_save_remotely(
            policy,
            key,
            default_ref=options.default_ref,
            branch_exists=standing is not None,
            any_exists=any_exists,
            last_save_s=None if standing is None else completed_s(vm_metadata_of(standing)),
            refresh_interval_s=options.min_refresh_interval_s,
            now_s=self._clock(),
        )
        if wanted:
            return "", None
        there = None
        if standing is not None:
            there = RemoteManifest(Digest.of(standing.serialize(), standing.digest_function), is_ours=False)
        return f"policy {policy} with a refresh interval of {options.min_refresh_interval_s:g} s", there

    def _complete_locally(
        self, capture: StateCapture, blobs: DigestArray, function: DigestFunction, *, is_pinned: bool
    ) -> list[str]:
        """Make sure that every blob is in a cache; what the stores alone have is put into the file cache.

        Args:
            is_pinned: Put all content of directories there, also what the remote cache has: a pin keeps only
                what is here, and the files may be removed next.
        """
        missing = self._file_cache.find_missing(blobs)
        if is_pinned:
            capture.rescue_from_directories(missing)
        if not missing:
            return []
        if self._remote is not None:
            try:
                if self._remote.digest_function is function:
                    missing = self._remote.find_missing(missing)
            except SnaploaderError as error:
                capture.rescue_from_directories(missing)
                if not missing:
                    return []
                # Readers check that a snapshot is whole, so at worst this one is a miss until it is.
                warning = (
                    f"{len(missing)} blobs that did not change since they were loaded are not in the local "
                    f"cache, and whether they still are in the remote cache cannot be told: {error.message}"
                )
                return [warning]
        capture.rescue(missing)
        missing = self._file_cache.find_missing(missing)
        if missing:
            raise ResourceExhausted(
                f"the file cache dropped {len(missing)} blobs of the snapshot while it was being saved: "
                "raise its size (max_bytes) above that of the snapshot"
            )
        return []

    def _publish_locally(
        self, manifest: Manifest, write_keys: list[SnapshotKey], id_key: SnapshotKey
    ) -> list[str]:
        for write_key in write_keys:
            self._manifests.keep_local(write_key, manifest)
        try:
            if self._manifests.keep_local(id_key, manifest):
                return []
            if not write_keys:
                raise taken(id_key)
            return [f"snapshot id {id_key.snapshot_id!r} was taken locally meanwhile and not overwritten"]
        except SnaploaderError as error:
            if not write_keys:
                raise
            return [f"the snapshot is not found by its id locally: {error.message}"]

    def _upload(
        self,
        remote: RemoteStore,
        manifest: Manifest,
        blobs: DigestArray,
        capture: StateCapture,
        progress: ProgressCallback | None,
    ) -> TransferStatistics:
        def source(digest: Digest) -> Buffer | str:
            try:
                return upload_source(self._file_cache, digest)
            except (NotFound, DataLoss):
                capture.rescue({digest})
                return upload_source(self._file_cache, digest)

        trees = manifest.trees
        return upload_blobs(remote, blobs, trees, capture.trees.values(), source, progress, sampled=True)

    def _publish_remotely(
        self,
        remote: RemoteStore,
        plan: _Plan,
        manifest: Manifest,
        id_key: SnapshotKey,
        warnings: list[str],
    ) -> RemoteManifest:
        """Make the snapshot visible; what stands under the key, or the id where the key names no branch.

        All is written before any of it is read back, so that an action cache which drops one for another is
        found out by the same look. An id that nobody else knows, and that was written last by the same
        credentials as what is read back, needs no look of its own.
        """
        for key, before in plan.before.items():
            self._manifests.publish(remote, key, manifest, before)
        standing: dict[SnapshotKey, RemoteManifest] = {}
        try:
            # Looked at once more: the upload may have taken minutes.
            is_taken = not plan.id_is_new and self._manifests.is_taken_remotely(id_key)
            if not is_taken:
                self._manifests.publish(remote, id_key, manifest, Before())
                if not (plan.id_is_new and plan.before):
                    standing[id_key] = self._manifests.read_back(remote, id_key, manifest, Before())
                    is_taken = not standing[id_key].is_ours
            if is_taken:
                raise FailedPrecondition(f"{taken(id_key).message} (it was taken remotely during this save)")
        except SnaploaderError as error:
            if not plan.before:
                raise
            warnings.append(f"the snapshot is not found by its id remotely: {error.message}")
        for key, before in plan.before.items():
            standing[key] = self._manifests.read_back(remote, key, manifest, before)
            if not standing[key].is_ours:
                warnings.append(f"another host saved under {key} meanwhile, and its snapshot stands")
        if plan.versioned is not None and not self._versions.stands(remote, plan.versioned):
            raise FailedPrecondition(
                f"the remote cache has dropped the version of {plan.versioned} during this save: its action "
                "cache keeps too few results, and nobody can load the snapshot from it. Raise its size"
            )
        return standing[next(iter(plan.before), id_key)]

    def _write_keys(self, key: SnapshotKey, key_set: SnapshotKeySet | None) -> list[SnapshotKey]:
        if key == SnapshotKey(instance_name=key.instance_name):
            return []
        universal = self._universal if key_set is None else any(map(keys.is_universal, key_set))
        if not universal or keys.is_universal(key) or not key.ref:
            return [key]
        return [key, replace(key, ref=keys.UNIVERSAL_REF)]

    def _make_source(
        self, name: str, table: ChunkTable, *, allow_remote: bool, mode: int
    ) -> SnapshotChunkSource:
        return SnapshotChunkSource(
            name,
            table,
            self._fetcher,
            allow_remote=allow_remote and self._remote is not None,
            mode=mode,
        )


def _metadata(given: Any, task: SnapshotTask | None, now_s: float) -> any_pb2.Any | None:
    """The metadata of a snapshot, with the task that ran last where it names none."""
    packed = None if given is None else pack_any(given)
    if task is None:
        return packed
    message = VMMetadata() if packed is None else unpack_any(packed, VMMetadata)
    if message is None:
        raise InvalidArgument("a task is recorded in a snaploader.VMMetadata: put its ids into your message")
    last = message.last_executed_task
    last.task_id = last.task_id or task.task_id
    last.invocation_id = last.invocation_id or task.invocation_id
    last.action_digest = last.action_digest or task.action_digest
    if not last.HasField("completed_timestamp"):
        last.completed_timestamp.FromNanoseconds(int(now_s * 10**9))
    return pack_any(message)
