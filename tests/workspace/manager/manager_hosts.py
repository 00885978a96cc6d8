"""Hosts with a manager each: a fake runtime, a file cache; remote cache and catalog they may share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from snaploader import FileCache, SnapshotLoader
from snaploader.testing import FakeCAS
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.check import check
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import Scope, SnapshotStatus, Volume, Workspace
from snaploader.workspace.policy import Policy, ScopePolicy
from snaploader.workspace.testing import FakeRuntime

DATA = Volume("data", "/data")
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **kwargs: float) -> datetime:
        self.now += timedelta(**kwargs)
        return self.now


@dataclass
class Host:
    """One host, and shorthands."""

    manager: WorkspaceManager
    runtime: FakeRuntime
    cache: FileCache
    loader: SnapshotLoader
    catalog: Catalog
    remote: FakeCAS | None
    folder: Path
    clock: Clock

    def create(self, workspace_id: str = "one", **kwargs: Any) -> Workspace:
        """A workspace with one volume."""
        kwargs.setdefault("volumes", [DATA])
        return self.manager.create(workspace_id, **kwargs)

    def write(self, path: str, text: str, workspace_id: str = "one") -> None:
        """Write a file as the workspace would."""
        file = self.runtime.root(workspace_id) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(self, path: str, workspace_id: str = "one") -> str | None:
        """What a file of the workspace holds; None when there is none."""
        file = self.runtime.root(workspace_id) / path
        return file.read_text() if file.exists() else None

    def is_running(self, workspace_id: str = "one") -> bool:
        return self.runtime.status(workspace_id).is_running

    def follow(
        self,
        on_pause: Scope = Scope.FULL,
        on_commit: Scope | None = None,
        name: str = "default",
        **kwargs: Any,
    ) -> None:
        """Change a policy."""
        with self.catalog.transaction() as tx:
            tx.put_policy(Policy(name, ScopePolicy(on_pause, on_commit), **kwargs))

    def events(self, workspace_id: str = "one") -> list[str]:
        return [event.type for event in self.manager.events(workspace_id)]

    def calls(self) -> list[str]:
        """Names of the runtime's methods that were called since the last time."""
        calls = [call.method for call in self.runtime.calls]
        self.runtime.calls.clear()
        return calls

    def findings(self) -> list[str]:
        """Everything that does not agree."""
        return [str(finding) for finding in check(self.manager)]

    def leftovers(self) -> list[str]:
        """What no workspace needs: snapshots half made, pins without a snapshot, folders half made."""
        with self.catalog.reading() as reader:
            unfinished = [f"{each.name} is {each.status}" for each in reader.unfinished_snapshots("host-a")]
            orphans = {
                each.name
                for each in reader.unfinished_snapshots("host-a")
                if each.status is SnapshotStatus.ORPHANED
            }
        staged = [path.name for path in (self.folder / "state" / "paused").iterdir() if "." in path.name]
        return [each for each in unfinished if each.split()[0] not in orphans] + staged


HostFactory = Callable[..., Host]


@contextmanager
def open_host(folder: Path, catalog: Catalog, remote: FakeCAS | None, **kwargs: Any) -> Iterator[Host]:
    """A host in a folder; opened again, it finds what it left."""
    folder.mkdir(exist_ok=True)
    clock = kwargs.pop("clock", None) or Clock()
    with ExitStack() as stack:
        cache = stack.enter_context(FileCache(folder / "cache"))
        loader = stack.enter_context(SnapshotLoader(cache, remote, workers=2))
        runtime = kwargs.pop("runtime", None) or FakeRuntime(folder / "runtime")
        stack.callback(runtime.close)
        kwargs.setdefault("host", "host-a")
        manager = WorkspaceManager(
            catalog, loader, cache, runtime, folder / "state", clock=clock, workers=4, **kwargs
        )
        stack.enter_context(manager)
        yield Host(manager, runtime, cache, loader, catalog, remote, folder, clock)
