"""One process's connection to a server: its threads, its bounds, and the clients that use them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import grpc

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import TransferStatistics, Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import ResourceExhausted, SnaploaderError, Unimplemented
from snaploader.remote.action_cache import ActionCacheClient
from snaploader.remote.auth import Credentials, Headers, is_secret
from snaploader.remote.bulk import BatchLimit, ByteBudget, Task, run_all
from snaploader.remote.calls import Caller, Transport
from snaploader.remote.capabilities import RemoteCapabilities, negotiate, without_capabilities
from snaploader.remote.cas import CASClient
from snaploader.remote.channel import open_channel, tls_failure
from snaploader.remote.codec import Item
from snaploader.remote.config import (
    Endpoint,
    Limits,
    RetryCallback,
    RetryEvent,
    RetryPolicy,
    Timeouts,
    TLSConfig,
)
from snaploader.remote.retry import Attempts, Cancellation, Retrier
from snaploader.remote.statistics import Recorder
from snaploader.remote.streams import StreamReader, StreamWriter
from snaploader.workers import WorkerPool

T = TypeVar("T")


class Once(Generic[T]):
    """Keeps the first success of `make`. A failure reaches those who waited; the next caller tries again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._future: Future[T] | None = None

    def get(self) -> T:
        """Return the value, made now if need be."""
        with self._lock:
            future = self._future
            is_maker = future is None
            if future is None:
                future = self._future = Future()
        if not is_maker:
            return future.result()
        try:
            value = self._make()
        except BaseException as error:
            with self._lock:
                self._future = None
            future.set_exception(error)
            raise
        future.set_result(value)
        return value


_TLS_PROBE_S = 5.0
"""Bounds finding out why a connection with TLS fails."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the user chose."""

    endpoint: Endpoint
    instance_name: str
    headers: Headers
    credentials: Credentials
    tls: TLSConfig
    timeouts: Timeouts
    retry: RetryPolicy
    limits: Limits
    digest_function: DigestFunction | None
    compression: bool
    on_retry: RetryCallback | None
    open_channel: Callable[[], grpc.Channel] | None


@dataclass(frozen=True, slots=True)
class Clients:
    """The clients of the services, made once the server's capabilities are known."""

    caller: Caller
    cas: CASClient
    reader: StreamReader
    writer: StreamWriter
    actions: ActionCacheClient

    def check(self, digest: Digest) -> Digest:
        """Return the digest itself. Unimplemented when the server does not know its function."""
        if digest.function not in self.caller.capabilities.digest_functions:
            raise Unimplemented(f"the server does not offer {digest.function.name} digests, as {digest} has")
        return digest

    def check_upload(self, upload: Upload) -> None:
        """Check the digest and its size: ResourceExhausted when the server takes no blob so big."""
        digest = self.check(upload.digest)
        if 0 < self.caller.capabilities.max_blob_bytes < digest.size_bytes:
            raise ResourceExhausted(
                f"blob {digest} is too big: the server takes at most "
                f"{self.caller.capabilities.max_blob_bytes} bytes",
                transient=False,
            )

    def held_bytes(self, upload: Upload) -> int:
        """Return what an upload keeps in memory: when streamed, a few frames only."""
        size = upload.digest.size_bytes
        if self.caller.batch_limit.fits(size):
            return size
        return min(size, 2 * self.caller.limits.stream_frame_bytes)

    def write(self, group: Sequence[Upload], cancellation: Cancellation) -> TransferStatistics:
        """Store the blobs of one batch, or one that is streamed; loaded and compressed on this thread."""
        if len(group) == 1 and not self.caller.batch_limit.fits(group[0].digest.size_bytes):
            return self.writer.write(group[0], cancellation)
        zstd = self.caller.capabilities.zstd_batch_updates
        return self.cas.update([Item.of(upload, zstd=zstd) for upload in group], cancellation)


