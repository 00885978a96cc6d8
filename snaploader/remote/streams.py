"""ByteStream: one blob, in pieces, however big; broken transfers continue where they broke."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from snaploader._proto import bytestream_pb2
from snaploader.blobstore import TransferStatistics, Upload
from snaploader.context import Cancellation
from snaploader.digest import Buffer, Digest
from snaploader.errors import Cancelled, DataLoss, Internal, InvalidArgument, SnaploaderError
from snaploader.remote.calls import Attempts, Caller, Code, code_of, deliver
from snaploader.remote.codec import (
    MIN_BYTES,
    Content,
    compress_frames,
    decompress_frames,
    read_name,
    upload_name,
    write_request,
)


def read(caller: Caller, digest: Digest, cancellation: Cancellation) -> bytes:
    """Read a whole blob into memory, verified. Wrong bytes are fetched once more, then DataLoss."""
    pieces: list[Buffer] = []
    try:
        read_to(caller, digest, pieces.append, cancellation)
    except DataLoss:
        pieces.clear()
        read_to(caller, digest, pieces.append, cancellation)
    return b"".join(pieces)


def read_to(
    caller: Caller, digest: Digest, write: Callable[[Buffer], object], cancellation: Cancellation
) -> None:
    """Hand the pieces of a blob to `write`, in order, as they come: unverified until this returns.

    DataLoss when they were wrong, at the end or before: pieces handed out cannot be taken back.
    """
    download = _Download(caller, digest, write)
    with caller.recorder.moving(digest.size_bytes):
        caller.retrier.run(f"reading {digest}", download.attempt, cancellation, digest.size_bytes)


def write(
    caller: Caller, upload: Upload, cancellation: Cancellation, is_present: Callable[[], bool]
) -> TransferStatistics:
    """Store one blob. Ends early when the server has it: if in doubt, `is_present` asks."""
    size = upload.digest.size_bytes
    with closing(Content(upload)) as content, caller.recorder.moving(size):
        transfer = _Upload(caller, upload, content)
        try:
            caller.retrier.run(f"writing {upload.digest}", transfer.attempt, cancellation, size)
        except (Cancelled, Internal):
            # Servers and proxies end a stream so when another client has just stored the blob.
            cancellation.check()
            if not is_present():
                raise
            transfer.was_present = True
    if transfer.was_present:
        return TransferStatistics(wire_bytes=transfer.sent, present_blobs=1)
    caller.recorder.add(blobs_written=1, content_bytes_written=size)
    return TransferStatistics(blobs=1, content_bytes=size, wire_bytes=transfer.sent)


class _Download:
    """One blob being read: what was received stays, from attempt to attempt."""

    def __init__(self, caller: Caller, digest: Digest, write: Callable[[Buffer], object]) -> None:
        self._caller = caller
        self._digest = digest
        self._write = write
        self._hasher = digest.function.hasher()
        self._received = 0

    def attempt(self, attempts: Attempts) -> None:
        # A broken compressed stream goes on uncompressed: servers differ in whether they heed an
        # offset into compressed data, and agree on what one into plain data means.
        zstd = (
            self._caller.capabilities.zstd_streams
            and not self._received
            and self._digest.size_bytes >= MIN_BYTES
        )
        request = bytestream_pb2.ReadRequest(
            resource_name=read_name(self._caller.instance_name, self._digest, zstd=zstd),
            read_offset=self._received,
        )
        with closing(self._caller.transport.receive("Read", request, attempts)) as messages:
            wire = self._counted(messages)
            pieces: Iterator[Buffer] = decompress_frames(wire, self._digest.size_bytes) if zstd else wire
            try:
                for piece in pieces:
                    self._take(piece, attempts)
            except DataLoss as error:
                if code_of(error) is not None:  # the server's own words
                    raise
                self._caller.recorder.add(corrupted=1)
                raise DataLoss(f"blob {self._digest} came damaged from the server: {error}") from error
        if self._received != self._digest.size_bytes:
            raise DataLoss(
                f"the server ended the stream of blob {self._digest} after {self._received} bytes",
                transient=True,
            )
        self._caller.recorder.add(blobs_read=1, content_bytes_read=self._received)

    def _counted(self, messages: Generator[bytestream_pb2.ReadResponse, None, None]) -> Iterator[Buffer]:
        for message in messages:
            if message.data:
                self._caller.recorder.add(wire_bytes_read=len(message.data))
                yield message.data

    def _take(self, piece: Buffer, attempts: Attempts) -> None:
        received = self._received + len(piece)
        if received > self._digest.size_bytes:
            raise DataLoss(f"there are more than {self._digest.size_bytes} bytes")
        self._hasher.update(piece)
        if received == self._digest.size_bytes and self._hasher.hexdigest() != self._digest.hash:
            raise DataLoss("the bytes do not match the digest")
        deliver(self._write, piece)
        self._received = received
        attempts.progressed()


class _Upload:
    """One blob being written, from attempt to attempt."""

    def __init__(self, caller: Caller, upload: Upload, content: Content) -> None:
        self.was_present = False
        self.sent = 0
        self._caller = caller
        self._digest = upload.digest
        self._content = content
        self._zstd = caller.capabilities.zstd_streams and upload.digest.size_bytes >= MIN_BYTES
        self._name = ""
        self._committed = 0

    def attempt(self, attempts: Attempts) -> None:
        offset = self._resume_offset(attempts)
        if offset == self._digest.size_bytes:
            return
        frame_bytes = self._caller.limits.stream_frame_bytes
        pieces = self._content.pieces(offset, frame_bytes)
        frames = _Frames(compress_frames(pieces, frame_bytes) if self._zstd else pieces)
        try:
            response = self._caller.transport.send("Write", frames.requests(self._name, offset), attempts)
        except SnaploaderError as error:
            if code_of(error) is Code.ALREADY_EXISTS:
                self.was_present = True
                return
            if offset and isinstance(error, InvalidArgument):
                # The server no longer knows what it said it had: once more, from the start.
                self._name = ""
                error.transient = True
            raise
        finally:
            self.sent = frames.sent
            self._caller.recorder.add(wire_bytes_written=frames.sent)
        size = self._digest.size_bytes
        if response.committed_size not in ({size, -1, self.sent} if self._zstd else {size}):
            raise Internal(
                f"writing {self._digest} failed: the server kept {response.committed_size} bytes",
                transient=True,
            )
        self.was_present = not frames.all_sent

    def _resume_offset(self, attempts: Attempts) -> int:
        """Find out where to go on. Compressed uploads start again: servers differ about offsets into them."""
        if self._name and not self._zstd:
            request = bytestream_pb2.QueryWriteStatusRequest(resource_name=self._name)
            try:
                known = self._caller.transport.unary("QueryWriteStatus", request, attempts)
            except SnaploaderError:
                known = None
            if known is not None:
                size = self._digest.size_bytes
                committed = size if known.complete else known.committed_size
                if 0 < committed <= self._content.read_bytes or known.complete:
                    if committed > self._committed:
                        self._committed = committed
                        attempts.progressed()
                    return committed
        self._name = upload_name(self._caller.instance_name, self._digest, zstd=self._zstd)
        return 0


class _Frames:
    """What one attempt sends, and how much of it was sent.

    Of one attempt only: a thread of gRPC's takes the messages, and may go on a little after the call
    has ended, when the next attempt is counting its own.
    """

    def __init__(self, frames: Iterator[Buffer]) -> None:
        self.sent = 0
        self.all_sent = False
        self._frames = frames

    def requests(self, name: str, offset: int) -> Iterator[bytes]:
        """Give the messages, serialised; only the first has a name."""
        frame = next(self._frames, None)
        while frame is not None:
            following = next(self._frames, None)
            self.sent += len(frame)
            self.all_sent = following is None
            yield write_request(name, offset, frame, finish=following is None)
            name = ""
            offset += len(frame)
            frame = following
