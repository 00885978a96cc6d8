"""ContentAddressableStorage: blobs are found, read and written in batches; a big one is streamed.

Many transfers run at once, within so many bytes. A signal may raise between any two steps of the calling
thread, so no bytes are counted up to be counted down later: what is held are entries of a dictionary, made
before they are waited for and removed by name, and what wakes a waiter only makes it look again.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar, cast

import grpc

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.context import Cancellation, current
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    SnaploaderError,
    Unimplemented,
)
from snaploader.formats.digests import DigestArray
from snaploader.remote import streams
from snaploader.remote.calls import (
    Attempts,
    Caller,
    deliver,
    from_message,
    is_of_whole_call,
    is_too_large,
)
from snaploader.remote.codec import ITEM_OVERHEAD_BYTES, Item, batch_update_request, decompress
from snaploader.workers import WorkerPool

_TRIES_AT_WRONG_BYTES = 2
_LEAST_LIMIT_BYTES = 64 * 1024  # refusals of smaller batches have other reasons than size
_BLOB_DIGESTS = reapi.FindMissingBlobsRequest.BLOB_DIGESTS_FIELD_NUMBER

log = logging.getLogger(__name__)

T = TypeVar("T")


def to_message(digest: Digest) -> reapi.Digest:
    """Return a digest as a message."""
    return reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes)


def function_field(function: DigestFunction) -> reapi.DigestFunction.Value:
    """Return the field digest_function: unset for SHA-256, which older servers infer from the hash."""
    number = 0 if function is DigestFunction.SHA256 else function.value
    return cast("reapi.DigestFunction.Value", number)


def batches(
    items: Iterable[T], digest_of: Callable[[T], Digest], limit_bytes: Callable[[], int], max_items: int
) -> Iterator[list[T]]:
    """Group items, in order, into messages of at most so many bytes and items, of one digest function.

    An item above the limit comes alone. Lazy: takes from `items` only what the next group needs, and asks for
    the limit again for each, since servers teach us lower ones.
    """
    group: list[T] = []
    group_bytes = 0
    function: DigestFunction | None = None
    for item in items:
        digest = digest_of(item)
        cost = digest.size_bytes + ITEM_OVERHEAD_BYTES
        is_full = group_bytes + cost > limit_bytes() or len(group) >= max_items
        if group and (is_full or digest.function is not function):
            yield group
            group, group_bytes = [], 0
        group.append(item)
        group_bytes += cost
        function = digest.function
    if group:
        yield group


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Cut a group that was too large in two."""
    middle = (len(items) + 1) // 2
    return items[:middle], items[middle:]


