"""A bound on the bytes held for transfers."""

from __future__ import annotations

import threading
from collections import deque


class ByteBudget:
    """Hands out shares of a number of bytes, first come, first served. Thread-safe.

    A share bigger than the whole budget is granted when nothing else is out, so that one big blob
    can still go, alone.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._used = 0
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()

    def acquire(self, size_bytes: int) -> None:
        """Wait for a share. Whoever holds one must give it back in bounded time."""
        ticket = object()
        with self._condition:
            self._queue.append(ticket)
            self._condition.wait_for(lambda: self._queue[0] is ticket and self._has_room(size_bytes))
            self._queue.popleft()
            self._used += size_bytes
            self._condition.notify_all()

    def release(self, size_bytes: int) -> None:
        """Give a share back."""
        with self._condition:
            self._used -= size_bytes
            self._condition.notify_all()

    @property
    def used_bytes(self) -> int:
        """What is out now."""
        return self._used

    def _has_room(self, size_bytes: int) -> bool:
        return not self._used or self._used + size_bytes <= self._total
