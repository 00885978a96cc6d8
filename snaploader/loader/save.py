"""Saving a snapshot: keep everything locally, publish it locally, then the same remotely.

The local part ends with the local manifest before the remote part begins, so an outage costs the
remote snapshot and not the local one. Where blobs or the manifest are not to be kept locally, only what is
whole and visible remotely is a snapshot: the local manifest, if any, comes last then. Within each part a
manifest is written last, when everything it names is stored: chunks and plain files, then directories, then
trees.

Every blob of a snapshot is asked for remotely, also those that did not change: a chunk that is served from
local caches only grows old there, and would one day be missing from a snapshot that was saved since.
"""

from __future__ import annotations

import logging
import operator
import random
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import chain

from snaploader import keys
from snaploader._proto import any_pb2
from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.context import current, unbounded
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
)
from snaploader.formats.chunktable import MAX_CHUNK_SIZE, check_geometry
from snaploader.formats.digests import DigestArray, HashSet
from snaploader.formats.dirtree import child_directories
from snaploader.formats.manifest import Manifest, check_name, pack_any, unpack_any
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader.capture import SaveOptions, StateCapture
from snaploader.loader.fetch import BlobFetcher
from snaploader.loader.find import SnapshotFinder
from snaploader.loader.manifests import ManifestStore, Stores, cannot_tell, taken
from snaploader.loader.results import (
    ManifestSource,
    ProgressCallback,
    ProgressMeter,
    RemoteManifest,
    SaveResult,
    Snapshot,
    SnapshotIdTaken,
    vm_metadata_of,
)
from snaploader.loader.versions import VersionStore
from snaploader.policy import SavePolicy, checked_seconds, completed_s, should_save_remotely
from snaploader.protocols import FileCacheProtocol

log = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 4 << 20
"""Blobs up to this size are uploaded from memory, bigger ones from their file."""

SAMPLED_BLOBS = 4
SAMPLED_BYTES = 2 << 20
"""How much is read at most of what a server says it has, at each save."""

ONE_BATCH_BYTES = 1 << 20
ONE_BATCH_BLOBS = 256
"""Up to this much is uploaded as one batch; more in steps, so that a tree comes after its chunks."""


@dataclass(frozen=True)
class _Plan:
    """What a save does remotely."""

    function: DigestFunction
    saves: bool = False
    """Whether it saves there at all."""
    skipped: str = ""
    """Why not, where nobody asked for that; empty otherwise."""
    standing: RemoteManifest | None = None
    """What the policy has found under the key."""
    before: Mapping[SnapshotKey, str] = field(default_factory=dict)
    """What stood under each key to write to; see `ManifestStore.before`."""
    id_is_new: bool = False
    """Whether this save has made up the snapshot's id, which nobody else can know."""
    versioned: SnapshotKey | None = None
    """The key, if the remote store has a version for it."""
    failure: SnaploaderError | None = None
    """What kept this save from finding out; raised when the local part is done."""


