"""Manifests, and all that stands under the keys of snapshots: the one place that reads and writes it.

On this host a manifest is a ref of the file cache, for other hosts it is a result in the action cache. One
that stands under a snapshot's id is never replaced but by a *tombstone*, when the snapshot is deleted: so an
id that ever named a snapshot is taken for good. The Remote Execution API has no way to delete a result; a
tombstone is an ActionResult with nothing but a `snaploader.v1.Tombstone` in its auxiliary metadata. In the
file cache it stands in a `LocalManifest` without a digest function.

A manifest is written when all that it names is stored, and read back when all that a save writes is
written. Action caches accept an update from a caller who may not make one, and drop it; or drop one result
for another; or hide one of which they lack a blob. Reading back what was published tells.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from google.protobuf.message import DecodeError

from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader._proto.snaploader_pb2 import LocalManifest, Tombstone
from snaploader.blobstore import RemoteStore
from snaploader.digest import Digest, hash_strings
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
from snaploader.filecache import FileCache, Pin
from snaploader.formats.manifest import Manifest, pack_any
from snaploader.keys import SnapshotKey
from snaploader.loader.results import RemoteManifest

log = logging.getLogger(__name__)

MAY_ONLY_READ = (FailedPrecondition, PermissionDenied, Unauthenticated, Unimplemented)
"""What servers answer to a caller who may read action results and not write them. UNAUTHENTICATED is
bazel-remote's with `--allow_unauthenticated_reads`."""

REMOTE_READONLY = "this loader may only read the remote cache (remote_readonly): nothing was published there"

_MAX_REMEMBERED = 1024
"""Keys of which is remembered what stood there remotely when this loader last looked."""


class Deleted(NotFound):
    """The snapshot was deleted for everybody, whatever copies of its manifest are kept elsewhere."""


class Entry(Enum):
    """What stands under the key of a snapshot."""

    NOTHING = auto()
    TOMBSTONE = auto()
    SNAPSHOT = auto()
    """Or anything else, such as a damaged manifest."""


@dataclass(frozen=True, slots=True)
class Before:
    """What stood remotely under a key before a manifest is published there."""

    content: str = ""
    """Which files and trees it names, hashed; empty where nothing stood."""


