"""Several processes at work on one host's workspaces: numbers stay whole, no event is lost, all agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from chaos_worker import MANAGED
from chaos_world import BUSY_S, DATA, Place, fill, opened, pids_of, stop_all

from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.policy import Policy

WORKER = Path(__file__).with_name("chaos_worker.py")


@contextmanager
def started(place: Place, task: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A worker that is ready."""
    command = [sys.executable, str(WORKER), json.dumps(asdict(place)), json.dumps(task)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_all(place: Place, tasks: list[dict[str, Any]]) -> list[Any]:
    """What each worker says that it did; all begin at one time."""
    with ExitStack() as stack:
        processes = [stack.enter_context(started(place, task)) for task in tasks]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate(timeout=BUSY_S)[1]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = []
        for process in processes:
            output, problem = process.communicate(timeout=BUSY_S)
            assert process.returncode == 0, problem
            results.append(json.loads(output))
        return results


def check_versions(place: Place, workspace_id: str, numbers: list[int]) -> None:
    """Each number was given once, in what callers got, in the history and in the events."""
    expected = list(range(1, len(numbers) + 1))
    assert sorted(numbers) == expected
    with opened(place) as world:
        versions = world.manager.list_versions(workspace_id)
        assert [each.number for each in versions] == expected
        assert len({each.runtime_name for each in versions}) == len(expected)
        events = world.manager.events(workspace_id, types=["version_create"], limit=None)
        assert [each.payload["version"] for each in events] == expected
        assert world.manager.workspace(workspace_id).state is WorkspaceState.RUNNING
        assert world.findings() == []


@pytest.mark.slow
def test_400_versions_taken_by_8_processes_have_400_consecutive_numbers(
    tmp_path: Path, catalog_url: str
) -> None:
    place = Place(str(tmp_path), catalog_url, is_fake=True)
    with opened(place) as world:
        world.manager.create("one", volumes=[DATA])
        (world.root("one") / "data/file").write_text("content")
    task = {"kind": "versions", "workspace_id": "one", "threads": 5, "calls": 50}
    taken = run_all(place, [task] * 8)
    assert [len(each) for each in taken] == [50] * 8
    check_versions(place, "one", [number for each in taken for number in each])


@pytest.mark.slow
def test_versions_of_a_real_process_taken_by_4_processes_have_consecutive_numbers(
    tmp_path: Path, catalog_url: str
) -> None:
    place = Place(str(tmp_path), catalog_url)
    try:
        with opened(place) as world:
            world.manager.create("one", command=["sleep", "10000"], volumes=[DATA])
            fill(world.root("one"), "word")
        task = {"kind": "versions", "workspace_id": "one", "threads": 2, "calls": 5}
        taken = run_all(place, [task] * 4)
        check_versions(place, "one", [number for each in taken for number in each])
        with opened(place) as world:
            assert pids_of("one") == [world.runtime.status("one").pid]
    finally:
        stop_all(place)
    assert pids_of("one") == []


@pytest.mark.slow
def test_users_and_a_lifecycle_in_several_processes_leave_all_in_order(
    tmp_path: Path, catalog_url: str
) -> None:
    place = Place(str(tmp_path), catalog_url, is_fake=True)
    ids = ["one", "two", "three"]
    with opened(place) as world:
        with world.catalog.transaction() as tx:
            tx.put_policy(Policy("short", autostop_after=timedelta(hours=1)))
        for workspace_id in ids:
            world.manager.create(workspace_id, volumes=[DATA], policy="short")
            fill(world.root(workspace_id), workspace_id)
            world.manager.create_version(workspace_id)
        before = {workspace_id: Counter(world.events(workspace_id)) for workspace_id in ids}
    tasks: list[dict[str, Any]] = [
        {"kind": "mix", "workspace_ids": ids, "calls": 40, "seed": seed} for seed in range(4)
    ]
    *mixed, (transitions, errors) = run_all(place, [*tasks, {"kind": "lifecycle", "calls": 40}])
    assert errors == []
    assert transitions, "the lifecycle was never in time"
    assert {kind for _, kind in transitions} == {"autostop"}
    with opened(place) as world:
        for workspace_id in ids:
            expected = before[workspace_id]
            for done in mixed:
                expected.update(done[workspace_id])
            expected[MANAGED["stop"]] += sum(stopped == workspace_id for stopped, _ in transitions)
            assert Counter(world.events(workspace_id)) == expected
            numbers = [each.number for each in world.manager.list_versions(workspace_id)]
            assert numbers == list(range(1, len(numbers) + 1))
            workspace = world.manager.workspace(workspace_id)
            is_running = world.runtime.status(workspace_id).is_running
            assert is_running == (workspace.state is WorkspaceState.RUNNING)
            if workspace.state is not WorkspaceState.PAUSED:
                assert (world.root(workspace_id) / "data/file").read_text() == f"data {workspace_id} "
        assert world.findings() == []
        summary = world.manager.recover()
        assert (summary.repaired, summary.problems, summary.busy) == ((), (), ())
