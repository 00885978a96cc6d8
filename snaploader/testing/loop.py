"""The event loop of all embedded servers of a process, on one thread that lives while a server does.

grpc.aio wakes every loop that uses it for the events of all, so servers share one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop that runs while it has users. Thread-safe; a forked child gets a loop of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Add a user; the first one starts the thread."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._users = os.getpid(), 0
            if self._users == 0:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="snaploader-server-loop", daemon=True
                )
                self._thread.start()
            self._users += 1

    def release(self) -> None:
        """Remove a user; the last one ends the thread and waits for it."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            assert self._loop is not None
            assert self._thread is not None
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. Not from the loop's own thread."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            loop.close()


LOOP = LoopThread()
