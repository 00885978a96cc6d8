"""The unary methods of ContentAddressableStorage: find, read and update in batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import grpc

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.digest import Digest
from snaploader.errors import DataLoss, Internal, InvalidArgument, ResourceExhausted, SnaploaderError
from snaploader.formats.digests import DigestArray
from snaploader.remote import status
from snaploader.remote.bulk import halves
from snaploader.remote.calls import Caller
from snaploader.remote.codec import Item, batch_update_request, decompress, function_field, to_message
from snaploader.remote.retry import Attempts, Cancellation

_TRIES_AT_WRONG_BYTES = 2
_BLOB_DIGESTS = reapi.FindMissingBlobsRequest.BLOB_DIGESTS_FIELD_NUMBER

log = logging.getLogger(__name__)


class CASClient:
    """Finds, reads and writes blobs in batches. Thread-safe. All digests of one call have the same function.

    Args:
        stream_read: Reads a blob alone, where it turns out too big for any batch.
        stream_write: Writes a blob alone, where its batch is refused.
    """

    def __init__(
        self,
        caller: Caller,
        stream_read: Callable[[Digest, Cancellation], bytes],
        stream_write: Callable[[Upload, Cancellation], TransferStatistics],
    ) -> None:
        self._caller = caller
        self._stream_read = stream_read
        self._stream_write = stream_write
        self._may_warn = threading.Lock()  # taken by the one who does, and kept

    def find_missing(self, digests: Sequence[Digest], cancellation: Cancellation) -> set[Digest]:
        """Return those the server does not hold."""
        function = digests[0].function
        asked = digests if isinstance(digests, DigestArray) else DigestArray.of(digests, function)
        request = reapi.FindMissingBlobsRequest(
            instance_name=self._caller.instance_name, digest_function=function_field(function)
        )
        # Serialised at once: messages for all chunks of a big snapshot would take as long as all the rest.
        request.MergeFromString(asked.encoded(_BLOB_DIGESTS))

        def attempt(attempts: Attempts) -> set[Digest]:
            response = self._caller.transport.unary("FindMissingBlobs", request, attempts)
            missing = {
                Digest(message.hash, message.size_bytes, function)
                for message in response.missing_blob_digests
            }
            stranger = asked.stranger(missing)
            if stranger is not None:
                raise Internal(f"the server misses {stranger.hash[:64]}, which it was not asked for")
            return missing

        operation = f"asking for {len(digests)} blobs"
        try:
            return self._caller.with_retries(operation, attempt, cancellation)
        except (InvalidArgument, ResourceExhausted) as error:
            if len(digests) == 1 or not status.is_too_large(error):
                raise
        first, second = halves(digests)
        return self.find_missing(first, cancellation) | self.find_missing(second, cancellation)

    def read(self, digests: Sequence[Digest], sink: Sink, cancellation: Cancellation) -> None:
        """Hand each blob, verified, to `sink`. Distinct digests only.

        What fails for a moment is asked for again alone; wrong bytes once more, then they are DataLoss.
        """
        batch = _ReadBatch(self._caller, digests, sink)
        try:
            self._caller.with_retries(batch.operation, batch.attempt, cancellation, batch.size_bytes)
            return
        except (InvalidArgument, ResourceExhausted) as error:
            rest = list(batch.remaining.values())
            self._learn(error, sum(digest.size_bytes for digest in rest))
        if len(rest) == 1:
            sink(rest[0], self._stream_read(rest[0], cancellation))
            return
        for half in halves(rest):
            self.read(half, sink, cancellation)

    def update(self, items: Sequence[Item], cancellation: Cancellation) -> TransferStatistics:
        """Store blobs. What fails for a moment is sent again alone."""
        batch = _UpdateBatch(self._caller, items)
        try:
            self._caller.with_retries(batch.operation, batch.attempt, cancellation, batch.size_bytes)
            return batch.done
        except (InvalidArgument, ResourceExhausted) as error:
            rest = list(batch.remaining.values())
            self._learn(error, sum(len(item.data) for item in rest))
            refusal = error
        if len(rest) == 1:
            done = self._stream_write(rest[0].upload, cancellation)
            self._warn_of_refusal(rest[0].digest, refusal)
            return batch.done + done
        first, second = halves(rest)
        return batch.done + self.update(first, cancellation) + self.update(second, cancellation)

    def _warn_of_refusal(self, digest: Digest, refusal: SnaploaderError) -> None:
        """Warn, once, of a server that refuses in batches what it takes as a stream, which is slower."""
        if status.is_of_whole_call(refusal) or not isinstance(refusal, InvalidArgument):
            return
        if not self._may_warn.acquire(blocking=False):
            return
        log.warning(
            "%s takes blobs as single streams only, which is slow: it refused %s in a batch (%s). Servers "
            "such as NativeLink with verify_hash check batches with SHA-256, whatever function is named: use "
            "SHA-256 (RemoteCache(digest_function=…), --digest-function sha256), or have the server check "
            "with %s",
            self._caller.url,
            digest,
            refusal.message,
            digest.function.name,
        )

    def _learn(self, error: SnaploaderError, batch_bytes: int) -> None:
        if not status.is_too_large(error):
            raise error
        if status.is_of_whole_call(error):
            self._caller.batch_limit.refused(batch_bytes)


class _ReadBatch:
    """One batch being read: what remains shrinks from attempt to attempt."""

    def __init__(self, caller: Caller, digests: Sequence[Digest], sink: Sink) -> None:
        self.remaining = {(digest.hash, digest.size_bytes): digest for digest in digests}
        self.size_bytes = sum(digest.size_bytes for digest in digests)
        self.operation = f"reading {digests[0]}" if len(digests) == 1 else f"reading {len(digests)} blobs"
        self._caller = caller
        self._sink = sink
        self._wrong: dict[Digest, int] = {}

    def attempt(self, attempts: Attempts) -> None:
        digests = list(self.remaining.values())
        request = reapi.BatchReadBlobsRequest(
            instance_name=self._caller.instance_name,
            digests=[to_message(digest) for digest in digests],
            acceptable_compressors=[reapi.Compressor.ZSTD] if self._caller.capabilities.zstd_streams else [],
            digest_function=function_field(digests[0].function),
        )
        response = self._caller.transport.unary("BatchReadBlobs", request, attempts)
        errors: list[SnaploaderError] = []
        for item in response.responses:
            digest = self.remaining.get((item.digest.hash, item.digest.size_bytes))
            if digest is None:  # not asked for, or answered twice
                continue
            if item.status.code:
                errors.append(status.from_message(item.status, f"reading {digest}"))
                continue
            try:
                data = self._verified(digest, item)
            except DataLoss as error:
                errors.append(error)
                continue
            del self.remaining[digest.hash, digest.size_bytes]
            attempts.progressed()
            self._caller.recorder.add(
                blobs_read=1, content_bytes_read=len(data), wire_bytes_read=len(item.data)
            )
            _deliver(self._sink, digest, data)
        _raise_worst(errors)
        if self.remaining:
            raise Internal(
                f"the server's answer left out {len(self.remaining)} of {len(digests)} blobs, such as "
                f"{next(iter(self.remaining.values()))}",
                transient=True,
            )

    def _verified(self, digest: Digest, item: reapi.BatchReadBlobsResponse.Response) -> bytes:
        try:
            return _decoded(digest, item)
        except DataLoss as error:
            self._caller.recorder.add(corrupted=1, wire_bytes_read=len(item.data))
            wrong = self._wrong[digest] = self._wrong.get(digest, 0) + 1
            raise DataLoss(
                f"blob {digest} came damaged from the server: {error}",
                transient=wrong < _TRIES_AT_WRONG_BYTES,
            ) from error


def _decoded(digest: Digest, item: reapi.BatchReadBlobsResponse.Response) -> bytes:
    if item.compressor == reapi.Compressor.ZSTD:
        data = decompress(item.data, digest.size_bytes)
    elif item.compressor == reapi.Compressor.IDENTITY:
        data = item.data
    else:
        raise DataLoss(f"compressor {item.compressor} was not asked for")
    if len(data) != digest.size_bytes or digest.function.hash(data) != digest.hash:
        raise DataLoss("the bytes do not match the digest")
    return data


class _UpdateBatch:
    """One batch being written: what remains shrinks from attempt to attempt."""

    def __init__(self, caller: Caller, items: Sequence[Item]) -> None:
        self.remaining = {(item.digest.hash, item.digest.size_bytes): item for item in items}
        self.size_bytes = sum(len(item.data) for item in items)
        self.operation = f"writing {items[0].digest}" if len(items) == 1 else f"writing {len(items)} blobs"
        self.done = TransferStatistics()
        self._caller = caller

    def attempt(self, attempts: Attempts) -> None:
        items = list(self.remaining.values())
        sent = sum(len(item.data) for item in items)
        request = batch_update_request(self._caller.instance_name, items, items[0].digest.function)
        self._caller.recorder.add(wire_bytes_written=sent)
        response = self._caller.transport.unary("BatchUpdateBlobs", request, attempts)
        errors: list[SnaploaderError] = []
        for answer in response.responses:
            key = (answer.digest.hash, answer.digest.size_bytes)
            item = self.remaining.get(key)
            if item is None:
                continue
            if answer.status.code and answer.status.code != grpc.StatusCode.ALREADY_EXISTS.value[0]:
                errors.append(status.from_message(answer.status, f"writing {item.digest}"))
                continue
            del self.remaining[key]
            attempts.progressed()
            size = item.digest.size_bytes
            self.done += TransferStatistics(blobs=1, content_bytes=size, wire_bytes=len(item.data))
            self._caller.recorder.add(blobs_written=1, content_bytes_written=size)
        _raise_worst(errors)
        if self.remaining:
            raise Internal(
                f"the server's answer left out {len(self.remaining)} of {len(items)} blobs", transient=True
            )


class SinkFailed(Exception):
    """Carries what a sink raised past the retry layer: it is no failure of the transfer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _deliver(sink: Sink, digest: Digest, data: bytes) -> None:
    try:
        sink(digest, data)
    except Exception as error:
        raise SinkFailed(error) from error


def _raise_worst(errors: Sequence[SnaploaderError]) -> None:
    """Raise what is final before what may pass."""
    for error in sorted(errors, key=lambda error: error.transient):
        raise error
