"""A process killed at any step: recovery ends before or after the operation, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ws_crash_driver import DATA_SCOPE, OPERATIONS

DRIVER = Path(__file__).with_name("ws_crash_driver.py")
TIMEOUT_S = 600


def run(operation: str, folder: Path, url: str, steps: str, stride: int) -> int:
    """How often the operation was killed; fails when anything was wrong after one."""
    command = [sys.executable, str(DRIVER), operation, str(folder), url, steps, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("operation", [*OPERATIONS, *DATA_SCOPE])
def test_killed_at_every_named_step(tmp_path: Path, catalog_url: str, operation: str) -> None:
    assert run(operation, tmp_path, catalog_url, "named", 1) >= 3


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("operation", ["create", "snapshot", "rollback-keep", "pause", "commit", "delete"])
def test_killed_at_many_steps_on_disk(tmp_path: Path, catalog_url: str, operation: str) -> None:
    assert run(operation, tmp_path, catalog_url, "files", 23) >= 3
