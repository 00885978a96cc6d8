"""Saving, the remote part: make a snapshot complete in the remote store, then visible.

Order: chunks and plain files, then directories, then trees, then the manifest. Every blob is asked
for, also those that did not change: a chunk that is served from local caches only grows old remotely,
and would one day be missing from a snapshot that was saved since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeAlias

from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest
from snaploader.dirtree import DirectoryTree, child_directories
from snaploader.errors import DataLoss, FailedPrecondition, NotFound, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKey
from snaploader.loader.progress import ProgressCallback, ProgressMeter
from snaploader.manifest import Manifest

SMALL_BLOB_BYTES = 4 << 20
"""Blobs up to this size are uploaded from memory, bigger ones from their file."""

_Content: TypeAlias = "tuple[dict[str, str], dict[str, str]]"
"""Hashes of plain files, and of trees, by name."""

BlobReader = Callable[[Digest], "Buffer | str"]
"""Bytes of a blob, or the path of a file that holds it."""


def taken(id_key: SnapshotKey) -> str:
    """What an error says where a snapshot is to get an id that names one, or did."""
    return f"snapshot id {id_key.snapshot_id!r} is taken: ids are never overwritten, choose another"


def upload_source(file_cache: FileCache, digest: Digest) -> Buffer | str:
    """A blob of the file cache, for `upload_blobs`. NotFound or DataLoss when it is gone or damaged."""
    return file_cache.path(digest) if digest.size_bytes > SMALL_BLOB_BYTES else file_cache.read(digest)


def upload_blobs(
    remote: RemoteStore,
    digests: Collection[Digest],
    read: BlobReader,
    progress: ProgressCallback | None,
    sent: list[Digest] | None = None,
) -> TransferStatistics:
    """Upload those of `digests` that the store lacks.

    Args:
        sent: Takes in what is handed to the store, for when that fails half-way.
    """
    missing = remote.find_missing(digests)
    meter = ProgressMeter(progress, "upload", sum(digest.size_bytes for digest in missing))

    def uploads() -> Iterator[Upload]:
        for digest in sorted(missing):
            try:
                source = read(digest)
            except (NotFound, DataLoss) as error:
                raise type(error)(
                    f"cannot complete the snapshot remotely: blob {digest} is missing there and here "
                    f"({error.message}). Save the whole state again from its files"
                ) from error
            if sent is not None:
                sent.append(digest)
            yield Upload(digest, source)
            meter.add(digest.size_bytes)

    return remote.write_many(uploads()) if missing else TransferStatistics()


def upload_child_directories(
    remote: RemoteStore, trees: Iterable[DirectoryTree], sent: list[Digest] | None = None
) -> TransferStatistics:
    """Upload the Directories in Trees as blobs of their own, those that the store lacks.

    Nothing reads them. But some servers, such as buildbox-casd, call a result incomplete without them.
    """
    uploaded = TransferStatistics()
    for tree in trees:
        directories = child_directories(tree)
        uploaded += upload_blobs(remote, directories, directories.__getitem__, None, sent)
    return uploaded


def publish_manifest(remote: RemoteStore, key: SnapshotKey, manifest: Manifest) -> bool:
    """Write the manifest under `key`, and look whether it is there to be read.

    Some servers accept an update from a caller who may not make one, and drop it; hence the look.

    Returns:
        Whether it stands. If not, another host has written its own meanwhile.

    Raises:
        FailedPrecondition: What stood there before still stands, or nothing.
    """
    name = keys.remote_manifest_digest(key, remote.digest_function)
    before = _content(remote, name)
    remote.update_action_result(name, manifest.to_action_result())
    stands = _content(remote, name)
    if stands == _content_of(manifest):
        return True
    if stands is None or stands == before:
        raise FailedPrecondition(
            f"the remote cache accepted the manifest of {key} and does not return it: it may be read-only "
            "for these credentials, or have lost a blob that was just uploaded"
        )
    return False


def retract_manifest(
    remote: RemoteStore, id_key: SnapshotKey, manifest: Manifest, tombstone: ActionResult
) -> None:
    """Make sure that a manifest is not to be seen whose publication failed, but perhaps only its answer.

    What another host has written under this id stays, if that can be told.
    """
    name = keys.remote_manifest_digest(id_key, remote.digest_function)
    # Where nothing stands, an update that timed out may still be on its way.
    stands = None
    with contextlib.suppress(SnaploaderError):
        stands = _content(remote, name)
    if stands in (None, _content_of(manifest)):
        remote.update_action_result(name, tombstone)


def _content_of(manifest: Manifest) -> _Content:
    trees = {**manifest.chunked_files, **manifest.directories}
    return (
        {name: file.digest.hash for name, file in manifest.files.items()},
        {name: tree.hash for name, tree in trees.items()},
    )


def _content(remote: RemoteStore, name: Digest) -> _Content | None:
    """What the files and trees of a result hash to; a server may fill in other fields, or reorder these."""
    try:
        result = remote.get_action_result(name)
    except NotFound:
        return None
    return (
        {file.path: file.digest.hash for file in result.output_files},
        {directory.path: directory.tree_digest.hash for directory in result.output_directories},
    )