class BatchLimit:
    """The size of batches for a server, in bytes: lowered when it refuses one within it. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.may_warn = threading.Lock()  # taken by the one who warns of refusals, and kept
        self._lock = threading.Lock()
        self._limit = limit_bytes

    def __call__(self) -> int:
        """Return the limit as known now."""
        return self._limit

    def fits(self, size_bytes: int) -> bool:
        """Tell whether a blob of this size may go in a batch."""
        return size_bytes + ITEM_OVERHEAD_BYTES <= self._limit

    def refused(self, batch_bytes: int) -> None:
        """Learn from a refusal: half of what was refused is the new limit, unless it is lower already."""
        self.lower(max(_LEAST_LIMIT_BYTES, batch_bytes // 2))

    def lower(self, limit_bytes: int) -> None:
        """Set a limit, unless it is lower already."""
        with self._lock:
            self._limit = min(self._limit, limit_bytes)


class CASClient:
    """Finds, reads and writes blobs. Thread-safe. All digests of one call have the same function.

    Args:
        caller: Calls the server.
        batch_limit: What is known of the server's, whoever calls.
    """

    def __init__(self, caller: Caller, batch_limit: BatchLimit) -> None:
        self.caller = caller
        self.batch_limit = batch_limit

    def check(self, digest: Digest) -> Digest:
        """Return the digest itself. Unimplemented when the server does not know its function."""
        if digest.function not in self.caller.capabilities.digest_functions:
            raise Unimplemented(f"the server does not offer {digest.function.name} digests, as {digest} has")
        return digest

    def check_upload(self, upload: Upload) -> None:
        """Check the digest and its size: ResourceExhausted when the server takes no blob so big."""
        digest = self.check(upload.digest)
        most = self.caller.capabilities.max_blob_bytes
        if 0 < most < digest.size_bytes:
            raise ResourceExhausted(
                f"blob {digest} is too big: the server takes at most {most} bytes", transient=False
            )

    def held_bytes(self, upload: Upload) -> int:
        """Return what an upload keeps in memory: when streamed, a few frames only."""
        size = upload.digest.size_bytes
        if self.batch_limit.fits(size):
            return size
        return min(size, 2 * self.caller.limits.stream_frame_bytes)

    def find_missing(self, digests: Sequence[Digest], cancellation: Cancellation) -> set[Digest]:
        """Return those the server does not hold."""
        function = self.check(digests[0]).function
        asked = digests if isinstance(digests, DigestArray) else DigestArray.of(digests, function)
        request = reapi.FindMissingBlobsRequest(
            instance_name=self.caller.instance_name, digest_function=function_field(function)
        )
        # Serialised at once: messages for all chunks of a big snapshot would take as long as all the rest.
        request.MergeFromString(asked.encoded(_BLOB_DIGESTS))

        def attempt(attempts: Attempts) -> set[Digest]:
            response = self.caller.transport.unary("FindMissingBlobs", request, attempts)
            missing = {
                Digest(message.hash, message.size_bytes, function)
                for message in response.missing_blob_digests
            }
            stranger = asked.stranger(missing)
            if stranger is not None:
                raise Internal(f"the server misses {stranger.hash[:64]}, which it was not asked for")
            return missing

        try:
            return self.caller.retrier.run(f"asking for {len(digests)} blobs", attempt, cancellation)
        except (InvalidArgument, ResourceExhausted) as error:
            if len(digests) == 1 or not is_too_large(error):
                raise
        first, second = halves(digests)
        return self.find_missing(first, cancellation) | self.find_missing(second, cancellation)

    def read(self, digests: Sequence[Digest], sink: Sink, cancellation: Cancellation) -> None:
        """Hand each blob of a batch, verified, to `sink`; or one that is streamed. Distinct digests only.

        What fails for a moment is asked for again alone; wrong bytes once more, then they are DataLoss.
        """
        if len(digests) > 1 or self.batch_limit.fits(digests[0].size_bytes):
            batch = _ReadBatch(self.caller, digests, sink)
            digests, _ = self._transfer(batch, cancellation)
        if len(digests) == 1:
            sink(digests[0], streams.read(self.caller, digests[0], cancellation))
        elif digests:
            for half in halves(digests):
                self.read(half, sink, cancellation)

    def write(self, uploads: Sequence[Upload], cancellation: Cancellation) -> TransferStatistics:
        """Store the blobs of one batch, or one that is streamed; loaded and compressed on this thread."""
        if len(uploads) == 1 and not self.batch_limit.fits(uploads[0].digest.size_bytes):
            return self._stream(uploads[0], cancellation)
        zstd = self.caller.capabilities.zstd_batch_updates
        return self._update([Item.of(upload, zstd=zstd) for upload in uploads], cancellation)

    def _update(self, items: Sequence[Item], cancellation: Cancellation) -> TransferStatistics:
        """Store blobs in a batch. What fails for a moment is sent again alone."""
        batch = _UpdateBatch(self.caller, items)
        rest, refusal = self._transfer(batch, cancellation)
        done = TransferStatistics(batch.blobs, batch.content_bytes, batch.wire_bytes)
        if len(rest) == 1:
            done += self._stream(rest[0].upload, cancellation)
            self._warn_of_refusal(rest[0].digest, refusal)
        elif rest:
            for half in halves(rest):
                done += self._update(half, cancellation)
        return done

    def _stream(self, upload: Upload, cancellation: Cancellation) -> TransferStatistics:
        def is_present() -> bool:
            return not self.find_missing([upload.digest], cancellation)

        return streams.write(self.caller, upload, cancellation, is_present)

    def _transfer(
        self, batch: _Batch[T], cancellation: Cancellation
    ) -> tuple[list[T], SnaploaderError | None]:
        """Transfer a batch; return what the server refuses for its size, and its refusal."""
        try:
            with self.caller.recorder.moving(batch.size_bytes):
                self.caller.retrier.run(batch.operation, batch.attempt, cancellation, batch.size_bytes)
            return [], None
        except (InvalidArgument, ResourceExhausted) as error:
            if not is_too_large(error):
                raise
            if is_of_whole_call(error):
                self.batch_limit.refused(batch.size_bytes)
            return list(batch.remaining.values()), error

    def _warn_of_refusal(self, digest: Digest, refusal: SnaploaderError | None) -> None:
        """Warn, once, of a server that refuses in batches what it takes as a stream, which is slower."""
        is_of_blob = isinstance(refusal, InvalidArgument) and not is_of_whole_call(refusal)
        if refusal is None or not is_of_blob or not self.batch_limit.may_warn.acquire(blocking=False):
            return
        log.warning(
            "%s takes blobs as single streams only, which is slow: it refused %s in a batch (%s). Servers "
            "such as NativeLink with verify_hash check batches with SHA-256, whatever function is named: use "
            "SHA-256 (RemoteCache(digest_function=…), --digest-function sha256), or have the server check "
            "with %s",
            self.caller.url,
            digest,
            refusal.message,
            digest.function.name,
        )


class _Batch(ABC, Generic[T]):
    """Blobs of one message: what remains of them shrinks from attempt to attempt."""

    def __init__(
        self, caller: Caller, doing: str, items: dict[Digest, T], size_of: Callable[[T], int]
    ) -> None:
        self.caller = caller
        self.operation = f"{doing} {next(iter(items)) if len(items) == 1 else f'{len(items)} blobs'}"
        self.remaining = {(digest.hash, digest.size_bytes): item for digest, item in items.items()}
        self.function = next(iter(items)).function
        self._size_of = size_of

    @property
    def size_bytes(self) -> int:
        """The content of what remains, as it goes on the wire."""
        return sum(map(self._size_of, self.remaining.values()))

    @abstractmethod
    def attempt(self, attempts: Attempts) -> None:
        """Send what remains, and settle it."""

    @abstractmethod
    def take(self, item: T, answer: Any) -> None:
        """Take a server's answer for one blob, or raise what is wrong with it."""

    def settle(self, answers: Iterable[Any], attempts: Attempts) -> None:
        """Take each answer. What failed for good is raised before what may pass."""
        asked = len(self.remaining)
        errors: list[SnaploaderError] = []
        for answer in answers:
            key = (answer.digest.hash, answer.digest.size_bytes)
            item = self.remaining.get(key)
            if item is None:  # not asked for, or answered twice
                continue
            try:
                self.take(item, answer)
            except SnaploaderError as error:
                errors.append(error)
                continue
            del self.remaining[key]
            attempts.progressed()
        if errors:
            raise min(errors, key=lambda error: error.transient)
        if self.remaining:
            raise Internal(
                f"the server's answer left out {len(self.remaining)} of {asked} blobs, such as "
                "{}/{}".format(*next(iter(self.remaining))),
                transient=True,
            )


