"""Calling work off: a flag that wakes sleepers, in a tree, so that closing a cache ends all it does."""

from __future__ import annotations

import threading
import weakref

from snaploader.errors import Cancelled


class Cancellation:
    """Set once, by `cancel`; its children are set with it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.event = threading.Event()
        """The flag itself, to wait for."""
        self._children: weakref.WeakSet[Cancellation] = weakref.WeakSet()

    def child(self) -> Cancellation:
        """A flag that is set with this one, or alone."""
        child = Cancellation()
        with self._lock:
            self._children.add(child)
            if self.event.is_set():
                child.event.set()
        return child

    def cancel(self) -> None:
        """Set the flag here and below, and wake those who sleep on it."""
        with self._lock:
            self.event.set()
            children = list(self._children)
        for child in children:
            child.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether the flag is set."""
        return self.event.is_set()

    def check(self) -> None:
        """Raise Cancelled when the flag is set."""
        if self.event.is_set():
            raise Cancelled("called off: the remote cache was closed, or another part of the transfer failed")

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise Cancelled as soon as the flag is set."""
        self.event.wait(seconds)
        self.check()
