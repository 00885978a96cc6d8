"""A process killed at any step: recovery ends before or after the operation, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from database import SQLITE
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
def test_killed_at_named_steps(tmp_path: Path, database: str, catalog_url: str, operation: str) -> None:
    # At every step on one database; on the other, which only the catalog tells from it, at every third.
    stride = 1 if database == SQLITE else 3
    assert run(operation, tmp_path, catalog_url, "named", stride) >= 3 // stride


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.parametrize("operation", ["create", "snapshot", "rollback-keep", "pause", "commit", "delete"])
def test_killed_at_many_steps_on_disk(tmp_path: Path, catalog_url: str, operation: str) -> None:
    assert run(operation, tmp_path, catalog_url, "files", 23) >= 3
