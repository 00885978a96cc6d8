"""Deriving: a snapshot of its own, made of all or some of another one, without touching content.

Trees and chunks are shared; only a manifest is new. Remotely first: what is missing there, chunks before
trees, then the manifest; then the pin and the local manifest. So whatever fails remotely leaves nothing
to be seen anywhere, and what was uploaded by then need not be uploaded by the next attempt.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from snaploader import keys
from snaploader.blobstore import RemoteStore, TransferStatistics
from snaploader.digest import Buffer, Digest
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.formats.digests import DigestArray, HashSet
from snaploader.formats.manifest import pack_any
from snaploader.keys import SnapshotKey
from snaploader.loader.manifests import REMOTE_READONLY, Before, ManifestStore, taken
from snaploader.loader.results import ManifestSource, ProgressCallback, Snapshot
from snaploader.loader.upload import upload_blobs, upload_source


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


@dataclass(frozen=True)
class DeriveOptions:
    """The arguments of `SnapshotLoader.derive_snapshot`, which documents them."""

    snapshot_id: str | None = None
    names: Collection[str] | None = None
    vm_metadata: Any = None
    pin: str | None = None
    remote: bool | None = None
    progress: ProgressCallback | None = None


class SnapshotDeriver:
    """Does the deriving for a loader. Thread-safe, stateless between calls.

    Args:
        readonly: Refuse to derive.
        remote_readonly: Derive locally only.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        file_cache: FileCache,
        manifests: ManifestStore,
        remote: RemoteStore | None,
        *,
        readonly: bool,
        remote_readonly: bool,
        clock: Callable[[], float],
    ) -> None:
        self._file_cache = file_cache
        self._manifests = manifests
        self._remote = remote
        self._readonly = readonly
        self._remote_readonly = remote_readonly
        self._clock = clock

    def derive(self, origin: Snapshot, options: DeriveOptions) -> DeriveResult:
        """See `SnapshotLoader.derive_snapshot`."""
        if self._readonly:
            raise FailedPrecondition("this loader is read-only: it cannot derive snapshots")
        if options.remote and self._remote is None:
            raise InvalidArgument("a remote snapshot was asked for and the loader has no remote cache")
        if options.remote and self._remote_readonly:
            raise FailedPrecondition(REMOTE_READONLY)
        is_private = self._remote_readonly or bool(origin.key.runner_id)
        remote = self._remote if not is_private or options.remote else None
        remote = None if options.remote is False else remote
        id_ = options.snapshot_id or str(uuid.uuid4())
        key = keys.snapshot_id_key(SnapshotKey(instance_name=origin.key.instance_name, snapshot_id=id_))
        derived = _part_of(origin, key, options)
        before = self._manifests.pinned_before(options.pin)
        self._check_unused(key, derived, remote)
        blobs = derived.digest_array()
        uploaded, warnings = TransferStatistics(), []
        with self._file_cache.lease((), hashes=[blobs.hashes]):
            absent = self._file_cache.find_missing(blobs)
            if remote is None:
                warnings += self._check_whole(derived, absent)
            else:
                uploaded = self._save_remotely(remote, derived, blobs, options.progress)
            saved_locally = True
            try:
                refs = [self._manifests.local_ref(derived.key)]
                with self._manifests.pinned(options.pin, before, blobs, refs):
                    if not self._manifests.keep_local(derived.key, derived.manifest):
                        raise taken(derived.key)
            except SnaploaderError as error:
                if remote is None:
                    raise
                warnings.append(f"the snapshot is saved remotely only: {error.message}")
                saved_locally = False
        source = ManifestSource.LOCAL if remote is None else ManifestSource.REMOTE
        return DeriveResult(
            replace(derived, source=source, absent=HashSet.of(absent)),
            saved_locally,
            remote is not None,
            uploaded.blobs,
            uploaded.content_bytes,
            uploaded.wire_bytes,
            tuple(warnings),
        )

    def upload(self, snapshot: Snapshot, progress: ProgressCallback | None) -> DeriveResult:
        """See `SnapshotLoader.upload_snapshot`."""
        if self._readonly:
            raise FailedPrecondition("this loader is read-only: it cannot upload snapshots")
        if self._remote is None:
            raise InvalidArgument("a snapshot is to be uploaded and the loader has no remote cache")
        if self._remote_readonly:
            raise FailedPrecondition(REMOTE_READONLY)
        if not snapshot.key.snapshot_id:
            raise InvalidArgument(
                f"the snapshot of {snapshot.key} was not found by its id: look for it by that"
            )
        self._check_digests(snapshot, self._remote)
        blobs = snapshot.digest_array()
        with self._file_cache.lease((), hashes=[blobs.hashes]):
            uploaded = self._save_remotely(self._remote, snapshot, blobs, progress)
        return DeriveResult(snapshot, True, True, uploaded.blobs, uploaded.content_bytes, uploaded.wire_bytes)

    def _check_unused(self, key: SnapshotKey, derived: Snapshot, remote: RemoteStore | None) -> None:
        self._manifests.check_unused(key)
        if remote is None:
            return
        self._check_digests(derived, remote)
        if self._manifests.is_taken_remotely(key):
            raise taken(key)

    @staticmethod
    def _check_digests(snapshot: Snapshot, remote: RemoteStore) -> None:
        function = snapshot.manifest.digest_function
        if remote.digest_function is not function:
            raise FailedPrecondition(
                f"the snapshot has {function.name} digests and the remote cache wants "
                f"{remote.digest_function.name}: restore it and save it again"
            )

    def _check_whole(self, derived: Snapshot, absent: set[Digest]) -> list[str]:
        """NotFound unless each blob is in some cache. What cannot be told is a warning."""
        gone = absent
        if absent and self._remote is not None and derived.allow_remote:
            try:
                if self._remote.digest_function is derived.manifest.digest_function:
                    gone = self._remote.find_missing(absent)
            except SnaploaderError as error:
                # Readers check that a snapshot is whole, so at worst this one is a miss until it is.
                warning = (
                    f"{len(absent)} blobs are not in the local cache, and whether they still are in the "
                    f"remote cache cannot be told: {error.message}"
                )
                return [warning]
        if gone:
            raise NotFound(
                f"{len(gone)} blobs of the snapshot are in no cache any more, such as {min(gone)}: "
                "look for a snapshot again"
            )
        return []

    def _save_remotely(
        self, remote: RemoteStore, derived: Snapshot, blobs: DigestArray, progress: ProgressCallback | None
    ) -> TransferStatistics:
        trees = derived.manifest.trees
        sent: list[Digest] = []

        def source(digest: Digest) -> Buffer | str:
            return upload_source(self._file_cache, digest)

        try:
            uploaded = upload_blobs(
                remote, blobs, trees, derived.directories.values(), source, progress, sent, sampled=False
            )
            # Looked at once more: the upload may have taken minutes.
            if self._manifests.is_taken_remotely(derived.key):
                raise taken(derived.key)
            self._publish_remotely(remote, derived)
        except SnaploaderError as error:
            error.uploaded = tuple(sent)
            error.add_note(
                f"snapshot {derived.key.snapshot_id!r} was not made. {len(sent)} blobs of "
                f"{sum(digest.size_bytes for digest in sent)} bytes were on their way to the remote cache; "
                "those that arrived are not sent again by the next attempt"
            )
            raise
        return uploaded

    def _publish_remotely(self, remote: RemoteStore, derived: Snapshot) -> None:
        key, manifest = derived.key, derived.manifest
        try:
            self._manifests.publish(remote, key, manifest, Before())
            stands = self._manifests.read_back(remote, key, manifest, Before())
        except SnaploaderError as error:
            try:
                self._manifests.retract(remote, key, manifest, self._clock())
            except SnaploaderError:
                error.add_note(
                    "whether the snapshot is visible remotely cannot be told: delete it by its id later"
                )
            raise
        if not stands.is_ours:
            raise taken(key)


def _part_of(origin: Snapshot, key: SnapshotKey, options: DeriveOptions) -> Snapshot:
    """The new snapshot, before it is stored anywhere."""
    part = origin.only(_names(origin, options.names))
    manifest = part.manifest
    if options.vm_metadata is not None:
        manifest = replace(manifest, vm_metadata=pack_any(options.vm_metadata))
    return replace(part, key=key, manifest=manifest, failures=())


def _names(origin: Snapshot, names: Collection[str] | None) -> set[str]:
    """Which files and directories to take."""
    present = set(origin.manifest.names)
    if names is None:
        return present
    if isinstance(names, str):
        raise InvalidArgument(f"names are a collection of names, not the one name {names!r}")
    if not names:
        raise InvalidArgument("there is nothing to derive: name at least one file or directory")
    unknown = set(names) - present
    if unknown:
        raise NotFound(f"{min(unknown)!r} is not in the snapshot, which has {sorted(present)}")
    return set(names)
