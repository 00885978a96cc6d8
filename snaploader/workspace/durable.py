"""Files that survive a power failure once a call returns."""

from __future__ import annotations

import os


def write_new(path: str, data: bytes) -> None:
    """Write a new file and flush it. Raises OSError, FileExistsError when there is one."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: str) -> None:
    """fsync(2) of a folder: the names in it are on disk afterwards. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
