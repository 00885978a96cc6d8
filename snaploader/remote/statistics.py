"""Counters of what a remote cache did."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RemoteStatistics:
    """Counters since a cache was made, at one moment. Immutable."""

    calls: Mapping[str, int] = field(default_factory=dict)
    """Calls begun, by method, retries included."""
    failed_calls: Mapping[str, int] = field(default_factory=dict)
    """Calls that ended in an error, by method; "not found" and the like are errors too."""
    retries: int = 0
    """Attempts after a transient failure."""
    blobs_read: int = 0
    """Blobs fetched and verified."""
    content_bytes_read: int = 0
    """Their size."""
    wire_bytes_read: int = 0
    """What was received for them, compressed where it was; failed attempts count too."""
    blobs_written: int = 0
    """Blobs uploaded."""
    content_bytes_written: int = 0
    """Their size."""
    wire_bytes_written: int = 0
    """What was sent for them, compressed where it was; failed attempts count too."""
    corrupted: int = 0
    """Transfers whose bytes did not match their digest."""


class Recorder:
    """Counts what a remote cache does. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()

    def call(self, method: str) -> None:
        """Count a call that begins."""
        with self._lock:
            self._calls[method] += 1

    def failure(self, method: str) -> None:
        """Count a call that failed."""
        with self._lock:
            self._failed[method] += 1

    def add(self, **numbers: int) -> None:
        """Add to the fields of RemoteStatistics with these names."""
        with self._lock:
            for name, number in numbers.items():
                self._numbers[name] += number

    def snapshot(self) -> RemoteStatistics:
        """Return the counters as they are now."""
        with self._lock:
            return RemoteStatistics(dict(self._calls), dict(self._failed), **self._numbers)
