"""Blobs that arrive in pieces."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from snaploader import files
from snaploader.digest import Buffer, Digest
from snaploader.errors import DataLoss, FailedPrecondition, translate_os_errors
from snaploader.filecache.blobs import BlobSpace


class BlobWriter:
    """Takes the bytes of one blob, in order, and adds it when they are all there. For one thread.

    A context manager; leaving it without `commit` drops what was written.
    """

    def __init__(self, blobs: BlobSpace, digest: Digest) -> None:
        blobs.check_fits(digest.size_bytes)
        self._blobs = blobs
        self._digest = digest
        self._hasher = digest.function.hasher()
        self._size = 0
        with translate_os_errors(f"cannot write blob {digest}"):
            self._staged = blobs.stage(digest)

    def write(self, data: Buffer) -> None:
        """Append bytes. DataLoss when they are more than the digest says."""
        self._check_open()
        self._size += len(memoryview(data).cast("B"))
        if self._size > self._digest.size_bytes:
            raise DataLoss(f"blob {self._digest}: more bytes came than its digest says")
        self._hasher.update(data)
        with translate_os_errors(f"cannot write blob {self._digest}"):
            files.write_all(self._staged.fd, data)

    def commit(self) -> bool:
        """Add the blob; False when the cache had it. DataLoss when the bytes do not have the digest."""
        self._check_open()
        if self._size != self._digest.size_bytes:
            raise DataLoss(f"blob {self._digest}: only {self._size} bytes came")
        found = self._hasher.hexdigest()
        if found != self._digest.hash:
            raise DataLoss(f"blob {self._digest}: the bytes that came have the hash {found}")
        with translate_os_errors(f"cannot add blob {self._digest}"):
            self._blobs.step_done("blob.written")
            added = not self._blobs.present(self._digest) and self._blobs.publish(
                self._digest, self._staged.fd, self._staged.link
            )
        self.close()
        return added

    def close(self) -> None:
        """Drop what was written, unless it was committed. Again is fine."""
        self._staged.close()

    def _check_open(self) -> None:
        if self._staged.fd < 0:
            raise FailedPrecondition(f"the writer of blob {self._digest} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
