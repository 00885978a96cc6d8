"""`workspace` as a program: what outlives it, signals, terminals, and what it does not import."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_runner import COMMAND, in_process_of_its_own

from snaploader.workspace.runtime import ProcessRuntime

TIMEOUT_S = 300
WORKSPACE_PARTS = ["alembic", "cronsim", "prometheus_client", "psycopg", "sqlalchemy"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a process that knows nothing of this machine's configuration; its workspaces end with the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SNAPLOADER_")}
    places = {f"XDG_{name.upper()}_HOME": str(tmp_path / name) for name in ("config", "cache", "state")}
    yield {**kept, **places}
    with closing(ProcessRuntime(tmp_path / "state/snaploader/runtime")) as runtime:
        for workspace_id in runtime.workspaces():
            runtime.stop(workspace_id, timeout_s=0)


def shown(environment: dict[str, str], *arguments: object) -> Any:
    """What a command prints with --json."""
    done = in_process_of_its_own("workspace", *arguments, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_workspace_outlives_its_command_and_another_ends_it(
    environment: dict[str, str],
) -> None:
    done = in_process_of_its_own("workspace", "create", "web", "--", "sleep", "1000", env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"web\n", b"")
    pid = shown(environment, "show", "web")["pid"]
    assert psutil.Process(pid).cmdline() == ["sleep", "1000"]
    assert shown(environment, "stop", "web")["state"] == "stopped"
    assert not psutil.pid_exists(pid)
    assert shown(environment, "start", "web")["state"] == "running"
    again = psutil.Process(shown(environment, "show", "web")["pid"])
    assert shown(environment, "rm", "web") == {"deleted": ["web"]}
    assert not again.is_running()


@pytest.mark.slow
def test_a_workspace_holds_no_stream_of_the_command_that_made_it(environment: dict[str, str]) -> None:
    # The shell's pipe ends when everyone who could write to it has closed it.
    command = [*COMMAND, "workspace", "create", "web", "--", "sleep", "1000"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        stdout, _ = process.communicate(timeout=TIMEOUT_S)
    assert stdout == b"web\n"


def imported_by(environment: dict[str, str], *arguments: str) -> set[str]:
    """The names of all modules that a command imports."""
    program = f"""
import sys
from snaploader.cli.app import run_command
code = run_command({list(arguments)!r})
print("\\n".join(["", *sys.modules]), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("--version", {"numpy", "rich", "snaploader.filecache"}),
        ("--help", {"numpy", "rich", "snaploader.filecache"}),
        ("workspace --help", {"numpy", "rich", "snaploader.workspace.model"}),
        ("cache ls", {"rich", "google.protobuf", "snaploader.loader"}),
        ("workspace ls", {"numpy", "google.protobuf", "snaploader.loader", "snaploader.workspace.manager"}),
    ],
)
def test_a_command_starts_without_what_it_does_not_need(
    environment: dict[str, str], command: str, without: set[str]
) -> None:
    if command == "workspace ls":
        imported_by(environment, *command.split())  # makes the catalog, which takes alembic
    never = {"grpc", "alembic", "cow"} | (set() if command == "workspace ls" else {"sqlalchemy"})
    assert imported_by(environment, *command.split()).isdisjoint(without | never)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cache ls", "workspace create --help", "doctor --quiet"])
def test_the_rest_of_the_command_line_imports_nothing_of_workspaces(
    environment: dict[str, str], command: str
) -> None:
    modules = imported_by(environment, *command.split())
    assert modules.isdisjoint(WORKSPACE_PARTS)
    assert modules.isdisjoint(
        {"snaploader.workspace.catalog", "snaploader.workspace.manager", "snaploader.workspace.runtime"}
    )


