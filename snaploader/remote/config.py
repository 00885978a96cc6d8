"""What a user can set: small frozen objects, with what a server can be expected to take as defaults."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

from snaploader.errors import InvalidArgument, SnaploaderError

PEM: TypeAlias = "bytes | str | os.PathLike[str]"
"""Certificates or a key: the PEM bytes themselves, or the path of a file that holds them."""


@dataclass(frozen=True, slots=True, repr=False)
class TLSConfig:
    """Certificates for `grpcs://`. Files are read when the connection is first made.

    InvalidArgument when a client certificate comes without its key, or the reverse.
    """

    certificate: PEM | None = None
    """Authorities that may sign the server's certificate; gRPC's own list when None."""
    client_certificate: PEM | None = None
    """What this client shows of itself (mTLS), with its chain."""
    client_key: PEM | None = None
    """The key of `client_certificate`."""
    server_name: str = ""
    """The name expected in the server's certificate, where that is not the host of the URL."""

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise InvalidArgument(
                "a TLS client certificate needs its key, and a key its certificate: give both"
            )


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Times in seconds. Each must be positive."""

    connect_s: float = 10.0
    """One attempt to connect."""
    call_s: float = 60.0
    """One unary call, connecting included."""
    idle_s: float = 60.0
    """The silence allowed between two messages of a stream."""
    min_bytes_per_s: float = 64 * 1024
    """A transfer slower than this, on the whole, is given up: the total budget grows by size / this."""
    keepalive_s: float = 0.0
    """Ping this often while calls are in flight; 0 never pings. Servers end connections that ping often."""
    credential_helper_s: float = 30.0
    """One run of the credential helper."""

    def __post_init__(self) -> None:
        for name in ("connect_s", "call_s", "idle_s", "min_bytes_per_s", "credential_helper_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"timeout {name} must be above 0, not {getattr(self, name)}")
        if self.keepalive_s < 0:
            raise InvalidArgument(f"timeout keepalive_s must not be negative, but is {self.keepalive_s}")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a transient failure is tried again, and for how long."""

    attempts: int = 5
    """Attempts without progress, the first one included. 1 never retries."""
    initial_delay_s: float = 0.1
    """The wait before the second attempt; doubled for each one after it."""
    max_delay_s: float = 5.0
    """The longest wait between two attempts; what a server asks for in RetryInfo may be longer."""
    jitter: float = 0.5
    """The share of each wait that is random, 0 to 1, so that many hosts do not come back as one."""
    budget_s: float = 180.0
    """All attempts and waits of one operation together; big blobs get more (`Timeouts.min_bytes_per_s`)."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidArgument(f"retry attempts must be at least 1, not {self.attempts}")
        is_delay_negative = self.initial_delay_s < 0 or self.max_delay_s < 0
        if is_delay_negative or not 0 <= self.jitter <= 1 or not self.budget_s > 0:
            raise InvalidArgument(
                f"delays must not be negative, jitter within 0 and 1, the budget above 0: {self}"
            )


@dataclass(frozen=True, slots=True)
class RetryEvent:
    """A failed attempt that will be tried again."""

    operation: str
    """What was being done, such as "reading 1f…/4096"."""
    attempt: int
    """The number of the attempt that failed, from 1."""
    delay_s: float
    """How long until the next one."""
    error: SnaploaderError
    """Why it failed."""


RetryCallback: TypeAlias = Callable[[RetryEvent], None]
"""Called on the thread that retries, before it waits. What it raises ends the operation."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and counts, in bytes where the name says so. Servers' own limits apply on top."""

    workers: int = 8
    """Threads at work for one bulk transfer, the calling one included; more did not measure faster."""
    in_flight_bytes: int = 16 * 1024 * 1024
    """Content in memory for bulk transfers, at most; a bigger single blob goes alone."""
    batch_bytes: int = 1024 * 1024 + 64 * 1024
    """Blobs are grouped into messages of at most this size (room for two chunks of 512 KiB, or one of
    1 MiB, and what surrounds them); a bigger blob is streamed."""
    batch_blobs: int = 4096
    """Blobs in one batch, at most."""
    stream_frame_bytes: int = 1024 * 1024
    """One message of an upload stream."""
    find_missing_digests: int = 10_000
    """Digests in one FindMissingBlobs call."""
    max_receive_message_bytes: int = 64 * 1024 * 1024
    """A bigger message from the server is an error."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise InvalidArgument(f"limit {name} must be at least 1, not {getattr(self, name)}")
        if self.stream_frame_bytes > 4 * 1024 * 1024 - 64 * 1024:
            raise InvalidArgument("limit stream_frame_bytes must leave room in gRPC's message limit of 4 MiB")


_DEFAULT_PORT = {"grpc": 80, "grpcs": 443}


class Endpoint(NamedTuple):
    """A server's address. `parse_endpoint` makes it."""

    target: str
    """As gRPC wants it: dns:///host:port, or unix:path."""
    secure: bool
    """Whether the connection uses TLS."""
    host: str
    """Host name or address; "localhost" for a Unix socket."""
    uri: str
    """As credential helpers want it: https://host[:port], or http:// where there is no TLS."""
    url: str
    """As the user gave it."""

    @property
    def port(self) -> int:
        """The TCP port; 0 for a Unix socket."""
        return 0 if self.target.startswith("unix:") else int(self.target.rpartition(":")[2])

    @property
    def is_on_this_host(self) -> bool:
        """Whether what is sent there stays on this machine: a Unix socket, or the loopback interface."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_endpoint(url: str) -> Endpoint:
    """Parse a URL: grpc://host[:port], grpcs://host[:port] or unix:/path of a socket.

    The port is 80 or, with TLS, 443 when the URL has none, as Bazel has it. InvalidArgument for
    anything else, with what to write instead.
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path or "\0" in path:
            raise InvalidArgument(f"remote cache URL {url!r} has no socket path: write unix:/path/of/socket")
        return Endpoint(f"unix:{path}", False, "localhost", "http://localhost", url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument(f"remote cache URL {url!r} is malformed: {error}") from error
    if parts.scheme not in _DEFAULT_PORT:
        raise InvalidArgument(
            f"remote cache URL {url!r} must start with grpc://, grpcs:// (TLS) or unix: (a socket)"
        )
    if not parts.hostname or "\0" in url:
        raise InvalidArgument(f"remote cache URL {url!r} names no host: write {parts.scheme}://host:port")
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument(
            "a remote cache URL holds no credentials: give a header or a bearer token instead"
        )
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise InvalidArgument(
            f"remote cache URL {url!r} has more than a host and a port: an instance is given as instance_name"
        )
    secure = parts.scheme == "grpcs"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = port or _DEFAULT_PORT[parts.scheme]
    scheme, shown = ("https", "" if port == 443 else f":{port}") if secure else ("http", f":{port}")
    return Endpoint(f"dns:///{host}:{port}", secure, parts.hostname, f"{scheme}://{host}{shown}", url)
