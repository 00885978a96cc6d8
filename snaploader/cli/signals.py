"""Waiting for the signals that tell a program to stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Whether the program was told to stop since the block of `stop_signal` began."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing

    def wait(self) -> None:
        """Return when a signal to stop has arrived, or `wake` was called."""
        while os.read(self._reading, 1)[0] not in STOP_SIGNALS:
            pass

    def wake(self) -> None:
        """End the wait of another thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of signals, so the wait ends anyway
            os.write(self._writing, bytes([signal.SIGTERM]))


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Heed SIGINT and SIGTERM in the block by nothing but the end of `wait`. In the main thread only.

    They come through a pipe that the interpreter itself writes to. A Python handler could not wake the main
    thread safely, because it runs in that thread, which may hold the lock it would need.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    old_descriptor = signal.set_wakeup_fd(writing)
    try:
        yield StopSignal(reading, writing)
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
