"""Saving, the remote part: make a snapshot complete in the remote store, then visible.

Order: chunks and plain files, then directories, then trees, then the manifest. Every blob is asked
for, also those that did not change: a chunk that is served from local caches only grows old remotely,
and would one day be missing from a snapshot that was saved since.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeAlias

from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    Unimplemented,
)
from snaploader.filecache import FileCache
from snaploader.formats.chunktable import MAX_CHUNK_SIZE
from snaploader.formats.dirtree import DirectoryTree
from snaploader.formats.dirtreecodec import child_directories
from snaploader.formats.manifest import Manifest
from snaploader.keys import SnapshotKey
from snaploader.loader.results import ProgressCallback, ProgressMeter, RemoteManifest

log = logging.getLogger(__name__)

SMALL_BLOB_BYTES = 4 << 20
"""Blobs up to this size are uploaded from memory, bigger ones from their file."""

SAMPLED_BLOBS = 4
SAMPLED_BYTES = 2 << 20
"""How much is read at most of what a server says it has, at each upload of chunks and files, and of trees."""

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
    *,
    sampled: bool = True,
) -> TransferStatistics:
    """Upload those of `digests` that the store lacks, and read a few of the others to see that it has them.

    Some servers answer from an index that outlives the blobs. Where a sample is wrong, no answer is trusted:
    all are uploaded.

    Args:
        sent: Takes in what is handed to the store, for when that fails half-way.
        sampled: Whether to read that sample.

    Raises:
        DataLoss: The server says that it has a blob, and cannot give it even after it was uploaded.
    """
    missing = remote.find_missing(digests)
    meter = ProgressMeter(progress, "upload", sum(digest.size_bytes for digest in missing))

    def uploads(wanted: Iterable[Digest]) -> Iterator[Upload]:
        for digest in sorted(wanted):
            try:
                source = read(digest)
            except (NotFound, DataLoss) as error:
                raise type(error)(
                    f"cannot complete the snapshot remotely: blob {digest} is missing there and here "
                    f"({error.message}). Save the whole state again from its files"
                ) from error
            if sent is not None:
                sent.append(digest)
            yield Upload(digest, source, verified=True)
            meter.add(digest.size_bytes)

    uploaded = remote.write_many(uploads(missing)) if missing else TransferStatistics()
    claimed = [digest for digest in digests if digest not in missing and digest.size_bytes]
    sample = _sample(claimed) if sampled else []
    error = _read_error(remote, sample)
    if error is None:
        return uploaded
    log.warning("the remote cache says that it has a blob and cannot give it, so all are uploaded: %s", error)
    meter = ProgressMeter(progress, "upload", sum(digest.size_bytes for digest in claimed))
    uploaded += remote.write_many(uploads(claimed))
    error = _read_error(remote, sample)
    if error is None:
        return uploaded
    raise DataLoss(
        "the remote cache says that it has blobs of the snapshot and cannot give them, even after they were "
        f"uploaded again: its index is wrong, and must be rebuilt on the server ({error.message})"
    ) from error


def _sample(claimed: Sequence[Digest]) -> list[Digest]:
    """A few blobs at random, so that one save after the other looks at different ones.

    At most `SAMPLED_BLOBS` of `SAMPLED_BYTES` together; where all are larger than that, one.
    """
    chance = random.SystemRandom()
    candidates = chance.sample(claimed, min(len(claimed), 16 * SAMPLED_BLOBS))
    sample: list[Digest] = []
    for digest in candidates:
        if sum(other.size_bytes for other in sample) + digest.size_bytes <= SAMPLED_BYTES:
            sample.append(digest)
    one = [digest for digest in candidates if digest.size_bytes <= MAX_CHUNK_SIZE]
    return sample[:SAMPLED_BLOBS] or one[:1]


def _read_error(remote: RemoteStore, sample: Collection[Digest]) -> SnaploaderError | None:
    """Why one of these blobs cannot be read, although the server says that it has it."""
    try:
        if sample:
            remote.read_many(sample, lambda *_: None)
    except (NotFound, DataLoss) as error:
        return error
    return None


def upload_child_directories(
    remote: RemoteStore, trees: Iterable[DirectoryTree], sent: list[Digest] | None = None
) -> TransferStatistics:
    """Upload the Directories in Trees as blobs of their own, those that the store lacks.

    Nothing reads them. But some servers, such as buildbox-casd, call a result incomplete without them.
    """
    uploaded = TransferStatistics()
    for tree in trees:
        directories = child_directories(tree)
        uploaded += upload_blobs(remote, directories, directories.__getitem__, None, sent, sampled=False)
    return uploaded


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


def publish_manifest(remote: RemoteStore, key: SnapshotKey, manifest: Manifest) -> RemoteManifest:
    """Write the manifest under `key`, and look whether it is there to be read.

    Some servers accept an update from a caller who may not make one, and drop it; hence the look.

    Returns:
        What stands there: this manifest, or the one that another host has written meanwhile.

    Raises:
        FailedPrecondition: What stood there before still stands, or nothing.
    """
    name = keys.remote_manifest_digest(key, remote.digest_function)
    ours = _content_of(manifest)
    before = _standing(remote, name)
    try:
        what = f"the manifest of {key}"
        update_result(remote, name, manifest.to_action_result(), what, replaces=before is not None)
    except FailedPrecondition:
        # Of a server that refuses to replace anything by the same.
        if before is None or _content(before) != ours:
            raise
    words = "it has none"
    try:
        stands: ActionResult | None = remote.get_action_result(name)
    except NotFound as error:
        stands, words = None, error.message
    if stands is not None and _content(stands) == ours:
        return RemoteManifest(_digest_of(stands, remote), is_ours=True)
    if stands is None or (before is not None and _content(stands) == _content(before)):
        words = words if stands is None else "what stood there before stands"
        raise FailedPrecondition(
            f"the remote cache accepted the manifest of {key} and does not return it ({words}): it may be "
            "read-only for these credentials, have lost a blob that was just uploaded, or call the snapshot "
            "too large. Check the server's limits and permissions"
        )
    return RemoteManifest(_digest_of(stands, remote), is_ours=False)


def holds_version(remote: RemoteStore, key: SnapshotKey) -> bool:
    """Whether the version that `key` carries has an entry in the action cache, whatever it says."""
    return _standing(remote, keys.remote_version_digest(key, remote.digest_function)) is not None


def check_kept(remote: RemoteStore, published: Iterable[SnapshotKey], versioned: SnapshotKey | None) -> None:
    """Look once more for everything that a save relies on, after all of it was written.

    Args:
        published: Keys of manifests that were there a moment ago.
        versioned: A key whose version was there when the save began; None when there was none.

    Raises:
        FailedPrecondition: The action cache has dropped one for another: nobody can load the snapshot.
    """
    lost = [
        f"the manifest of {key}"
        for key in published
        if _standing(remote, keys.remote_manifest_digest(key, remote.digest_function)) is None
    ]
    if versioned is not None and not holds_version(remote, versioned):
        lost.append(f"the version of {versioned}")
    if lost:
        raise FailedPrecondition(
            f"the remote cache returned {lost[0]} during this save and does not have it any more: its action "
            "cache keeps too few results, and nobody can load the snapshot from it. Raise that cache's size"
        )


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
        stands = _standing(remote, name)
    if stands is None or _content(stands) == _content_of(manifest):
        remote.update_action_result(name, tombstone)


def _content_of(manifest: Manifest) -> _Content:
    trees = {**manifest.chunked_files, **manifest.directories}
    return (
        {name: file.digest.hash for name, file in manifest.files.items()},
        {name: tree.hash for name, tree in trees.items()},
    )


def _standing(remote: RemoteStore, name: Digest) -> ActionResult | None:
    try:
        return remote.get_action_result(name)
    except NotFound:
        return None


def _digest_of(result: ActionResult, remote: RemoteStore) -> Digest:
    return Digest.of(result.SerializeToString(deterministic=True), remote.digest_function)


def _content(result: ActionResult) -> _Content:
    """What the files and trees of a result hash to; a server may fill in other fields, or reorder these."""
    return (
        {file.path: file.digest.hash for file in result.output_files},
        {directory.path: directory.tree_digest.hash for directory in result.output_directories},
    )
