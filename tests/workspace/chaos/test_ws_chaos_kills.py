"""A process killed at any step of an operation: the workspace is as before it or after it, never between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from chaos_kills import OPERATIONS
from chaos_world import HOST, Place, stop_all
from database import PostgreSQLServer

from snaploader.testing import EmbeddedServer

DRIVER = Path(__file__).with_name("chaos_kills.py")
STRIDE = 60
"""Makes a handful of kills for each operation. A stride of 1 takes minutes for each."""
KINDS = (
    *("snapshot", "version", "pause", "resume", "commit", "fork"),
    *("rollback-keeping", "delete", "create-from", "start", "stop"),
)
"""One operation of each kind."""


def drive(operation: str, folder: Path, catalog_url: str, remote_url: str, *how: str) -> str:
    """What the driver prints; fails when anything was wrong after a kill."""
    command = [sys.executable, str(DRIVER), operation, str(folder), catalog_url, remote_url, *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_some_steps(operation: str, tmp_path: Path) -> None:
    with EmbeddedServer() as server:
        catalog = f"sqlite:///{tmp_path}/catalog.db"
        kills = int(drive(operation, tmp_path, catalog, server.url, str(STRIDE)))
    assert kills >= 1


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["version", "rollback-keeping", "pause", "resume", "commit", "delete"])
def test_killed_at_some_steps_on_postgresql(
    operation: str, tmp_path: Path, postgresql: PostgreSQLServer
) -> None:
    name = postgresql.create_database()
    try:
        with EmbeddedServer() as server:
            kills = int(drive(operation, tmp_path, postgresql.url(name), server.url, str(2 * STRIDE)))
    finally:
        postgresql.drop_database(name)
    assert kills >= 1


@pytest.mark.slow
@pytest.mark.parametrize("operation", KINDS)
def test_the_doctor_finds_nothing_once_a_killed_operation_was_recovered(
    operation: str, tmp_path: Path
) -> None:
    catalog = f"sqlite:///{tmp_path}/catalog.db"
    place = Place(str(tmp_path), catalog)
    where = ["--catalog", catalog, "--state-dir", place.state, "--host-name", HOST]
    try:
        with EmbeddedServer() as server:
            options = ["--cache-dir", place.cache]
            if OPERATIONS[operation].is_remote:
                options += ["--remote-cache", server.url]
            drive(operation, tmp_path, catalog, server.url, "once", "2")
            ill = command_line(*options, "doctor", *where)
            assert ill.returncode == 13, ill.stdout + ill.stderr
            recovery = command_line(*options, "workspace", "recover", *where)
            assert recovery.returncode == 0, recovery.stdout + recovery.stderr
            well = command_line(*options, "doctor", *where)
            assert well.returncode == 0, well.stdout + well.stderr
    finally:
        stop_all(place)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-c", "from snaploader.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
