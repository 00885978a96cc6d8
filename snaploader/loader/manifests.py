"""Manifests, and all that stands under the keys of snapshots: the one place that reads and writes it.

On this host a manifest is a ref of the file cache, for other hosts it is a result in the action cache. One
that stands under a snapshot's id is never replaced but by a *tombstone*, when the snapshot is deleted: so an
id that ever named a snapshot is taken for good. The Remote Execution API has no way to delete a result; a
tombstone is an ActionResult with nothing but a `snaploader.v1.Tombstone` in its auxiliary metadata. In the
file cache it stands in a `LocalManifest` without a digest function.

A manifest is written when all that it names is stored, and read back when all that a save writes is
written. Action caches accept an update from a caller who may not make one, and drop it; or drop one result
for another; or hide one of which they lack a blob. Reading back what was published tells. Deleting goes the
other way, remotely first, so a snapshot is not lost here that others still see.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from google.protobuf.message import DecodeError, Message

from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader._proto.snaploader_pb2 import LocalManifest, Tombstone
from snaploader.blobstore import RemoteStore
from snaploader.context import current, unbounded
from snaploader.digest import Digest, DigestFunction, hash_strings
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
    Unauthenticated,
    Unimplemented,
)
from snaploader.filecache import Pin
from snaploader.formats.manifest import Manifest, is_packed, pack_any
from snaploader.keys import SnapshotKey
from snaploader.loader.results import DeleteResult, RemoteManifest, SnapshotIdTaken
from snaploader.protocols import FileCacheProtocol
from snaploader.telemetry import NOBODY, Observer
from snaploader.workers import WorkerPool

log = logging.getLogger(__name__)

MAY_ONLY_READ = (FailedPrecondition, PermissionDenied, Unauthenticated, Unimplemented)
"""What servers answer to a caller who may read action results and not write them. UNAUTHENTICATED is
bazel-remote's with `--allow_unauthenticated_reads`."""

_MAX_REMEMBERED = 1024
"""For so many keys this loader remembers what stood there remotely when it last looked."""


@dataclass(frozen=True, slots=True)
class Stores:
    """Where a loader keeps snapshots, and what it may write there."""

    file_cache: FileCacheProtocol
    remote: RemoteStore | None
    readonly: bool
    """Nothing may be published, here or remotely."""
    remote_readonly: bool
    """Nothing may be published remotely."""
    clock: Callable[[], float]
    """Seconds since the epoch."""
    pool: WorkerPool
    """Threads for what must come to its end, such as publishing, when its call is called off."""
    observer: Observer = NOBODY

    @property
    def server(self) -> RemoteStore:
        """`remote`, for those who know that there is one."""
        assert self.remote is not None
        return self.remote

    def check_may_write(self, verb: str, *, remote: bool | None, hint: str = "") -> None:
        """FailedPrecondition where this loader is read-only, InvalidArgument where there is no remote store.

        Args:
            verb: What is to be done with snapshots, remotely if `remote`.
            hint: What to do where the remote store is only read.
        """
        if self.readonly:
            raise FailedPrecondition(f"this loader is read-only: it cannot {verb} snapshots")
        if remote and self.remote is None:
            raise InvalidArgument(f"cannot {verb} a snapshot remotely: the loader has no remote cache")
        if remote and self.remote_readonly:
            raise FailedPrecondition(
                "this loader may only read the remote cache (remote_readonly): nothing was published there"
                + hint
            )

    def can_fetch(self, function: DigestFunction) -> bool:
        """Whether the remote store may have blobs of this digest function. May ask it, and raise."""
        return self.remote is not None and self.remote.digest_function is function

    def missing_remotely(self, digests: set[Digest], function: DigestFunction) -> set[Digest]:
        """Those of `digests` that the remote store lacks too; all where there is none for them."""
        return self.server.find_missing(digests) if self.can_fetch(function) else digests


