"""A workspace is as it was before a call or as it is after it, whenever the caller is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("runtime_crash_driver.py")
NAMED_STEPS_ONLY = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "stride", "least_kills"),
    [
        ("create", 1, 10),
        ("remove", 1, 15),
        ("start", 1, 10),
        ("stop", 1, 10),
        ("place", NAMED_STEPS_ONLY, 4),
        ("place", 7, 8),
        ("place-by-renames", NAMED_STEPS_ONLY, 5),
        ("place-by-renames", 7, 8),
        ("place-anew", NAMED_STEPS_ONLY, 3),
        ("place-anew", 7, 6),
    ],
)
def test_killed_calls_leave_the_state_before_or_after(
    operation: str, stride: int, least_kills: int, tmp_path: Path
) -> None:
    driver = subprocess.run(
        [sys.executable, DRIVER, operation, tmp_path, str(stride)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    assert int(driver.stdout) >= least_kills
