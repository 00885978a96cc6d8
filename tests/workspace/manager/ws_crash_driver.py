"""Runs one operation again and again, killing it at its first step, its second, and so on.

    python ws_crash_driver.py OPERATION FOLDER CATALOG_URL STEPS STRIDE

Each time a forked child prepares a workspace and does the operation on it, and kills itself (SIGKILL) at the
nth step; every third time another one recovers, and is killed at its own nth step. A last one recovers and
checks that the workspace is in its state before or after the operation, that nothing is left behind, and that
it still works. Ends when the operation comes to its end unkilled. Prints the number of kills.

STEPS is "named" for the steps that manager and file cache name, or "files" for what Python's audit hooks tell
of in the folder too. This process itself stays free of threads, so that forking is safe.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder_cas import FolderCAS
from manager_hosts import DATA, Clock

from snaploader import FileCache, NotFound, SnapshotLoader
from snaploader._environment import HostEnvironment
from snaploader.loader.manifests import is_local_tombstone
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.check import check
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import Scope, SnapshotKind, SnapshotStatus, WorkspaceState
from snaploader.workspace.policy import Policy, ScopePolicy
from snaploader.workspace.testing import FakeRuntime

FILE_EVENTS = frozenset({"open", "shutil.rmtree"}) | {
    f"os.{name}" for name in ("link", "symlink", "rename", "remove", "truncate", "utime", "mkdir", "rmdir")
}
HOST = "host-a"


class Killer:
    """Ends the process at the nth step after it was armed."""

    def __init__(self, folder: Path, steps: str) -> None:
        self._left = 0
        self._folder = str(folder)
        if steps == "files":
            sys.addaudithook(self._audit)

    def arm(self, at: int) -> None:
        self._left = at

    def step(self, _: str) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and (
            isinstance(arguments[0], int) or os.fsdecode(arguments[0]).startswith(self._folder)
        ):
            self.step(event)


@dataclass
class Host:
    """A host of one process."""

    manager: WorkspaceManager
    runtime: FakeRuntime
    cache: FileCache
    loader: SnapshotLoader
    catalog: Catalog

    def write(self, workspace_id: str, text: str) -> None:
        for name in ("data/file", "rest"):
            (self.runtime.root(workspace_id) / name).write_text(text * 1000)

    def read(self, workspace_id: str) -> list[str | None]:
        files = [self.runtime.root(workspace_id) / name for name in ("data/file", "rest")]
        return [file.read_text()[:1] if file.exists() else None for file in files]


@contextmanager
def host(folder: Path, url: str, killer: Killer) -> Iterator[Host]:
    with ExitStack() as stack:
        catalog = stack.enter_context(Catalog.open(url))
        cache = stack.enter_context(
            FileCache(folder / "cache", _environment=HostEnvironment(after_step=killer.step))
        )
        # One worker: the nth step is then the same one in every run.
        loader = stack.enter_context(SnapshotLoader(cache, FolderCAS(folder / "remote"), workers=1))
        runtime = FakeRuntime(folder / "runtime")
        stack.callback(runtime.close)
        manager = WorkspaceManager(
            catalog,
            loader,
            cache,
            runtime,
            folder / "state",
            host=HOST,
            clock=Clock(),
            _environment=HostEnvironment(after_step=killer.step),
        )
        stack.enter_context(manager)
        yield Host(manager, runtime, cache, loader, catalog)


Action = Callable[[Host, str], object]


def with_version(one: Host, name: str) -> None:
    one.manager.create(name, volumes=[DATA])
    one.write(name, "1")
    one.manager.create_version(name)
    one.write(name, "2")


def with_commit(one: Host, name: str) -> None:
    with_version(one, name)
    one.manager.commit(name)
    one.write(name, "3")


def with_pause(one: Host, name: str) -> None:
    with_version(one, name)
    one.manager.pause(name)


def with_old_pause(one: Host, name: str) -> None:
    with_pause(one, name)
    one.manager.resume(name)
    one.write(name, "4")


def stopped(one: Host, name: str) -> None:
    with_version(one, name)
    one.manager.stop(name)


def with_commit_and_pause(one: Host, name: str) -> None:
    with_commit(one, name)
    one.manager.pause(name)


def with_origin(one: Host, name: str) -> None:
    with_commit(one, f"origin-{name}")


def nothing(one: Host, name: str) -> None:
    pass


def create(one: Host, name: str) -> None:
    source = Path(one.cache.root).parent / "template"
    source.mkdir(exist_ok=True)
    (source / "rest").write_text("template")
    one.manager.create(name, volumes=[DATA], source=source)


OPERATIONS: dict[str, tuple[Action, Action]] = {
    "create": (nothing, create),
    "snapshot": (with_old_pause, lambda one, name: one.manager.create_version(name)),
    "snapshot-stopped": (stopped, lambda one, name: one.manager.create_version(name)),
    "rollback": (with_old_pause, lambda one, name: one.manager.rollback(name, 1)),
    "rollback-keep": (with_commit, lambda one, name: one.manager.rollback(name, 1, keep_current=True)),
    "pause": (with_old_pause, lambda one, name: one.manager.pause(name)),
    "resume": (with_pause, lambda one, name: one.manager.resume(name)),
    "commit": (with_old_pause, lambda one, name: one.manager.commit(name)),
    "commit-again": (with_commit, lambda one, name: one.manager.commit(name)),
    "commit-paused": (with_pause, lambda one, name: one.manager.commit(name)),
    "fork": (with_origin, lambda one, name: one.manager.fork(f"origin-{name}", name)),
    "start": (stopped, lambda one, name: one.manager.start(name)),
    "stop": (with_version, lambda one, name: one.manager.stop(name)),
    "delete": (with_commit, lambda one, name: one.manager.delete(name)),
    "delete-paused": (with_commit_and_pause, lambda one, name: one.manager.delete(name)),
}
DATA_SCOPE = {"resume-data": "resume", "pause-data": "pause", "commit-paused-data": "commit-paused"}


def observe(one: Host, name: str) -> dict[str, Any]:
    """All that tells a workspace's state before an operation from that after it, and no random names."""
    with one.catalog.reading() as reader:
        try:
            workspace = reader.workspace(name)
        except NotFound:
            return {"exists": False}
        records = reader.snapshots(name)
        events = [event.type for event in reader.events(name, limit=None)]
    assert workspace.operation is None
    visible = [record for record in records if record.is_remote and is_visible(one, record.runtime_name)]
    return {
        "exists": True,
        "state": workspace.state.value,
        "is_running": one.runtime.status(name).is_running,
        "slot": workspace.slot is not None,
        "content": one.read(name) if workspace.state in {"running", "stopped"} else None,
        "kinds": sorted(record.kind.value for record in records),
        "current": next((r.kind.value for r in records if r.name == workspace.current_snapshot), None),
        "versions": [version.number for version in one.manager.list_versions(name)],
        "visible": len(visible),
        "events": [event for event in events if event != "operation_recovered"],
    }


