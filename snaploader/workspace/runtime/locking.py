"""Who may change a workspace's folder: flock(2) on a small file.

A lock goes with the processes that hold its descriptor. The supervisor of a workspace inherits it until
it has written down what it started, so nobody can find the workspace half started, whoever is killed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from snaploader.locks import lock_new

_MODE = 0o600


@contextmanager
def locked(path: str) -> Iterator[int]:
    """Hold the lock, waiting for it first; gives its descriptor. Raises OSError."""
    fd = lock_new(path, mode=_MODE)
    pid = os.getpid()
    try:
        yield fd
        # At once, also where a process that was forked meanwhile has the descriptor too, which leaves the
        # lock to its parent. Not after an error: a supervisor that is still starting goes on to hold it.
        if os.getpid() == pid:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


@contextmanager
def locked_now(path: str) -> Iterator[bool]:
    """Hold the lock if that needs no waiting; whether it is held. Raises OSError."""
    try:
        fd = lock_new(path, wait=False, mode=_MODE)
    except BlockingIOError:
        yield False
        return
    pid = os.getpid()
    try:
        yield True
        if os.getpid() == pid:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
