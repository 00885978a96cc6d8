"""A remote store in memory, without a network: for tests of what stands above the store."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, NotFound


class FakeCAS:
    """Implements `snaploader.blobstore.RemoteStore`. Thread-safe.

    Args:
        digest_function: What it wants digests in.
        update_enabled: Whether action results may be written.
    """

    def __init__(
        self, digest_function: DigestFunction = DigestFunction.SHA256, *, update_enabled: bool = True
    ) -> None:
        self.digest_function = digest_function
        self.update_enabled = update_enabled
        self.blobs: dict[Digest, bytes] = {}
        """The content; tests may change it, also to what does not match."""
        self.action_results: dict[Digest, bytes] = {}
        """Serialised results by action digest."""
        self.calls: Counter[str] = Counter()
        """How often each method was called, by its name."""
        self.reads: Counter[Digest] = Counter()
        """How often each blob was read."""
        self.writes: Counter[Digest] = Counter()
        """How often each blob was written."""
        self._lock = threading.Lock()

    def _count(self, method: str) -> None:
        with self._lock:
            self.calls[method] += 1

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Those that are not in `blobs`, the empty one never."""
        self._count("find_missing")
        with self._lock:
            return {digest for digest in digests if digest.size_bytes and digest not in self.blobs}

    def read(self, digest: Digest) -> bytes:
        self._count("read")
        with self._lock:
            return self._read(digest)

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Each blob to `sink`, on this thread."""
        self._count("read_many")
        for digest in digests:
            with self._lock:
                data = self._read(digest)
            sink(digest, data)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """One blob into `write`, in two pieces when it has more than one byte."""
        self._count("read_to")
        with self._lock:
            data = memoryview(self._read(digest))
        middle = len(data) // 2
        for piece in (data[:middle], data[middle:]):
            if piece:
                write(piece)

    def _read(self, digest: Digest) -> bytes:
        if digest.size_bytes == 0:
            return b""
        self.reads[digest] += 1
        data = self.blobs.get(digest)
        if data is None:
            raise NotFound(f"no blob {digest} in the fake store")
        if Digest.of(data, digest.function) != digest:
            raise DataLoss(f"the blob {digest} in the fake store has other bytes")
        return data

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        self._count("write")
        self._write(digest, source)

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store each, on this thread."""
        self._count("write_many")
        return self._write_all(uploads)

    def upload_missing(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store those that are not there."""
        self._count("upload_missing")
        return self._write_all(uploads, only_missing=True)

    def _write_all(self, uploads: Iterable[Upload], *, only_missing: bool = False) -> TransferStatistics:
        blobs = content_bytes = present = 0
        for upload in uploads:
            if upload.digest.size_bytes == 0 or (only_missing and upload.digest in self.blobs):
                present += 1
                continue
            self._write(upload.digest, upload.source)
            blobs += 1
            content_bytes += upload.digest.size_bytes
        return TransferStatistics(
            blobs=blobs, content_bytes=content_bytes, wire_bytes=content_bytes, present_blobs=present
        )

    def _write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        data = Path(source).read_bytes() if isinstance(source, str | os.PathLike) else bytes(source)
        if Digest.of(data, digest.function) != digest:
            raise DataLoss(f"the bytes to store do not have the digest {digest}")
        with self._lock:
            self.writes[digest] += 1
            self.blobs[digest] = data

    def get_action_result(self, action_digest: Digest) -> reapi.ActionResult:
        """The result under a key. What it names is not checked."""
        self._count("get_action_result")
        data = self.action_results.get(action_digest)
        if data is None:
            raise NotFound(f"no action result for {action_digest} in the fake store")
        return reapi.ActionResult.FromString(data)

    def update_action_result(self, action_digest: Digest, action_result: reapi.ActionResult) -> None:
        self._count("update_action_result")
        if not self.update_enabled:
            raise FailedPrecondition("updates of action results are not enabled in the fake store")
        self.action_results[action_digest] = action_result.SerializeToString()
