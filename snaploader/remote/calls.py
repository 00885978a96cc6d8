"""An operation on a server: its calls and attempts, what is tried again and when, its errors, counters.

Transient failures are tried again, with growing random waits, within a budget, until called off. This is the
one retry layer: gRPC's own retries are off, since they end at the first byte of a response. Here an operation
that made progress (a stream that moved, a batch that lost some of its items) starts counting anew, and
continues where it was. tenacity runs the attempts, with strategies of its kind.
"""

from __future__ import annotations

import logging
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import grpc
import tenacity
from google.protobuf.message import DecodeError

from snaploader import errors
from snaploader._proto import duration_pb2, services, status_pb2
from snaploader.context import CallContext, Cancellation, Credentials, Headers, RequestMetadata, current
from snaploader.digest import DigestFunction
from snaploader.errors import Cancelled, DeadlineExceeded, SnaploaderError, Unauthenticated, Unavailable
from snaploader.remote.auth import SECRET_NAME
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.channel import StreamGuard, Watchdog, open_channel, tls_failure
from snaploader.remote.config import (
    Endpoint,
    Limits,
    RetryCallback,
    RetryEvent,
    RetryPolicy,
    Timeouts,
    TLSConfig,
)
from snaploader.telemetry import Observer, Operation

log = logging.getLogger(__name__)

T = TypeVar("T")

Code = grpc.StatusCode

_ERRORS: dict[grpc.StatusCode, tuple[type[SnaploaderError], bool]] = {
    Code.UNAVAILABLE: (errors.Unavailable, True),
    Code.ABORTED: (errors.Unavailable, True),
    Code.DEADLINE_EXCEEDED: (errors.DeadlineExceeded, True),
    Code.RESOURCE_EXHAUSTED: (errors.ResourceExhausted, True),  # unless a message was too large
    Code.INTERNAL: (errors.Internal, True),
    Code.UNKNOWN: (errors.Internal, True),
    Code.CANCELLED: (errors.Cancelled, True),  # the server's cancelling, not ours
    Code.UNAUTHENTICATED: (errors.Unauthenticated, False),  # but once, when credentials could be renewed
    Code.DATA_LOSS: (errors.DataLoss, False),
    Code.NOT_FOUND: (errors.NotFound, False),
    Code.INVALID_ARGUMENT: (errors.InvalidArgument, False),
    Code.OUT_OF_RANGE: (errors.InvalidArgument, False),
    Code.FAILED_PRECONDITION: (errors.FailedPrecondition, False),
    Code.ALREADY_EXISTS: (errors.FailedPrecondition, False),
    Code.PERMISSION_DENIED: (errors.PermissionDenied, False),
    Code.UNIMPLEMENTED: (errors.Unimplemented, False),
}
"""By code, the error and whether it is transient. The status stays reachable as its `__cause__`."""

_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_MAX_DETAILS = 1000
_DETAILS_KEY = "grpc-status-details-bin"
_RETRY_INFO = "/google.rpc.RetryInfo"
_TOO_LARGE = re.compile("larger than max|too large|exceeds maximum", re.IGNORECASE)


