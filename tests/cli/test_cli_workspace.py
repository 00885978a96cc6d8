"""`workspace` on real processes and folders: a workspace's life, what is printed of it, what is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_runner import CommandLine, Outcome

from snaploader.testing import EmbeddedServer, Fault, FaultScript
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime

ON_ONE_WORKSPACE = [
    "show",
    "snapshot",
    "version",
    "versions",
    "rollback",
    "pause",
    "resume",
    "start",
    "stop",
    "log",
]
SLEEP = ["--", "sleep", "1000"]


class Shell:
    """`snaploader workspace`."""

    def __init__(self, cli: CommandLine, folder: Path) -> None:
        self.cli = cli
        self.folder = folder
        self.runtime_directory = folder / "state/snaploader/runtime"

    def __call__(self, *arguments: object) -> Outcome:
        return self.cli("workspace", *arguments)

    def ok(self, *arguments: object) -> str:
        return self.cli.ok("workspace", *arguments).text

    def json(self, command: str, *arguments: object) -> Any:
        """What a command prints with --json, which may not follow what a workspace is to run."""
        return self.cli.ok("workspace", command, "--json", *arguments).json

    def on_host(self, name: str) -> tuple[str, ...]:
        """Options of a command on another host with the same catalog."""
        catalog = self.folder / "state/snaploader/catalog.sqlite"
        return ("--host-name", name, "--state-dir", f"{self.folder}/{name}", "--catalog", str(catalog))

    def root(self, workspace_id: str) -> Path:
        """What the command of a workspace sees."""
        return self.runtime_directory / "workspaces" / workspace_id / "root"

    def stop_all(self) -> None:
        with closing(ProcessRuntime(self.runtime_directory)) as runtime:
            for workspace_id in runtime.workspaces():
                runtime.stop(workspace_id, timeout_s=0)


@pytest.fixture
def shell(cli: CommandLine, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(cli, tmp_path)
    yield shell
    shell.stop_all()


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Nothing but the mode that is asked for keeps others out."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_nothing_in_the_state_directory_can_be_read_by_others(shell: Shell) -> None:
    state = shell.folder / "state/snaploader"
    for workspace_id in ("parked", "runs"):
        shell.ok("create", workspace_id, "--env", "TOKEN=secret", "--ready-command", "true", *SLEEP)
    shell.ok("version", "runs")
    shell.ok("pause", "parked")
    open_to_others = {
        str(path.relative_to(state))
        for path in (state, *state.rglob("*"))
        if path.lstat().st_mode & 0o077 and not path.is_symlink() and "root" not in path.parts
    }
    assert open_to_others == set()
    assert (state / "paused/parked/record.json").is_file()
    assert (state / "runtime/workspaces/runs/state/run.json").is_file()
    assert list((state / "slots").iterdir())
    assert (state / "state-id").is_file()


def test_folders_that_an_earlier_release_left_open_are_closed(shell: Shell) -> None:
    state = shell.folder / "state/snaploader"
    (state / "paused").mkdir(parents=True)
    for path in (state, state / "paused"):
        path.chmod(0o755)
    shell.ok("create", "web", "--no-start")
    assert (state / "paused").stat().st_mode & 0o777 == 0o700
    assert state.stat().st_mode & 0o777 == 0o755  # as the operator has made it


@pytest.mark.slow
def test_a_workspace_lives_its_life(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template/greeting").write_text("hello\n")
    command = ["--", "sh", "-c", "cat greeting; echo $WHO; exec sleep 1000"]
    printed = shell.ok(
        "create",
        "web",
        "--from",
        tmp_path / "template",
        "--volume",
        "data=/var/data",
        "--env",
        "WHO=it",
        *command,
    )
    assert printed == "web\n"
    root = shell.root("web")
    (root / "var/data/file").write_text("first")
    assert shell.json("snapshot", "web", "--name", "before it broke")["version"] == 1
    (root / "var/data/file").write_text("second")
    assert shell.ok("version", "web").startswith("version 2 of web: Full, ")
    rolled_back = shell.json("rollback", "web", 1)
    assert (rolled_back["state"], rolled_back["version"]) == ("running", 1)
    assert (root / "var/data/file").read_text() == "first"
    assert shell.json("pause", "web")["scope"] == "Full"
    assert not root.exists()
    assert shell.json("show", "web")["pid"] is None
    assert shell.ok("resume", "web") == "resumed web\n"
    assert (root / "var/data/file").read_text() == "first"
    assert shell.json("stop", "web")["state"] == "stopped"
    assert shell.json("start", "web")["state"] == "running"
    assert shell.json("show", "web")["pid"] > 0
    assert "hello\nit\n" in shell.ok("log", "web")
    assert shell.json("log", "web", "--max-size", 3) == {"log": "it\n"}
    listed = shell.json("versions", "web")["versions"]
    assert [(each["number"], each["display_name"], each["source"]) for each in listed] == [
        (1, "before it broke", "manual"),
        (2, "Version 2", "pre_exec"),
    ]
    assert "before it broke" in shell.ok("versions", "web")
    (dry,) = shell.json("rm", "--dry-run", "web")["would_delete"]
    assert dry["id"] == "web"
    assert len(dry["snapshots"]) == len(shell.json("show", "web")["snapshots"]) > 0
    assert "would delete web" in shell.ok("rm", "--dry-run", "web")
    assert shell.json("rm", "web") == {"deleted": ["web"]}
    assert not root.exists()
    assert [event["type"] for event in shell.json("events", "web")["events"]] == [
        "workspace_create",
        "snapshot_create",
        "version_create",
        "version_rollback",
        "workspace_pause",
        "workspace_resume",
        "workspace_stop",
        "workspace_start",
        "workspace_delete",
    ]
    assert shell.cli("doctor").exit_code == 0


@pytest.mark.slow
def test_forks_share_what_they_began_with(
    shell: Shell, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPLOADER_REMOTE_CACHE", server.url)
    (tmp_path / "template").mkdir()
    (tmp_path / "template/big").write_bytes(bytes(range(256)) * 400)
    shell.ok("create", "base", "--from", tmp_path / "template", "--owner", "alice", "--no-start", *SLEEP)
    committed = shell.json("commit", "base", "--name", "golden")
    assert committed["uploaded_bytes"] > 100_000
    assert "committed base." in shell.ok("commit", "base")
    shell.ok("fork", "base", "one", "--no-start")
    forked = shell.json(
        "fork", committed["snapshot_name"], "two", "--owner", "bob", "--env", "A=b", "--no-start"
    )
    assert (forked["owner"], forked["environment"], forked["command"]) == (
        "bob",
        {"A": "b"},
        ["sleep", "1000"],
    )
    assert (shell.root("two") / "big").read_bytes() == (tmp_path / "template/big").read_bytes()
    listed = shell.json("ls")
    assert {each["id"]: each["owner"] for each in listed["workspaces"]} == {
        "base": "alice",
        "one": "alice",
        "two": "bob",
    }
    for each in listed["workspaces"]:
        assert each["size"]["shared_bytes"] > 102_400 > each["size"]["exclusive_bytes"]
    assert 102_400 < listed["stored_bytes"] < 2 * 102_400
    tree = shell.ok("show", "base")
    assert 'commit "golden"  Full' in tree
    assert committed["snapshot_name"] in tree
    assert "fork two" in tree
    shell.ok("rm", "base", "one")
    assert shell.json("show", "two")["size"]["exclusive_bytes"] > 102_400


@pytest.mark.slow
def test_what_a_failed_commit_left_is_listed_until_the_next_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPLOADER_REMOTE_RETRIES", "0")
    faults = FaultScript(Fault("UpdateActionResult", status="UNAVAILABLE", times=1))
    with EmbeddedServer(faults=faults) as server:
        monkeypatch.setenv("SNAPLOADER_REMOTE_CACHE", server.url)
        shell.ok("create", "web", "--no-start")
        (shell.root("web") / "file").write_bytes(b"content")
        assert shell.json("orphans") == {"orphans": []}
        assert shell("commit", "web").exit_code == 6
        [left] = shell.json("orphans")["orphans"]
        assert left["workspace_id"] == "web"
        assert left["snapshot_name"].startswith("web.")
        assert left["blobs"] > 0
        assert left["size_bytes"] >= len(b"content")
        header, row = shell.ok("orphans", "web").splitlines()
        assert header.split() == ["workspace", "snapshot", "blobs", "size"]
        assert row.split()[:3] == ["web", left["snapshot_name"], str(left["blobs"])]
        shell.ok("commit", "web")
        assert shell.json("orphans", "web") == {"orphans": []}
        assert shell("orphans", "nobody").exit_code == 3


@pytest.mark.slow
def test_lists_are_chosen_from_by_state_owner_and_host(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(*arguments: str) -> list[str]:
        return [each["id"] for each in shell.json("ls", *arguments)["workspaces"]]

    shell.ok("create", "a", "--owner", "alice", "--no-start")
    shell.ok("create", "b")
    shell.ok("create", "c", *shell.on_host("elsewhere"))
    shell.ok("create", "d")
    shell.ok("rm", "d")
    assert ids() == ["a", "b"]
    assert ids("--all-hosts") == ["a", "b", "c"]
    assert ids("--deleted") == ["a", "b", "d"]
    assert ids("--state", "deleted") == ["d"]
    assert ids("--state", "running") == ["b"]
    assert ids("--owner", "alice") == ["a"]
    assert ids("--owner", "") == ["b"]
    lines = shell.ok("ls").splitlines()
    assert lines[0].split() == ["workspace", "state", "version", "exclusive", "shared", "used"]
    assert [line.split()[:2] for line in lines[1:]] == [["a", "stopped"], ["b", "running"]]
    header, *_, last = shell.ok("ls", "--all-hosts", "--no-sizes").splitlines()
    assert header.split() == ["workspace", "host", "state", "version", "used"]
    assert last.split()[:3] == ["c", "elsewhere", "running"]
    everywhere = shell.json("ls", "--all-hosts")["workspaces"]
    assert [each["size"] is None for each in everywhere] == [False, False, True]
    assert shell.json("ls", "--no-sizes")["stored_bytes"] is None
    assert shell.ok("ls", "--tree").splitlines() == ["a", "└── now: stopped", "b", "└── now: running"]
    deleted = shell.ok("show", "d")
    assert deleted.splitlines()[-1] == "d"
    assert "now:" not in deleted


def test_what_stands_after_two_dashes_is_the_workspaces(shell: Shell) -> None:
    made = shell.json("create", "--no-start", "--", "tool", "--json", "--no-start", "--", "-x")
    assert made["command"] == ["tool", "--json", "--no-start", "--", "-x"]
    assert made["id"].startswith("ws-")
    assert made["state"] == "stopped"


def test_all_that_a_workspace_is_made_of_can_be_said(shell: Shell) -> None:
    shell.ok("policy", "set", "agents")
    made = shell.json(
        "create",
        "web",
        *("--volume", "a=/x", "--volume", "b=/y/", "--env", "A=1", "--env", "B=c=d"),
        *("--ready-tcp", "127.0.0.1:1", "--ready-interval", "2s", "--ready-timeout", "3m"),
        *("--owner", "alice", "--base", "debian", "--policy", "agents", "--no-start"),
        *("--schedule", "CRON_TZ=Europe/Berlin 30 9 * * 1-5"),
    )
    assert made["volumes"] == [{"name": "a", "durable_dir": "/x"}, {"name": "b", "durable_dir": "/y"}]
    assert made["environment"] == {"A": "1", "B": "c=d"}
    assert made["readiness"] == {
        "kind": "tcp",
        "target": "127.0.0.1:1",
        "interval_s": 2.0,
        "timeout_s": 180.0,
    }
    assert (made["owner"], made["base"], made["policy"]) == ("alice", "debian", "agents")
    assert made["autostart_schedule"] == "CRON_TZ=Europe/Berlin 30 9 * * 1-5"
    shown = shell.ok("show", "web")
    for word in ("alice", "debian", "agents", "a=/x, b=/y", "tcp 127.0.0.1:1", "30 9 * * 1-5"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["Web"], 2, "no workspace id"),
        (["web", "--volume", "a=x"], 2, "not absolute"),
        (["web", "--volume", "a=/x/../y"], 2, "component '..'"),
        (["web", "--volume", "a=/x", "--volume", "b=/x/y"], 2, "may not overlap"),
        (["web", "--volume", "/x"], 2, "k=v"),
        (
            ["web", "--ready-tcp", "h:1", "--ready-http", "http://h"],
            2,
            "--ready-tcp and --ready-http exclude",
        ),
        (["web", "--ready-command", ""], 2, "needs a target"),
        (["web", "--ready-tcp", "foo"], 2, "'foo' is no address"),
        (["web", "--ready-http", "localhost:80"], 2, "'localhost:80' is no URL"),
        (["web", "--ready-timeout", "0"], 2, "above 0 s"),
        (["web", "--from", "/nowhere"], 2, "--from: there is no folder '/nowhere'"),
        (["web", "--schedule", "noon"], 2, "is no schedule"),
        (["web", "--policy", "nothing"], 3, "'nothing'"),
        (["web", "--", "/nowhere"], 4, "/nowhere"),
        (["web", "sleep", "1"], 2, "unexpected extra argument"),
    ],
)
def test_a_workspace_that_cannot_be_is_refused_and_nothing_is_left(
    shell: Shell, arguments: list[str], code: int, message: str
) -> None:
    outcome = shell("create", *arguments)
    assert outcome.exit_code == code
    assert message in outcome.stderr
    assert outcome.stdout == b""
    assert shell.json("ls", "--deleted")["workspaces"] == []
    assert not shell.root("web").exists()


@pytest.mark.parametrize("command", [*ON_ONE_WORKSPACE, "fork", "rm", "events", "set"])
def test_a_workspace_that_never_was_is_not_found(shell: Shell, command: str) -> None:
    more = {"rollback": ["1"], "set": ["--owner", "alice"]}.get(command, [])
    outcome = shell(command, "nobody", *more, "--json")
    error = json.loads(outcome.stderr)
    assert (outcome.exit_code, error["error"]) == (3, "NotFound")
    assert "'nobody'" in error["message"]


@pytest.mark.slow
def test_what_is_not_possible_now_says_why(shell: Shell) -> None:
    shell.ok("create", "web")
    refused = {
        ("create", "web"): (4, "used before"),
        ("start", "web"): (4, "it is running"),
        ("resume", "web"): (4, "it is running"),
        ("commit", "web"): (4, "remote cache"),
        ("fork", "web"): (3, "no commit"),
        ("rollback", "web", "0"): (2, "0 is no version"),
        ("rollback", "web", str(1 << 31)): (2, "is no version"),
        ("rollback", "web", "1"): (3, "no version 1"),
        ("rollback", "web", "one"): (2, "'one'"),
        ("stop", "web", *shell.on_host("elsewhere")): (4, "lives on host"),
        ("snapshot", "web", "--source", "x" * 201): (2, "no source of a snapshot"),
        ("lifecycle", "--tick", "2026-01-01"): (2, "--once"),
        ("lifecycle", "--once", "--tick", "noon"): (2, "'noon'"),
        ("lifecycle", "--interval", "0"): (2, "--interval"),
        ("lifecycle", "--metrics-listen", "nowhere"): (2, "--metrics-listen"),
        ("lifecycle", "--once", "--metrics-listen", "nowhere"): (2, "HOST:PORT"),
        ("lifecycle", "--once", "--metrics-listen", "127.0.0.1:0"): (2, "--once"),
        (): (2, "Usage: "),
        ("policy",): (2, "Usage: "),
        ("ls", "--catalog", "mysql://host/name"): (2, "mysql"),
        ("ls", "--catalog", "/nowhere/catalog.db"): (3, "/nowhere"),
    }
    for arguments, (code, message) in refused.items():
        outcome = shell(*arguments)
        assert (outcome.exit_code, arguments) == (code, arguments)
        assert message in outcome.stderr
    shell.ok("pause", "web")
    for command in ("pause", "stop", "snapshot", "version"):
        outcome = shell(command, "web")
        assert outcome.exit_code == 4
        assert "it is paused: resume it first" in outcome.stderr
    assert [event["type"] for event in shell.json("events")["events"]] == [
        "workspace_create",
        "workspace_pause",
    ]


@pytest.mark.slow
def test_a_workspace_that_does_not_become_ready_stays_paused(shell: Shell) -> None:
    shell.ok("policy", "set", "default", "onPause=Data")
    shell.ok("create", "web", "--volume", "data=/data", "--no-start", "--ready-command", "false", *SLEEP)
    assert shell.json("pause", "web")["scope"] == "Data"
    outcome = shell("resume", "web", "--ready-timeout", "0.2s")
    assert outcome.exit_code == 7
    assert shell.json("show", "web")["state"] == "paused"


def test_where_workspaces_are_can_be_said_in_four_places(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_made(*arguments: object) -> set[str]:
        """Which of the folders have a catalog after that."""
        assert shell.cli(*arguments).exit_code == 0
        made = {path.parent.name for path in tmp_path.glob("place-*/*.sqlite")}
        for path in tmp_path.glob("place-*/*.sqlite"):
            path.unlink()
        return made

    policy_ls = ("workspace", "policy", "ls")
    assert is_made(*policy_ls, "--state-dir", tmp_path / "place-after") == {"place-after"}
    assert is_made("workspace", "--state-dir", tmp_path / "place-before", "policy", "ls") == {"place-before"}
    (tmp_path / "config/snaploader").mkdir(parents=True)
    config = tmp_path / "config/snaploader/config.toml"
    config.write_text(f'state-dir = "{tmp_path}/place-top"\n')
    assert is_made(*policy_ls) == {"place-top"}
    config.write_text(f'[workspace]\nstate-dir = "{tmp_path}/place-table"\n')
    assert is_made(*policy_ls) == {"place-table"}
    monkeypatch.setenv("SNAPLOADER_STATE_DIR", str(tmp_path / "place-variable"))
    assert is_made(*policy_ls) == {"place-variable"}
    assert is_made(*policy_ls, "--state-dir", tmp_path / "place-after") == {"place-after"}
    (tmp_path / "place-other").mkdir()
    catalog = f"sqlite:///{tmp_path}/place-other/mine.sqlite"
    assert is_made(*policy_ls, "--catalog", catalog) == {"place-other"}


@pytest.mark.slow
def test_the_lifecycle_looks_once_at_a_given_time(shell: Shell) -> None:
    shell.ok("policy", "set", "default", "autostopAfterSeconds=1h", "timeUntilDormantSeconds=30d")
    shell.ok("create", "web")
    shell.ok("create", "idle", "--no-start")
    assert shell.json("lifecycle", "--once")["transitions"] == {}
    stats = shell.json("lifecycle", "--once", "--tick", "2100-01-01T00:00")
    assert stats["tick"] == "2100-01-01T00:00:00+00:00"
    assert stats["transitions"] == {"web": "autostop", "idle": "dormancy"}
    assert (stats["errors"], stats["skipped"]) == ({}, {})
    assert shell.ok("lifecycle", "--once", "--tick", "2100-01-02T00:00+01:00") == "web  dormancy\n"
    assert "stopped, dormant" in shell.ok("ls")
    shown = shell.json("show", "web")
    assert shown["state"] == "stopped"
    assert shown["latest_run"]["reason"] == "autostop"


@pytest.mark.slow
def test_the_doctor_names_what_is_wrong_and_recovery_mends_it(shell: Shell) -> None:
    def checks() -> dict[str, Any]:
        outcome = shell.cli("doctor", "--json", "--quiet")
        found = {check["name"]: check for check in outcome.json["checks"] if check["area"] == "workspaces"}
        failed = any(check["status"] == "failed" for check in found.values())
        assert outcome.exit_code == (13 if failed else 0)
        return found

    assert checks() == {}
    shell.ok("create", "web", *SLEEP)
    shell.ok("create", "parked")
    shell.ok("pause", "parked")
    healthy = checks()
    assert {name: check["status"] for name, check in healthy.items()} == {"catalog": "ok", "agreement": "ok"}
    assert "1 paused, 1 running" in healthy["catalog"]["detail"]
    assert shell.ok("recover") == "paused    parked: whole\n"
    shell.stop_all()
    (shell.runtime_directory.parent / "paused/parked/record.json").unlink()
    broken = checks()
    assert broken["agreement"]["detail"] == "2 things are wrong, listed below"
    assert "no process is" in broken["process of web"]["detail"]
    assert "record" in broken["record of parked"]["detail"]
    assert "workspace recover" in broken["process of web"]["remedy"]
    summary = shell.json("recover")
    assert {note["name"] for note in summary["repaired"]} == {"web", "parked"}
    assert shell.json("show", "web")["pid"] > 0
    assert checks()["agreement"]["status"] == "ok"


def test_the_doctor_says_that_recovery_leaves_alone_what_the_catalog_does_not_know(shell: Shell) -> None:
    shell.ok("policy", "ls")
    with closing(ProcessRuntime(shell.runtime_directory)) as runtime:
        runtime.create(WorkspaceSpec("stray"))
    outcome = shell.cli("doctor")
    assert outcome.exit_code == 13
    assert "workspaces: folder of stray (failed)" in outcome.text
    assert "see whether --catalog is the right one" in outcome.text
    assert shell.ok("recover") == "there was nothing to recover\n"


@pytest.mark.slow
def test_what_recovery_cannot_put_right_has_a_code_of_its_own(shell: Shell) -> None:
    shell.ok("create", "web", "--no-start")
    root = shell.root("web")
    with closing(ProcessRuntime(shell.runtime_directory)) as runtime:
        runtime.remove("web")
    assert not root.exists()
    outcome = shell("recover")
    assert outcome.exit_code == 13
    assert "problem   web: " in outcome.text
    assert "1 thing could not be put right" in outcome.stderr


@pytest.mark.slow
def test_a_command_that_has_ended_by_itself_is_told_until_it_is_stopped_or_started_again(
    shell: Shell,
) -> None:
    def wait_for_the_end() -> None:
        deadline = time.monotonic() + 60
        with closing(ProcessRuntime(shell.runtime_directory)) as runtime:
            while runtime.status("web").exit_code is None:  # written down after the end
                assert time.monotonic() < deadline
                time.sleep(0.01)

    shell.ok("create", "web", "--", "sh", "-c", "exit 3")
    wait_for_the_end()
    told = "running; its command has ended, exit code 3"
    assert told in shell.ok("ls")
    assert f"state      {told}\n" in shell.ok("show", "web")
    outcome = shell.cli("doctor")
    assert outcome.exit_code == 13
    words = " ".join(outcome.text.split())
    assert "1 thing is wrong, listed below" in words
    assert "no process is: its command has ended, exit code 3" in words
    assert "to leave one ended, `snaploader workspace stop` it" in words
    assert "was started" in shell.ok("recover")
    wait_for_the_end()
    assert shell.ok("stop", "web") == "stopped web\n"
    assert told not in shell.ok("ls")
    assert "state      stopped\n" in shell.ok("show", "web")
    assert shell.cli("doctor").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "look"),
    [(["stop", "web"], "show web"), (["create", "--no-start"], "ls"), (["rm", "web"], "ls")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_who_interrupts_an_operation_is_told_how_to_look_what_became_of_it(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], look: str
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    for operation in ("stop", "create", "delete"):
        monkeypatch.setattr(WorkspaceManager, operation, interrupted)
    outcome = shell(*arguments)
    assert outcome.exit_code == 130
    told = " ".join(outcome.stderr.split())
    assert told.startswith(
        "snaploader: error: interrupted an operation that had begun was finished, or taken"
    )
    assert told.endswith(f"look with `snaploader workspace {look}`")


def test_nothing_to_recover_is_said(shell: Shell) -> None:
    assert shell.ok("recover") == "there was nothing to recover\n"
    assert shell.json("recover")["restored"] == []
