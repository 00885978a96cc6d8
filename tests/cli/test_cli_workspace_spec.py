"""`workspace`: JSON from every command, what is not managed, and what recovery finds under odd names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest
from cli_runner import CommandLine

from snaploader import FileCache, SnapshotKey, SnapshotLoader, VMMetadata
from snaploader.cli.workspace import workspace
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.runtime import ProcessRuntime

REQUIRED = (
    "create ls show snapshot version versions rollback pause resume commit fork rm events recover lifecycle"
)


@pytest.fixture
def state(cli: CommandLine, tmp_path: Path) -> Iterator[Path]:
    """The state directory; what runs in it is stopped at the end."""
    folder = tmp_path / "state/snaploader"
    yield folder
    with closing(ProcessRuntime(folder / "runtime")) as runtime:
        for workspace_id in runtime.workspaces():
            runtime.stop(workspace_id, timeout_s=0)


def commands(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from commands(command)
        else:
            yield command


def test_every_command_there_must_be_is_there_and_all_take_json() -> None:
    assert set(REQUIRED.split()) <= set(workspace.commands)
    for command in commands(workspace):
        options = {name for param in command.params for name in param.opts}
        assert "--json" in options, command.name


@pytest.mark.slow
def test_taking_a_version_and_resuming_print_what_they_did(cli: CommandLine, state: Path) -> None:
    cli.ok("workspace", "create", "web")
    taken = cli.json("workspace", "version", "web")
    assert (taken["workspace_id"], taken["version"], taken["display_name"]) == ("web", 1, "Version 1")
    assert taken["runtime_name"] == f"workspaces/web/{taken['snapshot_name']}"
    [version] = cli.json("workspace", "versions", "web")["versions"]
    assert (version["runtime_name"], version["source"]) == (taken["runtime_name"], "pre_exec")
    assert version["created_at"] == taken["created_at"]
    assert version["id"] > 0
    paused = cli.json("workspace", "pause", "web")
    assert (paused["workspace_id"], paused["version"]) == ("web", None)
    resumed = cli.json("workspace", "resume", "web")
    assert (resumed["id"], resumed["state"], resumed["paused_at"]) == ("web", "running", None)


def test_what_a_workspace_is_made_with_is_shown_and_labels_find_it(cli: CommandLine, state: Path) -> None:
    made = ["--label", "team=web", "--label", "tier=1", "--image", "debian:12", "--device", "/dev/kvm"]
    cli.ok("workspace", "create", "web", "--no-start", *made, "--vcpus", "2", "--memory", "1GiB")
    cli.ok("workspace", "create", "db", "--no-start", "--label", "team=db")
    shown = cli.json("workspace", "show", "web")
    assert (shown["image"], shown["devices"]) == ("debian:12", ["/dev/kvm"])
    assert (shown["labels"], shown["resources"]) == (
        {"team": "web", "tier": "1"},
        {"vcpus": 2, "memory_bytes": 1 << 30},
    )
    told = cli.ok("workspace", "show", "web").text
    for line in ("labels     team=web, tier=1", "image      debian:12", "vcpus      2", "memory     1.0 GiB"):
        assert line in told
    ls = ("workspace", "ls", "--no-sizes")
    found = cli.json(*ls, "--label", "team=web", "--label", "tier=1")["workspaces"]
    assert [each["id"] for each in found] == ["web"]
    assert cli.json(*ls, "--label", "team=web", "--label", "tier=2")["workspaces"] == []
    assert "written as k=v" in cli("workspace", "ls", "--label", "web").stderr
    assert state.is_dir()


def test_a_snapshot_that_the_catalog_does_not_manage_is_shown_as_such(cli: CommandLine, state: Path) -> None:
    cli.ok("workspace", "create", "web", "--no-start")
    taken = cli.json("workspace", "snapshot", "web")
    with Catalog.open(state / "catalog.sqlite") as catalog, catalog.transaction() as transaction:
        transaction.update_workspace("web", current_snapshot="")
        transaction.remove_snapshot(taken["snapshot_name"])
    [shown] = cli.json("workspace", "show", "web")["snapshots"]
    assert (shown["is_managed"], shown["is_local"], shown["version"]) == (False, True, None)
    assert (shown["name"], shown["source"], shown["is_in_runtime"]) == (
        taken["snapshot_name"],
        "manual",
        False,
    )
    told = cli.ok("workspace", "show", "web").text
    assert f"not managed by the catalog: {taken['runtime_name']}  version of 20" in told


def test_what_other_programs_saved_of_a_workspace_does_not_go_with_it(cli: CommandLine, state: Path) -> None:
    cli.ok("workspace", "create", "web", "--no-start")
    cli.ok("workspace", "snapshot", "web")
    with FileCache(state.parents[1] / "xdg-cache/snaploader") as cache, SnapshotLoader(cache, None) as loader:
        loader.cache_snapshot(
            SnapshotKey(),
            files={"file": state / "state-id"},
            vm_metadata=VMMetadata(vm_id="web", snapshot_id="nightly"),
            snapshot_id="nightly",
            remote=False,
        )
    names = [each["runtime_name"] for each in cli.json("workspace", "show", "web")["snapshots"]]
    assert names[1:] == ["nightly"]
    [going] = cli.json("workspace", "rm", "--dry-run", "web")["would_delete"]
    assert [each["runtime_name"] for each in going["snapshots"]] == names[:1]
    assert "1 snapshots" in cli.ok("workspace", "rm", "--dry-run", "web").text


def test_a_workspace_that_runs_is_adopted_by_a_new_catalog(cli: CommandLine, state: Path) -> None:
    cli.ok("workspace", "create", "web", "--volume", "data=/data", "--", "sleep", "1000")
    cli.ok("workspace", "snapshot", "web", "--name", "first")
    pid = cli.json("workspace", "show", "web")["pid"]
    for path in state.glob("catalog.sqlite*"):
        path.unlink()
    lost = cli("doctor")
    assert lost.exit_code == 13
    assert "holds workspaces: web" in lost.text
    assert cli.json("workspace", "ls")["workspaces"] == []
    unknown = cli("doctor")
    assert unknown.exit_code == 13
    assert "`snaploader workspace adopt` takes in a workspace" in " ".join(unknown.text.split())
    options = ("--volume", "data=/data", "--label", "team=web")
    told = cli.ok("workspace", "adopt", "web", *options, "--", "sleep", "1000").text
    assert told == "adopted web, which is running, and 1 snapshots of it\n"
    shown = cli.json("workspace", "show", "web")
    assert (shown["pid"], shown["state"], shown["command"]) == (pid, "running", ["sleep", "1000"])
    assert (shown["labels"], shown["last_version"]) == ({"team": "web"}, 1)
    assert [each["display_name"] for each in shown["snapshots"]] == ["first"]
    assert cli("workspace", "adopt", "web").exit_code == 4
    assert cli("workspace", "adopt", "nothing").exit_code == 3
    cli.ok("doctor")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_recovery_tells_of_a_folder_whose_name_is_no_text(
    cli: CommandLine, state: Path, options: list[str]
) -> None:
    cli.ok("workspace", "recover")
    (state / "paused").mkdir(exist_ok=True)
    os.mkdir(os.fsencode(state / "paused") + b"/\xff")
    outcome = cli.ok("workspace", "recover", *options)
    if options:
        unknown: list[dict[str, Any]] = json.loads(outcome.stdout)["unknown"]
        assert "is no record of a paused workspace" in unknown[0]["reason"]
    else:
        assert outcome.text.startswith("left ")
