"""Deleting a snapshot by its id: the remote reference, then the local one. Blobs age out by themselves.

That is the reverse of the order of writing. Whatever fails or is killed in between, the next attempt does
the rest. As long as the remote part fails nothing is deleted locally either, so a snapshot is not lost
here that others still see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader.blobstore import RemoteStore
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
)
from snaploader.keys import SnapshotKey
from snaploader.loader.manifests import (
    MAY_ONLY_READ,
    REMOTE_READONLY,
    Entry,
    ManifestStore,
    tombstone_result,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """What `delete_snapshot` found and did."""

    snapshot_id: str
    deleted_locally: bool
    """A manifest stood in the file cache, and no longer does."""
    deleted_remotely: bool
    """A manifest stood in the remote cache, and no longer does, for any host."""
    was_deleted: bool
    """An earlier call had deleted it, at least in part."""

    @property
    def found(self) -> bool:
        """Whether there was anything: the snapshot, or what is left of one that was deleted."""
        return self.deleted_locally or self.deleted_remotely or self.was_deleted


class SnapshotDeleter:
    """Does the deleting for a loader. Thread-safe, stateless between calls.

    Args:
        readonly: Refuse to delete.
        remote_readonly: Refuse to delete remotely.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        manifests: ManifestStore,
        remote: RemoteStore | None,
        *,
        readonly: bool,
        remote_readonly: bool,
        clock: Callable[[], float],
    ) -> None:
        self._manifests = manifests
        self._remote = remote
        self._readonly = readonly
        self._remote_readonly = remote_readonly
        self._clock = clock

    def delete(self, snapshot_id: str, instance_name: str, remote: bool | None) -> DeleteResult:
        """See `SnapshotLoader.delete_snapshot`."""
        if self._readonly:
            raise FailedPrecondition("this loader is read-only: it cannot delete snapshots")
        if remote and self._remote is None:
            raise InvalidArgument("a remote delete was asked for and the loader has no remote cache")
        if self._remote is not None and remote is not False and self._remote_readonly:
            raise FailedPrecondition(f"{REMOTE_READONLY}; delete with remote=False only from this host")
        key = keys.snapshot_id_key(SnapshotKey(instance_name=instance_name, snapshot_id=snapshot_id))
        tombstone = tombstone_result(snapshot_id, self._clock())
        here = self._manifests.local_entry(key)
        there = Entry.NOTHING
        if self._remote is not None and remote is not False:
            is_known = here is not Entry.NOTHING
            there = self._delete_remotely(self._remote, key, tombstone, is_known=is_known)
        if self._remote is not None and remote is False:
            # Others go on using it, and so may this host, which fetches it again then.
            if here is Entry.SNAPSHOT:
                self._manifests.forget_local(key)
        elif Entry.SNAPSHOT in (here, there):
            self._manifests.bury_local(key, tombstone)
        return DeleteResult(
            snapshot_id,
            deleted_locally=here is Entry.SNAPSHOT,
            deleted_remotely=there is Entry.SNAPSHOT,
            was_deleted=Entry.TOMBSTONE in (here, there),
        )

    def _delete_remotely(
        self, remote: RemoteStore, key: SnapshotKey, tombstone: ActionResult, *, is_known: bool
    ) -> Entry:
        """Replace the remote manifest by a tombstone; returns what stood there.

        Args:
            is_known: The snapshot is, or was, in the local cache. Then it is also deleted where the server
                shows nothing: it may hide a manifest because a blob of it is gone, until that is uploaded
                again.
        """
        before = self._manifests.remote_entry(key)
        if before is Entry.TOMBSTONE or (before is Entry.NOTHING and not is_known):
            return before
        try:
            self._manifests.bury_remote(remote, key, tombstone, replaces=before is Entry.SNAPSHOT)
        except MAY_ONLY_READ as error:
            if before is Entry.NOTHING:
                # Nobody sees it, and nobody with these credentials can have saved it there.
                log.info("snapshot %r is not marked as deleted remotely: %s", key.snapshot_id, error)
                return before
            error.add_note(
                f"snapshot {key.snapshot_id!r} stands, remotely and locally: delete it with credentials that "
                "may write to the action cache, or with remote=False only from this host"
            )
            raise
        # Some servers accept an update from a caller who may not make one, and drop it.
        if before is Entry.SNAPSHOT and self._manifests.remote_entry(key) is Entry.SNAPSHOT:
            raise FailedPrecondition(
                f"the remote cache accepted the deletion of snapshot {key.snapshot_id!r} and still returns "
                "it: it may be read-only for these credentials. Nothing was deleted locally"
            )
        return before
