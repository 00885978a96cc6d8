"""Fixtures: a loader, and runtimes whose workspaces are gone at the end of each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_harness import FolderHarness

from snaploader import FileCache, SnapshotLoader
from snaploader.workspace.runtime import ProcessRuntime
from snaploader.workspace.testing import FakeRuntime


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[SnapshotLoader]:
    """A loader on a file cache of its own."""
    with FileCache(tmp_path / "cache") as cache, SnapshotLoader(cache, workers=2) as loader:
        yield loader


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ProcessRuntime]:
    """A runtime of processes."""
    runtime = ProcessRuntime(tmp_path / "runtime", durable=False)
    yield runtime
    for workspace_id in runtime.workspaces():
        runtime.stop(workspace_id, timeout_s=0)
    runtime.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeRuntime]:
    """A runtime without processes."""
    runtime = FakeRuntime(tmp_path / "runtime")
    yield runtime
    runtime.close()


@pytest.fixture(params=["fake", "process"])
def harness(
    request: pytest.FixtureRequest, tmp_path: Path, loader: SnapshotLoader
) -> Iterator[FolderHarness]:
    """Every runtime there is, for the public checks."""

    def make() -> FakeRuntime | ProcessRuntime:
        if request.param == "fake":
            return FakeRuntime(tmp_path / "runtime")
        return ProcessRuntime(tmp_path / "runtime", durable=False, index_placed=False)

    harness = FolderHarness(make, loader, tmp_path)
    yield harness
    harness.runtime.close()