class Connection:
    """One process's connection: the whole stack is put together here. Thread-safe.

    A process that was forked makes its own; what gRPC and threads held is not shared.
    """

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self.cancellation = Cancellation()
        self._pool = WorkerPool(
            settings.limits.workers, owner="the remote cache", thread_name="snaploader-remote"
        )
        self.budget = ByteBudget(settings.limits.in_flight_bytes)
        self._settings = settings
        self._recorder = recorder
        self._is_open_to_others = not (settings.endpoint.secure or settings.endpoint.is_on_this_host)
        self._may_warn = threading.Lock()  # taken by the one who does, and kept
        self._transport = Transport(
            settings.open_channel
            or partial(open_channel, settings.endpoint, settings.tls, settings.timeouts, settings.limits),
            settings.timeouts,
            self._headers,
            recorder,
            self._tls_failure,
        )
        self._retrier = Retrier(settings.retry, self._on_retry, settings.credentials.refresh)
        self._clients = Once(self._make_clients)

    @property
    def clients(self) -> Clients:
        """The clients. Asks for the server's capabilities at first, and raises what that raises."""
        return self._clients.get()

    def run_all(self, tasks: Iterable[Task]) -> None:
        """Run tasks in parallel, within the bounds of this cache; see `snaploader.remote.bulk.run_all`."""
        run_all(tasks, self._pool, self.budget, self.cancellation)

    def close(self) -> None:
        """Call everything off, close the connection, join the threads."""
        self.cancellation.cancel()
        self._transport.close()
        self._pool.close()

    def _headers(self) -> Headers:
        headers = self._settings.headers + self._settings.credentials.headers()
        if self._is_open_to_others and not self._may_warn.locked():
            secrets = sorted({name for name, _ in headers if is_secret(name)})
            if secrets and self._may_warn.acquire(blocking=False):
                log.warning(
                    "credentials (%s) go to %s without encryption: whoever sees the traffic can use them; "
                    "use a grpcs:// URL where the server offers TLS",
                    ", ".join(secrets),
                    self._settings.endpoint.url,
                )
        return headers

    def _tls_failure(self) -> SnaploaderError | None:
        settings = self._settings
        if settings.open_channel is not None:
            return None  # whatever it has for TLS
        return tls_failure(settings.endpoint, settings.tls, min(_TLS_PROBE_S, settings.timeouts.connect_s))

    def _on_retry(self, event: RetryEvent) -> None:
        self._recorder.add(retries=1)
        if self._settings.on_retry is not None:
            self._settings.on_retry(event)

    def _make_clients(self) -> Clients:
        settings = self._settings
        capabilities = self._ask_capabilities()
        caller = Caller(
            settings.endpoint.url,
            self._transport,
            self._retrier,
            settings.instance_name,
            settings.timeouts,
            settings.limits,
            self._recorder,
            capabilities,
            BatchLimit(min(settings.limits.batch_bytes, capabilities.message_limit_bytes)),
        )
        reader = StreamReader(caller)

        def is_present(upload: Upload, cancellation: Cancellation) -> bool:
            return not cas.find_missing([upload.digest], cancellation)

        writer = StreamWriter(caller, is_present)

        cas = CASClient(caller, reader.read, writer.write)
        return Clients(caller, cas, reader, writer, ActionCacheClient(caller))

    def _ask_capabilities(self) -> RemoteCapabilities:
        settings = self._settings
        request = reapi.GetCapabilitiesRequest(instance_name=settings.instance_name)

        def attempt(attempts: Attempts) -> reapi.ServerCapabilities:
            answer: reapi.ServerCapabilities = self._transport.unary("GetCapabilities", request, attempts)
            return answer

        operation = f"asking {settings.endpoint.url} for its capabilities"
        try:
            answer = self._retrier.run(operation, attempt, self.cancellation)
        except Unimplemented:
            return without_capabilities(settings.digest_function)
        return negotiate(answer, wanted=settings.digest_function, compression=settings.compression)
