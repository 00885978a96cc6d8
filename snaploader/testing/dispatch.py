"""From gRPC to the services and back: decoding, authentication, records, faults, statuses.

Messages cross the border to gRPC as bytes, so that a malformed one gets a proper status, its size is
known without work, and a fault can damage a response's very bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from snaploader._proto import bytestream_pb2 as bytestream, remote_execution_pb2 as reapi, services
from snaploader.errors import InvalidArgument, SnaploaderError
from snaploader.testing import faults
from snaploader.testing.byte_stream import ByteStream, parse_resource_name
from snaploader.testing.faults import Fault, FaultScript
from snaploader.testing.services import (
    ActionCache,
    Backend,
    ContentAddressableStorage,
    Failure,
    as_failure,
    overloaded,
    trailers,
)

Context = Any

_STREAMS = frozenset({"Read", "Write"})
_MAX_LOGGED_HASHES = 200_000


@dataclass(slots=True)
class Call:
    """One call, as the server saw it. Fields about the outcome are filled in while it runs."""

    method: str
    """Name of the method, as in "BatchReadBlobs"."""
    instance_name: str = ""
    resource_name: str = ""
    """Of ByteStream calls."""
    hashes: tuple[str, ...] = ()
    """Hashes of the blobs or of the action that the request names, in its order."""
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    """Headers the client sent; of a repeated one, the last value."""
    read_offset: int = 0
    """Where a Read begins; of Write, where its first message writes."""
    received_bytes: int = 0
    """Size of the request messages."""
    sent_bytes: int = 0
    """Size of the response messages."""
    status: str | None = None
    """Name of the status code it ended with; None while it runs, "CANCELLED" when the client went away."""
    is_logged: bool = field(default=False, repr=False)
    """Whether it is counted: at its first message, or when it ends without one."""


def describe(call: Call, request: Any) -> None:
    """Fill in what the request says: its instance, its resource, the hashes it names."""
    name = getattr(request, "resource_name", "")
    if name:
        call.resource_name = name
        call.read_offset = getattr(request, "read_offset", 0) or getattr(request, "write_offset", 0)
        with contextlib.suppress(SnaploaderError):
            parsed = parse_resource_name(name)
            call.instance_name = parsed.instance_name
            call.hashes = (parsed.digest.hash,)
        return
    call.instance_name = getattr(request, "instance_name", "")
    call.hashes = tuple(digest.hash for digest in _digests(request))


def _digests(request: Any) -> Iterator[Any]:
    for name in ("blob_digests", "digests"):
        yield from getattr(request, name, ())
    for item in getattr(request, "requests", ()):
        yield item.digest
    for name in ("action_digest", "root_digest"):
        if hasattr(request, name):
            yield getattr(request, name)


class CallLog:
    """The latest calls and counters of all of them. Thread-safe.

    Args:
        capacity: How many calls are remembered. Counters go on regardless.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._running = 0
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._calls: deque[Call] = deque()
            self._hashes = 0
            self._counts: Counter[str] = Counter()
            self._received: Counter[str] = Counter()
            self._sent: Counter[str] = Counter()

    def begin(self, call: Call) -> None:
        with self._lock:
            call.is_logged = True
            self._running += 1
            self._counts[call.method] += 1
            self._calls.append(call)
            self._hashes += len(call.hashes)
            while self._calls and (len(self._calls) > self._capacity or self._hashes > _MAX_LOGGED_HASHES):
                self._hashes -= len(self._calls.popleft().hashes)

    def end(self, call: Call, status: str) -> None:
        if not call.is_logged:
            self.begin(call)
        with self._lock:
            call.status = status
            self._received[call.method] += call.received_bytes
            self._sent[call.method] += call.sent_bytes
            self._running -= 1
            self._ended.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        with self._ended:
            return self._ended.wait_for(lambda: not self._running, timeout_s)

    def calls(self) -> list[Call]:
        """The remembered calls, oldest first."""
        with self._lock:
            return list(self._calls)

    def methods(self) -> list[str]:
        """The methods that were called."""
        with self._lock:
            return sorted(self._counts)

    def sums(self, method: str | None) -> tuple[int, int, int]:
        """Of a method, or of all: calls, and bytes of the messages of ended ones, received and sent."""
        with self._lock:
            counters = (self._counts, self._received, self._sent)
            counts, received, sent = (sum(c.values()) if method is None else c[method] for c in counters)
        return counts, received, sent


