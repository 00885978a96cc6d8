"""What stands where a snapshot was deleted, so that its id is never used again.

The Remote Execution API has no way to delete an action result. So the manifest under a snapshot's id is
replaced by an ActionResult with nothing but a `snaploader.v1.Tombstone` in its auxiliary metadata. In the
local file cache it stands in a `LocalManifest` without a digest function.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from snaploader._proto import remote_execution_pb2
from snaploader._proto.snaploader_pb2 import LocalManifest, Tombstone
from snaploader.errors import NotFound
from snaploader.formats.manifest import pack_any

NANOSECONDS = 10**9


class Deleted(NotFound):
    """The snapshot was deleted for everybody, whatever copies of its manifest are kept elsewhere."""


def tombstone_result(snapshot_id: str, now_s: float) -> remote_execution_pb2.ActionResult:
    """What replaces the manifest of a snapshot that is deleted now.

    Args:
        now_s: Seconds since the epoch.
    """
    tombstone = Tombstone(snapshot_id=snapshot_id)
    tombstone.deleted_timestamp.FromNanoseconds(int(now_s * NANOSECONDS))
    result = remote_execution_pb2.ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(tombstone))
    return result


def is_tombstone(result: remote_execution_pb2.ActionResult) -> bool:
    """Whether this stands for a snapshot that was deleted. Servers may have added metadata of their own."""
    name = Tombstone.DESCRIPTOR.full_name
    metadata = result.execution_metadata.auxiliary_metadata
    return any(packed.type_url.rpartition("/")[2] == name for packed in metadata)


def local_tombstone(result: remote_execution_pb2.ActionResult) -> bytes:
    """The same as a value of the local file cache."""
    data = result.SerializeToString(deterministic=True)
    return LocalManifest(action_result=data).SerializeToString(deterministic=True)


def is_local_tombstone(data: bytes) -> bool:
    """Whether a value of the local file cache stands for a snapshot that was deleted."""
    try:
        record = LocalManifest.FromString(data)
        # A manifest always names its digest function; only what does not is worth a second look.
        return not record.digest_function and is_tombstone(
            remote_execution_pb2.ActionResult.FromString(record.action_result)
        )
    except DecodeError:
        return False
