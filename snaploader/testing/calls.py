"""What a server was asked: the record of one call, and the bounded log with its counters."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from snaploader.errors import SnaploaderError
from snaploader.testing.byte_stream import parse_resource_name

_MAX_LOGGED_HASHES = 200_000


@dataclass(slots=True)
class Call:
    """One call, as the server saw it. Fields about the outcome are filled in while it runs."""

    method: str
    """Name of the method, as in "BatchReadBlobs"."""
    instance_name: str = ""
    resource_name: str = ""
    """Of ByteStream calls."""
    hashes: tuple[str, ...] = ()
    """Hashes of the blobs or of the action that the request names, in its order."""
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    """Headers the client sent; of a repeated one, the last value."""
    read_offset: int = 0
    """Where a Read begins; of Write, where its first message writes."""
    received_bytes: int = 0
    """Size of the request messages."""
    sent_bytes: int = 0
    """Size of the response messages."""
    status: str | None = None
    """Name of the status code it ended with; None while it runs, "CANCELLED" when the client went away."""


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


class CallLog:
    """The latest calls and counters of all of them. Thread-safe.

    Args:
        capacity: How many calls are remembered. Counters go on regardless.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._capacity = capacity
        self._calls: deque[Call] = deque()
        self._hashes = 0
        self._counts: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()

    def begin(self, call: Call) -> None:
        """Record a call that begins."""
        with self._lock:
            self._counts[call.method] += 1
            self._calls.append(call)
            self._hashes += len(call.hashes)
            while self._calls and (len(self._calls) > self._capacity or self._hashes > _MAX_LOGGED_HASHES):
                self._hashes -= len(self._calls.popleft().hashes)

    def end(self, call: Call, status: str) -> None:
        """Record how it ended."""
        with self._lock:
            call.status = status
            self._received[call.method] += call.received_bytes
            self._sent[call.method] += call.sent_bytes

    def clear(self) -> None:
        """Forget the calls and the counters."""
        with self._lock:
            self._calls.clear()
            self._hashes = 0
            for counter in (self._counts, self._received, self._sent):
                counter.clear()

    def calls(self) -> list[Call]:
        """The remembered calls, oldest first."""
        with self._lock:
            return list(self._calls)

    def count(self, method: str) -> int:
        """How often a method was called."""
        with self._lock:
            return self._counts[method]

    def total(self) -> int:
        """How often any method was called."""
        with self._lock:
            return sum(self._counts.values())

    def received_bytes(self, method: str | None = None) -> int:
        """Bytes of request messages of ended calls of a method, or of all."""
        return self._sum(self._received, method)

    def sent_bytes(self, method: str | None = None) -> int:
        """Bytes of response messages of ended calls of a method, or of all."""
        return self._sum(self._sent, method)

    def _sum(self, counter: Counter[str], method: str | None) -> int:
        with self._lock:
            return sum(counter.values()) if method is None else counter[method]
