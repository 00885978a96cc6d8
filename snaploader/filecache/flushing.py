"""What is on disk for certain once a call returns, also after a power failure."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


def flush_folder(path: str) -> None:
    """fsync(2) of a folder: the names in it are on disk afterwards. Raises OSError."""
    with _opened(path) as fd:
        os.fsync(fd)


def flush_file_system(path: str) -> None:
    """syncfs(2): what was written to the file system of a folder is on disk afterwards. Raises OSError."""
    with _opened(path) as fd:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
