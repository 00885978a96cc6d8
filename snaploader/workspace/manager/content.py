"""Content of workspaces' snapshots: saved, found and dropped with the loader, kept by pins of the file cache.

A snapshot is pinned before its manifest is there, and unpinned after its manifest is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from snaploader import keys
from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader.blobstore import RemoteStore
from snaploader.digest import Digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKey
from snaploader.loader import SaveResult, Snapshot, SnapshotLoader
from snaploader.policy import ReadPolicy
from snaploader.workspace.model import Scope, SnapshotRecord
from snaploader.workspace.names import pin_name
from snaploader.workspace.runtime.contents import NO_VOLUMES, VOLUME_PREFIX
from snaploader.workspace.runtime.protocol import Capture

log = logging.getLogger(__name__)

_PINS = pin_name("")
_CAPTURED = ".captured"
"""Ends the loader's name of a commit before it is in the remote cache."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot that was saved, and what it took."""

    record: SnapshotRecord
    read_bytes: int = 0
    stored_bytes: int = 0
    uploaded_bytes: int = 0


class SnapshotContent:
    """Thread-safe.

    Args:
        instance_name: Of the remote cache; part of every snapshot's key.
    """

    def __init__(self, loader: SnapshotLoader, file_cache: FileCache, instance_name: str) -> None:
        self.loader = loader
        self.file_cache = file_cache
        self.instance_name = instance_name

    @property
    def remote(self) -> RemoteStore | None:
        """The remote cache, if there is one."""
        return self.loader.remote_cache

    def need_remote(self, what: str) -> RemoteStore:
        """The remote cache. FailedPrecondition when there is none."""
        if self.remote is None:
            raise FailedPrecondition(f"{what} needs a remote cache, and this loader has none: configure one")
        return self.remote

    # Making

    def save(self, record: SnapshotRecord, capture: Capture, runtime_name: str = "") -> Saved:
        """Save what was captured as the snapshot of this record, in the local cache, pinned.

        Args:
            runtime_name: What the loader is to call it; by default what the record says.
        """
        result = self.loader.cache_snapshot(
            SnapshotKey(instance_name=self.instance_name),
            files=capture.files,
            chunked_files=capture.chunked_files,
            directories=capture.directories,
            vm_configuration=VMConfiguration(),
            vm_metadata=_metadata(record),
            snapshot_id=runtime_name or record.runtime_name,
            pin=pin_name(record.name),
            remote=False,
        )
        return Saved(
            replace(
                record,
                manifest_ref=self.manifest_ref(record.runtime_name),
                size_bytes=result.size_bytes - result.hole_bytes,
            ),
            read_bytes=_read_bytes(result),
            stored_bytes=result.stored_bytes,
        )

    def save_for_upload(self, record: SnapshotRecord, capture: Capture) -> Saved:
        """Save what was captured under another name than the record's, which `publish` gives it."""
        return self.save(record, capture, record.runtime_name + _CAPTURED)

    def publish(self, record: SnapshotRecord, origin: Snapshot | None = None) -> Saved:
        """Put a commit into the remote cache and show it under its name, there and here.

        It is pinned before, so that a commit without a pin cannot have been seen anywhere.

        Args:
            origin: What to make it from; by default what `save_for_upload` saved.
        """
        if origin is None:
            origin = self._find(record.runtime_name + _CAPTURED, ReadPolicy.LOCAL_FIRST)
        part = origin.only(_names(origin, record.scope))
        self.file_cache.pin(pin_name(record.name), part.digests())
        saved = self.derive(record, origin, remote=True)
        self.file_cache.delete_ref(self.manifest_ref(record.runtime_name + _CAPTURED))
        return saved

    def flush(self) -> None:
        """Have everything saved so far on disk: from now on it survives a power failure. May take seconds."""
        self.file_cache.sync()

    def derive(self, record: SnapshotRecord, origin: Snapshot, *, remote: bool) -> Saved:
        """Make the snapshot of this record from another one, as far as its scope reaches; pinned."""
        result = self.loader.derive_snapshot(
            origin,
            snapshot_id=record.runtime_name,
            names=_names(origin, record.scope),
            vm_metadata=_metadata(record),
            pin=pin_name(record.name),
            remote=remote,
        )
        return Saved(
            replace(record, manifest_ref=self.manifest_ref(record.runtime_name), is_remote=remote),
            uploaded_bytes=result.uploaded_bytes,
        )

    # Finding

    def find(self, record: SnapshotRecord, policy: ReadPolicy = ReadPolicy.LOCAL_FIRST) -> Snapshot:
        """The snapshot of this record, if nothing of it is missing.

        Raises:
            NotFound: It is not whole anywhere where `policy` looks.
        """
        return self._find(record.runtime_name, policy)

    def _find(self, runtime_name: str, policy: ReadPolicy) -> Snapshot:
        return self.loader.get_snapshot_by_id(
            runtime_name, instance_name=self.instance_name, read_policy=policy
        )

    def is_pinned(self, record: SnapshotRecord) -> bool:
        """Whether this host keeps content of the snapshot."""
        return pin_name(record.name) in self.file_cache.pins(pin_name(record.name))

    def is_local(self, runtime_name: str) -> bool:
        """Whether the snapshot's manifest is in the local cache."""
        try:
            self.file_cache.get_ref(self.manifest_ref(runtime_name))
        except NotFound:
            return False
        return True

    def pinned_names(self, workspace_id: str) -> list[str]:
        """Names of all snapshots of a workspace that are pinned on this host."""
        return [pin.removeprefix(_PINS) for pin in self.file_cache.pins(pin_name(f"{workspace_id}."))]

    def as_saved(self, record: SnapshotRecord) -> SnapshotRecord:
        """The record of a snapshot that was saved by a process that ended before it could tell.

        Its size is that of the distinct blobs.
        """
        sizes_bytes = self.file_cache.pinned(pin_name(record.name)).sizes_bytes
        return replace(
            record,
            manifest_ref=self.manifest_ref(record.runtime_name),
            size_bytes=int(np.maximum(sizes_bytes, 0).sum()),
        )

    def uploaded(self, record: SnapshotRecord) -> frozenset[Digest]:
        """The pinned blobs of a snapshot that the remote cache holds."""
        remote = self.need_remote("telling what was uploaded")
        try:
            pin = self.file_cache.pinned(pin_name(record.name))
        except (NotFound, DataLoss) as error:
            log.warning("what a failed commit has uploaded is not known: %s", error)
            return frozenset()
        function = remote.digest_function
        digests = {
            Digest(row.tobytes().hex(), size, function)
            for row, size in zip(pin.hashes, pin.sizes_bytes.tolist(), strict=True)
            if size >= 0
        }
        return frozenset(digests - remote.find_missing(digests))

    def check_remote(self, record: SnapshotRecord) -> None:
        """Raise whatever the remote cache raises when it is asked for a snapshot; its absence is fine."""
        remote = self.need_remote(f"deleting the committed snapshot {record.name!r}")
        key = keys.snapshot_id_key(self._key(record.runtime_name))
        try:
            remote.get_action_result(keys.remote_manifest_digest(key, remote.digest_function))
        except NotFound:
            return

    # Removing

    def withdraw(self, record: SnapshotRecord) -> None:
        """Take the snapshot out of the remote cache for everybody, and its manifest out of this host's."""
        try:
            self.loader.delete_snapshot(record.runtime_name, instance_name=self.instance_name)
        finally:
            self.hide(record)

    def hide(self, record: SnapshotRecord) -> None:
        """Remove the snapshot's manifests on this host; its blobs stay pinned."""
        for runtime_name in (record.runtime_name + _CAPTURED, record.runtime_name):
            self.file_cache.delete_ref(self.manifest_ref(runtime_name))

    def drop(self, record: SnapshotRecord) -> None:
        """Let go of the snapshot on this host. What others share stays."""
        self.hide(record)
        self.unpin(record)

    def unpin(self, record: SnapshotRecord) -> None:
        """Leave the snapshot to eviction, on this host."""
        self.file_cache.unpin(pin_name(record.name))

    def drop_unmanaged(self, names: Iterable[str]) -> None:
        """Let go of snapshots that the catalog does not know, by their names."""
        for name in names:
            pin = pin_name(name)
            with suppress(NotFound, DataLoss):
                for ref in self.file_cache.pinned(pin).refs:
                    self.file_cache.delete_ref(ref)
            self.file_cache.unpin(pin)

    def manifest_ref(self, runtime_name: str) -> str:
        """Key of the snapshot's manifest in the local cache."""
        key = keys.snapshot_id_key(self._key(runtime_name))
        return keys.local_manifest_key(self.file_cache.group_id, key)

    def _key(self, runtime_name: str) -> SnapshotKey:
        return SnapshotKey(instance_name=self.instance_name, snapshot_id=runtime_name)


def _names(snapshot: Snapshot, scope: Scope) -> set[str]:
    """What a snapshot of that scope takes of a larger one."""
    names = set(snapshot.manifest.names)
    if scope is Scope.DATA:
        names = {name for name in names if name.startswith(VOLUME_PREFIX) or name == NO_VOLUMES}
    return names


def _metadata(record: SnapshotRecord) -> VMMetadata:
    """What the snapshot itself says of where it is from."""
    message = VMMetadata(
        vm_id=record.workspace_id,
        snapshot_id=record.runtime_name,
        properties={
            "scope": record.scope.value,
            "source": record.source.value,
            "kind": record.kind.value,
            "parent": record.parent,
            "display_name": record.display_name,
        },
    )
    message.created_timestamp.FromDatetime(record.created_at)
    return message


def _read_bytes(result: SaveResult) -> int:
    return sum(file.hashed_bytes for file in result.files) + sum(
        directory.read_bytes for directory in result.directories
    )
