"""ByteStream.Read: one blob, in pieces, however big; broken streams continue where they broke."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from snaploader._proto import bytestream_pb2
from snaploader.digest import Buffer, Digest
from snaploader.errors import DataLoss, translate_os_errors
from snaploader.remote.cancel import Cancellation
from snaploader.remote.cas import SinkFailed
from snaploader.remote.client import Connection
from snaploader.remote.compression import MIN_BYTES, decompress_frames
from snaploader.remote.names import read_name
from snaploader.remote.retry import Attempts
from snaploader.remote.status import code_of


class StreamReader:
    """Reads blobs by ByteStream. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def read(self, digest: Digest, cancellation: Cancellation) -> bytes:
        """A whole blob in memory, verified. Wrong bytes are fetched once more, then DataLoss."""
        pieces: list[Buffer] = []
        try:
            self._transfer(digest, pieces.append, cancellation)
        except DataLoss:
            pieces.clear()
            self._transfer(digest, pieces.append, cancellation)
        return b"".join(pieces)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object], cancellation: Cancellation) -> None:
        """Hand the pieces of a blob to `write`, in order, as they come: unverified until this returns.

        DataLoss when they were wrong, at the end or before: pieces handed out cannot be taken back.
        """
        self._transfer(digest, write, cancellation)

    def read_into_file(self, digest: Digest, fd: int, cancellation: Cancellation) -> None:
        """Write a blob into a file, from its start. Wrong bytes are fetched once more, then DataLoss."""
        try:
            self._transfer(digest, _Placer(fd), cancellation)
        except DataLoss:
            self._transfer(digest, _Placer(fd), cancellation)

    def _transfer(
        self, digest: Digest, write: Callable[[Buffer], object], cancellation: Cancellation
    ) -> None:
        download = _Download(self._connection, digest, write)
        self._connection.run(f"reading {digest}", download.attempt, cancellation, digest.size_bytes)


class _Placer:
    """Writes pieces one after the other into a file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0

    def __call__(self, piece: Buffer) -> None:
        view = memoryview(piece)
        with translate_os_errors("cannot write a fetched blob"):
            while view:
                written = os.pwrite(self._fd, view, self._offset)
                self._offset += written
                view = view[written:]


class _Download:
    """One blob being read: what was received stays, from attempt to attempt."""

    def __init__(self, connection: Connection, digest: Digest, write: Callable[[Buffer], object]) -> None:
        self._connection = connection
        self._digest = digest
        self._write = write
        self._hasher = digest.function.hasher()
        self._received = 0

    def attempt(self, attempts: Attempts) -> None:
        # A broken compressed stream goes on uncompressed: servers differ in whether they heed an
        # offset into compressed data, and agree on what one into plain data means.
        zstd = (
            self._connection.capabilities.zstd_streams
            and not self._received
            and self._digest.size_bytes >= MIN_BYTES
        )
        request = bytestream_pb2.ReadRequest(
            resource_name=read_name(self._connection.instance_name, self._digest, zstd=zstd),
            read_offset=self._received,
        )
        with closing(self._connection.transport.receive("Read", request, attempts)) as messages:
            wire = self._counted(messages)
            pieces: Iterator[Buffer] = decompress_frames(wire, self._digest.size_bytes) if zstd else wire
            try:
                for piece in pieces:
                    self._take(piece, attempts)
            except DataLoss as error:
                if code_of(error) is not None:  # the server's own words
                    raise
                self._connection.recorder.add(corrupted=1)
                raise DataLoss(f"blob {self._digest} came damaged from the server: {error}") from error
        self._finish()

    def _counted(self, messages: Generator[bytestream_pb2.ReadResponse, None, None]) -> Iterator[Buffer]:
        for message in messages:
            if message.data:
                self._connection.recorder.add(wire_bytes_read=len(message.data))
                yield message.data

    def _take(self, piece: Buffer, attempts: Attempts) -> None:
        received = self._received + len(piece)
        if received > self._digest.size_bytes:
            raise DataLoss(f"there are more than {self._digest.size_bytes} bytes")
        self._hasher.update(piece)
        if received == self._digest.size_bytes and self._hasher.hexdigest() != self._digest.hash:
            raise DataLoss("the bytes do not match the digest")
        try:
            self._write(piece)
        except Exception as error:
            raise SinkFailed(error) from error
        self._received = received
        attempts.progressed()

    def _finish(self) -> None:
        if self._received != self._digest.size_bytes:
            raise DataLoss(
                f"the server ended the stream of blob {self._digest} after {self._received} bytes",
                transient=True,
            )
        self._connection.recorder.add(blobs_read=1, content_bytes_read=self._received)