class SnapshotSaver:
    """Does the saving for a loader, whose arguments it has. Thread-safe, stateless between calls."""

    def __init__(
        self,
        stores: Stores,
        fetcher: BlobFetcher,
        finder: SnapshotFinder,
        manifests: ManifestStore,
        versions: VersionStore,
        local_digest_function: DigestFunction,
        universal_ref: bool,
    ) -> None:
        self._stores = stores
        self._file_cache = stores.file_cache
        self._remote = stores.remote
        self._fetcher = fetcher
        self._finder = finder
        self._manifests = manifests
        self._versions = versions
        self._local_function = local_digest_function
        self._universal = universal_ref

    def save(self, key: SnapshotKey, options: SaveOptions) -> SaveResult:
        """See `SnapshotLoader.cache_snapshot`."""
        self._check(key, options)
        given = options.vm_configuration
        configuration = pack_any(VMConfiguration() if given is None else given)
        id_key = keys.snapshot_id_key(replace(key, snapshot_id=options.snapshot_id or str(uuid.uuid4())))
        metadata = _metadata(options, key, id_key.snapshot_id, self._stores.clock())
        write_keys = self._write_keys(key, options.key_set)
        plan = self._plan(key, id_key, write_keys, options)
        if not (options.stands_locally or plan.saves):
            if plan.failure is not None:
                raise plan.failure
            return SaveResult(
                key, id_key.snapshot_id, (), False, False, plan.skipped, remote_manifest=plan.standing
            )
        self._manifests.check_unused(id_key)
        pinned_before = self._manifests.pinned_before(options.pin)
        observer = self._stores.observer
        private_hash = None
        if key.runner_id and not plan.saves:
            group_id, id_ = self._file_cache.group_id, id_key.snapshot_id
            private_hash = partial(keys.private_file_hash, group_id, key, id_)
        pool = self._fetcher.pool
        with StateCapture(self._file_cache, plan.function, pool, options, private_hash) as capture:
            with observer.operation("save.store") as operation:
                saved = capture.store_all()
                operation.set(bytes=capture.hashed_bytes)
            manifest = Manifest(
                configuration,
                plan.function,
                vm_metadata=metadata,
                files={name: capture.plain_files[name] for name in options.files},
                chunked_files={name: saved[name].digest for name in options.chunked_files},
                directories={name: directory.digest for name, directory in capture.directories.items()},
            )
            trees, tables = capture.trees, capture.tables
            snapshot = Snapshot(id_key, manifest, ManifestSource.LOCAL, tables, True, directories=trees)
            blobs = snapshot.digests()
            uploaded, standing, id_taken = TransferStatistics(), plan.standing, False
            warnings: list[str] = []
            with self._file_cache.lease((), hashes=[blobs.hashes]):
                if options.local:
                    warnings += self._complete_locally(capture, blobs, is_pinned=options.pin is not None)
                if options.stands_locally:
                    refs = [self._manifests.local_ref(written) for written in (*write_keys, id_key)]
                    if key.version_id:
                        # Only this host may know it, and without it the snapshot is not found.
                        refs += self._versions.local_refs(key)
                    current().check()
                    with unbounded():
                        with (
                            observer.operation("save.publish"),
                            self._manifests.pinned(options.pin, pinned_before, blobs, refs),
                        ):
                            warnings += self._publish_locally(manifest, write_keys, id_key)
                        warnings += capture.commit(self._fetcher)
                try:
                    if plan.failure is not None:
                        raise plan.failure
                    if plan.saves:
                        with observer.operation("save.upload") as operation:
                            uploaded = self._upload(capture, snapshot, blobs, options)
                            operation.set(bytes=uploaded.content_bytes)
                        with observer.operation("save.publish_remotely"):
                            standing, id_taken = self._stores.pool.see_through(
                                lambda: self._publish_remotely(plan, manifest, id_key, warnings)
                            )
                except SnaploaderError as error:
                    if options.stands_locally:
                        error.add_note("the snapshot is saved in the local cache")
                    raise
            is_local = options.stands_locally
            if not is_local:
                with unbounded():
                    warnings += capture.commit(self._fetcher)
                    is_local = options.local_manifest and self._publish_late(
                        manifest, write_keys, id_key, warnings
                    )
        result = SaveResult(
            key=key,
            snapshot_id=id_key.snapshot_id,
            files=tuple(saved[name] for name in (*options.files, *options.chunked_files)),
            saved_locally=is_local,
            saved_remotely=plan.saves and standing is not None and standing.is_ours,
            remote_skipped=plan.skipped,
            uploaded_blobs=uploaded.blobs,
            uploaded_bytes=uploaded.content_bytes,
            uploaded_wire_bytes=uploaded.wire_bytes,
            warnings=tuple(warnings),
            directories=tuple(directory.result() for directory in capture.directories.values()),
            snapshot_id_taken=id_taken,
            remote_manifest=standing,
        )
        log.info(
            "saved snapshot %r of %s: %d bytes, %d hashed, %d new here; uploaded %d blobs of %d bytes%s",
            result.snapshot_id,
            key.debug_string(self._file_cache.group_id),
            result.size_bytes,
            result.hashed_bytes,
            result.stored_bytes,
            result.uploaded_blobs,
            result.uploaded_bytes,
            "" if result.saved_remotely else f"; not saved remotely {result.remote_skipped}".rstrip(),
        )
        return result

    def _check(self, key: SnapshotKey, options: SaveOptions) -> None:
        self._stores.check_may_write("save", remote=options.remote)
        if not options.stands_locally:
            if options.pin is not None:
                raise InvalidArgument("a pin keeps what is saved locally: leave local and local_manifest on")
            stays_here = self._stores.remote_readonly or bool(key.runner_id)
            if self._remote is None or options.remote is False or (options.remote is None and stays_here):
                raise InvalidArgument(
                    "nobody would find the snapshot again: save it remotely, or locally with its manifest"
                )
        if key.snapshot_id:
            raise InvalidArgument("the key to save under names a snapshot id: pass snapshot_id= instead")
        names = [*options.files, *options.chunked_files, *options.directories]
        if not names:
            raise InvalidArgument("there is nothing to save: name at least one file or directory")
        for name, count in Counter(names).items():
            check_name(name)
            if count > 1:
                raise InvalidArgument(
                    f"{name!r} cannot be saved both whole and in chunks, or as a directory too: choose one"
                )
        checked_seconds(options.min_refresh_interval_s, "min_refresh_interval_s")
        if options.chunk_size is not None:
            check_geometry(0, options.chunk_size)
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
            before = {written: self._manifests.before(written) for written in write_keys}
            versioned = key if key.version_id and self._versions.stood(key) else None
        except SnaploaderError as error:
            current().check()
            return _Plan(function, failure=error if wanted else None)
        if is_taken:
            raise taken(id_key)
        return _Plan(function, saves=True, before=before, id_is_new=id_is_new, versioned=versioned)

    def _reason_to_skip(self, key: SnapshotKey, options: SaveOptions) -> tuple[str, RemoteManifest | None]:
        """Why this snapshot is kept from the remote store, and what stands there; empty when it is not."""
        if self._stores.remote_readonly:
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
            now_s=self._stores.clock(),
        )
        if wanted:
            return "", None
        there = None
        if standing is not None:
            there = RemoteManifest(Digest.of(standing.serialize(), standing.digest_function), is_ours=False)
        return f"policy {policy} with a refresh interval of {options.min_refresh_interval_s:g} s", there

    def _complete_locally(self, capture: StateCapture, blobs: DigestArray, *, is_pinned: bool) -> list[str]:
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
        try:
            missing = self._stores.missing_remotely(missing, blobs.function)
        except SnaploaderError as error:
            current().check()
            capture.rescue_from_directories(missing)
            return [cannot_tell(missing, error)] if missing else []
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

    def _publish_late(
        self, manifest: Manifest, write_keys: list[SnapshotKey], id_key: SnapshotKey, warnings: list[str]
    ) -> bool:
        """Keep the manifest of what is saved remotely; whether that was done."""
        try:
            warnings += self._publish_locally(manifest, write_keys, id_key)
        except SnaploaderError as error:
            warnings.append(f"the snapshot has no local manifest: {error.message}")
            return False
        return True

    def _upload(
        self, capture: StateCapture, snapshot: Snapshot, blobs: DigestArray, options: SaveOptions
    ) -> TransferStatistics:
        return upload_blobs(
            self._stores,
            snapshot,
            blobs,
            options.progress,
            rescue=capture.rescue if options.local else None,
            sources=None if options.local else capture.sources,
            sampled=True,
        )

    def _publish_remotely(
        self, plan: _Plan, manifest: Manifest, id_key: SnapshotKey, warnings: list[str]
    ) -> tuple[RemoteManifest, bool]:
        """Make the snapshot visible; what stands under the key, or the id where the key names no branch.

        Also returns whether another host has taken the id meanwhile.

        All is written before any of it is read back, so that an action cache which drops one for another is
        found out by the same look. An id that nobody else knows, and that was written last by the same
        credentials as what is read back, needs no look of its own.
        """
        for key, before in plan.before.items():
            self._manifests.publish(key, manifest, before)
        standing: dict[SnapshotKey, RemoteManifest] = {}
        is_taken = False
        try:
            # Looked at once more: the upload may have taken minutes.
            is_taken = not plan.id_is_new and self._manifests.is_taken_remotely(id_key)
            if not is_taken:
                self._manifests.publish(id_key, manifest)
                if not (plan.id_is_new and plan.before):
                    standing[id_key] = self._manifests.read_back(id_key, manifest)
                    is_taken = not standing[id_key].is_ours
            if is_taken:
                raise SnapshotIdTaken(f"{taken(id_key).message} (it was taken remotely during this save)")
        except SnaploaderError as error:
            if not plan.before:
                raise
            warnings.append(f"the snapshot is not found by its id remotely: {error.message}")
        for key, before in plan.before.items():
            standing[key] = self._manifests.read_back(key, manifest, before)
            if not standing[key].is_ours:
                warnings.append(f"another host saved under {key} meanwhile, and its snapshot stands")
        if plan.versioned is not None and not self._versions.outlived_save(plan.versioned):
            raise FailedPrecondition(
                f"the remote cache has dropped the version of {plan.versioned} during this save: its action "
                "cache keeps too few results, and nobody can load the snapshot from it. Raise its size"
            )
        return standing[next(iter(plan.before), id_key)], is_taken

    def _write_keys(self, key: SnapshotKey, key_set: SnapshotKeySet | None) -> list[SnapshotKey]:
        if key == SnapshotKey(instance_name=key.instance_name):
            return []
        universal = self._universal if key_set is None else any(map(keys.is_universal, key_set))
        if not universal or keys.is_universal(key) or not key.ref:
            return [key]
        return [key, replace(key, ref=keys.UNIVERSAL_REF)]


