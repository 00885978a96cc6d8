"""A forked child that leaves the blocks it was forked in takes nothing from its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fork_driver
import pytest

DRIVER = Path(fork_driver.__file__)


@pytest.mark.parametrize("block", fork_driver.BLOCKS)
def test_a_child_that_leaves_a_block_by_sys_exit_changes_nothing_for_its_parent(
    block: str, tmp_path: Path
) -> None:
    # In a process of its own: threads that other tests left to gRPC could hang the child.
    done = subprocess.run(
        [sys.executable, DRIVER, block, tmp_path], timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