class _ReadBatch(_Batch[Digest]):
    def __init__(self, caller: Caller, digests: Sequence[Digest], sink: Sink) -> None:
        super().__init__(caller, "reading", {digest: digest for digest in digests}, attrgetter("size_bytes"))
        self._sink = sink
        self._wrong: Counter[Digest] = Counter()

    def attempt(self, attempts: Attempts) -> None:
        zstd = self.caller.capabilities.zstd_streams
        request = reapi.BatchReadBlobsRequest(
            instance_name=self.caller.instance_name,
            digests=[to_message(digest) for digest in self.remaining.values()],
            acceptable_compressors=[reapi.Compressor.ZSTD] if zstd else [],
            digest_function=function_field(self.function),
        )
        response = self.caller.transport.unary("BatchReadBlobs", request, attempts)
        self.settle(response.responses, attempts)

    def take(self, item: Digest, answer: reapi.BatchReadBlobsResponse.Response) -> None:
        if answer.status.code:
            raise from_message(answer.status, f"reading {item}")
        try:
            data = _decoded(item, answer)
        except DataLoss as error:
            self.caller.recorder.add(corrupted=1, wire_bytes_read=len(answer.data))
            self._wrong[item] += 1
            raise DataLoss(
                f"blob {item} came damaged from the server: {error}",
                transient=self._wrong[item] < _TRIES_AT_WRONG_BYTES,
            ) from error
        self.caller.recorder.add(blobs_read=1, content_bytes_read=len(data), wire_bytes_read=len(answer.data))
        deliver(self._sink, item, data)


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


