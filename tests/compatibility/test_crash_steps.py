"""The steps that operations name, where kill tests end a process, are the same ones in the same order.

    python test_crash_steps.py write            writes `crash_steps.json` anew
    python test_crash_steps.py SUITE FOLDER     prints the steps of one suite's operations, as JSON

A kill test that ends a process at every named step proves less when a step is gone: then this fails. A step
that is new is added to the file; one is taken away only with what it stood for. The operations are those of
the kill tests' own drivers, done here without a kill. The kill test of the file cache sees its steps itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GOLDEN = HERE / "crash_steps.json"
TIMEOUT_S = 600
ANY_ORDER = {
    "delete": "snapshots go in the order of their names, which are random",
    "delete-paused": "as delete",
    "delete-committed": "as delete",
    "remote-load": "another thread prefetches",
}
"""Operations whose steps are sorted, as their order differs from run to run, and why it does."""

Steps = dict[str, list[str]]


class Recorder:
    """Stands in for a driver's `Killer`, and writes down the steps between `arm(1)` and `arm(0)`."""

    def __init__(self, *, is_armed: bool = False) -> None:
        self.names: list[str] = []
        self.is_armed = is_armed

    def step(self, name: str) -> None:
        if self.is_armed:
            self.names.append(name)

    def arm(self, at: int) -> None:
        self.is_armed = at > 0


def loader_steps(base: Path) -> Steps:
    import crash_driver as driver

    from snaploader.testing import EmbeddedServer

    found: Steps = {}
    for operation in ("save", "unpack", "evict", "derive", "remote-save", "remote-load", "remote-derive"):
        recorder = Recorder(is_armed=True)
        with EmbeddedServer() as server:
            url = server.url if operation.startswith("remote") else ""
            if operation == "remote-load":
                driver.prepare("remote-save", base / "other-host", url)
            driver.prepare(operation, base / operation, url)
            driver.operate(operation, base / operation, url, recorder)
        found[operation] = recorder.names
    return found


def runtime_steps(base: Path) -> Steps:
    import runtime_crash_driver as driver

    (base / "cache").mkdir()
    source = driver.World(base, 0)
    source.base.mkdir()
    driver.make_snapshot(source, base / "id")
    snapshot_id = (base / "id").read_text()
    exchange = driver.folders.exchange
    found: Steps = {}
    operations = ("create", "remove", "start", "stop", "place", "place-by-renames", "place-anew")
    for number, operation in enumerate(operations, 1):
        world, recorder = driver.World(base, number), Recorder()
        world.base.mkdir()
        if operation not in {"create", "place-anew"}:
            driver.make_old(world)
        if operation == "stop":
            world.runtime().start(world.spec)
        driver.folders.exchange = (lambda *_: False) if operation == "place-by-renames" else exchange
        runtime = world.runtime(recorder.step)
        recorder.arm(1)
        if operation.startswith("place"):
            driver.place(world, runtime, snapshot_id, lambda: None)
        elif operation in {"create", "start"}:
            getattr(runtime, operation)(world.spec)
        else:
            getattr(runtime, operation)(driver.ID)
        recorder.arm(0)
        runtime.stop(driver.ID) if operation != "remove" else None
        found[operation] = recorder.names
    return found


def manager_steps(base: Path) -> Steps:
    import ws_crash_driver as driver

    found: Steps = {}
    for operation in (*driver.OPERATIONS, *driver.DATA_SCOPE):
        recorder = Recorder()
        folder = base / operation
        folder.mkdir()
        prepare, operate = driver.OPERATIONS[driver.DATA_SCOPE.get(operation, operation)]
        with driver.host(folder, f"sqlite:///{folder}/catalog.db", recorder) as one:
            if operation in driver.DATA_SCOPE:
                with one.catalog.transaction() as tx:
                    tx.put_policy(driver.Policy(scopes=driver.ScopePolicy(driver.Scope.DATA)))
            prepare(one, "one")
            recorder.arm(1)
            operate(one, "one")
            recorder.arm(0)
        found[operation] = recorder.names
    return found


def chaos_steps(base: Path) -> Steps:
    import chaos_kills as driver

    from snaploader.testing import EmbeddedServer

    found: Steps = {}
    for name, operation in driver.OPERATIONS.items():
        recorder, folder = Recorder(), base / name
        folder.mkdir()
        with EmbeddedServer() as server:
            remote = server.url if operation.is_remote else ""
            place = driver.Place(str(folder), f"sqlite:///{folder}/catalog.db", remote)
            try:
                with driver.opened(place, recorder.step) as world:
                    driver.prepare_host(world)
                    driver.prepare(world, operation, f"{name}-000001")
                    recorder.arm(1)
                    operation.act(world, f"{name}-000001")
                    recorder.arm(0)
            finally:
                driver.stop_all(place)
        found[name] = recorder.names
    return found


SUITES: dict[str, tuple[Callable[[Path], Steps], tuple[str, ...]]] = {
    "loader": (loader_steps, ("loader",)),
    "runtime": (runtime_steps, ("workspace/runtime",)),
    "manager": (manager_steps, ("workspace/manager",)),
    "chaos": (chaos_steps, ("workspace/chaos",)),
}
"""How the steps of a suite are found, and the folders below `tests` that its driver is in."""


def steps_now(suite: str, folder: Path) -> Steps:
    """The steps of the operations of a suite, found in a process of their own."""
    command = [sys.executable, __file__, suite, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: Steps = json.loads(done.stdout)
    return {name: sorted(steps) if name in ANY_ORDER else steps for name, steps in found.items()}


SLOW = ("chaos", "manager")


@pytest.mark.parametrize(
    "suite", [pytest.param(suite, marks=[pytest.mark.slow] * (suite in SLOW)) for suite in SUITES]
)
def test_operations_pass_exactly_the_steps_that_kill_tests_know(suite: str, tmp_path: Path) -> None:
    assert steps_now(suite, tmp_path) == json.loads(GOLDEN.read_text())[suite]


def write_golden() -> None:
    """Write down what the steps are now; those of the file cache are left as they are."""
    golden: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        golden = json.loads(GOLDEN.read_text())
    for suite in SUITES:
        with tempfile.TemporaryDirectory() as folder:
            golden[suite] = steps_now(suite, Path(folder))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def main() -> None:
    if sys.argv[1] == "write":
        write_golden()
        return
    find, folders = SUITES[sys.argv[1]]
    sys.path[:0] = [str(HERE.parent / folder) for folder in folders]
    print(json.dumps(find(Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
