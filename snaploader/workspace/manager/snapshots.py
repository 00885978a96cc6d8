"""Snapshots of workspaces: their records in the catalog, and their content in the caches.

Content is saved, found and dropped with the loader, and kept by pins of the file cache. A snapshot is pinned
before its manifest is there, and unpinned after its manifest is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader.blobstore import RemoteStore
from snaploader.digest import Digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKey
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.loader.manifests import Entry
from snaploader.policy import ReadPolicy
from snaploader.workspace.catalog import Reader, Transaction
from snaploader.workspace.events import about_snapshot, add_event
from snaploader.workspace.model import (
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    SnapshotSource,
    SnapshotStatus,
    Workspace,
    new_snapshot_name,
    pin_name,
    runtime_name,
)
from snaploader.workspace.runtime.contents import NO_VOLUMES, VOLUME_PREFIX
from snaploader.workspace.runtime.protocol import Capture

if TYPE_CHECKING:
    from snaploader.workspace.manager.operation import Services

log = logging.getLogger(__name__)


REMOTE_ORPHAN = "remote_orphan"
"""Type of the event of a commit that may be left in a remote cache for ever."""

_PINS = pin_name("")


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot that was saved, and what it took."""

    record: SnapshotRecord
    read_bytes: int = 0
    stored_bytes: int = 0
    uploaded_bytes: int = 0

    def result(self, display_name: str = "", version: int | None = None) -> SnapshotResult:
        """What the caller of the operation that took the snapshot gets."""
        record = self.record
        return SnapshotResult(
            record.workspace_id,
            record.name,
            record.runtime_name,
            display_name or record.display_name,
            version,
            record.created_at,
            record.scope,
            self.read_bytes,
            self.stored_bytes,
            self.uploaded_bytes,
        )


