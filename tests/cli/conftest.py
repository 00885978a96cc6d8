from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import CommandLine

from snaploader.testing import EmbeddedServer


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> CommandLine:
    """The command line, run in this process."""
    return CommandLine(tmp_path, monkeypatch, capsysbinary)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A server in memory."""
    with EmbeddedServer() as running:
        yield running
