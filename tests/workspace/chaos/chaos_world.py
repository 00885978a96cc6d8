"""A host's workspaces on folders and a database, opened again and again, also by processes to be killed."""

from __future__ import annotations

import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaploader import FileCache, RemoteCache, SnapshotLoader
from snaploader._environment import HostEnvironment
from snaploader.errors import NotFound
from snaploader.remote import RetryPolicy
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.check import check
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import SnapshotStatus, Volume, Workspace, WorkspaceState
from snaploader.workspace.runtime import ProcessRuntime
from snaploader.workspace.testing import FakeRuntime

DATA = Volume("data", "/data")
HOST = "host-a"
MTIME_NS = 1_600_000_000 * 10**9
BUSY_S = 280.0
"""More than any wait takes, on the busiest machine."""

FILE_EVENTS = frozenset(
    {"open", "shutil.rmtree", "subprocess.Popen", "fcntl.flock"}
    | {
        f"os.{name}"
        for name in ("link", "rename", "remove", "mkdir", "rmdir", "symlink", "truncate", "utime")
    }
)
"""What Python's audit hooks tell of files, locks and processes."""

Step = Callable[[str], None]


def no_step(_: str) -> None:
    """Nothing happens at any step."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is kept."""

    folder: str
    catalog: str
    remote: str = ""
    is_fake: bool = False
    host: str = HOST

    @property
    def state(self) -> str:
        """The state directory, as the command line lays it out."""
        return f"{self.folder}/state"

    @property
    def cache(self) -> str:
        """The folder of the file cache."""
        return f"{self.folder}/cache"


@dataclass
class World:
    """A manager, and all that it works with."""

    place: Place
    manager: WorkspaceManager
    runtime: FakeRuntime | ProcessRuntime
    cache: FileCache
    loader: SnapshotLoader
    catalog: Catalog

    def root(self, workspace_id: str) -> Path:
        """The folder that the workspace sees."""
        return self.runtime.root(workspace_id)

    def events(self, workspace_id: str) -> list[str]:
        """Types of all its events."""
        return [event.type for event in self.manager.events(workspace_id, limit=None)]

    def findings(self) -> list[str]:
        """Everything that is wrong."""
        return [str(finding) for finding in check(self.manager)]


def make_runtime(place: Place, step: Step = no_step) -> FakeRuntime | ProcessRuntime:
    """The runtime of a place: quick, and not safe against a power failure."""
    folder, environment = f"{place.state}/runtime", HostEnvironment(after_step=step)
    if place.is_fake:
        return FakeRuntime(folder, _environment=environment)
    return ProcessRuntime(folder, durable=False, index_placed=False, _environment=environment)


@contextmanager
def opened(
    place: Place,
    step: Step = no_step,
    *,
    wrap: Callable[[Catalog], Any] = lambda catalog: catalog,
    workers: int = 1,
    manager_step: Step | None = None,
    **kwargs: Any,
) -> Iterator[World]:
    """A world at a place. With one worker, the nth step of an operation is the same one in every run.

    Args:
        step: Called at each step of the file cache and the runtime, and of the manager, unless
        manager_step: is given.
        wrap: What the manager gets for a catalog.
    """
    os.makedirs(place.state, exist_ok=True)
    with ExitStack() as stack:
        cache = stack.enter_context(FileCache(place.cache, _environment=HostEnvironment(after_step=step)))
        remote = None
        if place.remote:
            remote = stack.enter_context(RemoteCache(place.remote, retry=RetryPolicy(attempts=1)))
        loader = stack.enter_context(SnapshotLoader(cache, remote, workers=workers))
        catalog = stack.enter_context(Catalog.open(place.catalog))
        runtime = make_runtime(place, step)
        stack.callback(runtime.close)
        manager = WorkspaceManager(
            wrap(catalog),
            loader,
            cache,
            runtime,
            place.state,
            host=place.host,
            workers=workers,
            _environment=HostEnvironment(after_step=manager_step or step),
            **kwargs,
        )
        stack.enter_context(manager)
        yield World(place, manager, runtime, cache, loader, catalog)


def fill(root: Path, word: str, token: str = "") -> None:
    """Content of all kinds, the same each time but for `word` and, in the files, `token`."""
    (root / "data/deep/empty").mkdir(parents=True, exist_ok=True)
    (root / "data/file").write_text(f"data {word} {token}")
    (root / "data/deep/script").write_text(f"#!/bin/sh\n# {word} {token}\n")
    (root / "data/deep/script").chmod(0o755)
    (root / "etc/empty").mkdir(parents=True, exist_ok=True)
    (root / "etc/secret").write_text(f"secret {word} {token}")
    (root / "etc/secret").chmod(0o600)
    (root / "big").write_bytes(f"{word} {token}".encode() * 20_000)
    for path, target in ((root / "data/link", "deep/script"), (root / f"link-{word}", f"../nowhere {word}")):
        with suppress(FileExistsError):
            path.symlink_to(target)
    set_times(root, MTIME_NS + len(word) * 1_000_000_007)