class MessageStatus(grpc.RpcError):
    """A google.rpc.Status found inside a response, which answers as a failed call does."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return _BY_NUMBER.get(self._status.code, Code.UNKNOWN)

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> Any:
        return ((_DETAILS_KEY, self._status.SerializeToString()),)


def from_message(status: status_pb2.Status, what: str) -> SnaploaderError:
    """Translate a status, not OK, inside a response; `what` as in `from_rpc_error`."""
    return from_rpc_error(MessageStatus(status), what)


def from_rpc_error(error: grpc.RpcError, what: str) -> SnaploaderError:
    """Translate the error of a call; `what` says what was being done, as in "reading 1f…/4096"."""
    call = _call(error)
    code, details = (Code.UNKNOWN, str(error)) if call is None else (call.code(), call.details() or "")
    kind, transient = _ERRORS.get(code, (errors.Internal, False))
    if code is Code.RESOURCE_EXHAUSTED and _TOO_LARGE.search(details):
        transient = False
    shown = details if len(details) <= _MAX_DETAILS else details[:_MAX_DETAILS] + "…"
    typed = kind(f"{what} failed: {shown or 'no reason given'} ({code.name})", transient=transient)
    typed.__cause__ = error
    return typed


def code_of(error: BaseException) -> grpc.StatusCode | None:
    """Return the gRPC code behind a typed error; None when there is none."""
    call = _call(error.__cause__)
    return call.code() if call is not None else None


def is_of_whole_call(error: BaseException) -> bool:
    """Tell whether a call as such failed, rather than one blob in it."""
    return _call(error.__cause__) is not None and not isinstance(error.__cause__, MessageStatus)


def is_too_large(error: BaseException) -> bool:
    """Tell whether a request or its response may have been refused for its size.

    buildbox-casd and BuildGrid answer INVALID_ARGUMENT to a batch above their limit without
    naming it, so that code alone counts.
    """
    code = code_of(error)
    if code is Code.RESOURCE_EXHAUSTED:
        return isinstance(error, SnaploaderError) and not error.transient
    return code in (Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE)


def retry_after_s(error: BaseException) -> float | None:
    """Return how long the server asks to wait before a retry (RetryInfo); None when it does not."""
    call = _call(error.__cause__)
    try:
        for key, value in (call.trailing_metadata() or ()) if call is not None else ():
            if key == _DETAILS_KEY and isinstance(value, bytes):
                return _delay(status_pb2.Status.FromString(value))
    except DecodeError:
        return None  # undecodable advice is no advice
    return None


def _call(error: BaseException | None) -> grpc.Call | None:
    """gRPC raises objects that are errors and calls at once, of a class without a name."""
    return cast("grpc.Call", error) if isinstance(error, grpc.RpcError) and hasattr(error, "code") else None


def _delay(status: status_pb2.Status) -> float | None:
    for detail in status.details:
        # RetryInfo has one field, number 1: a Duration of at most 16 bytes, behind a tag and a length byte.
        if detail.type_url.endswith(_RETRY_INFO) and detail.value[:1] == b"\x0a":
            duration = duration_pb2.Duration.FromString(detail.value[2:])
            return max(0.0, float(duration.seconds) + duration.nanos / 1e9)
    return None


class SinkFailed(Exception):
    """Carries what a sink raised past the retry layer: it is no failure of the transfer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def deliver(sink: Callable[..., object], *arguments: object) -> None:
    """Call a sink within an attempt. SinkFailed for what it raises."""
    try:
        sink(*arguments)
    except Exception as error:
        raise SinkFailed(error) from error


class Attempts:
    """The attempts at one operation: how many failed, what time is left, in whose name. Not thread-safe."""

    def __init__(
        self, operation: str, policy: RetryPolicy, extra_s: float, cancellation: Cancellation
    ) -> None:
        self.operation = operation
        self.cancellation = cancellation
        self.number = 0
        self.fruitless = 0  # failed since the last one that made progress
        self._share = 0.0  # random, of the jitter in the next wait
        self._policy = policy
        self.context = current()
        self._deadline = time.monotonic() + min(policy.budget_s + extra_s, self.context.remaining_s)
        self._progressed = False

    @property
    def remaining_s(self) -> float:
        """What is left of the budget."""
        return self._deadline - time.monotonic()

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the call that all this is for is over."""
        self.cancellation.check()
        self.context.check()

    def sleep(self, seconds: float) -> None:
        """Sleep. Errors as `check`, as soon as they occur."""
        self.cancellation.wait(seconds)
        self.check()

    def timeout_s(self, wanted: float) -> float:
        """Return the time for one call: `wanted`, or what is left. DeadlineExceeded when nothing is."""
        self.context.check()
        remaining = self.remaining_s
        if remaining <= 0:
            raise DeadlineExceeded(f"{self.operation} failed: its time budget is used up", transient=False)
        return min(wanted, remaining)

    def progressed(self) -> None:
        """Note that this attempt moved something for good: should it fail, counting starts anew."""
        self._progressed = True

    def failed(self) -> None:
        """Note that this attempt failed."""
        self.fruitless = 1 if self._progressed else self.fruitless + 1
        self._progressed = False
        self._share = random.random()  # noqa: S311 - spreads load, keeps no secret

    def delay_s(self, error: SnaploaderError) -> float:
        """Return the wait after an error: doubled with each fruitless attempt, capped, a share random.

        Longer, if the server asks; none after credentials were renewed.
        """
        if isinstance(error, Unauthenticated):
            return 0.0
        policy = self._policy
        full = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** min(self.fruitless - 1, 60))
        return max(full * (1.0 - policy.jitter * self._share), retry_after_s(error) or 0.0)

    def are_over(self, error: SnaploaderError) -> bool:
        """Tell whether there were enough without progress, or the next wait would use up the budget."""
        if self.fruitless >= self._policy.attempts and error.transient:  # renewing credentials is no attempt
            return True
        return self.delay_s(error) >= self.remaining_s


@dataclass(frozen=True, slots=True)
class Retrier:
    """Runs operations until they succeed or fail for good. Thread-safe."""

    policy: RetryPolicy
    on_retry: RetryCallback
    """Sees every retry before its wait."""
    refresh: Callable[[], bool] = lambda: False
    """Renews the credentials; called once per operation, when a server does not accept them."""
    min_bytes_per_s: float = math.inf
    """Gives what is big more time than the policy's budget."""

    def run(
        self,
        operation: str,
        attempt: Callable[[Attempts], T],
        cancellation: Cancellation,
        size_bytes: int = 0,
    ) -> T:
        """Call `attempt` until it returns, or raises what is not worth another try. Big blobs have longer."""
        attempts = Attempts(operation, self.policy, size_bytes / self.min_bytes_per_s, cancellation)

        def once() -> T:
            attempts.check()
            attempts.number += 1
            try:
                return attempt(attempts)
            except SnaploaderError as error:
                attempts.failed()
                if not isinstance(error, Cancelled):
                    attempts.check()
                raise

        try:
            return once()  # tenacity's machinery costs a tenth of a small read, so it begins with a failure
        except SnaploaderError as error:
            failures = [error]

        def again() -> T:
            if failures:
                raise failures.pop()
            return once()

        was_refreshed = False

        def is_worth_a_try(error: BaseException) -> bool:
            nonlocal was_refreshed
            if isinstance(error, SnaploaderError) and error.transient:
                return True
            if was_refreshed or not isinstance(error, Unauthenticated):
                return False
            was_refreshed = True
            return self.refresh()

        def tell(state: tenacity.RetryCallState) -> None:
            error = _error(state)
            self.on_retry(RetryEvent(operation, attempts.number, attempts.delay_s(error), error))

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_a_try),
            wait=lambda state: attempts.delay_s(_error(state)),
            stop=lambda state: attempts.are_over(_error(state)),
            before_sleep=tell,
            sleep=attempts.sleep,
            reraise=True,
        )(again)


