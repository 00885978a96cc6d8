"""Calls to a server: headers, deadlines, silence, counting, errors; with retries, by `Caller`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from snaploader._proto import services
from snaploader.digest import DigestFunction
from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    SnaploaderError,
    Unavailable,
    translate_thread_errors,
)
from snaploader.remote.auth import SECRET_NAME, Credentials, Headers
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.channel import open_channel, tls_failure
from snaploader.remote.config import Endpoint, Limits, RetryCallback, RetryPolicy, Timeouts, TLSConfig
from snaploader.remote.retry import Attempts, Cancellation, Retrier
from snaploader.remote.status import from_rpc_error

log = logging.getLogger(__name__)


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

    def snapshot(self) -> RemoteStatistics:
        """Return the counters as they are now."""
        with self._lock:
            return RemoteStatistics(dict(self._calls), dict(self._failed), **self._numbers)


@dataclass(eq=False, slots=True)
class StreamGuard:
    """Watches one stream; `touch` it at each message."""

    call: Any
    touched: float = field(default_factory=time.monotonic)
    expired: bool = False

    def touch(self) -> None:
        self.touched = time.monotonic()

    def pause(self) -> None:
        """Wait for no message until the next `touch`."""
        self.touched = math.inf


class Watchdog:
    """Ends streams that fall silent: gRPC's deadlines cover a whole call, not the time between two messages.

    One thread, started with the first stream, watches all streams of a cache. Thread-safe.

    Args:
        idle_s: The silence after which a stream is cancelled.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._condition = threading.Condition()
        self._guards: set[StreamGuard] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def watch(self, call: Any) -> Iterator[StreamGuard]:
        """Watch a call while the block runs."""
        guard = StreamGuard(call)
        with self._condition:
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="snaploader-remote-watchdog", daemon=True)
                with translate_thread_errors("the remote cache was closed"):
                    thread.start()
                self._thread = thread
            self._guards.add(guard)
            if len(self._guards) == 1:  # with others, it wakes before this one's time anyway
                self._condition.notify()
        try:
            yield guard
        finally:
            with self._condition:
                self._guards.discard(guard)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                limit = time.monotonic() - self._idle_s
                expired = [guard for guard in self._guards if guard.touched <= limit]
                for guard in expired:
                    self._guards.discard(guard)
                    guard.expired = True
                    guard.call.cancel()
                # A guard touched or resumed meanwhile has its whole time still to go: checking every
                # `idle_s` at least, its silence is noticed at most that much late.
                oldest = min((guard.touched for guard in self._guards), default=None)
                self._condition.wait(None if oldest is None else min(self._idle_s, oldest - limit))


_TLS_PROBE_S = 5.0  # bounds finding out why a connection with TLS fails

_RAW = ("BatchUpdateBlobs", "Write")  # methods whose requests come serialised (snaploader.remote.codec)
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


class Transport:
    """The methods of the four services on one channel. Thread-safe.

    A channel that could not connect is replaced, so that the next call tries again at once: when to try again
    is for `snaploader.remote.retry` to say, and gRPC's own backoff may outlast it.
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
        channel, options = self._begin(method, attempts, self._settings.timeouts.call_s)
        try:
            return channel.stubs[method](request, **options)
        except (grpc.RpcError, ValueError) as error:
            raise self._error(method, error, attempts, channel) from error

    def receive(self, method: str, request: Any, attempts: Attempts) -> Generator[Any, None, None]:
        """Send one request; gives the messages of the server's stream. Close it to end the call early."""
        channel, options = self._begin(method, attempts)
        try:
            call = channel.stubs[method](request, **options)
        except ValueError as error:
            raise self._error(method, error, attempts, channel) from error
        with self._watchdog.watch(call) as guard:
            try:
                for message in call:
                    guard.pause()  # what the receiver does with it is not the server's silence
                    yield message
                    guard.touch()
                    attempts.cancellation.check()
            except grpc.RpcError as error:
                raise self._error(method, error, attempts, channel, idle=guard.expired) from error
            finally:
                call.cancel()

    def send(self, method: str, requests: Iterator[bytes], attempts: Attempts) -> Any:
        """Send a stream; returns the response. What `requests` raises ends the call and is raised.

        A thread of gRPC's takes from `requests`, and may do so a little longer than the call lasts.
        """
        channel, options = self._begin(method, attempts)
        source = _Requests(requests)
        try:
            call = channel.stubs[method].future(source, **options)
        except ValueError as error:
            raise self._error(method, error, attempts, channel) from error
        with self._watchdog.watch(call) as guard:
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

    def _begin(
        self, method: str, attempts: Attempts, most_s: float = math.inf
    ) -> tuple[_Channel, dict[str, Any]]:
        """Count a call, and return the channel and the options to make it with."""
        options = {"timeout": attempts.timeout_s(most_s), "metadata": self._headers()}
        self._recorder.call(method)
        return self._channel, options

    def _headers(self) -> Headers:
        credentials = self._settings.credentials
        headers = self._settings.headers + (credentials.headers() if credentials is not None else ())
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
        return headers

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
        if attempts.cancellation.event.is_set():
            return Cancelled(f"{attempts.operation} was called off", transient=False)
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
            reason = tls_failure(self._settings.endpoint, self._settings.tls, timeout_s)
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