def _metadata(options: SaveOptions, key: SnapshotKey, snapshot_id: str, now_s: float) -> any_pb2.Any:
    """The metadata of a snapshot, completed where it does not say; a message of another type as it is."""
    given, task = options.vm_metadata, options.task
    packed = None if given is None else pack_any(given)
    message = VMMetadata() if packed is None else unpack_any(packed, VMMetadata)
    if packed is not None and message is None:
        if task is not None or options.recycled:
            raise InvalidArgument(
                "a task, or that a machine is recycled, is recorded in a snaploader.VMMetadata: put it into "
                "your message"
            )
        return packed
    assert message is not None
    complete_metadata(message, key, snapshot_id, now_s)
    message.recycled = message.recycled or options.recycled
    asks = current().request_metadata
    last = message.last_executed_task
    if task is not None:
        last.task_id = last.task_id or task.task_id
        last.invocation_id = last.invocation_id or task.invocation_id
        last.action_digest = last.action_digest or task.action_digest
        if not last.HasField("completed_timestamp"):
            last.completed_timestamp.FromNanoseconds(int(now_s * 10**9))
    if asks is not None and not last.invocation_id:
        last.invocation_id = asks.tool_invocation_id
    return pack_any(message)


def complete_metadata(message: VMMetadata, key: SnapshotKey, snapshot_id: str, now_s: float) -> None:
    """Say which snapshot it is, what it was saved under and when, where the message does not say."""
    message.snapshot_id = message.snapshot_id or snapshot_id
    if not message.HasField("snapshot_key"):
        message.snapshot_key.CopyFrom(key.to_proto())
    if not message.HasField("created_timestamp"):
        message.created_timestamp.FromNanoseconds(int(now_s * 10**9))


