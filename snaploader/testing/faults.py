"""A script of faults for the embedded server: what goes wrong, in which call, how often.

Each call is shown to the rules in the order they were added. The first that matches, has let its `after`
calls pass and is not used up, acts; the others do not see that call. So a sequence reads as it happens:

    FaultScript(
        Fault("BatchReadBlobs", status="UNAVAILABLE", times=2),
        Fault("BatchReadBlobs", latency_s=0.2),
    )

fails twice, is slow once, then works. Nothing is random: the same calls meet the same faults.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import grpc

from snaploader._proto import bytestream_pb2 as bytestream, remote_execution_pb2 as reapi
from snaploader.digest import Digest
from snaploader.errors import InvalidArgument
from snaploader.testing.services import Failure
from snaploader.testing.storage import Partition

if TYPE_CHECKING:
    from snaploader.testing.dispatch import Call

M = TypeVar("M", bytestream.ReadResponse, bytestream.WriteRequest)

WRITES = frozenset({"BatchUpdateBlobs", "Write"})


class CallGate:
    """Holds calls until it is opened, so that a test can arrange what happens while they hang.

    For use as `Fault(…, gate=CallGate())`. Thread-safe. Stopping the server ends the calls that are held.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_open = False
        self._arrived = 0
        self._waiters: list[Future[None]] = []

    def wait_reached(self, timeout_s: float, calls: int = 1) -> bool:
        """Wait until that many calls have arrived; False when they have not in this time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._arrived >= calls, timeout_s)

    def open(self) -> None:
        """Let the held calls go on, and all later ones pass."""
        with self._condition:
            self._is_open = True
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():  # else its call ended meanwhile
                waiter.set_result(None)

    async def pass_through(self) -> None:
        """Wait until the gate is open; called by the server."""
        waiter: Future[None] = Future()
        with self._condition:
            self._arrived += 1
            self._condition.notify_all()
            if self._is_open:
                return
            self._waiters.append(waiter)
        await asyncio.wrap_future(waiter)


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule: which calls, how often, and what happens to them. Effects may be combined.

    The fields up to `matches` choose the calls; all that are given must fit.
    """

    method: str = "*"
    """Name of the method, as in "BatchReadBlobs"; "*" for any."""
    times: int | None = 1
    """How many calls are hit; None for all."""
    after: int = 0
    """How many matching calls pass unharmed first."""
    digest: Digest | str | None = None
    """Only calls that name this blob or action (a digest, or a hash). Also what `drop_blob`, `flip_bit`,
    `wrong_digest`, `stale_index` and `item_status` act on in a batch; without it, all blobs of the call
    (`flip_bit` and `wrong_digest`: the first)."""
    resource: str | None = None
    """Only ByteStream calls whose resource name holds this."""
    matches: Callable[[Call], bool] | None = None
    """Only calls for which this is true."""

    latency_s: float = 0.0
    """Wait this long first."""
    gate: CallGate | None = None
    """Wait at this gate first."""
    hang: bool = False
    """Never answer: the call ends by its deadline, when it is cancelled, or with the server."""
    stall_after_bytes: int | None = None
    """Of Read and Write: wait at the gate, or hang, once this much data has passed instead of first."""
    status: grpc.StatusCode | str | None = None
    """End with this code (also by name). Before anything is done, unless `cut_after_bytes` or
    `lose_reply` says when."""
    message: str = "scripted fault"
    """The message of `status`."""
    retry_after_s: float | None = None
    """Add a google.rpc.RetryInfo with this delay to the status."""
    lose_reply: bool = False
    """Do the work, then end with `status` (UNAVAILABLE when not given)."""
    cut_after_bytes: int | None = None
    """Of Read and Write: stop after this many bytes of data and end with `status`, else UNAVAILABLE."""
    truncate_after_bytes: int | None = None
    """Of Read: stop after this many bytes and end with OK."""
    bandwidth_bytes_per_s: float | None = None
    """Of Read and Write: let the data pass at this rate. Of the others: delay the answer by its size."""
    flip_bit: int | None = None
    """Change this bit: of the data of Read or Write; of the blob's data in batches (modulo its size);
    of the serialised response in the other methods."""
    wrong_digest: bool = False
    """Batches and FindMissingBlobs: answer for another digest than was asked."""
    stale_index: bool = False
    """FindMissingBlobs: claim to have what is missing (only `digest`, where given)."""
    item_status: grpc.StatusCode | str | None = None
    """Batches: answer OK as a whole, with this code for the blob."""
    drop_blob: bool = False
    """Lose the blob: before the call in methods that read, after it in those that write."""

    def __post_init__(self) -> None:
        if self.times is not None and self.times < 1:
            raise InvalidArgument("times is below 1: leave the fault out, or use None for all calls")
        if self.after < 0 or self.latency_s < 0:
            raise InvalidArgument("after and latency_s cannot be negative")
        for name in ("stall_after_bytes", "cut_after_bytes", "truncate_after_bytes", "flip_bit"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidArgument(f"{name} cannot be negative")
        if self.bandwidth_bytes_per_s is not None and self.bandwidth_bytes_per_s <= 0:
            raise InvalidArgument("bandwidth_bytes_per_s must be above 0")
        for code in (self.status, self.item_status):
            if code is not None:
                status_code(code)

    @property
    def hash(self) -> str | None:
        """The hash of `digest`."""
        return self.digest.hash if isinstance(self.digest, Digest) else self.digest

    def failure(self) -> Failure:
        """The status that it ends a call with."""
        return Failure(
            status_code(self.status or "UNAVAILABLE"), self.message, retry_after_s=self.retry_after_s
        )

    def is_about(self, call: Call) -> bool:
        """Whether the rule is about this call."""
        return (
            self.method in ("*", call.method)
            and (self.digest is None or self.hash in call.hashes)
            and (self.resource is None or self.resource in call.resource_name)
            and (self.matches is None or self.matches(call))
        )


def status_code(code: grpc.StatusCode | str) -> grpc.StatusCode:
    """The code itself, also by name. InvalidArgument when there is none of that name."""
    if isinstance(code, grpc.StatusCode):
        return code
    try:
        return grpc.StatusCode[code.upper()]
    except KeyError:
        raise InvalidArgument(f"there is no gRPC status code {code!r}") from None


@dataclass(slots=True)
class _Rule:
    fault: Fault
    passed: int = 0
    fired: int = 0

    @property
    def is_used_up(self) -> bool:
        return self.fault.times is not None and self.fired >= self.fault.times


@dataclass(frozen=True, slots=True)
class Firing:
    """A fault that acted, and the call it acted on."""

    fault: Fault
    call: Call = field(repr=False)


class Link:
    """A network between clients and server, which all calls share: two directions, each of this rate.

    For use as `FaultScript(link=Link(…))`. Used on the server's loop.

    Args:
        bandwidth_bytes_per_s: Of messages in one direction, all calls together.
        latency_s: Delay of each call, for the way there and back.
    """

    def __init__(self, bandwidth_bytes_per_s: float, latency_s: float = 0.0) -> None:
        if bandwidth_bytes_per_s <= 0 or latency_s < 0:
            raise InvalidArgument("bandwidth_bytes_per_s must be above 0, and latency_s not below")
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self._free_at = {"up": 0.0, "down": 0.0}

    async def carry(self, direction: Literal["up", "down"], size: int) -> None:
        """Wait until so many bytes have passed, behind those that came before."""
        now = asyncio.get_running_loop().time()
        free_at = max(now, self._free_at[direction]) + size / self.bandwidth_bytes_per_s
        self._free_at[direction] = free_at
        await asyncio.sleep(free_at - now)


class FaultScript:
    """Rules in order, which may be added while the server runs. Thread-safe.

    Args:
        faults: The first rules.
        link: Carries all calls, whatever the rules say.
    """

    def __init__(self, *faults: Fault, link: Link | None = None) -> None:
        self.link = link
        self._lock = threading.Lock()
        self._rules = [_Rule(fault) for fault in faults]
        self._firings: list[Firing] = []

    def add(self, *faults: Fault) -> None:
        """Append rules."""
        with self._lock:
            self._rules.extend(_Rule(fault) for fault in faults)

    def clear(self) -> None:
        """Drop all rules, and the record of what fired."""
        with self._lock:
            self._rules.clear()
            self._firings.clear()

    def take(self, call: Call) -> Fault | None:
        """The fault that acts on this call, which counts as fired."""
        with self._lock:
            for rule in self._rules:
                if rule.is_used_up or not rule.fault.is_about(call):
                    continue
                if rule.passed < rule.fault.after:
                    rule.passed += 1
                    continue
                rule.fired += 1
                if len(self._firings) < 10_000:
                    self._firings.append(Firing(rule.fault, call))
                return rule.fault
            return None

    @property
    def fired(self) -> list[Firing]:
        """What fired so far, in order (the first 10,000)."""
        with self._lock:
            return list(self._firings)

    @property
    def pending(self) -> list[Fault]:
        """Rules with a number of `times` that are not used up: empty when all happened that was scripted."""
        with self._lock:
            return [r.fault for r in self._rules if r.fault.times is not None and not r.is_used_up]


async def before(fault: Fault) -> None:
    """What happens before any work is done."""
    if fault.latency_s:
        await asyncio.sleep(fault.latency_s)
    if fault.stall_after_bytes is None:
        await _stall(fault)
    if fault.status is not None and not fault.lose_reply and fault.cut_after_bytes is None:
        raise fault.failure()


async def _stall(fault: Fault) -> None:
    if fault.gate is not None:
        await fault.gate.pass_through()
    if fault.hang:
        await asyncio.Event().wait()


def drop_blobs(fault: Fault, hashes: Iterable[str], partition: Partition) -> None:
    """Lose the blobs that a fault is about."""
    targets = set(hashes) if fault.hash is None else {fault.hash}
    for digest in partition.blobs():
        if digest.hash in targets:
            partition.delete(digest)


def damaged_reply(fault: Fault, response: Any) -> bytes:
    """A response message as the fault leaves it, serialised."""
    if isinstance(response, reapi.BatchReadBlobsResponse | reapi.BatchUpdateBlobsResponse):
        _damage_batch(fault, response)
        return response.SerializeToString()
    if isinstance(response, reapi.FindMissingBlobsResponse):
        if fault.stale_index:
            missing = [item for item in response.missing_blob_digests if fault.hash not in (None, item.hash)]
            del response.missing_blob_digests[:]
            response.missing_blob_digests.extend(missing)
        if fault.wrong_digest and response.missing_blob_digests:
            response.missing_blob_digests[0].hash = _other(response.missing_blob_digests[0].hash)
    return flip(response.SerializeToString(), fault.flip_bit)


def _damage_batch(
    fault: Fault, response: reapi.BatchReadBlobsResponse | reapi.BatchUpdateBlobsResponse
) -> None:
    items: list[Any] = [item for item in response.responses if fault.hash in (None, item.digest.hash)]
    is_read = isinstance(response, reapi.BatchReadBlobsResponse)
    if fault.item_status is not None:
        for item in items:
            item.status.code = status_code(fault.item_status).value[0]
            item.status.message = fault.message
            if is_read:
                item.data = b""
    if items and is_read:
        items[0].data = flip(items[0].data, fault.flip_bit)
    if items and fault.wrong_digest:
        items[0].digest.hash = _other(items[0].digest.hash)


def flip(data: bytes, bit: int | None) -> bytes:
    """`data` with one bit changed, which is counted modulo its size; as it is where there is none."""
    if bit is None or not data:
        return data
    changed = bytearray(data)
    byte, bit = divmod(bit % (8 * len(data)), 8)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def damage_upload(fault: Fault, request: reapi.BatchUpdateBlobsRequest) -> list[reapi.Digest]:
    """Change a batch on its way in; the digests of the blobs that do not arrive at all."""
    items = [item for item in request.requests if fault.hash in (None, item.digest.hash)]
    if fault.item_status is not None:
        withheld = [reapi.Digest.FromString(item.digest.SerializeToString()) for item in items]
        for item in items:
            request.requests.remove(item)
        return withheld
    if items:
        items[0].data = flip(items[0].data, fault.flip_bit)
    return []


def _other(hash_: str) -> str:
    return hashlib.sha256(hash_.encode()).hexdigest()


async def shaped(fault: Fault, messages: AsyncIterator[M]) -> AsyncIterator[M]:
    """The messages of Read or Write, whose data the fault slows, damages or ends."""
    now = asyncio.get_running_loop().time
    started, position = now(), 0
    stalls_at = fault.stall_after_bytes
    stops = [stop for stop in (fault.cut_after_bytes, fault.truncate_after_bytes) if stop is not None]
    async for message in messages:
        if stalls_at is not None and position >= stalls_at:
            stalls_at = None
            await _stall(fault)
        data = message.data
        ends = bool(stops) and position + len(data) >= min(stops)
        if ends:
            data = data[: min(stops) - position]
        if fault.flip_bit is not None and 0 <= fault.flip_bit - 8 * position < 8 * len(data):
            data = flip(data, fault.flip_bit - 8 * position)
        position += len(data)
        if fault.bandwidth_bytes_per_s is not None:
            await asyncio.sleep(max(0.0, started + position / fault.bandwidth_bytes_per_s - now()))
        message.data = data
        if ends and isinstance(message, bytestream.WriteRequest):
            message.finish_write = False
        if data or isinstance(message, bytestream.WriteRequest):
            yield message
        if ends and fault.cut_after_bytes is not None:
            raise fault.failure()
        if ends:
            return
