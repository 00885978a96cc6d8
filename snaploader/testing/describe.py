"""What a request says about itself, and what a failure says in trailers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from snaploader._proto import any_pb2, duration_pb2, status_pb2
from snaploader.errors import SnaploaderError
from snaploader.testing.backend import Failure
from snaploader.testing.calls import Call
from snaploader.testing.names import parse_resource_name

_DETAILS_KEY = "grpc-status-details-bin"


def describe(call: Call, request: Any) -> None:
    """Fill in what the request says: its instance, its resource, the hashes it names."""
    name = getattr(request, "resource_name", "")
    if name:
        call.resource_name = name
        call.read_offset = getattr(request, "read_offset", 0) or getattr(request, "write_offset", 0)
        with contextlib.suppress(SnaploaderError):
            parsed = parse_resource_name(name)
            call.instance_name = parsed.instance_name
            call.hashes = (parsed.digest.hash,)
        return
    call.instance_name = getattr(request, "instance_name", "")
    call.hashes = tuple(digest.hash for digest in _digests(request))


def _digests(request: Any) -> Iterator[Any]:
    for name in ("blob_digests", "digests"):
        yield from getattr(request, name, ())
    for item in getattr(request, "requests", ()):
        yield item.digest
    for name in ("action_digest", "root_digest"):
        if hasattr(request, name):
            yield getattr(request, name)


def trailers(failure: Failure) -> tuple[tuple[str, bytes], ...]:
    """Status details, as google.rpc has them: a RetryInfo, when the failure has a delay."""
    if failure.retry_after_s is None:
        return ()
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(failure.retry_after_s * 1e9))
    packed = delay.SerializeToString()
    # RetryInfo{Duration retry_delay = 1}: a tag, one byte of length (a Duration is short), the Duration.
    info = any_pb2.Any(
        type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\x0a" + bytes([len(packed)]) + packed
    )
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message, details=[info])
    return ((_DETAILS_KEY, status.SerializeToString()),)