def _error(state: tenacity.RetryCallState) -> SnaploaderError:
    """What an attempt failed with that is tried again."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, SnaploaderError)
    return error


@dataclass(frozen=True, slots=True)
class RemoteStatistics:
    """Counters since a cache was made, at one moment. Immutable."""

    calls: Mapping[str, int] = field(default_factory=dict)
    """Calls begun, by method, retries included."""
    failed_calls: Mapping[str, int] = field(default_factory=dict)
    """Calls that ended in an error, by method; "not found" and the like are errors too."""
    retries: int = 0
    """Attempts after a transient failure."""
    blobs_read: int = 0
    """Blobs fetched and verified."""
    content_bytes_read: int = 0
    """Their size."""
    wire_bytes_read: int = 0
    """What was received for them, compressed where it was; failed attempts count too."""
    blobs_written: int = 0
    """Blobs uploaded."""
    content_bytes_written: int = 0
    """Their size."""
    wire_bytes_written: int = 0
    """What was sent for them, compressed where it was; failed attempts count too."""
    corrupted: int = 0
    """Transfers whose bytes did not match their digest."""
    in_flight_bytes: int = 0
    """Content of the blobs being read or written now."""


class Recorder:
    """Counts what a remote cache does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()

    def call(self, method: str) -> None:
        with self._lock:
            self._calls[method] += 1

    def failure(self, method: str) -> None:
        with self._lock:
            self._failed[method] += 1

    def add(self, **numbers: int) -> None:
        """Add to the fields of RemoteStatistics with these names."""
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    @contextmanager
    def moving(self, size_bytes: int) -> Iterator[None]:
        """Count content as in flight during the block."""
        self.add(in_flight_bytes=size_bytes)
        try:
            yield
        finally:
            self.add(in_flight_bytes=-size_bytes)

    def snapshot(self) -> RemoteStatistics:
        """Return the counters as they are now."""
        with self._lock:
            return RemoteStatistics(dict(self._calls), dict(self._failed), **self._numbers)


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls one instance on one server, with retries. Thread-safe."""

    url: str
    """Names the server in messages."""
    instance_name: str
    transport: Transport
    retrier: Retrier
    limits: Limits
    recorder: Recorder
    capabilities: RemoteCapabilities = RemoteCapabilities()  # noqa: RUF009 - frozen
    """What was negotiated."""

    def unary(self, operation: str, method: str, request: Any, cancellation: Cancellation) -> Any:
        """Send one request, with retries; `operation` says what is being done, as in "reading 1f…/4096"."""
        return self.retrier.run(
            operation, lambda attempts: self.transport.unary(method, request, attempts), cancellation
        )


_TLS_PROBE_S = 5.0  # bounds finding out why a connection with TLS fails

_RAW = ("BatchUpdateBlobs", "Write")  # methods whose requests come serialised (snaploader.remote.codec)
_PATHS = {
    method.name: method.path for service in services.SERVICES for method in services.methods(service).values()
}
_NOT_CONNECTED = "failed to connect"
_DISCONNECTED = "Socket closed"
"""What gRPC says of a call for which there was no connection, and of one whose connection ended."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the user chose."""

    endpoint: Endpoint
    instance_name: str
    headers: Headers
    credentials: Credentials | None
    tls: TLSConfig
    timeouts: Timeouts
    retry: RetryPolicy
    limits: Limits
    digest_function: DigestFunction | None
    compression: bool
    on_retry: RetryCallback | None
    open_channel: Callable[[], grpc.Channel] | None
    request_metadata: RequestMetadata
    observer: Observer

    def proof_of(self, context: CallContext) -> tuple[Headers, Credentials | None]:
        """The headers and the credentials to send in a context: its own if it has any, else the user's."""
        headers, credentials = context.proof
        if headers is None and credentials is None:
            return self.headers, self.credentials
        return headers or (), credentials


