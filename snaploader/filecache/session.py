"""One open cache: proof of life for what it leaves lying about, and its staging folder.

A session is a locked file `tmp/<token>.lock`. Staging files lie in `tmp/<token>/`, leases are called
`leases/<token>.<number>`. Whatever belongs to a token whose lock nobody holds is rubbish and is swept;
age plays no part.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
from contextlib import suppress

from snaploader.filecache import locks
from snaploader.filecache.layout import Layout

_LOCK = ".lock"


class Session:
    """The session of one open cache. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.pid = os.getpid()
        self.token = f"{self.pid}-{secrets.token_hex(8)}"
        self._numbers = itertools.count()
        self.staging = f"{layout.sessions}/{self.token}"
        self._fd = locks.lock_new(self.staging + _LOCK)
        try:
            os.mkdir(self.staging, 0o777)
        except BaseException:
            self.close()
            raise

    @property
    def is_own(self) -> bool:
        """Whether this is the process that began the session, not a forked child of it."""
        return os.getpid() == self.pid

    def unique_name(self) -> str:
        """A name that nothing else has, also not after a crash."""
        return f"{self.token}.{next(self._numbers)}"

    def temp_path(self) -> str:
        """A new path in the staging folder."""
        return f"{self.staging}/{next(self._numbers)}"

    def close(self) -> None:
        """End the session and remove its files. In a forked child it only drops the descriptor."""
        if self._fd < 0:
            return
        try:
            # The whole folder may have been removed while it was in use.
            if self.is_own and os.path.isdir(self._layout.leases):
                _remove_session(self._layout, self.token)
        finally:
            os.close(self._fd)
            self._fd = -1


def is_alive(layout: Layout, token: str) -> bool:
    """Whether the session's owner still runs."""
    return not locks.is_dead(f"{layout.sessions}/{token}{_LOCK}")


def sweep(layout: Layout) -> int:
    """Remove what dead sessions left; how many there were. Safe at any time, by any number of processes."""
    swept = 0
    names = set(os.listdir(layout.sessions))
    for name in names:
        if name.endswith(_LOCK):
            fd = locks.try_lock(f"{layout.sessions}/{name}")
            if fd is not None:
                try:
                    _remove_session(layout, name.removesuffix(_LOCK))
                finally:
                    os.close(fd)
                swept += 1
    for name in os.listdir(layout.leases):
        token = name.partition(".")[0]
        if f"{token}{_LOCK}" not in names and not is_alive(layout, token):
            with suppress(FileNotFoundError, PermissionError):
                os.unlink(f"{layout.leases}/{name}")
    return swept


def _remove_session(layout: Layout, token: str) -> None:
    """Remove a session's files, its lock last so that they stay findable. The caller holds the lock.

    What only the user who made it may remove is left, with the lock, to a cache opened by that user.
    """
    staging = f"{layout.sessions}/{token}"
    shutil.rmtree(staging, ignore_errors=True)
    with suppress(PermissionError):
        for name in os.listdir(layout.leases):
            if name.partition(".")[0] == token:
                with suppress(FileNotFoundError):
                    os.unlink(f"{layout.leases}/{name}")
        if not os.path.exists(staging):
            with suppress(FileNotFoundError):
                os.unlink(staging + _LOCK)