class Dispatcher:
    """The handlers of all services over one backend."""

    def __init__(self, backend: Backend, faults: FaultScript, log: CallLog) -> None:
        self._backend = backend
        self._faults = faults
        self._log = log
        self._bytes = ByteStream(backend)
        self._cas = ContentAddressableStorage(backend)
        self._results = ActionCache(backend)
        self._active = 0
        self._streams = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_idle(self) -> bool:
        return self._active == 0

    async def close(self) -> None:
        """Wait for the calls, which must have been cancelled, and drop what unfinished ones left."""
        await self._is_idle.wait()
        await self._bytes.close()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        run = self._backend.run
        handles: dict[str, Callable[..., Any]] = {
            "FindMissingBlobs": partial(run, self._cas.find_missing_blobs),
            "BatchUpdateBlobs": partial(run, self._cas.batch_update_blobs),
            "BatchReadBlobs": partial(run, self._cas.batch_read_blobs),
            "GetTree": self._tree,
            "GetActionResult": partial(run, self._results.get_action_result),
            "UpdateActionResult": partial(run, self._results.update_action_result),
            "Read": self._bytes.read,
            "Write": self._bytes.write,
            "QueryWriteStatus": self._bytes.query_write_status,
        }
        if self._backend.options.capabilities:
            handles["GetCapabilities"] = partial(run, self._backend.get_capabilities)
        kinds: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
            (False, False): self._unary,
            (False, True): self._reads,
            (True, False): self._writes,
        }
        tables = {
            service: {
                name: kinds[method.client_streaming, method.server_streaming](method, handles[name])
                for name, method in services.methods(service).items()
                if name in handles
            }
            for service in services.SERVICES
        }
        return [grpc.method_handlers_generic_handler(service, table) for service, table in tables.items()]

    def _unary(
        self, method: services.Method, handle: Callable[[Any], Awaitable[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def call_once(raw: bytes, context: Context) -> bytes:
            call = Call(method.name, received_bytes=len(raw))
            async with self._tracked(call, context):
                request = _decode(method.request, raw)
                fault = await self._begin(call, request, context, len(raw))
                if fault is None:
                    reply: bytes = (await handle(request)).SerializeToString()
                else:
                    reply = await self._faulty(fault, call, request, handle)
                call.sent_bytes = len(reply)
                await self._carry("down", len(reply))
                return reply

        return grpc.unary_unary_rpc_method_handler(call_once)

    async def _faulty(
        self, fault: Fault, call: Call, request: Any, handle: Callable[[Any], Awaitable[Any]]
    ) -> bytes:
        """A unary call that a fault acts on."""
        withheld = faults.damage_upload(fault, request) if call.method == "BatchUpdateBlobs" else []
        response = await handle(request)
        for digest in withheld:
            response.responses.add(digest=digest)
        await self._after(fault, call)
        reply = faults.damaged_reply(fault, response)
        if fault.bandwidth_bytes_per_s is not None:
            await asyncio.sleep(len(reply) / fault.bandwidth_bytes_per_s)
        return reply

    def _reads(
        self, method: services.Method, handle: Callable[[Any], AsyncIterator[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Read and GetTree."""

        async def call_once(raw: bytes, context: Context) -> None:
            call = Call(method.name, received_bytes=len(raw))
            async with self._tracked(call, context):
                request = _decode(method.request, raw)
                fault = await self._begin(call, request, context, len(raw))
                async with contextlib.aclosing(handle(request)) as whole:  # type: ignore[type-var]
                    # A fault shapes data only, not the pages of a tree.
                    shapes = fault if call.method in _STREAMS else None
                    async for response in whole if shapes is None else faults.shaped(shapes, whole):
                        reply = response.SerializeToString()
                        call.sent_bytes += len(reply)
                        del response  # a client that reads nothing is not to hold another copy
                        await self._send(reply, context)
                if fault is not None:
                    await self._after(fault, call)

        return grpc.unary_stream_rpc_method_handler(call_once)

    async def _send(self, reply: bytes, context: Context) -> None:
        """Send one message of a stream, as soon as the client takes it."""
        await self._carry("down", len(reply))
        try:
            async with self._idle_limit("the client read"):
                await context.write(reply)
        except grpc.aio.InternalError as error:
            # gRPC could not send: the client went away.
            raise asyncio.CancelledError from error

    @contextlib.asynccontextmanager
    async def _idle_limit(self, what: str) -> AsyncIterator[None]:
        """End the call when the client makes it wait for longer than the options allow."""
        limit_s = self._backend.options.stream_idle_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise Failure(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"{what} nothing for {limit_s:g} s, which ends the stream"
            ) from None

    async def _tree(self, request: reapi.GetTreeRequest) -> AsyncIterator[reapi.GetTreeResponse]:
        pages = self._cas.get_tree(request)
        while (page := await self._backend.run(next, pages, None)) is not None:
            yield page

    def _writes(
        self, method: services.Method, handle: Callable[[Any, AsyncIterator[Any]], Awaitable[Any]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def call_once(raws: AsyncIterator[bytes], context: Context) -> bytes:
            call = Call(method.name)
            async with self._tracked(call, context):
                messages = self._messages(raws, call)
                first = await anext(messages, None)
                if first is None:
                    raise InvalidArgument("the write has no message")
                fault = await self._begin(call, first, context)
                if fault is not None:
                    messages = faults.shaped(fault, _chain(first, messages))
                    first = await anext(messages)
                response = await handle(first, messages)
                if fault is not None:
                    await self._after(fault, call)
                reply: bytes = response.SerializeToString()
                call.sent_bytes = len(reply)
                await self._carry("down", len(reply))
                return reply

        return grpc.stream_unary_rpc_method_handler(call_once)

    async def _messages(
        self, raws: AsyncIterator[bytes], call: Call
    ) -> AsyncIterator[bytestream.WriteRequest]:
        while True:
            async with self._idle_limit("the client sent"):
                raw = await anext(raws, None)
            if raw is None:
                return
            call.received_bytes += len(raw)
            await self._carry("up", len(raw))
            yield _decode(bytestream.WriteRequest, raw)

    async def _begin(
        self, call: Call, request: Any, context: Context, size: int | None = None
    ) -> Fault | None:
        """Record a call, of one message of so many bytes, check its credentials, and begin its fault."""
        call.metadata = dict(context.invocation_metadata() or ())
        describe(call, request)
        self._log.begin(call)
        if self._faults.link is not None:
            await asyncio.sleep(self._faults.link.latency_s)
        self._authenticate(call)
        if call.method in _STREAMS and self._streams > self._backend.options.max_streams:
            raise overloaded("too many streams are open")
        fault = self._faults.take(call)
        if size is not None:
            await self._carry("up", size)
        if fault is not None:
            await faults.before(fault)
            if fault.drop_blob and call.method not in faults.WRITES:
                await self._drop(fault, call)
        return fault

    async def _carry(self, direction: Literal["up", "down"], size: int) -> None:
        """Bring a message over the link, where there is one."""
        if self._faults.link is not None:
            await self._faults.link.carry(direction, size)

    async def _after(self, fault: Fault, call: Call) -> None:
        """Let a fault act on work that is done."""
        if fault.drop_blob and call.method in faults.WRITES:
            await self._drop(fault, call)
        if fault.lose_reply:
            raise fault.failure()

    async def _drop(self, fault: Fault, call: Call) -> None:
        partition = self._backend.partition(call.instance_name)
        await self._backend.run(faults.drop_blobs, fault, call.hashes, partition)

    def _authenticate(self, call: Call) -> None:
        options = self._backend.options
        expected = dict(options.required_headers)
        if options.bearer_token is not None:
            expected["authorization"] = f"Bearer {options.bearer_token}"
        for name, value in expected.items():
            sent = call.metadata.get(name, "")
            sent = sent if isinstance(sent, bytes) else sent.encode()
            if not hmac.compare_digest(sent, value.encode()):
                raise Failure(grpc.StatusCode.UNAUTHENTICATED, f"the header {name} is missing or wrong")

    @contextlib.asynccontextmanager
    async def _tracked(self, call: Call, context: Context) -> AsyncIterator[None]:
        """Record the end of the call, and end it with the status of what is raised inside."""
        status, failure = "CANCELLED", None
        is_stream = call.method in _STREAMS
        self._active += 1
        self._streams += is_stream
        self._is_idle.clear()
        try:
            yield
            status = "OK"
        except Exception as error:  # noqa: BLE001 - every error becomes a status
            failure = as_failure(error)
            status = failure.code.name
        finally:
            self._log.end(call, status)
            self._active -= 1
            self._streams -= is_stream
            if self._active == 0:
                self._is_idle.set()
        if failure is not None:
            # This waits for as long as the client does not read, so the call no longer counts.
            try:
                await context.abort(failure.code, failure.message, trailers(failure))
            except grpc.aio.InternalError as error:
                # gRPC could not send: the client went away.
                raise asyncio.CancelledError from error


def _decode(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidArgument(f"the request is not a {kind.DESCRIPTOR.full_name}") from error


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item