class _UpdateBatch(_Batch[Item]):
    def __init__(self, caller: Caller, items: Sequence[Item]) -> None:
        super().__init__(
            caller, "writing", {item.digest: item for item in items}, lambda item: len(item.data)
        )
        self.blobs = self.content_bytes = self.wire_bytes = 0

    def attempt(self, attempts: Attempts) -> None:
        request = batch_update_request(self.caller.instance_name, self.remaining.values(), self.function)
        self.caller.recorder.add(wire_bytes_written=self.size_bytes)
        response = self.caller.transport.unary("BatchUpdateBlobs", request, attempts)
        self.settle(response.responses, attempts)

    def take(self, item: Item, answer: reapi.BatchUpdateBlobsResponse.Response) -> None:
        if answer.status.code and answer.status.code != grpc.StatusCode.ALREADY_EXISTS.value[0]:
            raise from_message(answer.status, f"writing {item.digest}")
        self.blobs += 1
        self.content_bytes += item.digest.size_bytes
        self.wire_bytes += len(item.data)
        self.caller.recorder.add(blobs_written=1, content_bytes_written=item.digest.size_bytes)


Task: TypeAlias = "tuple[int, Callable[[Cancellation], None]]"
"""The bytes a task holds, and what it does."""


@dataclass(eq=False, slots=True)
class Share:
    """Bytes of a `ByteBudget` that are asked for, held, or given back."""

    size_bytes: int
    granted: bool = False
    wake: SimpleQueue[None] = field(default_factory=SimpleQueue)


class ByteBudget:
    """Hands out shares of a number of bytes, first come, first served. Thread-safe.

    A share bigger than the whole budget is granted when nothing else is out, so that one big blob
    can still go, alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._lock = threading.Lock()
        self._shares: dict[Share, None] = {}
        """Those granted, and behind them those that wait, in the order in which they came."""

    def acquire(self, share: Share, cancellation: Cancellation) -> None:
        """Wait for a share. Whoever asked for one, had it or not, must `release` it in bounded time.

        Cancelled or DeadlineExceeded as soon as the call that it is for is over.
        """
        with self._lock:
            self._shares[share] = None
        context = current()
        with cancellation.calling(lambda: share.wake.put(None)):
            while True:
                cancellation.check()
                context.check()
                with self._lock:
                    self._grant()
                    if share.granted:
                        return
                with suppress(Empty):
                    share.wake.get(timeout=context.wait_s())

    def release(self, share: Share) -> None:
        """Give a share back, or ask for it no more. May be called again."""
        with self._lock:
            self._shares.pop(share, None)
            self._grant()

    @property
    def used_bytes(self) -> int:
        """The bytes that are granted now."""
        return sum(share.size_bytes for share in list(self._shares) if share.granted)

    def _grant(self) -> None:
        used = self.used_bytes
        for share in self._shares:
            if not share.granted:
                if used and used + share.size_bytes > self._total:
                    return
                share.wake.put(None)  # first: who is woken grants itself what an interrupt left undone
                share.granted = True
                used += share.size_bytes


def run_all(tasks: Iterable[Task], pool: WorkerPool, budget: ByteBudget, parent: Cancellation) -> None:
    """Run tasks, taken one by one as threads are free. The first error calls off the rest and is raised.

    Returns or raises after every task that began has ended; but an interrupt is raised at once, as a server
    that does not answer may keep the other threads for a while.
    """
    cancellation = Cancellation(parent)
    latest: dict[int, Share] = {}  # by thread, as each works on one task at a time

    def work(task: Task) -> None:
        size_bytes, call = task
        share = latest[threading.get_ident()] = Share(size_bytes)
        try:
            budget.acquire(share, cancellation)
            call(cancellation)
        finally:
            budget.release(share)

    try:
        pool.for_each(work, tasks, on_failure=cancellation.cancel, waits_when_interrupted=False)
    finally:
        # An interrupt may have kept this thread from giving its share back.
        if share := latest.get(threading.get_ident()):
            budget.release(share)
    cancellation.check()
