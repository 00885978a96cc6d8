"""What a long call tells its caller while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of a call has come."""

    stage: str
    """"store" (hash and keep locally), "upload", "fetch" or "write" (materialise)."""
    done_bytes: int
    """Bytes dealt with so far; holes count as soon as they are recognised."""
    total_bytes: int
    """Bytes the stage will have dealt with at its end."""


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Called from any thread, one call at a time, with rising `done_bytes` within a stage. What it raises
ends the call it reports on."""


class ProgressMeter:
    """Adds up the work of several threads for one callback. Thread-safe."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total_bytes: int) -> None:
        self._callback = callback
        self._stage = stage
        self._total = total_bytes
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        if self._callback is None:
            return
        with self._lock:
            self._done += count
            self._callback(Progress(self._stage, self._done, self._total))
