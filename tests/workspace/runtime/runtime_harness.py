"""Runtimes for tests: what the public checks need, and a workspace's life in short."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from snaploader import SaveResult, Snapshot, SnapshotKey, SnapshotLoader, VMConfiguration
from snaploader.workspace.model import Scope, WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime
from snaploader.workspace.runtime.runs import ProcessIdentity, wait_ended
from snaploader.workspace.testing import FakeRuntime

KEY = SnapshotKey(instance_name="tests")


class FolderHarness:
    """Implements `snaploader.workspace.testing.Harness` for runtimes that keep folders."""

    def __init__(
        self, make: Callable[[], FakeRuntime | ProcessRuntime], loader: SnapshotLoader, scratch: Path
    ) -> None:
        self.another = make
        self.runtime = make()
        self.loader = loader
        self.command = ("sleep", "1000")
        self.scratch = str(scratch)

    def write(self, workspace_id: str, path: str, data: bytes) -> None:
        """See `Harness`."""
        target = self._path(workspace_id, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def read(self, workspace_id: str, path: str) -> bytes | None:
        """See `Harness`."""
        target = self._path(workspace_id, path)
        return target.read_bytes() if target.is_file() else None

    def _path(self, workspace_id: str, path: str) -> Path:
        return self.runtime.root(workspace_id) / path.removeprefix("/")


class Fifo:
    """Through which a workspace's command tells a test that it has come so far. Reading waits for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def read(self) -> str:
        """What one writer wrote before it closed the pipe."""
        return self.path.read_text()


def wait_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Wait until a process has ended; whether it has in this time."""
    process = ProcessIdentity.of(pid)
    return process is None or wait_ended([process], timeout_s)


def save(
    runtime: FakeRuntime | ProcessRuntime,
    loader: SnapshotLoader,
    spec: WorkspaceSpec,
    scope: Scope = Scope.FULL,
) -> SaveResult:
    """Capture a workspace and save it locally."""
    with runtime.capture(spec, scope) as captured:
        return loader.cache_snapshot(
            KEY,
            files=captured.files,
            chunked_files=captured.chunked_files,
            directories=captured.directories,
            vm_configuration=VMConfiguration(),
            snapshot_id=uuid.uuid4().hex,
        )


def find(loader: SnapshotLoader, saved: SaveResult) -> Snapshot:
    """The snapshot that was saved."""
    return loader.get_snapshot_by_id(saved.snapshot_id, instance_name=KEY.instance_name)


def tree_of(folder: Path) -> dict[str, tuple[int, bytes | str | None]]:
    """All that is in a folder, by relative path: mode, and content, target or nothing."""
    found: dict[str, tuple[int, bytes | str | None]] = {}
    for path in sorted(folder.rglob("*")):
        content: bytes | str | None = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found
