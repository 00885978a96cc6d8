"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snaploader.cli.app import run_command

COMMAND = [sys.executable, "-m", "snaploader.cli"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class CommandLine:
    """The command line, with a cache folder and a configuration folder of the test's own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes]
    ) -> None:
        for name in [name for name in os.environ if name.startswith("SNAPLOADER_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "xdg-cache"))
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
        # The tests share this process with all others, whose allocator stays as it is.
        monkeypatch.setattr("snaploader.remote.tune_malloc", lambda: None)
        self._capture = capture

    def __call__(self, *arguments: object) -> Outcome:
        self._capture.readouterr()
        code = run_command([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        outcome = Outcome(code, out, err.decode())
        assert "Traceback" not in outcome.stderr
        return outcome

    def ok(self, *arguments: object) -> Outcome:
        """Run a command that must succeed."""
        outcome = self(*arguments)
        assert outcome.exit_code == 0, outcome
        return outcome

    def json(self, *arguments: object) -> Any:
        """Run a command that must succeed, with --json; what it printed."""
        return self.ok(*arguments, "--json").json


def in_process_of_its_own(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a program."""
    command = [*COMMAND, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, timeout=300, check=False, **options)


def chunked_content(*chunks: int, chunk_size: int = 4096) -> bytes:
    """A chunk of these bytes each; 0 is a chunk that becomes a hole."""
    return b"".join(bytes([number]) * chunk_size for number in chunks)
