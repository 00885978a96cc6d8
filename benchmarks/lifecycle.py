"""One look of the lifecycle at 10,000 workspaces of which 1 % are due, on SQLite and PostgreSQL.

    python -m benchmarks.lifecycle [--workspaces 10000] [--due 100]

The manager is the real one; its runtime stops nothing, so that the lifecycle, the locks and the catalog are
measured. Each figure stands beside its baselines, of the same run: a look at as many workspaces as
are due and no others, and reading and deciding for each workspace in turn. Exits with 1 when workspaces that
are not due cost more than one query on an index.

PostgreSQL is measured when its programs are installed; the server is that of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

from sqlalchemy import event, text

import snaploader
from benchmarks.floors import Cost, timed
from snaploader import FileCache, SnapshotLoader
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.lifecycle import LifecycleExecutor
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import RunStatus, RunTransition, Workspace, WorkspaceSpec, WorkspaceState
from snaploader.workspace.policy import Policy, Situation, Transition
from snaploader.workspace.testing import FakeRuntime

HOST = "benchmark"
NOW = datetime(2026, 5, 11, 12, 0, tzinfo=UTC)
BEFORE = NOW - timedelta(hours=2)
"""When nothing was due yet."""
BATCH = 1000
REPEATS = 3
TRANSITIONS = (Transition.DORMANCY, Transition.AUTOSTOP)


class Host:
    """The lifecycle on a catalog of so many workspaces, the first `due` of which can be made due."""

    def __init__(self, url: str, folder: Path, count: int, due: int) -> None:
        self.due = due
        with contextlib.ExitStack() as stack:
            self.catalog = stack.enter_context(Catalog.open(url))
            cache = stack.enter_context(FileCache(folder / "cache"))
            loader = stack.enter_context(SnapshotLoader(cache))
            runtime = FakeRuntime(folder / "runtime")
            stack.callback(runtime.close)
            manager = WorkspaceManager(
                self.catalog, loader, cache, runtime, folder / "state", host=HOST, clock=lambda: NOW
            )
            self.executor = stack.enter_context(LifecycleExecutor(stack.enter_context(manager)))
            self._populate(count)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _populate(self, count: int) -> None:
        """Stopped workspaces that were just used."""
        with self.catalog.transaction() as changes:
            changes.put_policy(Policy(time_until_dormant=timedelta(hours=1)))
        for first in range(0, count, BATCH):
            with self.catalog.transaction() as changes:
                for number in range(first, min(first + BATCH, count)):
                    workspace = Workspace(
                        WorkspaceSpec(f"ws-{number}"),
                        HOST,
                        WorkspaceState.STOPPED,
                        created_at=BEFORE,
                        last_used_at=NOW,
                        owner=f"owner-{number % 100}",
                        base=f"base-{number % 10}",
                    )
                    changes.add_workspace(workspace)
                    run = changes.add_run(workspace.id, RunTransition.STOP, BEFORE, "user")
                    changes.finish_run(run.id, RunStatus.SUCCEEDED, BEFORE)
        if self.catalog.dialect == "postgresql":
            with self.catalog._engine.connect() as connection:
                connection.execute(
                    text("ANALYZE")
                )  # as its autovacuum does, which is off on the tests' server

    def make_due(self, transition: Transition) -> None:
        """Let the transition be due for the first ones at NOW."""
        is_running = transition is Transition.AUTOSTOP
        with self.catalog.transaction() as changes:
            for number in range(self.due):
                changes.update_workspace(
                    f"ws-{number}",
                    state=WorkspaceState.RUNNING if is_running else WorkspaceState.STOPPED,
                    last_used_at=NOW if is_running else BEFORE,
                    dormant_at=None,
                )
                if is_running:
                    run = changes.add_run(f"ws-{number}", RunTransition.START, BEFORE, "user", NOW)
                    changes.finish_run(run.id, RunStatus.SUCCEEDED, BEFORE)

    def look(self, transition: Transition) -> Cost:
        """The least of several looks at those that are due."""
        costs = []
        for _ in range(REPEATS):
            self.make_due(transition)
            cost, stats = timed(partial(self.executor.run_once, NOW))
            costs.append(cost)
            if list(stats.transitions.values()) != [transition] * self.due:
                raise RuntimeError(f"{transition} was due for {self.due} workspaces: {stats}")
        return min(costs)

    def look_for_nothing(self) -> Cost:
        """The least of several looks when nothing is due."""
        return min(timed(partial(self.executor.run_once, BEFORE))[0] for _ in range(REPEATS))

    def decide_for_each(self, count: int) -> None:
        """What a lifecycle without the index would do to know what is due, for `count` workspaces."""
        with self.catalog.reading() as reader:
            for workspace in reader.workspaces(host=HOST, limit=count):
                Situation.read(reader, workspace.id).decide(NOW)

    def plan(self) -> str:
        """How the database finds what is due."""
        with Statements(self.catalog) as statements, self.catalog.reading() as reader:
            reader.due(NOW, host=HOST)
        ((statement, parameters),) = statements.seen
        explain = "EXPLAIN QUERY PLAN " if self.catalog.dialect == "sqlite" else "EXPLAIN "
        with self.catalog._engine.connect() as connection:
            rows = connection.exec_driver_sql(explain + statement, parameters).all()
        return "; ".join(str(row[-1]).strip() for row in rows)


class Statements:
    """Keeps what is sent to a catalog's database, but for the bounds of transactions."""

    def __init__(self, catalog: Catalog) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._engine = catalog._engine

    def __enter__(self) -> Self:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, *arguments: Any) -> None:
        _connection, _cursor, statement, parameters, *_ = arguments
        if not statement.startswith("BEGIN"):
            self.seen.append((statement, parameters))


