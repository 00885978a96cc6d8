"""Deriving: a snapshot of its own, made of all or some of another one, without touching content.

Trees and chunks are shared; only a manifest is new. Remotely first: what is missing there, chunks before
trees, then the manifest; then the pin and the local manifest. So whatever fails remotely leaves nothing
to be seen anywhere, and what was uploaded by then need not be uploaded by the next attempt.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import replace

from google.protobuf.message import Message

from snaploader import keys
from snaploader._proto import any_pb2
from snaploader._proto.snaploader_pb2 import VMMetadata
from snaploader.blobstore import TransferStatistics
from snaploader.context import current, unbounded
from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.formats.digests import DigestArray, HashSet
from snaploader.formats.manifest import Manifest, pack_any, unpack_any
from snaploader.keys import SnapshotKey
from snaploader.loader.manifests import ManifestStore, Stores, cannot_tell, taken
from snaploader.loader.results import DeriveResult, ManifestSource, ProgressCallback, Snapshot
from snaploader.loader.save import complete_metadata, upload_blobs


class SnapshotDeriver:
    """Does the deriving for a loader. Thread-safe, stateless between calls."""

    def __init__(self, stores: Stores, manifests: ManifestStore) -> None:
        self._stores = stores
        self._file_cache = stores.file_cache
        self._manifests = manifests

    def derive(
        self,
        origin: Snapshot,
        snapshot_id: str | None,
        names: Collection[str] | None,
        vm_metadata: Message | None,
        pin: str | None,
        remote: bool | None,
        progress: ProgressCallback | None,
    ) -> DeriveResult:
        """See `SnapshotLoader.derive_snapshot`."""
        self._stores.check_may_write("derive", remote=remote)
        if remote is None:
            private = self._file_cache.find_private(file.digest for file in origin.manifest.files.values())
            is_private = self._stores.remote_readonly or bool(origin.key.runner_id or private)
            remote = self._stores.remote is not None and not is_private
        id_ = snapshot_id or str(uuid.uuid4())
        key = keys.snapshot_id_key(SnapshotKey(instance_name=origin.key.instance_name, snapshot_id=id_))
        part = origin.only(_names(origin, names))
        manifest = part.manifest
        manifest = replace(manifest, vm_metadata=_metadata(manifest, vm_metadata, key, self._stores.clock()))
        derived = replace(part, key=key, manifest=manifest, failures=(), passed_over=())
        before = self._manifests.pinned_before(pin)
        self._manifests.check_unused(key)
        if remote and self._manifests.is_taken_remotely(key):
            raise taken(key)
        blobs = derived.digests()
        uploaded = TransferStatistics()
        warnings: list[str] = []
        with self._file_cache.lease((), hashes=[blobs.hashes]):
            absent = self._file_cache.find_missing(blobs)
            saved_locally = True

            def keep() -> None:
                nonlocal saved_locally
                try:
                    with self._manifests.pinned(pin, before, blobs, [self._manifests.local_ref(key)]):
                        if not self._manifests.keep_local(key, manifest):
                            raise taken(key)
                except SnaploaderError as error:
                    if not remote:
                        raise
                    warnings.append(f"the snapshot is saved remotely only: {error.message}")
                    saved_locally = False

            if remote:
                uploaded = self._save_remotely(derived, blobs, progress, keep)
            else:
                warnings += self._check_whole(derived, absent)
                current().check()
                with unbounded():
                    keep()
        source = ManifestSource.REMOTE if remote else ManifestSource.LOCAL
        return DeriveResult(
            replace(derived, source=source, absent=HashSet.of(absent)),
            saved_locally,
            remote,
            uploaded.blobs,
            uploaded.content_bytes,
            uploaded.wire_bytes,
            tuple(warnings),
        )

    def upload(self, snapshot: Snapshot, progress: ProgressCallback | None) -> DeriveResult:
        """See `SnapshotLoader.upload_snapshot`."""
        self._stores.check_may_write("upload", remote=True)
        if not snapshot.key.snapshot_id:
            raise InvalidArgument(
                f"the snapshot of {snapshot.key} was not found by its id: look for it by that"
            )
        blobs = snapshot.digests()
        with self._file_cache.lease((), hashes=[blobs.hashes]):
            uploaded = self._save_remotely(snapshot, blobs, progress)
        return DeriveResult(snapshot, True, True, uploaded.blobs, uploaded.content_bytes, uploaded.wire_bytes)

    def _check_whole(self, derived: Snapshot, absent: set[Digest]) -> list[str]:
        """NotFound unless each blob is in some cache. What cannot be told is a warning."""
        if absent and derived.allow_remote:
            try:
                absent = self._stores.missing_remotely(absent, derived.manifest.digest_function)
            except SnaploaderError as error:
                current().check()
                return [cannot_tell(absent, error)]
        if absent:
            raise NotFound(
                f"{len(absent)} blobs of the snapshot are in no cache any more, such as {min(absent)}: "
                "look for a snapshot again"
            )
        return []

    def _save_remotely(
        self,
        derived: Snapshot,
        blobs: DigestArray,
        progress: ProgressCallback | None,
        then: Callable[[], object] = lambda: None,
    ) -> TransferStatistics:
        """Upload and publish, and do what comes after that even when the call is over by then."""
        key, manifest = derived.key, derived.manifest
        function, wanted = manifest.digest_function, self._stores.server.digest_function
        if wanted is not function:
            raise FailedPrecondition(
                f"the snapshot has {function.name} digests and the remote cache wants {wanted.name}: "
                "restore it and save it again"
            )
        sent: list[Digest] = []
        try:
            with self._stores.observer.operation("save.upload") as operation:
                uploaded = upload_blobs(self._stores, derived, blobs, progress, sent=sent)
                operation.set(bytes=uploaded.content_bytes)
            # Looked at once more: the upload may have taken minutes.
            if self._manifests.is_taken_remotely(key):
                raise taken(key)

            def publish() -> None:
                self._publish(key, manifest)
                then()

            self._stores.pool.see_through(publish)
        except SnaploaderError as error:
            error.uploaded = tuple(sent)
            what = "may be made in spite of it" if current().is_over else "was not made"
            error.add_note(
                f"snapshot {key.snapshot_id!r} {what}. {len(sent)} blobs of "
                f"{sum(digest.size_bytes for digest in sent)} bytes were on their way to the remote cache; "
                "those that arrived are not sent again by the next attempt"
            )
            raise
        return uploaded

    def _publish(self, key: SnapshotKey, manifest: Manifest) -> None:
        try:
            self._manifests.publish(key, manifest)
            stands = self._manifests.read_back(key, manifest)
        except SnaploaderError as error:
            try:
                self._manifests.retract(key, manifest)
            except SnaploaderError:
                error.add_note(
                    "whether the snapshot is visible remotely cannot be told: delete it by its id later"
                )
            raise
        if not stands.is_ours:
            raise taken(key)


def _metadata(
    manifest: Manifest, given: Message | None, key: SnapshotKey, now_s: float
) -> any_pb2.Any | None:
    """The metadata that was given, or the origin's, with id, key and time of what is derived."""
    packed = manifest.vm_metadata if given is None else pack_any(given)
    try:
        message = VMMetadata() if packed is None else unpack_any(packed, VMMetadata)
    except InvalidArgument:  # of an origin whose metadata is damaged
        message = None
    if message is None:
        return packed
    if given is None:
        # What is said of the machine and its last task stays true; this was said of the origin itself.
        for name in ("snapshot_id", "snapshot_key", "created_timestamp"):
            message.ClearField(name)
    complete_metadata(message, key, key.snapshot_id, now_s)
    return pack_any(message)


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