class Deleted(NotFound):
    """The snapshot was deleted for everybody, whatever copies of its manifest are kept elsewhere."""


class Damaged(NotFound):
    """A local manifest cannot be understood. It counts as none, and is removed when it is read to be used."""


class Entry(Enum):
    """What stands under the key of a snapshot."""

    NOTHING = auto()
    TOMBSTONE = auto()
    SNAPSHOT = auto()
    """Or anything else, such as a damaged manifest."""


class ManifestStore:
    """Reads, writes and deletes manifests, here and remotely. Thread-safe."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._file_cache = stores.file_cache
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[object, Digest], str] = OrderedDict()
        """By caller and name: others may be shown something else."""

    def local_ref(self, key: SnapshotKey) -> str:
        """The ref of the file cache that the manifest of `key` is kept under."""
        return keys.local_manifest_key(self._file_cache.group_id, key)

    def read_local(self, key: SnapshotKey) -> Manifest:
        """The manifest under `key` on this host. NotFound when there is none; a damaged one is removed."""
        name = self.local_ref(key)
        try:
            data = self._file_cache.get_ref(name)
        except NotFound:
            raise NotFound("no local manifest") from None
        if is_local_tombstone(data):
            raise NotFound("it was deleted")
        try:
            return Manifest.parse_local(data)
        except InvalidArgument as error:
            log.warning("a local manifest is damaged: %s", error)
            if not self._stores.readonly:
                self._file_cache.delete_ref(name)
            raise Damaged(f"the local manifest was damaged ({error})") from error

    def look_local(self, key: SnapshotKey) -> Manifest:
        """As `read_local`, but this does not count as a use, and a damaged manifest stays."""
        try:
            data = self._file_cache.get_ref(self.local_ref(key), use=False)
        except NotFound:
            raise NotFound("no local manifest") from None
        except DataLoss as error:
            raise Damaged(f"the local manifest is damaged ({error.message})") from error
        if is_local_tombstone(data):
            raise Deleted("it was deleted")
        try:
            return Manifest.parse_local(data)
        except InvalidArgument as error:
            raise Damaged(f"the local manifest is damaged ({error.message})") from error

    def remote_name(self, key: SnapshotKey) -> str:
        """What the manifest of `key` is kept under in the remote cache, without its size; it is not asked."""
        return keys.remote_manifest_digest(key, DigestFunction.SHA256).hash

    def keep_local(self, key: SnapshotKey, manifest: Manifest) -> bool:
        """Keep a manifest on this host; whether it was kept. Nothing is replaced where `key` is an id."""
        overwrite = not key.snapshot_id
        return self._file_cache.put_ref(self.local_ref(key), manifest.serialize_local(), overwrite=overwrite)

    def local_entry(self, key: SnapshotKey) -> Entry:
        """What stands under a key on this host."""
        try:
            data = self._file_cache.get_ref(self.local_ref(key))
        except NotFound:
            return Entry.NOTHING
        return Entry.TOMBSTONE if is_local_tombstone(data) else Entry.SNAPSHOT

    def check_unused(self, id_key: SnapshotKey) -> None:
        """FailedPrecondition when the id of this key names a snapshot on this host, or ever did."""
        if self.local_entry(id_key) is not Entry.NOTHING:
            raise taken(id_key)

    def read_remote(self, key: SnapshotKey) -> Manifest:
        """The manifest under `key` in the remote cache.

        NotFound when there is none, `Deleted` when it was deleted, DataLoss when it is no manifest.
        """
        result = self._look(key)
        if result is None:
            raise NotFound("no remote manifest")
        if is_tombstone(result):
            raise Deleted("it was deleted")
        try:
            return Manifest.from_action_result(result, self._stores.server.digest_function)
        except InvalidArgument as error:
            raise DataLoss(f"the remote manifest is damaged: {error.message}") from error

    def remote_entry(self, key: SnapshotKey) -> Entry:
        """What stands under a key in the remote cache, if there is one. Raises as that does."""
        result = self._look(key)
        if result is None:
            return Entry.NOTHING
        return Entry.TOMBSTONE if is_tombstone(result) else Entry.SNAPSHOT

    def is_taken_remotely(self, id_key: SnapshotKey) -> bool:
        """Whether the id of this key names a snapshot in the remote cache, or ever did."""
        return self.remote_entry(id_key) is not Entry.NOTHING

    def before(self, key: SnapshotKey) -> str:
        """A hash of what stands remotely under `key` before it is published to; empty where nothing does.

        That is what this loader last saw there, if it did: another host's manifest that came since then is
        told from ours all the same, when ours is read back.
        """
        with self._lock:
            content = self._remembered.get((current().caller, self._name(key)))
        if content is not None:
            return content
        result = self._look(key)
        return "" if result is None else _content(result)

    def publish(self, key: SnapshotKey, manifest: Manifest, before: str = "") -> None:
        """Write the manifest under `key` in the remote cache; `read_back` tells whether it is there.

        FailedPrecondition when the server refuses to replace what stands.
        """
        result = manifest.to_action_result()
        what = f"the manifest of {key}"
        try:
            update_result(self._stores.server, self._name(key), result, what, replaces=bool(before))
        except FailedPrecondition:
            # Of a server that refuses to replace anything by the same.
            if before != _content(result):
                raise

    def read_back(self, key: SnapshotKey, manifest: Manifest, before: str = "") -> RemoteManifest:
        """What stands under `key` after `publish`: the manifest, or the one that another host wrote since.

        FailedPrecondition when what stood there before still stands, or nothing.
        """
        try:
            stands = self._get(key)
        except NotFound as error:
            words = error.message
        else:
            content = _content(stands)
            is_ours = content == _content(manifest.to_action_result())
            if is_ours or content != before:
                data = stands.SerializeToString(deterministic=True)
                return RemoteManifest(Digest.of(data, self._stores.server.digest_function), is_ours=is_ours)
            words = "what stood there before stands"
        raise FailedPrecondition(
            f"the remote cache accepted the manifest of {key} and does not return it ({words}): it may be "
            "read-only for these credentials, have lost a blob that was just uploaded, call the snapshot too "
            "large, or its action cache keeps too few results. Check the server's limits and permissions"
        )

    def retract(self, id_key: SnapshotKey, manifest: Manifest) -> None:
        """Hide a manifest whose publication failed, in case it arrived and only the answer was lost.

        What another host has written under this id stays, if that can be told.
        """
        # Where nothing stands, an update that timed out may still be on its way.
        stands = None
        with contextlib.suppress(SnaploaderError):
            stands = self._look(id_key)
        if stands is None or _content(stands) == _content(manifest.to_action_result()):
            tombstone = tombstone_result(id_key.snapshot_id, self._stores.clock())
            self._stores.server.update_action_result(self._name(id_key), tombstone)

    def _name(self, key: SnapshotKey) -> Digest:
        return keys.remote_manifest_digest(key, self._stores.server.digest_function)

    def _look(self, key: SnapshotKey) -> ActionResult | None:
        if self._stores.remote is None:
            return None
        try:
            return self._get(key)
        except NotFound:
            return None

    def _get(self, key: SnapshotKey) -> ActionResult:
        name = self._name(key)
        known_as = current().caller, name
        try:
            result = self._stores.server.get_action_result(name)
        except BaseException:
            with self._lock:
                self._remembered.pop(known_as, None)
            raise
        with self._lock:
            self._remembered[known_as] = _content(result)
            self._remembered.move_to_end(known_as)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return result

    def delete(self, snapshot_id: str, instance_name: str, remote: bool | None) -> DeleteResult:
        """See `SnapshotLoader.delete_snapshot`."""
        if remote is None:
            remote = self._stores.remote is not None
        hint = "; delete with remote=False only from this host"
        self._stores.check_may_write("delete", remote=remote, hint=hint)
        key = keys.snapshot_id_key(SnapshotKey(instance_name=instance_name, snapshot_id=snapshot_id))
        wants_remote = remote
        return self._stores.pool.see_through(lambda: self._delete(key, remote=wants_remote))

    def _delete(self, key: SnapshotKey, *, remote: bool) -> DeleteResult:
        snapshot_id = key.snapshot_id
        tombstone = tombstone_result(snapshot_id, self._stores.clock())
        here = self.local_entry(key)
        there = Entry.NOTHING
        if remote:
            there = self._delete_remotely(key, tombstone, is_known=here is not Entry.NOTHING)
        if self._stores.remote is not None and not remote:
            # Others go on using it, and so may this host, which fetches it again then.
            if here is Entry.SNAPSHOT:
                self._file_cache.delete_ref(self.local_ref(key))
        elif Entry.SNAPSHOT in (here, there):
            # Also where there is no local manifest: a reader may be about to put it there.
            try:
                self._file_cache.put_ref(self.local_ref(key), local_tombstone(tombstone))
            except ResourceExhausted as error:
                log.warning("no room to remember that snapshot %r was deleted: %s", snapshot_id, error)
                self._file_cache.delete_ref(self.local_ref(key))
        return DeleteResult(
            snapshot_id,
            deleted_locally=here is Entry.SNAPSHOT,
            deleted_remotely=there is Entry.SNAPSHOT,
            was_deleted=Entry.TOMBSTONE in (here, there),
        )

    def _delete_remotely(self, key: SnapshotKey, tombstone: ActionResult, *, is_known: bool) -> Entry:
        """Replace the remote manifest by a tombstone; what stood there.

        Args:
            is_known: The snapshot is, or was, in the local cache. Then it is also deleted where the server
                shows nothing: it may hide a manifest because a blob of it is gone, until that is uploaded
                again.
        """
        before = self.remote_entry(key)
        if before is Entry.TOMBSTONE or (before is Entry.NOTHING and not is_known):
            return before
        replaces = before is Entry.SNAPSHOT
        what = f"snapshot {key.snapshot_id!r}"
        try:
            update_result(self._stores.server, self._name(key), tombstone, what, replaces=replaces)
        except MAY_ONLY_READ as error:
            if not replaces:
                # Nobody sees it, and nobody with these credentials can have saved it there.
                log.info("%s is not marked as deleted remotely: %s", what, error)
                return before
            error.add_note(
                f"{what} stands, remotely and locally: delete it with credentials that may write to the "
                "action cache, or with remote=False only from this host"
            )
            raise
        # Some servers accept an update from a caller who may not make one, and drop it.
        if replaces and self.remote_entry(key) is Entry.SNAPSHOT:
            raise FailedPrecondition(
                f"the remote cache accepted the deletion of {what} and still returns it: it may be read-only "
                "for these credentials. Nothing was deleted locally"
            )
        return before

    def pinned_before(self, name: str | None) -> Pin | None:
        """The pin that stands under a name before another one is made. Errors as `FileCache.pinned`."""
        if name is not None:
            with contextlib.suppress(NotFound):
                return self._file_cache.pinned(name)
        return None

    @contextlib.contextmanager
    def pinned(
        self, name: str | None, before: Pin | None, digests: Iterable[Digest], refs: Iterable[str]
    ) -> Iterator[None]:
        """Pin a snapshot before it is there to be evicted, around the block that makes it visible.

        If that or the block fails, what was pinned before is again. Where that cannot be done, a note of the
        error says so. No name pins nothing.
        """
        if name is None:
            yield
            return
        try:
            # Even if this fails the new pin may stand, not flushed to disk.
            self._file_cache.pin(name, digests, refs=refs)
            yield
        except BaseException as error:
            try:
                with unbounded():
                    if before is None:
                        self._file_cache.unpin(name)
                    else:
                        self._pin_again(before)
            except SnaploaderError as failure:
                error.add_note(
                    f"what was pinned as {name!r} before may not be so any more: {failure.message}"
                )
            raise

    def _pin_again(self, pin: Pin) -> None:
        known = pin.sizes_bytes >= 0
        digests = [
            # A pin does not keep the function, nor does it matter to one.
            Digest(row.tobytes().hex(), size)
            for row, size in zip(pin.hashes[known], pin.sizes_bytes[known].tolist(), strict=True)
        ]
        self._file_cache.pin(pin.name, digests, hashes=[pin.hashes[~known]], refs=pin.refs)


def cannot_tell(absent: Collection[Digest], error: SnaploaderError) -> str:
    """The warning where the remote store should have `absent` and cannot be asked.

    Readers check that a snapshot is whole, so at worst it is a miss until the store can be asked again.
    """
    return (
        f"{len(absent)} blobs are not in the local cache, and whether they still are in the remote cache "
        f"cannot be told: {error.message}"
    )


def taken(id_key: SnapshotKey) -> SnapshotIdTaken:
    """The error where a snapshot is to get an id that names one, or did."""
    return SnapshotIdTaken(
        f"snapshot id {id_key.snapshot_id!r} is taken: ids are never overwritten, choose another"
    )


def update_result(
    remote: RemoteStore, name: Digest, result: ActionResult, what: str, *, replaces: bool
) -> None:
    """Keep a result in the action cache.

    FailedPrecondition when the server refuses to replace what stands there, if `replaces` says that something
    does. A server whose action cache is write-once may refuse with any code, such as INTERNAL.
    """
    try:
        remote.update_action_result(name, result)
    except (FailedPrecondition, Internal, InvalidArgument, Unimplemented) as error:
        if not replaces:
            raise
        raise FailedPrecondition(
            f"the remote cache refuses to replace {what}, and what stood there before still stands: its "
            "action cache may be write-once, or these credentials may not write to it. Let it take updates, "
            f"or use another server or instance ({error.message})"
        ) from error


def tombstone_result(snapshot_id: str, now_s: float) -> ActionResult:
    """What replaces the manifest of a snapshot that is deleted now, in seconds since the epoch."""
    tombstone = Tombstone(snapshot_id=snapshot_id)
    tombstone.deleted_timestamp.FromNanoseconds(int(now_s * 10**9))
    return result_of(tombstone)


def result_of(metadata: Message) -> ActionResult:
    """A result that holds nothing but one message, in its auxiliary metadata."""
    result = ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(metadata))
    return result


def is_tombstone(result: ActionResult) -> bool:
    """Whether this stands for a snapshot that was deleted. Servers may have added metadata of their own."""
    return any(is_packed(entry, Tombstone) for entry in result.execution_metadata.auxiliary_metadata)


def local_tombstone(result: ActionResult) -> bytes:
    """A tombstone as a value of the local file cache."""
    data = result.SerializeToString(deterministic=True)
    return LocalManifest(action_result=data).SerializeToString(deterministic=True)


def is_local_tombstone(data: bytes) -> bool:
    """Whether a value of the local file cache stands for a snapshot that was deleted."""
    try:
        record = LocalManifest.FromString(data)
        # A manifest always names its digest function; only what does not is worth a second look.
        return not record.digest_function and is_tombstone(ActionResult.FromString(record.action_result))
    except DecodeError:
        return False


def _content(result: ActionResult) -> str:
    """A hash of the files and trees of a result; a server may fill in other fields, or reorder these."""
    files = sorted((file.path, file.digest.hash) for file in result.output_files)
    trees = sorted((tree.path, tree.tree_digest.hash) for tree in result.output_directories)
    return hash_strings(repr(files), repr(trees))
