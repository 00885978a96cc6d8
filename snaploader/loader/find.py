"""Finding the best snapshot of a key set that is whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

from snaploader import keys
from snaploader._proto.snaploader_pb2 import VMMetadata
from snaploader.blobstore import RemoteStore
from snaploader.chunktable import ChunkTable
from snaploader.digest import Digest
from snaploader.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader.fetch import BlobFetcher
from snaploader.loader.results import KeyFailure, ManifestSource, Snapshot
from snaploader.manifest import Manifest, unpack_any
from snaploader.policy import ReadPolicy, is_stale
from snaploader.tree import decode_tree

log = logging.getLogger(__name__)


class SnapshotFinder:
    """Looks keys up in the file cache and the remote store. Thread-safe.

    Args:
        readonly: Do not keep remote manifests in the file cache.
        max_stale_fallback_age_s: Local snapshots of fallback keys older than this are passed over.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        fetcher: BlobFetcher,
        remote: RemoteStore | None,
        *,
        readonly: bool,
        max_stale_fallback_age_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._fetcher = fetcher
        self._file_cache: FileCache = fetcher.file_cache
        self._remote = remote
        self._readonly = readonly
        self._max_age_s = max_stale_fallback_age_s
        self._clock = clock

    def find(self, key_set: SnapshotKeySet, policy: ReadPolicy, *, allow_degraded: bool) -> Snapshot:
        """The first snapshot of the set, in order of its keys, that is whole.

        Only a key without a snapshot is passed over silently. Any other failure (an outage, damage)
        is raised, or with `allow_degraded` recorded in the result, which is then a fallback.
        """
        failures: list[KeyFailure] = []
        for position, key in enumerate(key_set):
            try:
                snapshot = self._find_key(key, policy, is_fallback=position > 0)
            except SnaploaderError as error:
                failures.append(KeyFailure(key, error))
                if not isinstance(error, NotFound) and not allow_degraded:
                    raise _summary(failures) from error
                continue
            return replace(snapshot, failures=tuple(failures))
        raise _summary(failures) from failures[-1].error

    def find_one(self, key: SnapshotKey, policy: ReadPolicy) -> Snapshot:
        """The snapshot of exactly this key."""
        try:
            return self._find_key(key, policy, is_fallback=False)
        except SnaploaderError as error:
            raise _summary([KeyFailure(key, error)]) from error

    def remote_manifest(self, key: SnapshotKey) -> Manifest | None:
        """What the remote store holds under `key`; None when nothing, or nothing whole."""
        if self._remote is None:
            return None
        function = self._remote.digest_function
        try:
            result = self._remote.get_action_result(keys.remote_manifest_digest(key, function))
        except NotFound:
            return None
        return Manifest.from_action_result(result, function)

    def _find_key(self, key: SnapshotKey, policy: ReadPolicy, *, is_fallback: bool) -> Snapshot:
        # The universal ref takes the state of every branch, so its age counts wherever it comes from.
        limit_any_age = keys.is_universal(key)
        tiers: list[Callable[[], Snapshot]] = []
        allow_remote = policy is not ReadPolicy.LOCAL_ONLY and self._remote is not None
        local = self._local_attempt(key, allow_remote, limit_age=is_fallback or limit_any_age)
        if allow_remote:
            remote = self._remote_attempt(key, keep=policy is not ReadPolicy.NEWEST, limit_age=limit_any_age)
            tiers = [remote, local] if policy is ReadPolicy.NEWEST else [local, remote]
        else:
            tiers = [local]
        reasons = []
        damage: SnaploaderError | None = None
        for attempt in tiers:
            try:
                return attempt()
            except NotFound as error:
                reasons.append(error.message)
            except (DataLoss, InvalidArgument) as error:
                # The manifest of the other tier may be a different one, and right.
                damage = damage or error
        if damage is not None:
            raise damage
        raise NotFound("; ".join(reasons))

    def _local_attempt(
        self, key: SnapshotKey, allow_remote: bool, *, limit_age: bool
    ) -> Callable[[], Snapshot]:
        def attempt() -> Snapshot:
            name = keys.local_manifest_key(self._file_cache.group_id, key)
            try:
                data = self._file_cache.get_ref(name)
            except NotFound:
                raise NotFound("no local manifest") from None
            try:
                manifest = Manifest.parse_local(data)
            except InvalidArgument as error:
                log.warning("dropping a damaged local manifest: %s", error)
                self._file_cache.delete_ref(name)
                raise NotFound(f"the local manifest was damaged ({error})") from error
            if limit_age:
                self._check_age(manifest, "local")
            return self._whole(key, manifest, ManifestSource.LOCAL, allow_remote)

        return attempt

    def _remote_attempt(self, key: SnapshotKey, *, keep: bool, limit_age: bool) -> Callable[[], Snapshot]:
        def attempt() -> Snapshot:
            manifest = self.remote_manifest(key)
            if manifest is None:
                raise NotFound("no remote manifest")
            if limit_age:
                self._check_age(manifest, "remote")
            snapshot = self._whole(key, manifest, ManifestSource.REMOTE, allow_remote=True)
            if keep and not self._readonly:
                name = keys.local_manifest_key(self._file_cache.group_id, key)
                try:
                    self._file_cache.put_ref(name, manifest.serialize_local())
                except ResourceExhausted as error:
                    log.warning("a remote manifest is not kept locally: %s", error)
            return snapshot

        return attempt

    def _check_age(self, manifest: Manifest, tier: str) -> None:
        try:
            metadata = unpack_any(manifest.vm_metadata, VMMetadata)
        except InvalidArgument:
            metadata = None
        if is_stale(metadata, now_s=self._clock(), max_age_s=self._max_age_s):
            raise NotFound(
                f"the {tier} manifest is older than {self._max_age_s:g} s or does not say how old it is"
            )

    def _whole(
        self,
        key: SnapshotKey,
        manifest: Manifest,
        source: ManifestSource,
        allow_remote: bool,
    ) -> Snapshot:
        """A snapshot of which every artefact is at hand; NotFound when one is not."""
        tables = {}
        for name, tree_digest in manifest.chunked_files.items():
            try:
                tree = self._fetcher.read(tree_digest, allow_remote=allow_remote)
            except NotFound as error:
                raise NotFound(f"the {source} manifest is incomplete: {error.message}") from error
            tables[name] = decode_tree(tree, manifest.digest_function)
        self._check_presence(manifest, tables, source, allow_remote)
        return Snapshot(key, manifest, source, tables, allow_remote)

    def _check_presence(
        self,
        manifest: Manifest,
        tables: dict[str, ChunkTable],
        source: ManifestSource,
        allow_remote: bool,
    ) -> None:
        missing = self._file_cache.find_missing(list(artefacts(manifest, tables)))
        if missing and allow_remote and self._remote is not None:
            missing = self._remote.find_missing(missing)
        if missing:
            raise NotFound(
                f"the {source} manifest is incomplete: {len(missing)} of its blobs are in no cache, "
                f"such as {min(missing)}"
            )


def artefacts(manifest: Manifest, tables: dict[str, ChunkTable]) -> Iterator[Digest]:
    """Every blob a snapshot needs: plain files, trees and chunks; the empty blob is not one."""
    yield from manifest.digests()
    for table in tables.values():
        yield from table.digests()


def _summary(failures: list[KeyFailure]) -> SnaploaderError:
    """One error for all keys tried: of the worst kind among them, with the reason for each."""
    worst = next((f.error for f in failures if not isinstance(f.error, NotFound)), failures[-1].error)
    lines = "; ".join(f"{failure.key}: {failure.error.message}" for failure in failures)
    return type(worst)(f"no snapshot could be loaded. Tried {lines}", transient=worst.transient)
