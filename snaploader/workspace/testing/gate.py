"""Holding a call until a test lets it go on."""

from __future__ import annotations

import threading

DEFAULT_TIMEOUT_S = 30.0


class Gate:
    """Holds the calls that come to it until it is opened. Thread-safe."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_open = False
        self._arrived = 0

    def wait_reached(self, timeout_s: float = DEFAULT_TIMEOUT_S, calls: int = 1) -> bool:
        """Wait until that many calls have arrived; False when they have not in this time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._arrived >= calls, timeout_s)

    def open(self) -> None:
        """Let the held calls go on, and all later ones pass."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()

    def pass_through(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Arrive, and wait until the gate is open. TimeoutError when it is not in this time."""
        with self._condition:
            self._arrived += 1
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._is_open, timeout_s):
                raise TimeoutError(f"a gate was not opened within {timeout_s:g} s")