class ManifestStore:
    """Reads and writes manifests, here and remotely. Thread-safe.

    Args:
        readonly: Leave a damaged manifest where it is.
    """

    def __init__(self, file_cache: FileCache, remote: RemoteStore | None, *, readonly: bool) -> None:
        self._file_cache = file_cache
        self._remote = remote
        self._readonly = readonly
        self._lock = threading.Lock()
        self._remembered: OrderedDict[Digest, str] = OrderedDict()

    # On this host

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
            if not self._readonly:
                self._file_cache.delete_ref(name)
            raise NotFound(f"the local manifest was damaged ({error})") from error

    def keep_local(self, key: SnapshotKey, manifest: Manifest) -> bool:
        """Keep a manifest on this host; whether it was kept. Nothing is replaced where `key` is an id."""
        overwrite = not key.snapshot_id
        return self._file_cache.put_ref(self.local_ref(key), manifest.serialize_local(), overwrite=overwrite)

    def check_unused(self, id_key: SnapshotKey) -> None:
        """FailedPrecondition when the id of this key names a snapshot on this host, or ever did."""
        if self.local_entry(id_key) is not Entry.NOTHING:
            raise taken(id_key)

    def local_entry(self, key: SnapshotKey) -> Entry:
        """What stands under a key on this host."""
        try:
            data = self._file_cache.get_ref(self.local_ref(key))
        except NotFound:
            return Entry.NOTHING
        return Entry.TOMBSTONE if is_local_tombstone(data) else Entry.SNAPSHOT

    def forget_local(self, id_key: SnapshotKey) -> None:
        """Remove what stands under an id on this host, so that the remote manifest is found again."""
        self._file_cache.delete_ref(self.local_ref(id_key))

    def bury_local(self, id_key: SnapshotKey, tombstone: ActionResult) -> None:
        """Replace the local manifest. Also where there is none: a reader may be about to put it there."""
        try:
            self._file_cache.put_ref(self.local_ref(id_key), local_tombstone(tombstone))
        except ResourceExhausted as error:
            log.warning("no room to remember that snapshot %r was deleted: %s", id_key.snapshot_id, error)
            self.forget_local(id_key)

    # Remotely

    def read_remote(self, key: SnapshotKey) -> Manifest | None:
        """The manifest under `key` in the remote cache, or None.

        Raises:
            Deleted: It was deleted.
            DataLoss: It is no manifest.
        """
        if self._remote is None:
            return None
        result = self._look(self._remote, key)
        if result is None:
            return None
        if is_tombstone(result):
            raise Deleted("it was deleted")
        try:
            return Manifest.from_action_result(result, self._remote.digest_function)
        except InvalidArgument as error:
            raise DataLoss(f"the remote manifest is damaged: {error.message}") from error

    def is_taken_remotely(self, id_key: SnapshotKey) -> bool:
        """Whether the id of this key names a snapshot in the remote cache, or ever did."""
        try:
            return self.read_remote(id_key) is not None
        except Deleted:
            return True

    def remote_entry(self, key: SnapshotKey) -> Entry:
        """What stands under a key in the remote cache, if there is one. Raises as that does."""
        result = None if self._remote is None else self._look(self._remote, key)
        if result is None:
            return Entry.NOTHING
        return Entry.TOMBSTONE if is_tombstone(result) else Entry.SNAPSHOT

    def before(self, remote: RemoteStore, key: SnapshotKey) -> Before:
        """What stands under `key` before it is published to.

        That is what this loader last saw there, if it did: another host's manifest that came since then is
        told from ours all the same, when ours is read back.
        """
        name = keys.remote_manifest_digest(key, remote.digest_function)
        with self._lock:
            content = self._remembered.get(name)
        if content is None:
            result = self._look(remote, key)
            content = "" if result is None else _content(result)
        return Before(content)

    def publish(self, remote: RemoteStore, key: SnapshotKey, manifest: Manifest, before: Before) -> None:
        """Write the manifest under `key` in the remote cache; `read_back` tells whether it is there.

        Raises:
            FailedPrecondition: The server refuses to replace what stands.
        """
        result = manifest.to_action_result()
        name = keys.remote_manifest_digest(key, remote.digest_function)
        try:
            update_result(remote, name, result, f"the manifest of {key}", replaces=bool(before.content))
        except FailedPrecondition:
            # Of a server that refuses to replace anything by the same.
            if before.content != _content(result):
                raise

    def read_back(
        self, remote: RemoteStore, key: SnapshotKey, manifest: Manifest, before: Before
    ) -> RemoteManifest:
        """What stands under `key` after `publish`: the manifest, or the one that another host wrote since.

        Raises:
            FailedPrecondition: What stood there before still stands, or nothing.
        """
        words = "it has none"
        try:
            stands = self._get(remote, key)
        except NotFound as error:
            stands, words = None, error.message
        if stands is not None:
            content = _content(stands)
            is_ours = content == _content(manifest.to_action_result())
            if is_ours or content != before.content:
                digest = Digest.of(stands.SerializeToString(deterministic=True), remote.digest_function)
                return RemoteManifest(digest, is_ours=is_ours)
            words = "what stood there before stands"
        raise FailedPrecondition(
            f"the remote cache accepted the manifest of {key} and does not return it ({words}): it may be "
            "read-only for these credentials, have lost a blob that was just uploaded, call the snapshot too "
            "large, or its action cache keeps too few results. Check the server's limits and permissions"
        )

    def retract(self, remote: RemoteStore, id_key: SnapshotKey, manifest: Manifest, now_s: float) -> None:
        """Hide a manifest whose publication failed, in case it arrived and only the answer was lost.

        What another host has written under this id stays, if that can be told.
        """
        # Where nothing stands, an update that timed out may still be on its way.
        stands = None
        with contextlib.suppress(SnaploaderError):
            stands = self._look(remote, id_key)
        if stands is None or _content(stands) == _content(manifest.to_action_result()):
            name = keys.remote_manifest_digest(id_key, remote.digest_function)
            remote.update_action_result(name, tombstone_result(id_key.snapshot_id, now_s))

    def bury_remote(
        self, remote: RemoteStore, id_key: SnapshotKey, tombstone: ActionResult, *, replaces: bool
    ) -> None:
        """Replace the remote manifest. Errors as `update_result`."""
        name = keys.remote_manifest_digest(id_key, remote.digest_function)
        update_result(remote, name, tombstone, f"snapshot {id_key.snapshot_id!r}", replaces=replaces)

    def _look(self, remote: RemoteStore, key: SnapshotKey) -> ActionResult | None:
        try:
            return self._get(remote, key)
        except NotFound:
            return None

    def _get(self, remote: RemoteStore, key: SnapshotKey) -> ActionResult:
        name = keys.remote_manifest_digest(key, remote.digest_function)
        try:
            result = remote.get_action_result(name)
        except BaseException:
            with self._lock:
                self._remembered.pop(name, None)
            raise
        with self._lock:
            self._remembered[name] = _content(result)
            self._remembered.move_to_end(name)
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return result

    # Pins

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
        error says so.

        Args:
            name: None pins nothing.
            before: What stood under the name.
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
        """Put a pin back as it was."""
        known = pin.sizes_bytes >= 0
        digests = [
            # A pin does not keep the function, nor does it matter to one.
            Digest(row.tobytes().hex(), size)
            for row, size in zip(pin.hashes[known], pin.sizes_bytes[known].tolist(), strict=True)
        ]
        self._file_cache.pin(pin.name, digests, hashes=[pin.hashes[~known]], refs=pin.refs)


def taken(id_key: SnapshotKey) -> FailedPrecondition:
    """The error where a snapshot is to get an id that names one, or did."""
    return FailedPrecondition(
        f"snapshot id {id_key.snapshot_id!r} is taken: ids are never overwritten, choose another"
    )


def update_result(
    remote: RemoteStore, name: Digest, result: ActionResult, what: str, *, replaces: bool
) -> None:
    """Keep a result in the action cache.

    Args:
        what: What it is, for messages.
        replaces: Something else stands there.

    Raises:
        FailedPrecondition: The server refuses to replace what stands. One whose action cache is write-once
            may do so with any code, such as INTERNAL.
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
    """What replaces the manifest of a snapshot that is deleted now.

    Args:
        now_s: Seconds since the epoch.
    """
    tombstone = Tombstone(snapshot_id=snapshot_id)
    tombstone.deleted_timestamp.FromNanoseconds(int(now_s * 10**9))
    result = ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(tombstone))
    return result


def is_tombstone(result: ActionResult) -> bool:
    """Whether this stands for a snapshot that was deleted. Servers may have added metadata of their own."""
    name = Tombstone.DESCRIPTOR.full_name
    metadata = result.execution_metadata.auxiliary_metadata
    return any(packed.type_url.rpartition("/")[2] == name for packed in metadata)


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
