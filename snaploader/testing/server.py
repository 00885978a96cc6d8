"""The embedded server: a Remote Execution API cache in this process, on a thread of its own."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio

from snaploader._proto import remote_execution_pb2 as reapi, services
from snaploader._proto._pool import new_pool
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snaploader.testing.dispatch import Call, CallLog, Dispatcher
from snaploader.testing.faults import FaultScript, flip
from snaploader.testing.options import ServerOptions, ServerTLS
from snaploader.testing.services import Backend
from snaploader.testing.storage import (
    DiskStorage,
    MemoryStorage,
    Partition,
    Storage,
    parse_result_key,
    result_key,
)

if TYPE_CHECKING:
    from grpc_health.v1.health import aio as health_aio

T = TypeVar("T")

_KEEPALIVE_MS = 60_000

_IDLE_GRACE_S = 1.0
"""Bound of an orderly goodbye to clients without calls under way; takes a few milliseconds."""


class EmbeddedServer:
    """A server of CAS, ByteStream, ActionCache and Capabilities.

        with EmbeddedServer() as server:
            remote = RemoteCache(server.url)

    Thread-safe, except for `start` and `stop`. It can be started again after a stop, on the same port
    when that is free, and then still has its content. In a process that forks, start it after the fork.

    Args:
        storage: A folder (see `snaploader.testing.storage`; one server at a time), a `Storage`, which is
            shared and stays the caller's, or None for memory of its own.
        options: What it offers, demands and refuses.
        faults: What goes wrong, when.
        host: Where to listen.
        port: Where to listen; 0 for a free one.
        unix_socket: Listen on this path instead.
        tls: Speak TLS with these certificates.
        log_capacity: How many calls `requests` remembers; 0 for none.
        introspection: Offer the standard health service (NOT_SERVING from the moment that it is stopped) and
            server reflection, as grpcurl uses it. Needs the extra `serve`. They are not in the call log.
    """

    def __init__(
        self,
        storage: str | os.PathLike[str] | Storage | None = None,
        options: ServerOptions | None = None,
        faults: FaultScript | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        unix_socket: str | os.PathLike[str] | None = None,
        tls: ServerTLS | None = None,
        log_capacity: int = 10_000,
        introspection: bool = False,
    ) -> None:
        if not 0 <= port <= 65535:
            raise InvalidArgument(f"port {port} is not between 0 and 65535")
        self.options = options or ServerOptions()
        self.faults = faults or FaultScript()
        self._host = host
        self._port = port
        self._socket = None if unix_socket is None else os.path.abspath(unix_socket)
        self.tls = tls
        self.introspection = introspection
        self.call_log = CallLog(log_capacity)
        self._folder: str | None = None
        self._storage: Storage | None = None
        if isinstance(storage, str | os.PathLike):
            self._folder = os.fspath(storage)
        else:
            self._storage = storage or MemoryStorage()
        self._running: _Running | None = None

    def start(self) -> Self:
        """Begin to serve. Calls are answered when this returns.

        Raises:
            Unavailable: The address cannot be bound.
            FailedPrecondition: It runs already, another server uses the folder, or the packages for
                `introspection` are not installed.
        """
        if self._running is not None:
            raise FailedPrecondition("the server runs already")
        if self._socket is None:
            _check_address(self._host, self._port)
        storage = DiskStorage(self._folder) if self._folder is not None else self._storage
        assert storage is not None
        try:
            self._running = _Running(self, storage)
        except BaseException:
            if self._folder is not None:
                storage.close()
            raise
        self._storage, self._port = storage, self._running.port
        return self

    def stop(self, grace_s: float = 0.0) -> None:
        """End serving: calls under way get `grace_s` to end and are then cancelled. Idempotent."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop(grace_s)
        if self._folder is not None and self._storage is not None:
            self._storage.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether it serves."""
        return self._running is not None

    @property
    def port(self) -> int:
        """The port it listens on; before the first start, the one it was told."""
        return self._port

    @property
    def address(self) -> str:
        """What gRPC calls the target: host:port, or unix:path."""
        if self._socket is not None:
            return f"unix:{self._socket}"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    @property
    def url(self) -> str:
        """What a client is given: grpc://…, grpcs://… or unix:…"""
        if self._socket is not None:
            return self.address
        return f"{'grpc' if self.tls is None else 'grpcs'}://{self.address}"

    def calls(self, method: str) -> int:
        """How often a method was called, as in `calls("BatchUpdateBlobs")`."""
        return self.call_log.sums(method)[0]

    def total_calls(self) -> int:
        """How often any method was called."""
        return self.call_log.sums(None)[0]

    def received_bytes(self, method: str | None = None) -> int:
        """Bytes of request messages, of ended calls."""
        return self.call_log.sums(method)[1]

    def sent_bytes(self, method: str | None = None) -> int:
        """Bytes of response messages, of ended calls."""
        return self.call_log.sums(method)[2]

    @property
    def requests(self) -> list[Call]:
        """The latest calls, oldest first."""
        return self.call_log.calls()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call is under way; False when some still are after this time."""
        return self.call_log.wait_idle(timeout_s)

    def clear_log(self) -> None:
        """Forget the calls and set the counters to zero."""
        self.call_log.clear()

    def put_blob(
        self, data: Buffer, function: DigestFunction = DigestFunction.SHA256, *, instance_name: str = ""
    ) -> Digest:
        """Store a blob, past the network."""
        digest = Digest.of(data, function)
        self._partition(instance_name).put(digest, data, verify=False)
        return digest

    def get_blob(self, digest: Digest, *, instance_name: str = "") -> bytes:
        """A stored blob, past the network. NotFound when absent."""
        data = self._partition(instance_name).load(digest)
        if data is None:
            raise NotFound(f"no blob {digest} on the server")
        return data

    def delete_blob(self, digest: Digest, *, instance_name: str = "") -> None:
        """Drop a blob, as an eviction does. NotFound when absent."""
        if not self._partition(instance_name).delete(digest):
            raise NotFound(f"no blob {digest} on the server")

    def corrupt_blob(self, digest: Digest, bit: int = 0, *, instance_name: str = "") -> None:
        """Change one bit of a stored blob, which is then served as it is. NotFound when absent."""
        data = self.get_blob(digest, instance_name=instance_name)
        if not 0 <= bit < 8 * len(data):
            raise InvalidArgument(f"the blob {digest} has no bit {bit}")
        self._partition(instance_name).put(digest, flip(data, bit), verify=False)

    def blobs(self, *, instance_name: str = "") -> list[Digest]:
        """The digests of all stored blobs, sorted."""
        return self._partition(instance_name).blobs()

    def action_results(self, *, instance_name: str = "") -> dict[Digest, reapi.ActionResult]:
        """All action results by action digest (of size 0 where results are kept under the hash alone)."""
        partition = self._partition(instance_name)
        found = {parse_result_key(key): partition.get_result(key) for key in partition.results()}
        return {key: reapi.ActionResult.FromString(data) for key, data in found.items() if data is not None}

    def delete_action_result(self, digest: Digest, *, instance_name: str = "") -> None:
        """Drop an action result. NotFound when absent."""
        key = result_key(digest, has_size=self.options.result_key_has_size)
        if not self._partition(instance_name).delete_result(key):
            raise NotFound(f"no action result for {digest} on the server")

    def _partition(self, instance_name: str) -> Partition:
        if self._storage is None:
            raise FailedPrecondition("the server was never started, so its folder is not open")
        return self._storage.partition(instance_name)


class LoopThread:
    """An event loop on a thread while it has users. Thread-safe; a forked child gets one of its own.

    grpc.aio wakes every loop that uses it for the events of all, so the servers of a process share one.
    """

    _loop: asyncio.AbstractEventLoop
    _stop: asyncio.Event
    _thread: threading.Thread

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._pid = 0

    def acquire(self) -> None:
        """Add a user; the first one starts the thread."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._users = os.getpid(), 0
            if self._users == 0:
                self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
                self._thread = threading.Thread(
                    target=self._serve, name="snaploader-server-loop", daemon=True
                )
                self._thread.start()
            self._users += 1

    def release(self) -> None:
        """Remove a user; the last one ends the thread and waits for it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._loop.call_soon_threadsafe(self._stop.set)
                self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. Not from the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stop.wait())


LOOP = LoopThread()


def _check_address(host: str, port: int) -> None:
    """Unavailable, with the system's reason, when no socket can be bound there.

    gRPC would print that reason on stderr and raise an error without it.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}: {error.strerror}", transient=False) from error
    refusals: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return
        except OSError as error:
            refusals.append(error)
    raise Unavailable(
        f"cannot listen on {host} port {port}: {os.strerror(refusals[0].errno or 0)}", transient=False
    ) from refusals[0]