def upload_blobs(
    stores: Stores,
    snapshot: Snapshot,
    blobs: DigestArray,
    progress: ProgressCallback | None,
    *,
    sent: list[Digest] | None = None,
    rescue: Callable[[set[Digest]], None] | None = None,
    sources: Callable[[Collection[Digest]], Mapping[Digest, Callable[[], Buffer | str]]] | None = None,
    sampled: bool = False,
) -> TransferStatistics:
    """Upload the blobs of a snapshot that the remote store lacks, from the file cache.

    The Directories in the Trees of directories are uploaded too, as blobs of their own. Nothing reads them,
    but some servers, such as buildbox-casd, call a result incomplete without them.

    Args:
        blobs: All that it needs.
        sent: Takes in what is handed to the store, for when that fails half-way.
        rescue: Puts blobs into the file cache again that it has lost.
        sources: Where to read blobs instead that the file cache was not to take; see `StateCapture.sources`.
        sampled: Whether to read a few of the others. Some servers answer from an index that outlives the
            blobs. Where a sample is wrong, no answer is trusted: all are uploaded.

    DataLoss when the server says that it has a blob, and cannot give it even after it was uploaded.
    """
    remote = stores.server
    children: dict[Digest, bytes] = {}
    for directory in snapshot.directories.values():
        children |= child_directories(directory)
    wanted = blobs
    if children:
        wanted = DigestArray.joined([blobs, DigestArray.of(children, blobs.function)], blobs.function)
    missing = remote.find_missing(wanted)
    private = stores.file_cache.find_private(missing)
    if private:
        raise FailedPrecondition(
            f"{len(private)} files of the snapshot, such as {min(private)}, are not named by their content, "
            "as it was saved for one runner alone: it cannot go to the remote cache. Save with remote=True"
        )
    read = partial(_read, stores.file_cache, rescue)

    def uploads(digests: Collection[Digest], meter: ProgressMeter) -> Iterator[Upload]:
        again = {} if sources is None else sources(digests)
        for digest in digests:
            content: Buffer | str
            try:
                if digest in children:
                    content = children[digest]
                else:
                    content = again[digest]() if digest in again else read(digest)
            except (NotFound, DataLoss) as error:
                raise type(error)(
                    f"cannot complete the snapshot remotely: blob {digest} is missing there and here "
                    f"({error.message}). Save the whole state again from its files"
                ) from error
            if sent is not None:
                sent.append(digest)
            # What the file cache gives is verified, a file that it did not take is not.
            verified = digest not in again or not isinstance(content, str)
            yield Upload(digest, content, verified=verified)
            meter.add(digest.size_bytes)

    def upload(digests: Collection[Digest]) -> TransferStatistics:
        meter = ProgressMeter(progress, "upload", sum(digest.size_bytes for digest in digests))
        steps = _steps(digests, children, snapshot.manifest.trees)
        done = [remote.write_many(uploads(step, meter)) for step in steps]
        return reduce(operator.add, done) if done else TransferStatistics()

    uploaded = upload(missing)
    claimed = blobs.without(HashSet.of(missing))
    sample = _sample(claimed) if sampled else []
    error = _read_error(remote, sample)
    if error is None:
        return uploaded
    log.warning("the remote cache says that it has a blob and cannot give it, so all are uploaded: %s", error)
    uploaded += upload(claimed)
    error = _read_error(remote, sample)
    if error is None:
        return uploaded
    raise DataLoss(
        "the remote cache says that it has blobs of the snapshot and cannot give them, even after they were "
        f"uploaded again: its index is wrong, and must be rebuilt on the server ({error.message})"
    ) from error