@pytest.mark.slow
def test_only_what_a_command_needs_is_imported(environment: dict[str, str]) -> None:
    imported_by(environment, "workspace", "policy", "ls")  # makes the catalog, which takes alembic
    modules = imported_by(environment, "workspace", "policy", "ls")
    assert "sqlalchemy" in modules
    assert modules.isdisjoint(["alembic", "prometheus_client", "psycopg", "snaploader.workspace.manager"])


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["sqlalchemy", "alembic", "cronsim", "prometheus_client"])
def test_without_its_extra_it_says_what_to_install(environment: dict[str, str], missing: str) -> None:
    arguments = {
        "prometheus_client": ["workspace", "lifecycle", "--metrics-listen", "127.0.0.1:0"],
    }.get(missing, ["workspace", "create", "web", "--no-start"])
    program = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments!r}; "
        "import snaploader.cli; snaploader.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 4
    extra = "metrics" if missing == "prometheus_client" else "workspace"
    assert re.search(rf"pip install 'snaploader\[(cli,)?{extra}\]'", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_doctor_says_what_to_install_where_there_is_a_catalog(
    environment: dict[str, str], tmp_path: Path
) -> None:
    shown(environment, "policy", "ls")
    program = (
        "import sys; sys.modules['sqlalchemy'] = None; sys.argv[1:] = ['doctor']; "
        "import snaploader.cli; snaploader.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 13
    assert "pip install 'snaploader[cli,workspace]'" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_lifecycle_recovers_tells_measures_and_ends_cleanly(
    environment: dict[str, str], number: signal.Signals
) -> None:
    shown(environment, "policy", "set", "default", "autostopAfterSeconds=0.001", "autostopAction=pause")
    shown(environment, "create", "web", "--no-start")
    shown(environment, "create", "short")
    options = ["--metrics-listen", "127.0.0.1:0", "--interval", "0.05s", "--json"]
    with subprocess.Popen(
        [*COMMAND, "workspace", "lifecycle", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stdout is not None
            url = process.stderr.readline().split()[-1]
            assert process.stderr.readline() == "snaploader: there was nothing to recover\n"
            record = json.loads(process.stdout.readline())
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                metrics = answer.read().decode()
            process.send_signal(number)
            _, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0
    assert stderr.splitlines()[-1] == "snaploader: stopped"
    assert (record["workspace_id"], record["transition"], record["error"]) == ("short", "autostop", "")
    assert (record["state_before"], record["state_after"]) == ("running", "paused")
    assert "# TYPE snaploader_lifecycle_run_duration_seconds histogram" in metrics
    assert shown(environment, "show", "short")["state"] == "paused"


@pytest.mark.slow
def test_an_address_that_cannot_be_listened_on_is_said(environment: dict[str, str]) -> None:
    done = in_process_of_its_own("workspace", "lifecycle", "--metrics-listen", "192.0.2.1:1", env=environment)
    assert done.returncode == 6
    assert b"--metrics-listen: cannot listen on 192.0.2.1:1" in done.stderr
    assert b"Traceback" not in done.stderr


def on_a_terminal(environment: dict[str, str], *arguments: object) -> list[str]:
    """The lines that a command writes to a terminal of 80 columns."""
    terminal, end = pty.openpty()
    try:
        command = [*COMMAND, *(str(argument) for argument in arguments)]
        wide = {**environment, "COLUMNS": "80", "TERM": "xterm"}
        done = subprocess.run(command, stdout=end, env=wide, timeout=TIMEOUT_S, check=False)
        os.close(end)
        end = -1
        assert done.returncode == 0
        seen = b""
        with suppress(OSError):  # a terminal without its other end
            while piece := os.read(terminal, 65536):
                seen += piece
        return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).splitlines()
    finally:
        os.close(terminal)
        if end >= 0:
            os.close(end)


@pytest.mark.slow
def test_what_is_shown_on_a_terminal_can_be_read_at_80_columns(environment: dict[str, str]) -> None:
    name = "a-workspace-with-a-name-of-a-good-length"
    shown(environment, "create", name, "--no-start", "--volume", "data=/data")
    shown(environment, "snapshot", name, "--name", "a name that tells what the snapshot is for, at length")
    table = on_a_terminal(environment, "workspace", "ls")
    assert max(map(len, table)) <= 80
    assert "".join(line.split()[0] for line in table[1:]) == name
    page = on_a_terminal(environment, "workspace", "show", name)
    tree = page[page.index("") + 1 :]
    assert max(map(len, tree)) <= 80
    assert tree[0] == name
    assert tree[-1] == "└── now: stopped"


@pytest.mark.slow
def test_a_tree_is_folded_to_80_columns_on_a_terminal_and_in_a_pipe(environment: dict[str, str]) -> None:
    name = "x" * 200
    shown(environment, "create", "web", "--no-start")
    shown(environment, "snapshot", "web", "--name", name)
    piped = in_process_of_its_own(
        "workspace", "show", "web", env={**environment, "COLUMNS": "80"}, stdin=subprocess.DEVNULL
    )
    for lines in (
        piped.stdout.decode().splitlines(),
        on_a_terminal(environment, "workspace", "ls", "--tree"),
    ):
        tree = lines[lines.index("web") :]
        assert max(map(len, tree)) <= 80
        assert "".join(tree).count("x") == len(name)
