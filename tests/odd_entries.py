"""What others may leave where a file is expected."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

ODD_KINDS = ("pipe", "folder", "link", "socket", "device", "hollow")
"""Kinds for `make_odd`. A hollow file has 1 TiB, all of it a hole."""


def make_odd(path: Path, kind: str) -> None:
    """Put something odd in the place of whatever is there."""
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("only root can make devices")
    if path.is_dir():
        path.rename(f"{path}.before")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "inside").write_bytes(b"x")
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        # The path of a socket may be no longer than 107 bytes.
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/s")
        os.rename("s", path, src_dir_fd=here)
        os.close(here)
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
