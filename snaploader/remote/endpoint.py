"""Where a server is, parsed from a URL."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

from snaploader.errors import InvalidArgument

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
    """The endpoint that `url` names: grpc://host[:port], grpcs://host[:port] or unix:/path of a socket.

    The port is 80 or, with TLS, 443 when the URL has none, as Bazel has it. InvalidArgument for
    anything else, with what to write instead.
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("//") else path
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
    if not parts.hostname:
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