def _milliseconds(seconds: float) -> int:
    """For gRPC, where the biggest number means for ever."""
    return math.ceil(min(seconds * 1000, 2**31 - 1))


def _add_introspection(server: grpc.aio.Server) -> health_aio.HealthServicer:
    """Add health and reflection to a server. FailedPrecondition when their packages are not installed."""
    try:
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection, reflection_pb2
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"health and reflection need the Python package {error.name!r}, which is not installed: "
            "pip install 'snaploader[serve]'"
        ) from error
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    # Our messages are in a pool of their own; reflection serves one pool, so it gets one with all of them.
    pool = new_pool()
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(file.serialized_pb)
    names = (*services.SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=pool)
    return servicer


class _Running:
    """A server between start and stop."""

    def __init__(self, server: EmbeddedServer, storage: Storage) -> None:
        self._pid = os.getpid()
        self._backend = Backend(server.options, storage)
        self._dispatcher = Dispatcher(self._backend, server.faults, server.call_log)
        self._health: health_aio.HealthServicer | None = None
        LOOP.acquire()
        try:
            self.port = LOOP.run(self._start(server))
        except BaseException:
            LOOP.release()
            self._backend.close()
            raise

    async def _start(self, server: EmbeddedServer) -> int:
        options, limit = server.options, server.options.max_message_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # A second server on the port must fail, not share its calls.
                ("grpc.so_reuseport", 0),
                # A host that vanished is noticed after this time, not after two hours.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                # gRPC cannot reset one stream: what a client does not read ends with its connection.
                ("grpc.max_concurrent_streams", options.max_connection_calls),
                ("grpc.max_connection_age_ms", _milliseconds(options.max_connection_age_s)),
                ("grpc.max_connection_age_grace_ms", _milliseconds(options.max_connection_grace_s)),
            ]
        )
        self._server.add_generic_rpc_handlers(tuple(self._dispatcher.handlers()))
        if server.introspection:
            self._health = _add_introspection(self._server)
        tls = server.tls
        try:
            if tls is None:
                port = self._server.add_insecure_port(server.address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(tls.private_key, tls.certificate)], tls.client_ca, tls.client_ca is not None
                )
                port = self._server.add_secure_port(server.address, credentials)
        except RuntimeError as error:
            raise Unavailable(f"cannot listen on {server.address}", transient=False) from error
        await self._server.start()
        return port or server.port

    def stop(self, grace_s: float) -> None:
        if os.getpid() != self._pid:
            return  # A forked child has neither the loop nor the connections.
        try:
            LOOP.run(self._stop(grace_s))
        finally:
            LOOP.release()
            self._backend.close()

    async def _stop(self, grace_s: float) -> None:
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        # Without a grace, gRPC tells idle clients that something is wrong, and they log it.
        grace = _IDLE_GRACE_S if self._dispatcher.is_idle else grace_s
        await self._server.stop(grace or None)
        await self._dispatcher.close()
