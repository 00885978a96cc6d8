"""Finding the best snapshot of a key set that is whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from snaploader import keys
from snaploader.context import current
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, InvalidArgument, NotFound, SnaploaderError
from snaploader.formats.chunktable import decode_chunked_file
from snaploader.formats.digests import DigestArray, HashSet
from snaploader.formats.dirtree import (
    MAX_DECODED_BYTES,
    MAX_ENTRIES,
    DirectoryTree,
    check_entry_count,
    decode_directory_tree,
)
from snaploader.formats.manifest import Manifest
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader.fetch import BlobFetcher, UncachedFetcher
from snaploader.loader.manifests import Deleted, ManifestStore, Stores
from snaploader.loader.results import (
    KeyFailure,
    ManifestSource,
    PassedOver,
    Snapshot,
    metadata_of,
    vm_metadata_of,
)
from snaploader.policy import (
    EVERY_SOURCE,
    ReadPolicy,
    ReadSources,
    allowed_sources,
    checked_seconds,
    is_stale,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 20_000
"""Blobs that are looked for at a time: each takes about a kilobyte meanwhile."""


class SnapshotFinder:
    """Looks keys up in the file cache and the remote store. Thread-safe."""

    def __init__(
        self,
        stores: Stores,
        fetcher: BlobFetcher,
        manifests: ManifestStore,
        max_stale_fallback_age_s: float,
        sources: ReadSources,
    ) -> None:
        self._stores = stores
        self._file_cache = stores.file_cache
        self._fetcher = fetcher
        self._uncached = UncachedFetcher(fetcher)
        self._manifests = manifests
        self.max_age_s = checked_seconds(max_stale_fallback_age_s, "max_stale_fallback_age_s")
        """How old a local snapshot of a fallback key may be, in seconds, where a call does not say."""
        self._sources = sources
        if stores.remote is None:
            self._sources = sources.within(ReadSources(remote_manifests=False, remote_chunks=False))

    def limit_s(self, asked_s: float | None) -> float:
        """How old a fallback may be: what a call asks for, else what the loader was told."""
        return self.max_age_s if asked_s is None else checked_seconds(asked_s, "max_stale_fallback_age_s")

    def find(
        self,
        key_set: SnapshotKeySet,
        policy: ReadPolicy,
        sources: ReadSources = EVERY_SOURCE,
        *,
        allow_degraded: bool,
        max_stale_fallback_age_s: float | None = None,
    ) -> Snapshot:
        """The first snapshot of the set, in order of its keys, that is whole.

        Only a key without a snapshot is passed over silently. Any other failure (an outage, damage)
        is raised, or with `allow_degraded` recorded in the result, which is then a fallback.
        """
        max_age_s = self.limit_s(max_stale_fallback_age_s)
        allowed = self.allowed(policy, sources)
        order = manifest_order(policy, allowed)
        failures: list[KeyFailure] = []
        passed: list[PassedOver] = []
        for position, key in enumerate(key_set):
            get = partial(self._get, key, policy, allowed, max_age_s, passed, is_fallback=position > 0)
            snapshot = self._first_to_succeed(key, order, get, failures, allow_degraded=allow_degraded)
            if snapshot is not None:
                found = replace(snapshot, failures=tuple(failures), passed_over=tuple(passed))
                _log_found(found, self._file_cache.group_id)
                return found
        raise _summary(failures) from failures[-1].error

    def allowed(self, policy: ReadPolicy, sources: ReadSources) -> ReadSources:
        """What a call may read. FailedPrecondition when that is nothing."""
        return allowed_sources(policy, sources, self._sources)

    def whole_remote_manifest(self, key: SnapshotKey) -> Manifest | None:
        """The manifest under `key` if another host could load it; None when it is damaged or incomplete."""
        try:
            manifest = self._manifests.read_remote(key)
            blobs = self.unchecked(key, manifest, ManifestSource.REMOTE, EVERY_SOURCE).digests()
        except (NotFound, DataLoss):
            return None
        return None if any(map(self._stores.server.find_missing, _batches(blobs))) else manifest

    def _first_to_succeed(
        self,
        key: SnapshotKey,
        order: Sequence[ManifestSource],
        get: Callable[[ManifestSource], Snapshot],
        failures: list[KeyFailure],
        *,
        allow_degraded: bool,
    ) -> Snapshot | None:
        """The snapshot of one key; None when it has none. What failed is added to `failures`."""
        absent: list[str] = []
        damage: list[KeyFailure] = []
        for source in order:
            try:
                with self._stores.observer.operation("lookup", source=source, key=key):
                    return get(source)
            except Deleted as error:
                # Copies of it that are kept elsewhere do not count: a deletion is for everybody.
                failures.append(KeyFailure(key, NotFound(error.message)))
                return None
            except NotFound as error:
                absent.append(error.message)
            except DataLoss as error:
                # The manifest of the other tier may be a different one, and right.
                damage.append(KeyFailure(key, error))
            except SnaploaderError as error:
                current().check()
                failures.append(KeyFailure(key, error))
                if not allow_degraded:
                    raise _summary(failures) from error
        if absent:
            failures.append(KeyFailure(key, NotFound("; ".join(absent))))
        failures += damage
        if damage and not allow_degraded:
            raise _summary(failures) from damage[0].error
        return None

    def _get(
        self,
        key: SnapshotKey,
        policy: ReadPolicy,
        sources: ReadSources,
        max_age_s: float,
        passed: list[PassedOver],
        source: ManifestSource,
        *,
        is_fallback: bool,
    ) -> Snapshot:
        is_local = source is ManifestSource.LOCAL
        manifest = self._manifests.read_local(key) if is_local else self._manifests.read_remote(key)
        limit_s = max_age_s if is_limited(key, source, is_fallback=is_fallback) else None
        try:
            snapshot = self._whole(key, manifest, source, sources, limit_s)
        except SnaploaderError as error:
            passed.append(PassedOver(key, source, metadata_of(manifest), error.message))
            raise
        is_kept = policy is ReadPolicy.LOCAL_FIRST and sources.local_manifests
        if is_kept and not is_local and not self._stores.readonly:
            try:
                # What an id names never changes, but for being deleted meanwhile, which must stay.
                self._manifests.keep_local(key, manifest)
            except SnaploaderError as error:
                log.warning("a remote manifest is not kept locally: %s", error)
        return snapshot

    def _whole(
        self,
        key: SnapshotKey,
        manifest: Manifest,
        source: ManifestSource,
        sources: ReadSources,
        max_age_s: float | None,
    ) -> Snapshot:
        """A snapshot of which every artefact is at hand; NotFound when one is not, or when it is too old."""
        now_s = self._stores.clock()
        if max_age_s is not None and is_stale(vm_metadata_of(manifest), now_s=now_s, max_age_s=max_age_s):
            raise NotFound(
                f"the {source} manifest is older than {max_age_s:g} s or does not say how old it is"
            )
        try:
            snapshot = self.unchecked(key, manifest, source, sources)
        except NotFound as error:
            raise NotFound(f"the {source} manifest is incomplete: {error.message}") from error
        return replace(snapshot, absent=HashSet.of(self._absent(snapshot)))

    def unchecked(
        self,
        key: SnapshotKey,
        manifest: Manifest,
        source: ManifestSource,
        sources: ReadSources,
        read: Callable[[Digest], bytes] | None = None,
    ) -> Snapshot:
        """The snapshot of a manifest, as far as its trees tell. NotFound when one of them is gone.

        Args:
            read: Reads a tree. Default: from where `sources` says, and keeps it in the file cache.
        """
        read = read or partial(self.read_tree, sources)
        files = self._decode_all(manifest, manifest.chunked_files, decode_chunked_file, read)
        return Snapshot(
            key,
            manifest,
            source,
            {name: table for name, (table, _) in files.items()},
            sources.remote_chunks,
            directories=self._read_directories(manifest, read),
            modes={name: mode for name, (_, mode) in files.items()},
            allow_local=sources.local_chunks,
        )

    def _absent(self, snapshot: Snapshot) -> Iterator[Digest]:
        """Those blobs that must be fetched; NotFound when some are nowhere."""
        gone = 0
        example: Digest | None = None
        for absent, missing in self.absent(snapshot):
            if missing:
                gone += len(missing)
                example = min(missing)
            yield from absent
        if gone:
            raise NotFound(
                f"the {snapshot.source} manifest is incomplete: {gone} of its blobs are in no cache"
                f"{_that_is_read(snapshot)}, such as {example}"
            )

    def absent(self, snapshot: Snapshot, *, use: bool = True) -> Iterator[tuple[set[Digest], set[Digest]]]:
        """Those blobs, in parts, that must be fetched; and those of them that are nowhere.

        Args:
            use: Whether this counts as a use of what the file cache has.
        """
        for batch in _batches(snapshot.digests()):
            absent = self._file_cache.find_missing(batch, use=use) if snapshot.allow_local else set(batch)
            missing = absent
            if absent and snapshot.allow_remote and self._stores.can_fetch(snapshot.manifest.digest_function):
                assert self._fetcher.behind is not None
                missing = self._fetcher.behind.find_missing(absent)
            yield absent, missing

    def _read_directories(
        self, manifest: Manifest, read: Callable[[Digest], bytes]
    ) -> dict[str, DirectoryTree]:
        entries, decoded_bytes = MAX_ENTRIES, MAX_DECODED_BYTES

        def decode(data: bytes, function: DigestFunction) -> DirectoryTree:
            nonlocal entries, decoded_bytes
            tree = decode_directory_tree(data, function, max_entries=entries, max_decoded_bytes=decoded_bytes)
            entries -= len(tree)
            decoded_bytes -= tree.decoded_bytes
            return tree

        directories = self._decode_all(manifest, manifest.directories, decode, read)
        try:
            check_entry_count(sum(map(len, directories.values())))
        except InvalidArgument as error:
            raise DataLoss(f"the manifest is damaged: {error.message}") from error
        return directories

    def _decode_all(
        self,
        manifest: Manifest,
        trees: Mapping[str, Digest],
        decode: Callable[[bytes, DigestFunction], T],
        read: Callable[[Digest], bytes],
    ) -> dict[str, T]:
        """The trees by name. Equal ones are one object: a small manifest can name a big tree many times."""
        decoded: dict[Digest, T] = {}
        for name, digest in trees.items():
            if digest in decoded:
                continue
            data = read(digest)
            try:
                decoded[digest] = decode(data, manifest.digest_function)
            except InvalidArgument as error:
                raise DataLoss(f"the tree {digest} of {name!r} is damaged: {error.message}") from error
            del data  # it may be large, and the next one too
        return {name: decoded[digest] for name, digest in trees.items()}

    def read_tree(self, sources: ReadSources, digest: Digest, *, keep: bool = True) -> bytes:
        """The bytes of a tree from where `sources` says; kept in the file cache, where that takes it."""
        if sources.local_chunks:
            try:
                return self._file_cache.read(digest)
            except (NotFound, DataLoss):
                if not (sources.remote_chunks and self._stores.can_fetch(digest.function)):
                    raise
            return (self._fetcher if keep else self._uncached).read(digest)
        if not self._stores.can_fetch(digest.function):
            raise NotFound(f"the remote cache has no {digest.function.name} digests, such as {digest}")
        return self._uncached.read(digest)


def is_limited(key: SnapshotKey, source: ManifestSource, *, is_fallback: bool) -> bool:
    """Whether the limit of age holds for the manifest of a key from this tier."""
    # The universal ref takes the state of every branch, so its age counts wherever it comes from.
    return keys.is_universal(key) or (is_fallback and source is ManifestSource.LOCAL)


def _log_found(found: Snapshot, group_id: str) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    metadata, blobs = found.metadata, found.digests()
    log.info(
        "found snapshot %r (completed %s) of %s by its %s manifest: %d blobs of %d bytes, %d to fetch",
        found.key.snapshot_id or (metadata and metadata.snapshot_id) or "without an id",
        (metadata and metadata.completed) or "at an unknown time",
        found.key.debug_string(group_id),
        found.source,
        len(blobs),
        int(blobs.sizes.sum()),
        len(found.absent),
    )
    for other in found.passed_over:
        known = other.metadata
        log.info(
            "passed over snapshot %r (completed %s) of %s: %s",
            (known and known.snapshot_id) or "without an id",
            (known and known.completed) or "at an unknown time",
            other.key.debug_string(),
            other.reason,
        )


def manifest_order(policy: ReadPolicy, sources: ReadSources) -> list[ManifestSource]:
    """Where the manifest of a key is looked for, in order."""
    order = [ManifestSource.LOCAL, ManifestSource.REMOTE]
    if policy is ReadPolicy.NEWEST:
        order.reverse()
    on = {ManifestSource.LOCAL: sources.local_manifests, ManifestSource.REMOTE: sources.remote_manifests}
    return [source for source in order if on[source]]


def _that_is_read(snapshot: Snapshot) -> str:
    if snapshot.allow_local and snapshot.allow_remote:
        return ""
    return f" that is read (only the {'file' if snapshot.allow_local else 'remote'} cache)"


def _batches(digests: DigestArray) -> Iterator[DigestArray]:
    """Digests in parts: an object for each chunk of a big snapshot would take hundreds of MiB."""
    for start in range(0, len(digests), _BATCH):
        current().check()
        yield digests.take(slice(start, start + _BATCH))


def _summary(failures: list[KeyFailure]) -> SnaploaderError:
    """One error for all keys tried: of the worst kind among them, with the reason for each."""
    worst = next((f.error for f in failures if not isinstance(f.error, NotFound)), failures[-1].error)
    lines = "; ".join(f"{_described(failure.key)}: {failure.error.message}" for failure in failures)
    return type(worst)(f"no snapshot could be loaded. Tried {lines}", transient=worst.transient)


def _described(key: SnapshotKey) -> str:
    if key.snapshot_id:
        return f"snapshot {key.snapshot_id!r}"
    if key.ref:
        return f"ref {key.ref!r}"
    return f"runner {key.runner_id!r}" if key.runner_id else "the key without a ref"
