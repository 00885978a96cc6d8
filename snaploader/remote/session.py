"""What a remote cache holds open: the connection, its threads, and the clients that use them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import SnaploaderError, Unimplemented
from snaploader.remote.action_cache import ActionCacheClient
from snaploader.remote.batching import BatchLimit
from snaploader.remote.bulk import ByteBudget
from snaploader.remote.cancel import Cancellation
from snaploader.remote.capabilities import RemoteCapabilities, negotiate, without_capabilities
from snaploader.remote.cas import CASClient
from snaploader.remote.channel import open_channel, tls_failure
from snaploader.remote.client import Connection
from snaploader.remote.config import Limits, RetryCallback, RetryEvent, RetryPolicy, Timeouts, TLSConfig
from snaploader.remote.credentials import Credentials
from snaploader.remote.endpoint import Endpoint
from snaploader.remote.metadata import Headers, is_secret
from snaploader.remote.once import Once
from snaploader.remote.retry import Attempts, Retrier
from snaploader.remote.statistics import Recorder
from snaploader.remote.stream_read import StreamReader
from snaploader.remote.stream_write import StreamWriter
from snaploader.remote.transport import Transport

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

    connection: Connection
    cas: CASClient
    reader: StreamReader
    writer: StreamWriter
    actions: ActionCacheClient


class Session:
    """One process's connection: the whole stack is put together here. Thread-safe.

    A process that was forked makes its own session; what gRPC and threads held is not shared.
    """

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self.cancellation = Cancellation()
        self.executor = ThreadPoolExecutor(settings.limits.workers, thread_name_prefix="snaploader-remote")
        self.budget = ByteBudget(settings.limits.in_flight_bytes)
        self._settings = settings
        self._recorder = recorder
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

    def close(self) -> None:
        """Call everything off, close the connection, join the threads."""
        self.cancellation.cancel()
        self._transport.close()
        self.executor.shutdown(wait=True)

    def _headers(self) -> Headers:
        headers = self._settings.headers + self._settings.credentials.headers()
        endpoint = self._settings.endpoint
        if not self._may_warn.locked() and not endpoint.secure and not endpoint.is_on_this_host:
            secrets = sorted({name for name, _ in headers if is_secret(name)})
            if secrets and self._may_warn.acquire(blocking=False):
                log.warning(
                    "credentials (%s) go to %s without encryption: whoever sees the traffic can use them; "
                    "use a grpcs:// URL where the server offers TLS",
                    ", ".join(secrets),
                    endpoint.url,
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
        connection = Connection(
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
        reader = StreamReader(connection)

        def is_present(upload: Upload, cancellation: Cancellation) -> bool:
            return not cas.find_missing([upload.digest], cancellation)

        writer = StreamWriter(connection, is_present)

        cas = CASClient(connection, reader.read, writer.write)
        return Clients(connection, cas, reader, writer, ActionCacheClient(connection))

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


def checked_digest(digest: Digest, capabilities: RemoteCapabilities) -> Digest:
    """The digest itself. Unimplemented when the server does not know its function."""
    if digest.function not in capabilities.digest_functions:
        raise Unimplemented(f"the server does not offer {digest.function.name} digests, as {digest} has")
    return digest
