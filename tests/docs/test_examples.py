"""The examples run, say what they promise, and leave nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = CHECKOUT / "examples/fifty_workspaces.py"


@pytest.mark.slow
def test_the_workspaces_of_one_base_are_parked_and_revived_and_cost_one_base(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", EXAMPLE, "--workspaces", "6", "--base-mib", "2"]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.split(maxsplit=1)[0] for line in done.stdout.splitlines()] == [
        "base",
        "forked",
        "parked",
        "one",
        "together",
        "revived",
        "checked",
    ]
    costs = re.search(r"^one fork +([0-9.]+) KiB exclusive, ([0-9.]+) MiB shared$", done.stdout, re.MULTILINE)
    assert costs is not None
    assert 16 <= float(costs[1]) < 32
    assert 2 <= float(costs[2]) < 2.1
    together = re.search(r"^together +([0-9.]+) MiB .* copies: ([0-9.]+) MiB", done.stdout, re.MULTILINE)
    assert together is not None
    assert float(together[1]) < 2.5
    assert float(together[2]) > 12
    assert list(tmp_path.iterdir()) == []
    left = [
        process.cmdline() for process in psutil.process_iter() if str(tmp_path) in " ".join(_command(process))
    ]
    assert left == []


def run_example(name: str, tmp_path: Path, *command: str) -> list[str]:
    """The lines that an example prints. It leaves nothing in its temporary folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command, CHECKOUT / "examples" / name],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_service_restores_at_once_and_leaves_nothing_of_what_was_called_off(tmp_path: Path) -> None:
    assert run_example("restore_service.py", tmp_path) == [
        "restored [2300000, 2300000, 2300000, 2300000]",
        "absent NotFound",
        "checked True left behind: False",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_pool_works_on_one_pickled_snapshot(tmp_path: Path) -> None:
    assert run_example("snapshot_pool.py", tmp_path) == ["hashed 8 shares; fetched 8.0 MiB"]
    assert list(tmp_path.iterdir()) == []


def test_the_tests_of_the_small_executor_pass(tmp_path: Path) -> None:
    lines = run_example(
        "test_an_executor.py", tmp_path, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"
    )
    assert re.fullmatch(r"5 passed in [0-9.]+s", lines[-1])


def _command(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.cwd()]
    except psutil.Error:
        return []


def test_the_readme_and_the_documentation_name_the_examples() -> None:
    for example in (CHECKOUT / "examples").glob("*.py"):
        name = f"examples/{example.name}"
        assert name in (CHECKOUT / "README.md").read_text()
        assert any(name in page.read_text() for page in (CHECKOUT / "docs").rglob("*.md"))
