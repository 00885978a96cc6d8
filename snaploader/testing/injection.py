"""Carrying out a fault: before a call, on the data that flows, on the response."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

from snaploader._proto import bytestream_pb2 as bytestream
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.testing.backend import Failure
from snaploader.testing.faults import Fault, status_code
from snaploader.testing.storage import Partition

_WRITES = frozenset({"BatchUpdateBlobs", "Write"})
_STREAMS = frozenset({"Read", "Write"})


def failure_of(fault: Fault) -> Failure:
    """The status that a fault ends a call with."""
    return Failure(fault.code, fault.message, retry_after_s=fault.retry_after_s)


async def before(fault: Fault) -> None:
    """What happens before any work is done."""
    if fault.latency_s:
        await asyncio.sleep(fault.latency_s)
    if fault.gate is not None:
        await fault.gate.pass_through()
    if fault.hang:
        await asyncio.Event().wait()
    if fault.status is not None and not fault.lose_reply and fault.cut_after_bytes is None:
        raise failure_of(fault)


def drops_before(method: str) -> bool:
    """Whether a blob to drop is dropped before the call, not after."""
    return method not in _WRITES


def drop_blobs(fault: Fault, hashes: Iterable[str], partition: Partition) -> None:
    """Lose the blobs that a fault is about."""
    targets = set(hashes) if fault.hash is None else {fault.hash}
    for digest in partition.blobs():
        if digest.hash in targets:
            partition.delete(digest)


def damage(fault: Fault, response: Any) -> None:
    """Change a response message as the fault says."""
    if isinstance(response, reapi.FindMissingBlobsResponse):
        if fault.stale_index:
            missing = [item for item in response.missing_blob_digests if fault.hash not in (None, item.hash)]
            del response.missing_blob_digests[:]
            response.missing_blob_digests.extend(missing)
        if fault.wrong_digest and response.missing_blob_digests:
            response.missing_blob_digests[0].hash = _other(response.missing_blob_digests[0].hash)
        return
    if not isinstance(response, reapi.BatchReadBlobsResponse | reapi.BatchUpdateBlobsResponse):
        return
    items: list[Any] = [item for item in response.responses if fault.hash in (None, item.digest.hash)]
    for item in items:
        if fault.item_status is not None:
            item.status.code = status_code(fault.item_status).value[0]
            item.status.message = fault.message
            if isinstance(response, reapi.BatchReadBlobsResponse):
                item.data = b""
    if not items:
        return
    if fault.flip_bit is not None and isinstance(response, reapi.BatchReadBlobsResponse) and items[0].data:
        items[0].data = flip(items[0].data, fault.flip_bit % (8 * len(items[0].data)))
    if fault.wrong_digest:
        items[0].digest.hash = _other(items[0].digest.hash)


def flips_serialised(fault: Fault, method: str) -> bool:
    """Whether `flip_bit` is about the serialised response."""
    return fault.flip_bit is not None and method not in {*_STREAMS, "BatchReadBlobs", "BatchUpdateBlobs"}


def flip(data: bytes, bit: int) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def damage_upload(fault: Fault, request: reapi.BatchUpdateBlobsRequest) -> list[reapi.Digest]:
    """Change a batch on its way in; the digests of the blobs that do not arrive at all."""
    items = [item for item in request.requests if fault.hash in (None, item.digest.hash)]
    if fault.item_status is not None:
        withheld = [reapi.Digest.FromString(item.digest.SerializeToString()) for item in items]
        for item in items:
            request.requests.remove(item)
        return withheld
    if fault.flip_bit is not None and items and items[0].data:
        items[0].data = flip(items[0].data, fault.flip_bit % (8 * len(items[0].data)))
    return []


def _other(hash_: str) -> str:
    return hashlib.sha256(hash_.encode()).hexdigest()


class Flow:
    """A stream of data that a fault slows, damages or ends. For one stream."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._position = 0
        self._started = asyncio.get_running_loop().time()

    async def shape(self, data: bytes) -> tuple[bytes, bool]:
        """What passes of the next piece, and whether the stream ends after it."""
        fault = self._fault
        ends = False
        stops = [stop for stop in (fault.cut_after_bytes, fault.truncate_after_bytes) if stop is not None]
        if stops and self._position + len(data) >= min(stops):
            data = data[: min(stops) - self._position]
            ends = True
        if fault.flip_bit is not None:
            bit = fault.flip_bit - 8 * self._position
            if 0 <= bit < 8 * len(data):
                data = flip(data, bit)
        self._position += len(data)
        if fault.bandwidth_bytes_per_s is not None:
            due = self._started + self._position / fault.bandwidth_bytes_per_s
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
        return data, ends

    def end(self) -> None:
        """Raise what the stream ends with, unless it is to look whole."""
        if self._fault.cut_after_bytes is not None:
            raise failure_of(self._fault)


async def shaped_responses(
    fault: Fault, responses: AsyncIterator[bytestream.ReadResponse]
) -> AsyncIterator[bytestream.ReadResponse]:
    """The messages of Read, with the fault in them."""
    flow = Flow(fault)
    async for response in responses:
        data, ends = await flow.shape(response.data)
        if data:
            yield bytestream.ReadResponse(data=data)
        if ends:
            flow.end()
            return


async def shaped_messages(
    fault: Fault, messages: AsyncIterator[bytestream.WriteRequest]
) -> AsyncIterator[bytestream.WriteRequest]:
    """The messages of Write, with the fault in them."""
    flow = Flow(fault)
    async for message in messages:
        data, ends = await flow.shape(message.data)
        message.data = data
        if ends:
            message.finish_write = False
        yield message
        if ends:
            flow.end()
            return
