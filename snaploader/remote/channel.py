"""A channel to a server: opening it, why TLS fails, streams that fall silent; an allocator for gRPC."""

from __future__ import annotations

import ctypes
import math
import os
import pkgutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from snaploader._version import __version__
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    SnaploaderError,
    Unauthenticated,
    translate_os_errors,
    translate_thread_errors,
)
from snaploader.remote.config import PEM, Endpoint, Limits, Timeouts, TLSConfig


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

    One thread, started with the first stream, watches all streams of a cache and cancels those that are
    silent for `idle_s`. Thread-safe.
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


def open_channel(endpoint: Endpoint, tls: TLSConfig, timeouts: Timeouts, limits: Limits) -> grpc.Channel:
    """Make a channel, which connects at its first call. InvalidArgument for unusable certificates."""
    options: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", f"snaploader/{__version__}"),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", limits.max_receive_message_bytes),
        ("grpc.enable_retries", 0),  # snaploader.remote.calls is the one retry layer
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.use_local_subchannel_pool", 1),  # closing a cache closes its connection, whoever else has one
        ("grpc.enable_http_proxy", 0),  # would read environment variables
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(timeouts.connect_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if timeouts.keepalive_s:
        interval_ms = int(timeouts.keepalive_s * 1000)
        options += [
            ("grpc.keepalive_time_ms", interval_ms),
            ("grpc.keepalive_timeout_ms", interval_ms),
            ("grpc.keepalive_permit_without_calls", 0),
        ]
    if not endpoint.secure:
        return grpc.insecure_channel(endpoint.target, options)
    if name := tls.server_name:
        options += [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.certificate, "the TLS certificate"),
        private_key=_pem(tls.client_key, "the TLS client key"),
        certificate_chain=_pem(tls.client_certificate, "the TLS client certificate"),
    )
    return grpc.secure_channel(endpoint.target, credentials, options)


def tls_failure(endpoint: Endpoint, tls: TLSConfig, timeout_s: float) -> SnaploaderError | None:
    """Find out why no TLS connection can be made; None when that cannot be told, or TLS works.

    gRPC tells a certificate that is not accepted, on either side, like any lost connection. So shake hands
    once more, with the same certificates, and see.
    """
    if not endpoint.secure:
        return None
    try:
        context = _ssl_context(tls)
        # Some servers, gRPC's own among them, hang up on a client whose certificate they do not accept. One
        # that is being stopped may hang up once.
        if all(_hangs_up(endpoint, context, tls.server_name, timeout_s) for _ in range(2)):
            return _refused(endpoint, "it hangs up after the handshake")
    except ssl.SSLCertVerificationError as error:
        return FailedPrecondition(
            f"the certificate of {endpoint.url} is not accepted: {error.verify_message}; check it, the "
            "authority to trust (TLSConfig.certificate, --tls-certificate) and the name expected in it "
            "(TLSConfig.server_name, --tls-server-name)"
        )
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if "alert" in reason and "version" not in reason:
            return _refused(endpoint, reason)
        return FailedPrecondition(
            f"{endpoint.url} does not speak TLS as this client does: {reason}; check the port, or use grpc://"
        )
    except (OSError, SnaploaderError):
        return None  # no connection, or no word in time
    return None


def _hangs_up(endpoint: Endpoint, context: ssl.SSLContext, server_name: str, timeout_s: float) -> bool:
    """Tell whether the server ends a connection after the client's part of the handshake, without a word.

    Raises ssl.SSLError where it, or the client, says why.
    """
    with (
        socket.create_connection((endpoint.host, endpoint.port), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=server_name or endpoint.host) as connection,
    ):
        # With TLS 1.3 a server looks at the client's certificate when the client believes to be done. One of
        # HTTP/2 speaks first.
        try:
            return not connection.recv(1)
        except (ConnectionError, ssl.SSLEOFError):
            return True


def _refused(endpoint: Endpoint, reason: str) -> Unauthenticated:
    return Unauthenticated(
        f"{endpoint.url} does not accept the TLS certificate of this client, or the lack of one ({reason}): "
        "check TLSConfig.client_certificate (--tls-client-certificate)"
    )


def _ssl_context(tls: TLSConfig) -> ssl.SSLContext:
    """Do what gRPC does with the same settings, in Python's terms. OSError for unusable certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    # Certificates are ASCII; remarks between them need not be, and Python refuses those.
    roots = _pem(tls.certificate, "the TLS certificate")
    if roots is not None:
        context.load_verify_locations(cadata=roots.decode("ascii", errors="ignore"))
    else:
        # gRPC has a list of its own, and may be told to use others.
        context.load_default_certs()
        own = pkgutil.get_data("grpc", "_cython/_credentials/roots.pem")
        if own is not None:
            context.load_verify_locations(cadata=own.decode("ascii", errors="ignore"))
    certificate = _pem(tls.client_certificate, "the TLS client certificate")
    key = _pem(tls.client_key, "the TLS client key")
    if certificate is not None and key is not None:
        fd = os.memfd_create("snaploader-tls", os.MFD_CLOEXEC)  # Python loads them from files only
        with os.fdopen(fd, "wb") as file:
            file.write(certificate + b"\n" + key)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{fd}")
    return context


def _pem(source: PEM | None, what: str) -> bytes | None:
    if source is None:
        return None
    content = source
    if not isinstance(content, bytes):
        with translate_os_errors(f"cannot read {what}", absent=InvalidArgument):
            content = Path(content).read_bytes()
    if b"-----BEGIN " not in content:
        raise InvalidArgument(f"{what} is not in PEM form (it has no -----BEGIN line)")
    return content


_MIB = 1024 * 1024
_MALLOPT = ((-8, 1), (-1, 512 * _MIB), (-3, 32 * _MIB))
"""M_ARENA_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def tune_malloc() -> bool:
    """Tell glibc to keep and reuse big buffers; False where the C library has no such call.

    By default glibc maps every buffer of a message anew and pays with page faults: with this,
    transfers through gRPC cost about half the processor time. It holds for the whole process, up
    to 512 MiB of freed memory stay with it, and all threads share one arena: an application's
    choice, so nothing here ever calls it by itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    results = [mallopt(parameter, value) for parameter, value in _MALLOPT]  # each, whatever the others say
    return all(result == 1 for result in results)
