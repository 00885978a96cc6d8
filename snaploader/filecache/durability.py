"""What a power failure may have damaged.

A blob is not flushed to disk when it is added: that would double the cost of a save. The kernel flushes
it some thirty seconds later. If the machine dies before that, the file may be there with the right size
and zeros inside. So the file `state` (docs/formats/filecache.md) tells in which windows of time what was
written may be damaged: such blobs are suspects, verified before they count as present.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection
from contextlib import suppress

from snaploader.filecache.layout import OpenFolder
from snaploader.filecache.usage import Ledger
from snaploader.files import FileLock, OddEntry, flush_file_system, is_odd, read_regular

CLOCK_SLACK_NS = 1_000_000_000
"""File times come from a clock that lags by up to one tick; a second is plenty."""
MAX_WINDOWS = 16
_MAX_STATE_BYTES = 64 << 10
Window = tuple[int, int]


class Durability:
    """Knows which blobs are suspects, and flushes. Thread-safe, process-safe.

    At the first use after another boot the ledger forgets its total. `used_before` tells that the folder
    existed: then a missing state is a lost one.
    """

    windows: list[Window]
    """In which suspects were written, in nanoseconds since the epoch. Without any there are none."""

    def __init__(self, folder: OpenFolder, ledger: Ledger, boot_id: str, *, used_before: bool) -> None:
        self._base = folder.layout.base
        self._path = f"{self._base}/state"
        self._folder = folder
        self._boot_id = boot_id
        self._lock = FileLock(folder.open_written(f"{folder.layout.usage}/state.lock"))
        try:
            with self._lock.held():
                boot, flushed_ns, self.windows = self._load()
                if boot != boot_id:
                    with ledger.section() as section:
                        section.set_total(None)
                    now_ns = time.time_ns()
                    if boot or used_before:
                        self.windows.append((flushed_ns, now_ns))
                    if len(self.windows) > MAX_WINDOWS:
                        self.windows = [(min(self.windows)[0], now_ns)]
                    self._store(now_ns)
        except BaseException:
            self.close()
            raise

    def is_suspect(self, status: os.stat_result) -> bool:
        """Tell whether a power failure may have damaged a file since it was written."""
        modified_ns = status.st_mtime_ns
        return any(start - CLOCK_SLACK_NS <= modified_ns <= end for start, end in self.windows)

    def sync(self) -> None:
        """Flush everything written so far to disk: it survives a power failure from now on."""
        now_ns = time.time_ns()
        flush_file_system(self._base)
        self._update(now_ns, ())

    def clear(self) -> None:
        """Forget the windows known so far, in which no suspects are left."""
        self._update(0, self.windows)

    def _update(self, flushed_ns: int, cleared: Collection[Window]) -> None:
        with self._lock.held():
            boot, known_ns, windows = self._load()
            if boot == self._boot_id:
                self.windows = [window for window in windows if window not in cleared]
                self._store(max(flushed_ns, known_ns))

    def close(self) -> None:
        """Give up the descriptor."""
        self._lock.close()

    def _load(self) -> tuple[str, int, list[Window]]:
        with suppress(FileNotFoundError, OddEntry, ValueError, KeyError, TypeError):
            data = read_regular(self._path, _MAX_STATE_BYTES)
            checksum, _, text = data.partition(b"\n")
            if len(data) <= _MAX_STATE_BYTES and hashlib.sha256(text).hexdigest().encode() == checksum:
                state = json.loads(text)
                windows = [(int(start), int(end)) for start, end in state["suspect_windows_ns"]]
                return str(state["boot_id"]), int(state["flushed_ns"]), windows
        return "", 0, []

    def _store(self, flushed_ns: int) -> None:
        state = {"boot_id": self._boot_id, "flushed_ns": flushed_ns, "suspect_windows_ns": self.windows}
        text = json.dumps(state, sort_keys=True)
        data = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode()
        with self._folder.staged(data, flush=True) as temporary:
            if is_odd(self._path):
                self._folder.set_aside(self._path)
            os.rename(temporary, self._path)