def _read(
    cache: FileCacheProtocol, rescue: Callable[[set[Digest]], None] | None, digest: Digest
) -> Buffer | str:
    """The bytes of a blob, or the path of its file if it is big. NotFound or DataLoss when it is lost."""
    try:
        return cache.path(digest) if digest.size_bytes > _IN_MEMORY_BYTES else cache.read(digest)
    except (NotFound, DataLoss):
        if rescue is None:
            raise
    rescue({digest})
    return _read(cache, None, digest)


def _steps(
    digests: Collection[Digest], directories: Collection[Digest], trees: Collection[Digest]
) -> list[list[Digest]]:
    """What to upload one after the other; what fits into one small batch goes as one."""
    last = {digest for digest in digests if digest in trees}
    below = {digest for digest in digests if digest in directories} - last
    steps = [sorted({*digests} - below - last), sorted(below), sorted(last)]
    is_small = sum(digest.size_bytes for digest in digests) <= ONE_BATCH_BYTES
    if is_small and len(digests) <= ONE_BATCH_BLOBS:
        steps = [list(chain(*steps))]
    return [step for step in steps if step]


def _sample(claimed: DigestArray) -> list[Digest]:
    """A few blobs at random, so that one save after the other looks at different ones.

    At most `SAMPLED_BLOBS` of `SAMPLED_BYTES` together; where all are larger than that, one.
    """
    rows = random.SystemRandom().sample(range(len(claimed)), min(len(claimed), 16 * SAMPLED_BLOBS))
    candidates = [claimed[row] for row in rows]
    sample: list[Digest] = []
    size_bytes = 0
    for digest in candidates:
        if size_bytes + digest.size_bytes <= SAMPLED_BYTES and len(sample) < SAMPLED_BLOBS:
            sample.append(digest)
            size_bytes += digest.size_bytes
    one = [digest for digest in candidates if digest.size_bytes <= MAX_CHUNK_SIZE]
    return sample or one[:1]


def _read_error(remote: RemoteStore, sample: Collection[Digest]) -> SnaploaderError | None:
    """Why one of these blobs cannot be read, although the server says that it has it."""
    try:
        if sample:
            remote.read_many(sample, lambda *_: None)
    except (NotFound, DataLoss) as error:
        return error
    return None