def tombstones(one: Host) -> set[str]:
    """Refs that stand for snapshots that were deleted."""
    return {ref for ref in one.cache.refs() if is_local_tombstone(one.cache.get_ref(ref))}


def is_visible(one: Host, runtime_name: str) -> bool:
    try:
        one.loader.get_snapshot_by_id(runtime_name, read_policy="newest")
    except NotFound:
        return False
    return True


def verify(one: Host, name: str, allowed: list[dict[str, Any]]) -> None:
    """After recovery: before or after, never between; nothing left behind; and it goes on."""
    seen = observe(one, name)
    assert seen in allowed, (seen, allowed)
    assert [str(finding) for finding in check(one.manager)] == []
    with one.catalog.reading() as reader:
        for record in reader.unfinished_snapshots(HOST):
            assert record.status is SnapshotStatus.ORPHANED, record
            assert record.kind is SnapshotKind.COMMIT
            assert not record.is_remote
            assert not is_visible(one, record.runtime_name)
        known = {
            record.manifest_ref
            for each in reader.workspaces(host=HOST)
            for record in reader.snapshots(each.id)
        }
    assert set(one.cache.refs()) - known - tombstones(one) == set()
    assert not [path for path in Path(one.manager.records.folder).iterdir() if "." in path.name]
    if not seen["exists"]:
        one.manager.create(name, volumes=[DATA])
        return
    state = one.manager.workspace(name).state
    if state is WorkspaceState.DELETED:
        return
    if state is WorkspaceState.PAUSED:
        one.manager.resume(name)
        assert one.read(name)[0] in {"1", "2", "3", "4"}
    numbers = [version.number for version in one.manager.list_versions(name)]
    assert one.manager.create_version(name).version == len(numbers) + 1
    one.manager.rollback(name, 1)
    one.manager.commit(name)
    assert one.manager.orphaned_uploads(name) == []
    one.manager.delete(name)
    assert [str(finding) for finding in check(one.manager)] == []


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


@dataclass
class Driver:
    operation: str
    folder: Path
    url: str
    steps: str

    def attempt(self, name: str, at: int, observed: Path) -> None:
        """Prepare, look, operate until killed, look again."""
        prepare, operate = OPERATIONS[DATA_SCOPE.get(self.operation, self.operation)]
        killer = Killer(self.folder, self.steps)
        with host(self.folder, self.url, killer) as one:
            if self.operation in DATA_SCOPE:
                with one.catalog.transaction() as tx:
                    tx.put_policy(Policy(scopes=ScopePolicy(Scope.DATA)))
            prepare(one, name)
            before = observe(one, name)
            observed.write_text(repr(before))
            killer.arm(at)
            operate(one, name)
            killer.arm(0)
            observed.with_suffix(".after").write_text(repr(observe(one, name)))

    def recover(self, at: int) -> None:
        killer = Killer(self.folder, self.steps)
        with host(self.folder, self.url, killer) as one:
            killer.arm(at)
            one.manager.recover()
            killer.arm(0)

    def check(self, name: str, allowed: list[dict[str, Any]]) -> None:
        with host(self.folder, self.url, Killer(self.folder, "named")) as one:
            summary = one.manager.recover()
            assert summary.problems == (), summary
            verify(one, name, allowed)

    def run(self, stride: int) -> int:
        observed = self.folder / "observed"
        assert in_child(lambda: self.attempt("whole", 0, observed)) == 0, "the operation fails unkilled"
        after = eval(observed.with_suffix(".after").read_text())
        kills = 0
        for number in range(1, 100_000, stride):
            name = f"killed-{number}"
            status = in_child(lambda n=number, w=name: self.attempt(w, n, observed))  # type: ignore[misc]
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed or status == 0, f"the operation failed at step {number}: {status}"
            before = eval(observed.read_text())
            if number % 3 == 0:
                # The recovery is killed too, here and there.
                in_child(lambda n=number: self.recover(n))  # type: ignore[misc]
            allowed = [before, after]
            assert in_child(lambda w=name, a=allowed: self.check(w, a)) == 0, f"wrong after step {number}"  # type: ignore[misc]
            if not killed:
                break
            kills += 1
        return kills


def main() -> None:
    operation, folder, url, steps, stride = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    print(Driver(operation, Path(folder), url, steps).run(int(stride)))


if __name__ == "__main__":
    main()
