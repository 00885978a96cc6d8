"""Saving, the remote part: make a snapshot complete in the remote store, then visible.

Order: chunks and plain files, then trees, then the manifest. Every blob is asked for, also those
that did not change: a chunk that is served from local caches only grows old remotely, and would one
day be missing from a snapshot that was saved since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from snaploader import keys
from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound
from snaploader.keys import SnapshotKey
from snaploader.loader.progress import ProgressCallback, ProgressMeter
from snaploader.manifest import Manifest

BlobReader = Callable[[Digest], "Buffer | str"]
"""Bytes of a blob, or the path of a file that holds it."""


def upload_blobs(
    remote: RemoteStore,
    digests: Collection[Digest],
    read: BlobReader,
    progress: ProgressCallback | None,
) -> TransferStatistics:
    """Upload those of `digests` that the store lacks."""
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
            yield Upload(digest, source)
            meter.add(digest.size_bytes)

    return remote.write_many(uploads()) if missing else TransferStatistics()


def publish_manifest(remote: RemoteStore, key: SnapshotKey, manifest: Manifest) -> None:
    """Write the manifest under `key`, and make sure that it is there to be read.

    Some servers accept an update from a caller who may not make one, and drop it; hence the look.
    What comes back may differ in fields a server fills in, so only what it names is compared.
    """
    name = keys.remote_manifest_digest(key, remote.digest_function)
    remote.update_action_result(name, manifest.to_action_result())
    try:
        stands = remote.get_action_result(name)
    except NotFound as error:
        raise FailedPrecondition(
            "the remote cache accepted the manifest and does not return it: it may be read-only for "
            f"these credentials, or have lost one of the blobs just uploaded ({error.message})"
        ) from error
    theirs = {directory.path: directory.tree_digest.hash for directory in stands.output_directories}
    ours = {name: digest.hash for name, digest in manifest.chunked_files.items()}
    if not theirs.keys() >= ours.keys():
        raise FailedPrecondition(
            "the remote cache returns another manifest than the one just written: it may be read-only "
            "for these credentials"
        )
