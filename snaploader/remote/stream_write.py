"""ByteStream.Write: one blob, in pieces, however big; broken uploads continue where the server can say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from snaploader._proto import bytestream_pb2
from snaploader.blobstore import TransferStatistics, Upload
from snaploader.digest import Buffer
from snaploader.errors import Cancelled, Internal, InvalidArgument, SnaploaderError
from snaploader.remote.cancel import Cancellation
from snaploader.remote.client import Connection
from snaploader.remote.compression import MIN_BYTES, compress_frames
from snaploader.remote.content import Content
from snaploader.remote.encoding import write_request
from snaploader.remote.names import upload_name
from snaploader.remote.retry import Attempts
from snaploader.remote.status import Code, code_of


class StreamWriter:
    """Writes blobs by ByteStream. Thread-safe.

    Args:
        is_present: Whether the server holds a digest; asked when an upload's outcome is in doubt.
    """

    def __init__(self, connection: Connection, is_present: Callable[[Upload, Cancellation], bool]) -> None:
        self._connection = connection
        self._is_present = is_present

    def write(self, upload: Upload, cancellation: Cancellation) -> TransferStatistics:
        """Store one blob. Ends early when the server has it already."""
        content = Content(upload)
        try:
            transfer = _Upload(self._connection, upload, content)
            try:
                self._connection.run(
                    f"writing {upload.digest}", transfer.attempt, cancellation, upload.digest.size_bytes
                )
            except (Cancelled, Internal):
                # Servers and proxies end a stream so when another client has just stored the blob.
                cancellation.check()
                if not self._is_present(upload, cancellation):
                    raise
                transfer.was_present = True
        finally:
            content.close()
        size = upload.digest.size_bytes
        if transfer.was_present:
            return TransferStatistics(wire_bytes=transfer.sent, present_blobs=1)
        self._connection.recorder.add(blobs_written=1, content_bytes_written=size)
        return TransferStatistics(blobs=1, content_bytes=size, wire_bytes=transfer.sent)


class _Upload:
    """One blob being written, from attempt to attempt."""

    def __init__(self, connection: Connection, upload: Upload, content: Content) -> None:
        self.was_present = False
        self.sent = 0
        self._connection = connection
        self._digest = upload.digest
        self._content = content
        self._zstd = connection.capabilities.zstd_streams and upload.digest.size_bytes >= MIN_BYTES
        self._name = ""
        self._committed = 0

    def attempt(self, attempts: Attempts) -> None:
        offset = self._resume_offset(attempts)
        if offset == self._digest.size_bytes:
            return
        frames = self._frames(offset)
        try:
            response = self._connection.transport.send("Write", frames.requests(), attempts)
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
            self._connection.recorder.add(wire_bytes_written=frames.sent)
        self._check(response.committed_size)
        self.was_present = not frames.all_sent

    def _frames(self, offset: int) -> _Frames:
        frame_bytes = self._connection.limits.stream_frame_bytes
        pieces = self._content.pieces(offset, frame_bytes)
        return _Frames(self._name, offset, compress_frames(pieces, frame_bytes) if self._zstd else pieces)

    def _resume_offset(self, attempts: Attempts) -> int:
        """Where to go on. Compressed uploads start again: an offset into them means nothing to us."""
        instance = self._connection.instance_name
        if self._name and not self._zstd:
            request = bytestream_pb2.QueryWriteStatusRequest(resource_name=self._name)
            try:
                known = self._connection.transport.unary("QueryWriteStatus", request, attempts)
            except SnaploaderError:
                known = None
            if known is not None:
                size = self._digest.size_bytes
                committed = size if known.complete else known.committed_size
                if 0 < committed <= self._content.hashed_bytes or known.complete:
                    if committed > self._committed:
                        self._committed = committed
                        attempts.progressed()
                    return committed
        self._name = upload_name(instance, self._digest, zstd=self._zstd)
        return 0

    def _check(self, committed: int) -> None:
        accepted = {self._digest.size_bytes}
        if self._zstd:
            accepted |= {-1, self.sent}
        if committed not in accepted:
            raise Internal(
                f"writing {self._digest} failed: the server kept {committed} bytes", transient=True
            )


class _Frames:
    """What one attempt sends, and how much of it was sent.

    Of one attempt only: a thread of gRPC's takes the messages, and may go on a little after the call
    has ended, when the next attempt is counting its own.
    """

    def __init__(self, name: str, offset: int, frames: Iterator[Buffer]) -> None:
        self.sent = 0
        self.all_sent = False
        self._name = name
        self._offset = offset
        self._frames = frames

    def requests(self) -> Iterator[bytes]:
        """The messages, serialised."""
        name, offset = self._name, self._offset
        frame = next(self._frames, None)
        while frame is not None:
            following = next(self._frames, None)
            self.sent += len(frame)
            self.all_sent = following is None
            yield write_request(name, offset, frame, finish=following is None)
            name = ""
            offset += len(frame)
            frame = following
