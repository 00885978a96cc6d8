"""One of several processes that manage one host's workspaces together.

    python chaos_worker.py PLACE TASK

PLACE and TASK are JSON: the fields of a `Place`, and `{"kind": ..., ...}`, see `TASKS`. The process says
"ready", waits for a line on its standard input, works, and prints what it did as one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from chaos_world import Place, World, opened

from snaploader.errors import FailedPrecondition
from snaploader.workspace.lifecycle import LifecycleExecutor

MANAGED = {
    "create_snapshot": "snapshot_create",
    "create_version": "version_create",
    "rollback": "version_rollback",
    "pause": "workspace_pause",
    "resume": "workspace_resume",
    "stop": "workspace_stop",
    "start": "workspace_start",
}
"""Operations, and the events they leave."""


def take_versions(world: World, workspace_id: str, threads: int, calls: int) -> list[int | None]:
    """The numbers that this process got."""

    def one(_: int) -> int | None:
        return world.manager.create_version(workspace_id).version

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(calls)))


def mix(world: World, workspace_ids: list[str], calls: int, seed: int) -> dict[str, dict[str, int]]:
    """How often each workspace got each event from this process; what its state refused is left out."""
    chance, done = random.Random(seed), {each: Counter[str]() for each in workspace_ids}
    for _ in range(calls):
        workspace_id, name = chance.choice(workspace_ids), chance.choice(list(MANAGED))
        arguments: list[Any] = [workspace_id]
        if name == "rollback":
            arguments.append(
                chance.choice([each.number for each in world.manager.list_versions(workspace_id)])
            )
        try:
            getattr(world.manager, name)(*arguments)
        except FailedPrecondition:
            continue
        done[workspace_id][MANAGED[name]] += 1
    return {each: dict(counts) for each, counts in done.items()}


def run_lifecycle(world: World, calls: int) -> list[list[list[str]]]:
    """Transitions that were made, and errors, by ticks that are far in the future: all deadlines passed."""
    transitions, errors = [], []
    with LifecycleExecutor(world.manager) as executor:
        for _ in range(calls):
            stats = executor.run_once(datetime.now(UTC) + timedelta(days=1))
            transitions += [[workspace_id, kind.value] for workspace_id, kind in stats.transitions.items()]
            errors += [[workspace_id, error] for workspace_id, error in stats.errors.items()]
    return [transitions, errors]


TASKS: dict[str, Callable[..., Any]] = {
    "versions": take_versions,
    "mix": mix,
    "lifecycle": run_lifecycle,
}


def main() -> None:
    place, task = Place(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
    with opened(place, workers=task.pop("workers", 4)) as world:
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(TASKS[task.pop("kind")](world, **task)), flush=True)


if __name__ == "__main__":
    main()
