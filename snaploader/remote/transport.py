"""Single calls: metadata, deadlines, counting and the translation of errors. No retries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grpc

from snaploader._proto import services
from snaploader.errors import Cancelled, DeadlineExceeded, SnaploaderError, Unavailable
from snaploader.remote.config import Timeouts
from snaploader.remote.metadata import Headers
from snaploader.remote.retry import Attempts
from snaploader.remote.statistics import Recorder
from snaploader.remote.status import from_rpc_error
from snaploader.remote.watchdog import Guard, Watchdog

_RAW = frozenset(("BatchUpdateBlobs", "Write"))
"""Methods whose requests come serialised (snaploader.remote.encoding)."""

_NOT_CONNECTED = "failed to connect"
_DISCONNECTED = "Socket closed"
"""What gRPC says of a call for which there was no connection, and of one whose connection ended."""


class Transport:
    """The methods of the four services on one channel. Thread-safe.

    A channel that could not connect is replaced, so that the next call tries again at once: when to try again
    is for `snaploader.remote.retry` to say, and gRPC's own backoff may outlast it.

    Args:
        open_channel: Makes a channel, which is closed here.
        headers: What to send along, asked for at every call.
        tls_failure: Says why no connection could be made where TLS is to blame, which gRPC hardly tells.
    """

    def __init__(
        self,
        open_channel: Callable[[], grpc.Channel],
        timeouts: Timeouts,
        headers: Callable[[], Headers],
        recorder: Recorder,
        tls_failure: Callable[[], SnaploaderError | None],
    ) -> None:
        self._open_channel = open_channel
        self._timeouts = timeouts
        self._headers = headers
        self._recorder = recorder
        self._tls_failure = tls_failure
        self._watchdog = Watchdog(timeouts.idle_s)
        self._lock = threading.Lock()
        self._closed = False
        self._channel = _Channel(open_channel())

    def unary(self, method: str, request: Any, attempts: Attempts) -> Any:
        """The response to one request, within `Timeouts.call_s` and what is left of the budget."""
        timeout_s = attempts.timeout_s(self._timeouts.call_s)
        headers = self._headers()
        self._recorder.call(method)
        channel = self._channel
        try:
            return channel.stubs[method](request, timeout=timeout_s, metadata=headers)
        except (grpc.RpcError, ValueError) as error:
            raise self._error(method, error, attempts, channel) from error

    def receive(self, method: str, request: Any, attempts: Attempts) -> Generator[Any, None, None]:
        """The messages of a server's stream. Close it (contextlib.closing) to end the call early."""
        timeout_s = attempts.timeout_s(float("inf"))
        headers = self._headers()
        self._recorder.call(method)
        channel = self._channel
        try:
            call = channel.stubs[method](request, timeout=timeout_s, metadata=headers)
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
        """The response to a client's stream. What `requests` raises ends the call and is raised.

        A thread of gRPC's takes from `requests`, and may do so a little longer than the call lasts.
        """
        timeout_s = attempts.timeout_s(float("inf"))
        headers = self._headers()
        self._recorder.call(method)
        source = _Requests(requests)
        channel = self._channel
        try:
            call = channel.stubs[method].future(source, timeout=timeout_s, metadata=headers)
        except ValueError as error:
            raise self._error(method, error, attempts, channel) from error
        with self._watchdog.watch(call) as guard:
            source.attach(call, guard, attempts)
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

    def _lost(self, channel: _Channel) -> None:
        """Begin anew, with a channel that has nothing to back off from; once for one that cannot connect."""
        with self._lock:
            if self._closed or self._channel is not channel:
                return
            self._channel = _Channel(self._open_channel())
        channel.channel.close()

    def _error(
        self, method: str, error: Exception, attempts: Attempts, channel: _Channel, *, idle: bool = False
    ) -> SnaploaderError:
        self._recorder.failure(method)
        if attempts.cancellation.cancelled:
            return Cancelled(f"{attempts.operation} was called off", transient=False)
        if idle:
            return DeadlineExceeded(
                f"{attempts.operation} failed: the server was silent for {self._timeouts.idle_s:g} s"
            )
        if isinstance(error, grpc.RpcError):
            typed = from_rpc_error(error, attempts.operation)
            if not isinstance(typed, Unavailable):
                return typed
            if _NOT_CONNECTED in typed.message:
                self._lost(channel)
            elif _DISCONNECTED not in typed.message:
                return typed
            reason = self._tls_failure()
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
        self._on_next: Callable[[], None] = lambda: None
        self.error: BaseException | None = None

    def attach(self, call: Any, guard: Guard, attempts: Attempts) -> None:
        """The call these requests are for, which may have taken some of them already."""

        def on_next() -> None:
            guard.touch()
            attempts.cancellation.check()

        self._on_next = on_next
        self._call = call
        if self.error is not None:
            call.cancel()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            self._on_next()
            return next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:  # noqa: BLE001 - raised by send, on the caller's thread
            self.error = error
            if self._call is not None:
                self._call.cancel()
            raise StopIteration from None