def set_times(root: Path, mtime_ns: int) -> None:
    """Give everything below a folder, and itself, a time of its own."""
    for number, path in enumerate(sorted(root.rglob("*"), key=lambda path: (-len(path.parts), path))):
        at_ns = mtime_ns + number * 1_000_000
        os.utime(path, ns=(at_ns, at_ns), follow_symlinks=False)
    os.utime(root, ns=(mtime_ns, mtime_ns))


def tree_of(root: Path, *, loose: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """All that is kept of a folder, by relative path: kind, mode, time, and content or target.

    Args:
        loose: Folders whose times do not count.
    """
    found: dict[str, list[Any]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status, name = path.lstat(), str(path.relative_to(root))
        if stat.S_ISLNK(status.st_mode):
            found[name] = ["link", 0, status.st_mtime_ns, os.readlink(path)]
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ["folder", stat.S_IMODE(status.st_mode), status.st_mtime_ns, ""]
        else:
            found[name] = ["file", stat.S_IMODE(status.st_mode), status.st_mtime_ns, path.read_bytes().hex()]
    for name in loose:
        if name in found:
            found[name][2] = 0
    return found


def picture(world: World, workspace_id: str) -> dict[str, Any]:
    """All that can be seen of a workspace, without names that differ in every run."""
    manager = world.manager
    try:
        workspace = manager.workspace(workspace_id)
    except NotFound:
        return {"state": "none"}
    with world.catalog.reading() as reader:
        snapshots = reader.snapshots(workspace_id, statuses=list(SnapshotStatus))
        runs = reader.runs(workspace_id)
    shown = [each for each in snapshots if each.status is not SnapshotStatus.ORPHANED]
    status = world.runtime.status(workspace_id)
    return {
        "state": workspace.state.value,
        "operation": None if workspace.operation is None else workspace.operation.kind.value,
        "has_slot": workspace.slot is not None,
        "last_version": workspace.last_version,
        "runs_now": status.is_running,
        "content": tree_of(world.root(workspace_id), loose=(".",)) if status.exists else None,
        "versions": [
            [each.number, each.display_name, each.source.value]
            for each in manager.list_versions(workspace_id)
        ],
        "snapshots": sorted(
            [each.kind.value, each.scope.value, each.status.value, each.is_remote] for each in shown
        ),
        "current": [each.kind.value for each in shown if each.name == workspace.current_snapshot],
        "has_record": workspace_id in manager.records.entries(),
        "events": world.events(workspace_id),
        "runs": [[run.transition.value, run.status.value, run.reason] for run in runs],
    }


def is_on_host(workspace: Workspace) -> bool:
    """Whether its files are."""
    return workspace.state in {WorkspaceState.RUNNING, WorkspaceState.STOPPED}


class Killer:
    """Ends the process (SIGKILL) at the nth step, once it is armed; 0: never.

    Args:
        with_events: Whether what audit hooks tell are steps too, besides those that are named.
    """

    def __init__(self, at: int, *, with_events: bool) -> None:
        self.steps = 0
        self.is_armed = False
        self._at = at
        if with_events:
            sys.addaudithook(self._audit)

    def step(self, _: str) -> None:
        """A step."""
        if not self.is_armed:
            return
        self.steps += 1
        if self.steps == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, _: object) -> None:
        if event in FILE_EVENTS:
            self.step(event)


class ChildFailedError(Exception):
    """A forked process ended with an error, or was killed by somebody else."""


def in_child(action: Callable[[], None]) -> bool:
    """Do it in a forked process; whether that came to its end, and was not killed.

    For processes without threads.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status not in (0, signal.SIGKILL):
        raise ChildFailedError(f"the child ended with wait status {status}")
    return status == 0


def pids_of(workspace_id: str) -> list[int]:
    """All processes of a host that belong to a workspace."""
    mark, found = f"WORKSPACE_ID={workspace_id}".encode(), []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def stop_all(place: Place) -> None:
    """Let nothing run any more, whatever became of it."""
    runtime = make_runtime(place)
    for workspace_id in runtime.workspaces():
        with suppress(NotFound):
            runtime.stop(workspace_id, timeout_s=5)
    runtime.close()
