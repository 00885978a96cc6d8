"""Runs one operation of a runtime again and again, killing it at its first step, its second, and so on.

    python runtime_crash_driver.py OPERATION FOLDER STRIDE

Each time a forked child does the operation and kills itself (SIGKILL) at the nth step; then another
runtime looks at what is left. Ends when a child comes to its end unkilled. Prints the number of kills.

A step is whatever Python's audit hooks tell of files (to open, link, rename, remove or make one), locks
and new processes, and each step that the runtime names. With a stride of 0 only those count that the runtime
names. This process stays free of threads, so that forking is safe.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from runtime_harness import save

from snaploader import FileCache, Snapshot, SnapshotLoader
from snaploader._environment import HostEnvironment
from snaploader.errors import SnaploaderError
from snaploader.workspace.model import Volume, WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime, StopOutcome, folder as folders

EVENTS = frozenset(
    {"open", "shutil.rmtree", "subprocess.Popen", "fcntl.flock"}
    | {f"os.{name}" for name in ("link", "rename", "remove", "mkdir", "rmdir", "chmod")}
)
ID = "ws"
VOLUME = Volume("data", "/data")
OLD, NEW = {"data/file": b"old", "rest": b"old rest"}, {"data/file": b"new", "rest": b"new rest"}


class Killer:
    """Ends the process at the nth step, once it is armed."""

    def __init__(self, at: int, *, with_events: bool) -> None:
        self._left = at
        self.is_armed = False
        if with_events:
            sys.addaudithook(lambda event, _: self.step(event) if event in EVENTS else None)

    def step(self, _: str) -> None:
        if not self.is_armed:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class World:
    """One try: a fresh runtime folder, and snapshots of the old and the new content."""

    def __init__(self, folder: Path, number: int) -> None:
        self.base = folder / str(number)
        self.cache = folder / "cache"
        self.pids = self.base / "pids"
        # "$$" is the shell's pid, which `exec` keeps. The file counts the commands that were ever started.
        self.spec = WorkspaceSpec(
            ID, command=("sh", "-c", f"echo $$ >> {self.pids}; exec sleep 1000"), volumes=(VOLUME,)
        )

    def runtime(self, checkpoint: Callable[[str], None] = lambda _: None) -> ProcessRuntime:
        return ProcessRuntime(
            self.base / "runtime",
            durable=False,
            index_placed=False,
            _environment=HostEnvironment(after_step=checkpoint),
        )

    def loader(self) -> tuple[FileCache, SnapshotLoader]:
        cache = FileCache(self.cache)
        return cache, SnapshotLoader(cache, workers=1)

    def content(self, runtime: ProcessRuntime) -> dict[str, bytes]:
        root = runtime.root(ID)
        return {name: (root / name).read_bytes() for name in OLD if (root / name).is_file()}

    def alive(self) -> list[int]:
        """Commands that run."""
        pids = [int(line) for line in self.pids.read_text().split()] if self.pids.exists() else []
        return [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() in {"sleep\n", "sh\n"}
    except OSError:
        return False


def write(runtime: ProcessRuntime, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (runtime.root(ID) / name).write_bytes(data)


def in_child(action: Callable[[], None]) -> bool:
    """Do it in a forked process; whether that came to its end. RuntimeError when it failed."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the child failed with wait status {status}")
    return status == 0


def make_old(world: World) -> None:
    runtime = world.runtime()
    runtime.create(world.spec)
    write(runtime, OLD)


def make_snapshot(world: World, id_file: Path) -> None:
    """Save a snapshot of the new content, and write its id to a file."""
    runtime = world.runtime()
    runtime.create(world.spec)
    write(runtime, NEW)
    cache, loader = world.loader()
    id_file.write_text(save(runtime, loader, world.spec).snapshot_id)
    loader.close()
    cache.close()


def place(world: World, runtime: ProcessRuntime, snapshot_id: str, arm: Callable[[], None]) -> None:
    cache, loader = world.loader()
    snapshot: Snapshot = loader.get_snapshot_by_id(snapshot_id, instance_name="tests")
    arm()
    runtime.place(world.spec, loader, snapshot, token="new")
    loader.close()
    cache.close()


def check(is_met: bool, what: str) -> None:
    if not is_met:
        raise AssertionError(what)


