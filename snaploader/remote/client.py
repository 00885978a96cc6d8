"""What every client of a service shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from snaploader.remote.batching import BatchLimit
from snaploader.remote.cancel import Cancellation
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.config import Limits, Timeouts
from snaploader.remote.retry import Attempts, Retrier
from snaploader.remote.statistics import Recorder
from snaploader.remote.transport import Transport

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Connection:
    """A server, an instance on it, and what was negotiated."""

    url: str
    """Names the server in messages."""
    transport: Transport
    retrier: Retrier
    instance_name: str
    timeouts: Timeouts
    limits: Limits
    recorder: Recorder
    capabilities: RemoteCapabilities
    batch_limit: BatchLimit

    def run(
        self,
        operation: str,
        attempt: Callable[[Attempts], T],
        cancellation: Cancellation,
        size_bytes: int = 0,
    ) -> T:
        """`attempt` with retries; big transfers get time on top of the budget."""
        extra_s = size_bytes / self.timeouts.min_bytes_per_s
        return self.retrier.run(operation, attempt, cancellation, extra_s=extra_s)