class SnapshotContent:
    """The content of workspaces' snapshots in the caches: saved, found and dropped. Thread-safe."""

    def __init__(self, loader: SnapshotLoader, file_cache: FileCache, instance_name: str) -> None:
        self.loader = loader
        self.file_cache = file_cache
        self.instance_name = instance_name

    def need_remote(self, what: str) -> RemoteStore:
        """The remote cache. FailedPrecondition when there is none."""
        remote = self.loader.remote_cache
        if remote is None:
            raise FailedPrecondition(f"{what} needs a remote cache, and this loader has none: configure one")
        return remote

    # Making

    def save(self, record: SnapshotRecord, capture: Capture) -> Saved:
        """Save what was captured as the snapshot of this record, in the local cache, pinned."""
        result = self.loader.cache_snapshot(
            SnapshotKey(instance_name=self.instance_name),
            files=capture.files,
            chunked_files=capture.chunked_files,
            directories=capture.directories,
            vm_configuration=VMConfiguration(),
            vm_metadata=_metadata(record),
            snapshot_id=record.runtime_name,
            pin=pin_name(record.name),
            remote=False,
        )
        return Saved(
            replace(
                record,
                manifest_ref=self.manifest_ref(record.runtime_name),
                size_bytes=result.size_bytes - result.hole_bytes,
            ),
            read_bytes=sum(file.hashed_bytes for file in result.files)
            + sum(directory.read_bytes for directory in result.directories),
            stored_bytes=result.stored_bytes,
        )

    def upload(self, saved: Saved) -> Saved:
        """Put a commit that was saved here into the remote cache, for everybody to find."""
        result = self.loader.upload_snapshot(self.find(saved.record, ReadPolicy.LOCAL_FIRST))
        record = replace(saved.record, is_remote=True)
        return replace(saved, record=record, uploaded_bytes=result.uploaded_bytes)

    def derive(self, record: SnapshotRecord, origin: Snapshot, *, remote: bool) -> Saved:
        """Make the snapshot of this record from another one, as far as its scope reaches; pinned."""
        names = set(origin.manifest.names)
        if record.scope is Scope.DATA:
            names = {name for name in names if name.startswith(VOLUME_PREFIX) or name == NO_VOLUMES}
        if remote:
            # Before it can be seen anywhere: a commit without a pin was seen nowhere.
            self.file_cache.pin(pin_name(record.name), origin.only(names).digests())
        result = self.loader.derive_snapshot(
            origin,
            snapshot_id=record.runtime_name,
            names=names,
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
        """The snapshot of this record. NotFound when it is not whole anywhere where `policy` looks."""
        return self.loader.get_snapshot_by_id(
            record.runtime_name, instance_name=self.instance_name, read_policy=policy
        )

    def is_pinned(self, record: SnapshotRecord) -> bool:
        """Whether this host keeps content of the snapshot."""
        return pin_name(record.name) in self.file_cache.pins(pin_name(record.name))

    def is_local(self, runtime_name: str) -> bool:
        with suppress(NotFound):
            self.file_cache.get_ref(self.manifest_ref(runtime_name))
            return True
        return False

    def pinned_names(self, workspace_id: str) -> list[str]:
        return [pin.removeprefix(_PINS) for pin in self.file_cache.pins(pin_name(f"{workspace_id}."))]

    def as_saved(self, record: SnapshotRecord) -> SnapshotRecord:
        """The record of a snapshot whose process ended before it could tell; sized by its distinct blobs."""
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
        self.need_remote(f"deleting the committed snapshot {record.name!r}")
        self.loader.manifests.remote_entry(self._key(record.runtime_name))

    def is_remote(self, record: SnapshotRecord) -> bool:
        """Whether the remote cache, if there is one, has the snapshot."""
        if self.loader.remote_cache is None:
            return False
        return self.loader.manifests.remote_entry(self._key(record.runtime_name)) is Entry.SNAPSHOT

    # Removing

    def hide(self, record: SnapshotRecord) -> None:
        """Remove the snapshot's manifest on this host; its blobs stay pinned."""
        self.file_cache.delete_ref(self.manifest_ref(record.runtime_name))

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
        return self.loader.manifests.local_ref(self._key(runtime_name))

    def _key(self, runtime_name: str) -> SnapshotKey:
        return SnapshotKey(instance_name=self.instance_name, snapshot_id=runtime_name)


def _metadata(record: SnapshotRecord) -> VMMetadata:
    """What the snapshot itself says of where it is from."""
    message = VMMetadata(
        vm_id=record.workspace_id,
        snapshot_id=record.runtime_name,
        properties={
            "scope": record.scope.value,
            "source": record.source,
            "kind": record.kind.value,
            "parent": record.parent,
            "display_name": record.display_name,
        },
    )
    message.created_timestamp.FromDatetime(record.created_at)
    return message


def new_record(
    tx: Reader,
    services: Services,
    workspace: Workspace,
    kind: SnapshotKind,
    scope: Scope,
    *,
    source: str = SnapshotSource.MANUAL,
    display_name: str = "",
) -> SnapshotRecord:
    now = services.clock()
    parent = find_snapshot(tx, workspace.current_snapshot)
    if parent is not None and parent.kind is SnapshotKind.PAUSE:
        parent = find_snapshot(tx, parent.parent)  # a pause is temporary
    name = new_snapshot_name(workspace.id, now)
    return SnapshotRecord(
        name,
        workspace.id,
        runtime_name(workspace.id, name),
        kind,
        scope,
        source,
        now,
        SnapshotStatus.PENDING,
        display_name,
        "" if parent is None else parent.name,
    )


def completed(record: SnapshotRecord) -> SnapshotRecord:
    return replace(record, status=SnapshotStatus.COMPLETE)


def find_snapshot(tx: Reader, name: str) -> SnapshotRecord | None:
    """The snapshot of that name; None when the name is empty or there is none."""
    with suppress(NotFound):
        return tx.snapshot(name) if name else None
    return None


def load_state(
    services: Services, workspace: Workspace, name: str
) -> tuple[SnapshotRecord, Snapshot, Snapshot | None]:
    """The snapshot of that name, and what has all but the durable directories under a Data snapshot."""
    with services.catalog.reading() as reader:
        record = reader.snapshot(name)
        base = None if record.scope is Scope.FULL else find_snapshot(reader, workspace.base_snapshot)
    find = services.content.find
    return record, find(record), find(base) if base is not None and base.scope is Scope.FULL else None


def let_go(services: Services, record: SnapshotRecord) -> None:
    """Give up what this host keeps of a snapshot that the workspace has gone on from.

    A pause is removed. A commit is in the remote cache, and may be evicted here. Versions stay.
    """
    if record.kind is SnapshotKind.PAUSE:
        remove_unfinished(services, record)
    elif record.kind is SnapshotKind.COMMIT and record.is_remote:
        services.content.unpin(record)


def remove_unfinished(services: Services, record: SnapshotRecord) -> None:
    """Finish what the catalog says of a snapshot that is on its way out, or of a commit that failed.

    A commit that failed stays known, and its blobs stay pinned, for the next try to find. `is_remote` of it
    says that it may be visible in the remote cache, and is to be taken back there.
    """
    content = services.content
    try:
        if record.kind is SnapshotKind.COMMIT and record.is_remote:
            content.need_remote(f"removing commit {record.name!r}")
            content.loader.delete_snapshot(record.runtime_name, instance_name=content.instance_name)
    finally:
        content.hide(record)
    is_kept = record.status is SnapshotStatus.ORPHANED
    if not is_kept:
        content.unpin(record)
    with services.catalog.transaction() as tx:
        if is_kept:
            tx.put_snapshot(replace(record, is_remote=False))
        else:
            tx.remove_snapshot(record.name)


def forget_remote(tx: Transaction, record: SnapshotRecord, now: datetime) -> None:
    """Give up what the remote cache may have of a commit, and write down what may be left there for ever."""
    tx.put_snapshot(replace(record, is_remote=False))
    add_event(tx, record.workspace_id, REMOTE_ORPHAN, about_snapshot(record), now)
