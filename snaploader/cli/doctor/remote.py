"""Does the remote cache do what saving and loading need? Writes random blobs and one action result there."""

from __future__ import annotations

import os
import statistics
import time

from snaploader._proto import any_pb2, remote_execution_pb2
from snaploader.cli.doctor.check import Check, Finding, Status
from snaploader.cli.values import format_size, format_time
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, ResourceExhausted, Unauthenticated
from snaploader.remote import RemoteCache

SMALL_BYTES = 64 << 10
"""Goes in a batch."""
BIG_BYTES = 3 << 20
"""Goes as a stream, in several messages."""
PINGS = 5
SLOW_S = 0.05
"""A reader that waits for a missing chunk waits at least so long, which is felt."""

_CREDENTIALS = "check the address, TLS options and credentials (--remote-cache, --tls-…, --remote-header)"


def remote_checks(remote: RemoteCache) -> list[Check]:
    """The checks of a remote cache, in order."""
    return [
        Check("connection, capabilities", lambda: _capabilities(remote), _CREDENTIALS, needed=True),
        Check("latency", lambda: _latency(remote), "use a server that is nearer, or a faster network"),
        Check(
            "small blobs",
            lambda: _round_trip(remote, SMALL_BYTES),
            "let this client write to the server's CAS",
        ),
        Check(
            "big blobs",
            lambda: _round_trip(remote, BIG_BYTES),
            "see that ByteStream passes the server's proxies",
        ),
        Check(
            "action cache",
            lambda: _action_cache(remote),
            "let this client update the action cache, for saving",
        ),
    ]


def remote_remedy(error: BaseException) -> str:
    """What to do about an error of the remote cache, where its cause tells."""
    if isinstance(error, ResourceExhausted):
        return "make room on the server, or raise its limits"
    if isinstance(error, Unauthenticated):
        return (
            "renew the credentials (--remote-header, --bearer-token-file, --credential-helper, --netrc, "
            "--tls-client-certificate)"
        )
    return ""


def _capabilities(remote: RemoteCache) -> Finding:
    offered = remote.capabilities()
    functions = ", ".join(function.name for function in sorted(offered.digest_functions))
    limit = format_size(offered.max_batch_bytes) if offered.max_batch_bytes else "not stated"
    compression = "zstd" if offered.zstd_streams else "none"
    detail = f"API {offered.api_version or '?'}, {functions}, compression {compression}, batch limit {limit}"
    if offered.digest_function is not DigestFunction.BLAKE3:
        detail += f"; using {offered.digest_function.name}"
    if not offered.update_enabled:
        return Finding(
            detail + "; read-only",
            Status.WARNING,
            "snapshots can be loaded from there, not saved: allow action cache updates for this client",
        )
    return Finding(detail)


def _latency(remote: RemoteCache) -> Finding:
    times = []
    for _ in range(PINGS):
        begin = time.monotonic()
        remote.find_missing([_sample(remote, 16)[1]])
        times.append(time.monotonic() - begin)
    middle = statistics.median(times)
    detail = f"{format_time(middle)} for a small call (median of {PINGS})"
    if middle > SLOW_S:
        return Finding(
            detail,
            Status.WARNING,
            "chunks that are missing locally will be felt; use a server that is nearer",
        )
    return Finding(detail)


def _round_trip(remote: RemoteCache, size: int) -> Finding:
    data, digest = _sample(remote, size)
    if not remote.find_missing([digest]):
        raise FailedPrecondition("the server claims to have a blob that was never uploaded")
    begin = time.monotonic()
    remote.write(digest, data)
    written = time.monotonic()
    if remote.find_missing([digest]):
        raise DataLoss(
            "the server accepted a blob and does not have it: it may drop the writes of this client"
        )
    asked = time.monotonic()
    if remote.read(digest) != data:
        raise DataLoss("the server returned other bytes than were written")
    read = time.monotonic() - asked
    return Finding(f"{format_size(size)} up in {format_time(written - begin)}, down in {format_time(read)}")


def _action_cache(remote: RemoteCache) -> Finding:
    key = Digest(os.urandom(32).hex(), 1, remote.digest_function)
    result = remote_execution_pb2.ActionResult()
    note = any_pb2.Any(type_url="type.googleapis.com/google.protobuf.StringValue", value=b"\n\x06doctor")
    result.execution_metadata.auxiliary_metadata.append(note)
    remote.update_action_result(key, result)
    stands = remote.get_action_result(key)
    if note not in stands.execution_metadata.auxiliary_metadata:
        raise FailedPrecondition(
            "the action cache does not keep auxiliary metadata, in which snapshots say what they are"
        )
    return Finding("updates are kept, metadata too")


def _sample(remote: RemoteCache, size: int) -> tuple[bytes, Digest]:
    data = os.urandom(size)
    return data, Digest.of(data, remote.digest_function)
