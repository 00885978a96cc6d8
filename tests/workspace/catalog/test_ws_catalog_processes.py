"""Many processes, forks and killed writers: `catalog_processes_suite.py`, run in a process of its own.

Its children are forked, and that is safe only where nothing else is under way: what earlier tests left of
gRPC in this process, threads of its own and objects that wait for them, can hang a child.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("catalog_processes_suite.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chosen", ["not postgresql", "postgresql"])
def test_processes_forks_and_killed_writers(chosen: str) -> None:
    arguments = ["-q", "-n0", "-rs", "-p", "no:cacheprovider", "-k", chosen, str(SUITE)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