def check_usable(world: World, runtime: ProcessRuntime) -> None:
    """Whatever happened, the workspace runs, stops and is removed, and nothing is left."""
    runtime.start(world.spec)
    check(runtime.status(ID).is_running, "it does not run")
    check(runtime.stop(ID) is not StopOutcome.NOT_RUNNING, "it did not run")
    check(not world.alive(), "its command still runs")
    runtime.remove(ID)
    check(runtime.sweep() == [] and runtime.leftovers() == [], "something is left")


def check_created(world: World, runtime: ProcessRuntime) -> None:
    runtime.sweep()
    check(runtime.leftovers() == [], "something is left half made")
    if not runtime.status(ID).exists:
        runtime.create(world.spec)
    check((runtime.root(ID) / "data").is_dir(), "the durable directory is not there")
    check_usable(world, runtime)


def check_placed(world: World, runtime: ProcessRuntime) -> None:
    status = runtime.status(ID)
    check(status.exists, "it is gone")
    expected = {"new": NEW, "": OLD}[status.placed]
    check(world.content(runtime) == expected, f"it holds {world.content(runtime)}, placed {status.placed!r}")
    check(runtime.workspaces() == [ID], f"listed are {runtime.workspaces()}")
    runtime.sweep()
    check(runtime.leftovers() == [], "something is left half made")
    check(world.content(runtime) == expected, "sweeping changed it")
    check_usable(world, runtime)


def check_placed_anew(world: World, runtime: ProcessRuntime) -> None:
    runtime.sweep()
    check(runtime.leftovers() == [], "something is left half made")
    if runtime.status(ID).exists:
        check(runtime.status(ID).placed == "new" and world.content(runtime) == NEW, "it is half made")
    else:
        runtime.create(world.spec)
    check_usable(world, runtime)


def check_removed(world: World, runtime: ProcessRuntime) -> None:
    if runtime.status(ID).exists:
        check(world.content(runtime) == OLD, "it is half removed")
        runtime.remove(ID)
    runtime.sweep()
    check(runtime.workspaces() == [] and runtime.leftovers() == [], "something is left half removed")
    check(not list((world.base / "runtime" / "locks").iterdir()), "its lock is left")


def check_started(world: World, runtime: ProcessRuntime) -> None:
    runtime.start(world.spec)
    status = runtime.status(ID)
    check(status.is_running and status.pid is not None, f"it was started again and is {status}")
    outcome = runtime.stop(ID)
    check(outcome is StopOutcome.STOPPED, f"stopping it said {outcome}")
    check(not world.alive(), f"commands still run: {world.alive()}")
    check_usable(world, runtime)


def check_stopped(world: World, runtime: ProcessRuntime) -> None:
    runtime.stop(ID)
    check(not runtime.status(ID).is_running and not world.alive(), "it still runs")
    check_usable(world, runtime)


def run(operation: str, folder: Path, stride: int) -> int:
    (folder / "cache").mkdir()
    first = World(folder, 0)
    first.base.mkdir()
    in_child(lambda: make_snapshot(first, folder / "id"))
    snapshot_id = (folder / "id").read_text()
    if operation == "place-by-renames":
        folders.exchange = lambda *_: False
    for kills, number in enumerate(itertools.count(1, stride or 1)):
        world = World(folder, number)
        world.base.mkdir()
        if operation not in {"create", "place-anew"}:
            make_old(world)
        if operation == "stop":
            world.runtime().start(world.spec)

        def operate(world: World = world, number: int = number) -> None:
            killer = Killer(number, with_events=stride > 0)
            runtime = world.runtime(killer.step)
            if operation.startswith("place"):
                place(world, runtime, snapshot_id, lambda: setattr(killer, "is_armed", True))
                return
            killer.is_armed = True
            if operation in {"create", "start"}:
                getattr(runtime, operation)(world.spec)
            else:
                getattr(runtime, operation)(ID)

        has_ended = in_child(operate)
        checks = {
            "create": check_created,
            "start": check_started,
            "stop": check_stopped,
            "remove": check_removed,
            "place": check_placed,
            "place-by-renames": check_placed,
            "place-anew": check_placed_anew,
        }
        try:
            checks[operation](world, world.runtime())
        except (AssertionError, SnaploaderError) as error:
            raise AssertionError(f"{operation} killed at step {number}: {error}") from error
        if has_ended:
            return kills
    raise AssertionError("unreachable")


if __name__ == "__main__":
    print(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
