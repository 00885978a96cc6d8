"""The bytes of an upload: in memory or in a file, read once or in pieces, always hashed on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from snaploader.blobstore import Upload
from snaploader.digest import Buffer, Digest
from snaploader.errors import Cancelled, DataLoss, translate_os_errors


def load(upload: Upload) -> Buffer:
    """The whole content, verified. DataLoss when it does not have the digest."""
    digest = upload.digest
    if isinstance(upload.source, str | os.PathLike):
        path = os.fspath(upload.source)
        with translate_os_errors(f"cannot read {path!r} for upload"), open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            _check_size(digest, size, path)
            data: Buffer = file.read()
    else:
        data = memoryview(upload.source).cast("B")
    _check_size(digest, len(data), upload.source)
    if digest.function.hash(data) != digest.hash:
        raise _mismatch(digest, upload.source)
    return data


class Content:
    """Content that is read in pieces, from any offset, more than once, by one thread at a time.

    The hash is checked the first time the end is reached, before the last piece is given out. A
    thread of gRPC's may still be reading when a call has ended: `close` waits for its read and
    ends its iterator with Cancelled, so the descriptor is never used after.
    """

    def __init__(self, upload: Upload) -> None:
        self._digest = upload.digest
        self._source = upload.source
        self._lock = threading.Lock()
        self._closed = False
        self._hasher = upload.digest.function.hasher()
        self._hashed = 0
        self._fd = -1
        self._view = memoryview(b"")
        if isinstance(self._source, str | os.PathLike):
            path = os.fspath(self._source)
            with translate_os_errors(f"cannot read {path!r} for upload"):
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                size = os.fstat(self._fd).st_size
        else:
            self._view = memoryview(self._source).cast("B")
            size = len(self._view)
        try:
            _check_size(self._digest, size, self._source)
        except DataLoss:
            self.close()
            raise

    def pieces(self, offset: int, piece_bytes: int) -> Iterator[Buffer]:
        """The content from `offset` on. DataLoss, before the last piece, when the hash is wrong."""
        size = self._digest.size_bytes
        while offset < size:
            with self._lock:
                if self._closed:
                    raise Cancelled("the upload has ended")
                piece = self._piece(offset, min(piece_bytes, size - offset))
                self._check(offset, piece)
            yield piece
            offset += len(piece)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._closed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    @property
    def hashed_bytes(self) -> int:
        """How far the content was read and hashed."""
        return self._hashed

    def _piece(self, offset: int, length: int) -> Buffer:
        if self._fd < 0:
            return self._view[offset : offset + length]
        with translate_os_errors(f"cannot read {self._source!r} for upload"):
            piece = os.pread(self._fd, length, offset)
        if not piece:
            raise DataLoss(f"{self._source!r} became shorter while it was uploaded")
        return piece

    def _check(self, offset: int, piece: Buffer) -> None:
        if offset <= self._hashed < offset + len(piece):
            self._hasher.update(memoryview(piece)[self._hashed - offset :])
            self._hashed = offset + len(piece)
            if self._hashed == self._digest.size_bytes and self._hasher.hexdigest() != self._digest.hash:
                self._hashed, self._hasher = 0, self._digest.function.hasher()
                raise _mismatch(self._digest, self._source)


def _check_size(digest: Digest, size: int, source: object) -> None:
    if size != digest.size_bytes:
        raise DataLoss(f"{_name(source)} has {size} bytes, not those of digest {digest}; nothing was stored")


def _mismatch(digest: Digest, source: object) -> DataLoss:
    return DataLoss(f"{_name(source)} does not have digest {digest}; nothing was stored")


def _name(source: object) -> str:
    return repr(source) if isinstance(source, str | os.PathLike) else "the data given"
