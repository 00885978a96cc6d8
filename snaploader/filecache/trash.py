"""Removing big folders later, so that nobody waits for it.

What is renamed into `trash/` is out of the cache. A background thread removes it; what it did not get
to before the process ended is removed by the next cache that opens the folder.
"""

from __future__ import annotations

import os
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from snaploader.errors import SnaploaderError
from snaploader.files import remove_tree

if TYPE_CHECKING:
    from snaploader.filecache.session import Session


class TrashCan:
    """Removes folders in the background, on one thread that starts with the first. Thread-safe."""

    def __init__(self, folder: str, session: Session) -> None:
        self._folder = folder
        self._session = session
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def new_path(self) -> str:
        """A path in the trash to rename something to; `empty` should follow."""
        return f"{self._folder}/{self._session.unique_name()}"

    def empty(self, path: str) -> None:
        """Remove a path in the trash soon; after `close` it is left to the next start."""
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="snaploader-trash", daemon=True)
                self._thread.start()
            self._queue.put(path)

    def sweep(self) -> None:
        """Remove everything that lies in the trash, from whatever time."""
        with self._session.folder(self._folder) as folder:
            names = os.listdir(folder)
        for name in names:
            self.empty(f"{self._folder}/{name}")

    def close(self) -> None:
        """Wait until all is removed: a short-lived process would else never get to it. Idempotent.

        A forked child waits for nothing: the thread is its parent's.
        """
        if not self._session.is_own:
            return
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _work(self) -> None:
        while (path := self._queue.get()) is not None:
            # Unseen by anybody: what cannot be removed is left to the next start.
            with suppress(SnaploaderError, OSError), self._session.folder(self._folder) as folder:
                remove_tree(os.path.basename(path), dir_fd=folder)
