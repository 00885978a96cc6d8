"""Uploading what a snapshot needs, so that it is complete in the remote store before its manifest is written.

Order: chunks and plain files, then directories, then trees. Every blob is asked for, also those that did
not change: a chunk that is served from local caches only grows old remotely, and would one day be missing
from a snapshot that was saved since.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain

from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest
from snaploader.errors import (
    DataLoss,
    NotFound,
    SnaploaderError,
)
from snaploader.filecache import FileCache
from snaploader.formats.chunktable import MAX_CHUNK_SIZE
from snaploader.formats.digests import DigestArray
from snaploader.formats.dirtree import DirectoryTree, child_directories
from snaploader.loader.results import ProgressCallback, ProgressMeter

log = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 4 << 20
"""Blobs up to this size are uploaded from memory, bigger ones from their file."""

SAMPLED_BLOBS = 4
SAMPLED_BYTES = 2 << 20
"""How much is read at most of what a server says it has, at each save."""

ONE_BATCH_BYTES = 1 << 20
ONE_BATCH_BLOBS = 256
"""Up to this much is uploaded as one batch; more in steps, so that a tree comes after its chunks."""

BlobReader = Callable[[Digest], "Buffer | str"]
"""Bytes of a blob, or the path of a file that holds it."""


def upload_source(file_cache: FileCache, digest: Digest) -> Buffer | str:
    """Read a blob of the file cache, or name its file if it is big. NotFound or DataLoss when it is lost."""
    return file_cache.path(digest) if digest.size_bytes > _IN_MEMORY_BYTES else file_cache.read(digest)


def upload_blobs(
    remote: RemoteStore,
    blobs: DigestArray,
    trees: Collection[Digest],
    directories: Iterable[DirectoryTree],
    read: BlobReader,
    progress: ProgressCallback | None,
    sent: list[Digest] | None = None,
    *,
    sampled: bool,
) -> TransferStatistics:
    """Upload the blobs of a snapshot that the store lacks, and read a few others to see that it has them.

    Some servers answer from an index that outlives the blobs. Where a sample is wrong, no answer is trusted:
    all are uploaded.

    The Directories in the Trees of directories are uploaded too, as blobs of their own. Nothing reads them,
    but some servers, such as buildbox-casd, call a result incomplete without them.

    Args:
        blobs: All that the snapshot needs, distinct.
        trees: Those of them that are trees.
        read: Reads one of them.
        sent: Takes in what is handed to the store, for when that fails half-way.
        sampled: Whether to read that sample.

    Raises:
        DataLoss: The server says that it has a blob, and cannot give it even after it was uploaded.
    """
    children: dict[Digest, bytes] = {}
    for directory in directories:
        children |= child_directories(directory)
    wanted = blobs
    if children:
        wanted = DigestArray.joined([blobs, DigestArray.of(children, blobs.function)], blobs.function)
    missing = remote.find_missing(wanted)

    def uploads(digests: Iterable[Digest], meter: ProgressMeter) -> Iterator[Upload]:
        for digest in digests:
            try:
                source = children[digest] if digest in children else read(digest)
            except (NotFound, DataLoss) as error:
                raise type(error)(
                    f"cannot complete the snapshot remotely: blob {digest} is missing there and here "
                    f"({error.message}). Save the whole state again from its files"
                ) from error
            if sent is not None:
                sent.append(digest)
            yield Upload(digest, source, verified=True)
            meter.add(digest.size_bytes)

    def upload(digests: Collection[Digest]) -> TransferStatistics:
        total = sum(digest.size_bytes for digest in digests)
        meter = ProgressMeter(progress, "upload", total)
        below = {digest for digest in digests if digest in children and digest not in trees}
        last = {digest for digest in digests if digest in trees}
        steps: list[list[Digest]] = [sorted({*digests} - below - last), sorted(below), sorted(last)]
        if total <= ONE_BATCH_BYTES and len(digests) <= ONE_BATCH_BLOBS:
            steps = [list(chain(*steps))]
        done = TransferStatistics()
        for step in filter(None, steps):
            done += remote.write_many(uploads(step, meter))
        return done

    uploaded = upload(missing)
    claimed = blobs.without(missing)
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