class Transport:
    """The methods of the four services on one channel. Thread-safe.

    A channel that could not connect is replaced, so that the next call tries again at once: when to try again
    is for `Retrier` to say, and gRPC's own backoff may outlast it.
    """

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self._settings = settings
        self._recorder = recorder
        self._may_warn = threading.Lock()  # taken by the one who does, and kept
        self._open_channel = settings.open_channel or partial(
            open_channel, settings.endpoint, settings.tls, settings.timeouts, settings.limits
        )
        self._watchdog = Watchdog(settings.timeouts.idle_s)
        self._lock = threading.Lock()
        self._closed = False
        self._channel = _Channel(self._open_channel())

    def unary(self, method: str, request: Any, attempts: Attempts) -> Any:
        """Send one request; returns the response, within `Timeouts.call_s` and what is left of the budget."""
        with self._observed(method) as operation:
            channel, options = self._begin(method, attempts, operation, self._settings.timeouts.call_s)
            stub = channel.stubs[method]
            try:
                if attempts.context.cancellation is None:
                    return stub(request, **options)
                call = stub.future(request, **options)  # costs more, and can be cancelled
                try:
                    with attempts.cancellation.calling(call.cancel):
                        return call.result()
                finally:
                    call.cancel()
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
                raise self._error(method, error, attempts, channel) from error

    def receive(self, method: str, request: Any, attempts: Attempts) -> Generator[Any, None, None]:
        """Send one request; gives the messages of the server's stream. Close it to end the call early."""
        with self._observed(method) as operation:
            channel, options = self._begin(method, attempts, operation)
            try:
                call = channel.stubs[method](request, **options)
            except ValueError as error:
                raise self._error(method, error, attempts, channel) from error
            with self._watchdog.watch(call) as guard, attempts.cancellation.calling(call.cancel):
                try:
                    for message in call:
                        guard.pause()  # what the receiver does with it is not the server's silence
                        yield message
                        guard.touch()
                        attempts.check()
                except grpc.RpcError as error:
                    raise self._error(method, error, attempts, channel, idle=guard.expired) from error
                finally:
                    call.cancel()

    def send(self, method: str, requests: Iterator[bytes], attempts: Attempts) -> Any:
        """Send a stream; returns the response. What `requests` raises ends the call and is raised.

        A thread of gRPC's takes from `requests`, and may do so a little longer than the call lasts.
        """
        with self._observed(method) as operation:
            channel, options = self._begin(method, attempts, operation)
            source = _Requests(requests)
            try:
                call = channel.stubs[method].future(source, **options)
            except ValueError as error:
                raise self._error(method, error, attempts, channel) from error
            with self._watchdog.watch(call) as guard, attempts.cancellation.calling(call.cancel):
                source.attach(call, guard, attempts.cancellation)
                try:
                    response = call.result()
                except (grpc.RpcError, grpc.FutureCancelledError) as error:
                    if source.error is None:
                        raise self._error(method, error, attempts, channel, idle=guard.expired) from error
                    response = None
                finally:
                    call.cancel()
            if source.error is not None:
                self._recorder.failure(method)
                raise source.error
            return response

    def close(self) -> None:
        """Cancel every call and close the connection."""
        with self._lock:
            self._closed = True
        self._channel.channel.close()
        self._watchdog.close()

    def _observed(self, method: str) -> Operation:
        """Tell of a call, while the block runs."""
        endpoint = self._settings.endpoint
        return self._settings.observer.operation(
            "rpc", path=_PATHS[method], address=endpoint.host, port=endpoint.port
        )

    def _begin(
        self, method: str, attempts: Attempts, operation: Operation, most_s: float = math.inf
    ) -> tuple[_Channel, dict[str, Any]]:
        """Count a call, and return the channel and the options to make it with."""
        headers = self._headers(attempts.context) + operation.headers()
        options = {"timeout": attempts.timeout_s(most_s), "metadata": headers}
        self._recorder.call(method)
        return self._channel, options

    def _headers(self, context: CallContext) -> Headers:
        headers, credentials = self._settings.proof_of(context)
        headers += credentials.headers() if credentials is not None else ()
        endpoint = self._settings.endpoint
        if not endpoint.secure and not self._may_warn.locked():
            secrets = sorted({name for name, _ in headers if SECRET_NAME.search(name)})
            if secrets and self._may_warn.acquire(blocking=False) and not endpoint.is_on_this_host:
                log.warning(
                    "credentials (%s) go to %s without encryption: whoever sees the traffic can use them; "
                    "use a grpcs:// URL where the server offers TLS",
                    ", ".join(secrets),
                    endpoint.url,
                )
        metadata = context.request_metadata or self._settings.request_metadata
        # gRPC takes no subclass of bytes, as the secret ones are.
        plain = ((name, bytes(value) if isinstance(value, bytes) else value) for name, value in headers)
        return (metadata.header(), *plain)

    def _replace(self, channel: _Channel) -> None:
        """Replace a channel that cannot connect, once, by one that has nothing to back off from."""
        with self._lock:
            if self._closed or self._channel is not channel:
                return
            self._channel = _Channel(self._open_channel())
        channel.channel.close()

    def _error(
        self, method: str, error: Exception, attempts: Attempts, channel: _Channel, *, idle: bool = False
    ) -> SnaploaderError:
        self._recorder.failure(method)
        if attempts.cancellation.is_cancelled:
            return Cancelled(f"{attempts.operation}: {attempts.cancellation.reason}", transient=False)
        if idle:
            return DeadlineExceeded(
                f"{attempts.operation} failed: the server was silent for {self._settings.timeouts.idle_s:g} s"
            )
        if isinstance(error, grpc.RpcError):
            typed = from_rpc_error(error, attempts.operation)
            if not isinstance(typed, Unavailable):
                return typed
            if _NOT_CONNECTED in typed.message:
                self._replace(channel)
            elif _DISCONNECTED not in typed.message:
                return typed
            if self._settings.open_channel is not None:
                return typed  # whatever it has for TLS
            timeout_s = min(_TLS_PROBE_S, self._settings.timeouts.connect_s)
            find_out = partial(tls_failure, self._settings.endpoint, self._settings.tls, timeout_s)
            reason = attempts.context.wait_for(find_out)
            if reason is None:
                return typed
            reason.__cause__ = error
            return reason
        if not self._closed:
            return Unavailable(f"{attempts.operation} failed: the connection was lost meanwhile")
        return Cancelled(f"{attempts.operation} failed: the connection was closed", transient=False)


class _Channel:
    """A channel, and what to call on it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.stubs: dict[str, Any] = {
            method.name: self._stub(method)
            for service in services.SERVICES
            for method in services.methods(service).values()
        }

    def _stub(self, method: services.Method) -> Any:
        kind = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
        }[method.client_streaming, method.server_streaming]
        serializer = None if method.name in _RAW else method.request.SerializeToString
        return kind(
            method.path, request_serializer=serializer, response_deserializer=method.response.FromString
        )


class _Requests:
    """An iterator whose failure cancels the call and is kept; gRPC would log it, and not say what it was."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._call: Any = None
        self._guard: StreamGuard | None = None
        self._cancellation: Cancellation | None = None
        self.error: BaseException | None = None

    def attach(self, call: Any, guard: StreamGuard, cancellation: Cancellation) -> None:
        """Name the call these requests are for, which may have taken some of them already."""
        self._call, self._guard, self._cancellation = call, guard, cancellation
        if self.error is not None:
            call.cancel()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if self._guard is not None and self._cancellation is not None:
                self._guard.touch()
                self._cancellation.check()
            return next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:  # noqa: BLE001 - raised by send, on the caller's thread
            self.error = error
            if self._call is not None:
                self._call.cancel()
            raise StopIteration from None
