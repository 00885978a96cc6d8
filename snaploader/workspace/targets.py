"""What a readiness check connects to, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from snaploader.errors import InvalidArgument

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class HTTPTarget:
    """A URL to get."""

    is_encrypted: bool
    host: str
    port: int | None
    """None: that of its scheme."""
    path: str
    """With the query."""


def parse_address(target: str) -> tuple[str, int]:
    """Host and port of "host:port". No host means this machine; that of IPv6 may be in square brackets.

    Raises:
        InvalidArgument: it is something else, or the port is not within 1 to 65535.
    """
    host, colon, port = target.rpartition(":")
    is_number = port.isascii() and port.isdecimal() and len(port) <= len(str(_MAX_PORT))
    if not colon or not is_number or not 0 < int(port) <= _MAX_PORT:
        raise InvalidArgument(
            f"{target!r} is no address to connect to: use host:port, with a port of 1 to {_MAX_PORT}"
        )
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def parse_url(target: str) -> HTTPTarget:
    """The parts of an HTTP URL.

    Raises:
        InvalidArgument: it is something else, or has no host.
    """
    try:
        parts = urlsplit(target)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"{target!r} is no URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not host:
        raise InvalidArgument(f"{target!r} is no URL to get: begin it with http:// or https:// and a host")
    path = parts.path or "/"
    return HTTPTarget(parts.scheme == "https", host, port, f"{path}?{parts.query}" if parts.query else path)