def measure(database: str, urls: list[str], folder: Path, count: int, due: int) -> dict[str, Any]:
    """Figures of one kind of database; `urls` are of two, for all workspaces and for the due ones alone."""
    with (
        Host(urls[0], folder / "all", count, due) as all_of_them,
        Host(urls[1], folder / "due", due, due) as few,
    ):
        nothing, nothing_of_few = all_of_them.look_for_nothing(), few.look_for_nothing()
        with Statements(all_of_them.catalog) as statements:
            all_of_them.executor.run_once(BEFORE)
        transitions = {}
        for transition in TRANSITIONS:
            cost, baseline = all_of_them.look(transition), few.look(transition)
            transitions[transition.value] = {
                "ms_per_due": _ms(cost.wall_s / due),
                "cpu_ms_per_due": _ms(cost.cpu_s / due),
                "ms_per_due_alone": _ms(baseline.wall_s / due),
                "ratio": round(cost.wall_s / baseline.wall_s, 2),
                "cpu_ratio": round(cost.cpu_s / baseline.cpu_s, 2),
            }
        each = timed(partial(all_of_them.decide_for_each, count // 10))[0].scaled(10)
        return {
            "database": database,
            "workspaces": count,
            "due": due,
            "transitions": transitions,
            "nothing_due_ms": _ms(nothing.wall_s),
            "nothing_due_of_few_ms": _ms(nothing_of_few.wall_s),
            "deciding_for_each_ms": _ms(each.wall_s),
            "nothing_due_to_deciding_for_each": round(nothing.wall_s / each.wall_s, 6),
            "statements_when_nothing_is_due": len(statements.seen),
            "plan": all_of_them.plan(),
        }


def is_indexed(row: dict[str, Any]) -> bool:
    """Whether those that are not due cost one query on the index."""
    plan = row["plan"]
    return row["statements_when_nothing_is_due"] == 1 and "INDEX" in plan.upper() and "due_at" in plan


@contextlib.contextmanager
def postgresql() -> Iterator[Any]:
    """The tests' server; None when PostgreSQL is not installed."""
    path = Path(__file__).parent.parent / "tests" / "workspace" / "database.py"
    spec = importlib.util.spec_from_file_location("database", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.PostgreSQLServer.missing():
        yield None
        return
    server = module.PostgreSQLServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workspaces", type=int, default=10_000)
    parser.add_argument("--due", type=int, default=100)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lifecycle.json"))
    arguments = parser.parse_args()
    sizes = (arguments.workspaces, arguments.due)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch, postgresql() as server:
        folder = Path(scratch)
        urls = [f"sqlite:///{folder}/{name}.db" for name in ("all", "due")]
        rows.append(measure("SQLite", urls, folder / "sqlite", *sizes))
        if server is not None:
            urls = [server.url(server.create_database()) for _ in range(2)]
            rows.append(measure("PostgreSQL", urls, folder / "postgresql", *sizes))
    for row in rows:
        print(json.dumps(row, indent=1))
    machine = {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "snaploader": snaploader.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine, "figures": rows}, indent=1) + "\n")
    return 0 if all(is_indexed(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
