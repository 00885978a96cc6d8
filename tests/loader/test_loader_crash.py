"""A process killed at any step of an operation leaves a cache that is right, or empty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snaploader.testing import EmbeddedServer

DRIVER = Path(__file__).with_name("crash_driver.py")


def run(operation: str, folder: Path, url: str = "", stride: int = 1) -> int:
    """How often the operation was killed; fails when anything was wrong after one."""
    command = [sys.executable, str(DRIVER), operation, str(folder), url, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "stride"), [("save", 5), ("unpack", 2), ("evict", 5), ("derive", 2)])
def test_killed_at_many_steps(tmp_path: Path, operation: str, stride: int) -> None:
    assert run(operation, tmp_path, stride=stride) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "stride"), [("remote-save", 10), ("remote-load", 10), ("remote-derive", 4)]
)
def test_killed_at_many_steps_with_a_server(tmp_path: Path, operation: str, stride: int) -> None:
    with EmbeddedServer() as server:
        if operation == "remote-load":
            prepare_server(tmp_path, server.url)
        assert run(operation, tmp_path, server.url, stride=stride) >= 5


def prepare_server(folder: Path, url: str) -> None:
    """Save the state from another host, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; import crash_driver as d; folder = Path(sys.argv[1])\n"
        "d.prepare('remote-save', folder, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(folder / "other-host"), url]
    subprocess.run(command, check=True, cwd=DRIVER.parent, timeout=300)
