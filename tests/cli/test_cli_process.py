"""The command line as a program: `serve`, signals, pipes, terminals, a missing extra."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cli_runner import COMMAND, in_process_of_its_own
from grpc_health.v1 import health_pb2, health_pb2_grpc

from snaploader.cli.values import parse_address
from snaploader.errors import InvalidArgument
from snaploader.testing import CallGate, EmbeddedServer, Fault, FaultScript

TIMEOUT_S = 300

_HEED_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
INTERRUPTIBLE = [sys.executable, "-c", f"{_HEED_SIGINT}; from snaploader.cli import main; main()"]
"""COMMAND, also where SIGINT is inherited as ignored, as in jobs that a shell runs in the background."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that knows nothing of this machine's configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SNAPLOADER_")}
    places = {f"XDG_{name.upper()}_HOME": str(tmp_path / name) for name in ("config", "cache", "state")}
    return {**kept, **places}


@contextlib.contextmanager
def serving(*arguments: object, environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`snaploader serve` on a free port: its URL and process."""
    command = [*COMMAND, "serve", "--listen", "127.0.0.1:0", *(str(argument) for argument in arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().decode().strip(), process
        finally:
            process.kill()


@pytest.mark.slow
def test_serve_has_metrics_of_its_calls(environment: dict[str, str]) -> None:
    with serving("--metrics-listen", "127.0.0.1:0", environment=environment) as (url, process):
        assert process.stderr is not None
        where = process.stderr.readline().decode().split()[-1]
        done = in_process_of_its_own("doctor", "--remote-cache", url, env=environment)
        assert done.returncode == 0, done.stdout
        with urllib.request.urlopen(where, timeout=TIMEOUT_S) as answer:
            metrics = answer.read().decode()
    assert re.search(
        r'^snaploader_server_calls_total\{method="GetCapabilities"\} [1-9]', metrics, re.MULTILINE
    )
    assert "process_resident_memory_bytes" in metrics


@pytest.mark.slow
def test_a_server_process_serves_two_hosts_and_keeps_its_content(
    environment: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"\1" * (5 << 20))
    os.truncate(disk, 8 << 20)
    with serving("--root", tmp_path / "cas", environment=environment) as (url, process):
        common = ["--remote-cache", url, "--json", "--quiet"]
        done = in_process_of_its_own(
            *common, "--cache-dir", tmp_path / "a", "save", "--ref", "main", disk, env=environment
        )
        assert done.returncode == 0, done.stderr
        saved = json.loads(done.stdout)
        assert saved["uploaded_bytes"] > 0
        assert saved["files"][0]["chunked"] is True
        assert done.stderr == b""
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    with serving("--root", tmp_path / "cas", environment=environment) as (url, _process):
        common = ["--remote-cache", url, "--cache-dir", tmp_path / "b"]
        restore = [*common, "restore", "--ref", "x", "--base-ref", "main", "--json", tmp_path / "out"]
        done = in_process_of_its_own(*restore, env=environment)
        assert done.returncode == 0, done.stderr
        restored = json.loads(done.stdout)
    assert restored["ref"] == "main"
    assert restored["fetched_bytes"] > 0
    assert (tmp_path / "out/disk.img").read_bytes() == disk.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_with_success_when_told_to(environment: dict[str, str], number: signal.Signals) -> None:
    with serving("--like", "casd", environment=environment) as (url, process):
        assert url.startswith("grpc://127.0.0.1:")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert stderr.decode().splitlines()[-1] == "snaploader: stopped"


@pytest.mark.slow
def test_serve_says_what_is_wrong_with_its_address(environment: dict[str, str], tmp_path: Path) -> None:
    with serving(environment=environment) as (url, _process):
        taken = url.removeprefix("grpc://")
        done = in_process_of_its_own("serve", "--listen", taken, env=environment)
    assert done.returncode == 6
    host, _, port = taken.rpartition(":")
    assert done.stderr.decode() == (
        f"snaploader: error: cannot listen on {host} port {port}: Address already in use\n"
    )


@pytest.mark.slow
def test_serve_tells_its_health(environment: dict[str, str]) -> None:
    with (
        serving(environment=environment) as (url, _process),
        grpc.insecure_channel(url.removeprefix("grpc://")) as channel,
    ):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_addresses() -> None:
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_address("[::1]:80") == ("::1", 80)
    for wrong in ("", ":1", "host", "host:", "host:x", "host:-1", "host:70000"):
        with pytest.raises(InvalidArgument):
            parse_address(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_that_waits(
    environment: dict[str, str], number: signal.Signals, code: int
) -> None:
    gate = CallGate()
    with EmbeddedServer(faults=FaultScript(Fault("GetCapabilities", gate=gate, times=None))) as server:
        command = [*INTERRUPTIBLE, "--remote-cache", server.url, "show", "--ref", "main"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            try:
                assert gate.wait_reached(TIMEOUT_S)
                process.send_signal(number)
                stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
    assert process.returncode == code
    assert stdout == b""
    assert b"Traceback" not in stderr


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * (3 << 20))
    assert in_process_of_its_own("save", "--ref", "main", path, env=environment).returncode == 0
    command = [*COMMAND, "read", "--ref", "main", "big"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(TIMEOUT_S) == 141
    assert stderr == b""


@pytest.mark.slow
def test_a_reader_that_never_came_ends_text_quietly(environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [*COMMAND, "doctor", "--quiet"]
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=TIMEOUT_S, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def without(
    streams: str, *arguments: object, environment: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with streams closed, as a shell does on `>&-`."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", *COMMAND, *(str(part) for part in arguments)]
    return subprocess.run(command, capture_output=True, env=environment, timeout=TIMEOUT_S, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(environment: dict[str, str], tmp_path: Path, streams: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    done = without(streams, "save", "--ref", "main", path, environment=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    done = without(streams, "show", "--ref", "other", environment=environment)
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [False, True])
def test_bytes_that_cannot_be_written_are_an_error(
    environment: dict[str, str], tmp_path: Path, unbuffered: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert in_process_of_its_own("save", "--ref", "main", path, env=environment).returncode == 0
    done = without("2>&-", "read", "--ref", "main", "file", environment=environment)
    assert (done.returncode, done.stdout) == (0, b"content")
    done = without(">&-", "read", "--ref", "main", "file", environment=environment)
    assert done.returncode == 4
    assert b"stdout is closed" in done.stderr
    # Buffered or not, it is told the same way.
    environment.pop("PYTHONUNBUFFERED", None)
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    read = ["read", "--ref", "main", "file"]
    for streams, code, command in (
        (">/dev/full", 5, read),
        (">/dev/full", 5, ["show", "--ref", "main"]),
        ("1</dev/null", 4, read),
        ("2>/dev/full", 3, ["show", "--ref", "other"]),
    ):
        done = without(streams, *command, environment=environment)
        assert done.returncode == code, done
        assert streams == "2>/dev/full" or b"cannot write to stdout" in done.stderr


def on_a_terminal(*arguments: object, environment: dict[str, str]) -> bytes:
    """What a command writes to a terminal that is its stderr."""
    terminal, end = pty.openpty()
    try:
        command = [*COMMAND, *(str(argument) for argument in arguments)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=end, env=environment, timeout=TIMEOUT_S, check=False
        )
        os.close(end)
        end = -1
        assert done.returncode == 0
        seen = b""
        with contextlib.suppress(OSError):  # a terminal without its other end
            while piece := os.read(terminal, 65536):
                seen += piece
        return seen
    finally:
        os.close(terminal)
        if end >= 0:
            os.close(end)


@pytest.mark.slow
def test_bars_are_drawn_on_a_terminal_only(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * (5 << 20))
    environment = {**environment, "TERM": "xterm"}
    seen = on_a_terminal("save", "--ref", "main", path, environment=environment)
    assert b"storing" in seen
    assert b"\x1b[" in seen
    assert on_a_terminal("save", "--ref", "main", "--quiet", path, environment=environment) == b""
    done = in_process_of_its_own("save", "--ref", "main", path, env=environment)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"\x1b[" not in done.stdout


def answering(
    answer: bytes, *arguments: object, environment: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a command on a terminal at which somebody types; what is shown there is the result's stderr."""
    terminal, end = pty.openpty()
    try:
        os.write(terminal, answer)
        command = [*COMMAND, *(str(argument) for argument in arguments)]
        done = subprocess.run(
            command,
            stdin=end,
            stdout=subprocess.PIPE,
            stderr=end,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
        os.close(end)
        end = -1
        done.stderr = b""
        with contextlib.suppress(OSError):  # a terminal without its other end
            while piece := os.read(terminal, 65536):
                done.stderr += piece
        return done
    finally:
        os.close(terminal)
        if end >= 0:
            os.close(end)


@pytest.mark.slow
def test_on_a_terminal_nothing_is_removed_unasked(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert in_process_of_its_own("save", "--ref", "main", path, env=environment).returncode == 0

    def listed() -> list[dict[str, object]]:
        done = in_process_of_its_own("cache", "ls", "--json", env=environment)
        return json.loads(done.stdout)["entries"]

    entries = listed()
    blob = next(str(entry["key"]) for entry in entries if entry["kind"] == "blob")
    prune = ["cache", "prune", "--target-size", "0"]
    for command, question in (
        (prune, b"Evict 4 entries"),
        (["cache", "rm", blob], b"Remove 1 entries"),
        (["invalidate"], b"Invalidate the snapshots of all branches"),
    ):
        done = answering(b"\n", *command, environment=environment)
        assert (done.returncode, done.stdout) == (12, b""), done
        assert question in done.stderr
        assert b"nothing was removed" in done.stderr
    assert {entry["key"] for entry in listed()} == {entry["key"] for entry in entries}
    done = answering(b"y\n", "cache", "rm", blob, environment=environment)
    assert done.returncode == 0, done
    done = answering(b"", *prune, "--yes", environment=environment)
    assert done.returncode == 0, done
    assert b"[y/N]" not in done.stderr
    assert listed() == []


@pytest.mark.slow
def test_on_a_terminal_no_workspace_is_removed_unasked(environment: dict[str, str]) -> None:
    create = ["workspace", "create", "one", "--no-start", "--", "sleep", "infinity"]
    assert in_process_of_its_own(*create, env=environment).returncode == 0

    def listed() -> list[dict[str, object]]:
        done = in_process_of_its_own("workspace", "ls", "--json", env=environment)
        return json.loads(done.stdout)["workspaces"]

    done = answering(b"\n", "workspace", "rm", "one", environment=environment)
    assert (done.returncode, done.stdout) == (12, b""), done
    assert b"nothing was removed" in done.stderr
    assert len(listed()) == 1
    done = answering(b"", "workspace", "rm", "one", "--yes", environment=environment)
    assert done.returncode == 0, done
    assert b"[y/N]" not in done.stderr
    assert listed() == []


@pytest.mark.slow
def test_nobody_can_be_asked_where_the_question_is_not_seen(environment: dict[str, str]) -> None:
    terminal, end = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, "invalidate"],
            stdin=end,
            capture_output=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 4
    assert b"give --yes" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["click", "platformdirs", "rich"])
def test_without_the_extra_it_says_what_to_install(environment: dict[str, str], missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import snaploader.cli; snaploader.cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert done.returncode == 4
    assert "pip install 'snaploader[cli]'" in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_little_is_imported_before_interrupts_are_heeded(environment: dict[str, str]) -> None:
    program = (
        "import sys; before = set(sys.modules); import snaploader.cli; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    expected = {"__future__", "snaploader", "snaploader._lazy", "snaploader.cli"}
    assert set(done.stdout.decode().split()) == expected


INTERRUPTED_AT_EVERY_LINE = """
import os, signal, sys
from snaploader.cli import main

package = os.path.dirname(os.path.dirname(main.__code__.co_filename)) + os.sep
process, reports = os.getpid(), os.dup(1)

def interrupt(frame, event, _):
    if not frame.f_code.co_filename.startswith(package):
        return None
    if os.getpid() == process and event in {"call", "line", "return"}:
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            sys.settrace(None)
            os.dup2(writing, 2)
            os.close(reading)
            os.close(writing)
            signal.raise_signal(signal.SIGINT)
            return None
        os.close(writing)
        with open(reading, "rb") as stream:
            said = stream.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} {event}"
        os.write(reports, f"{code} {said!r} {place}\\n".encode())
    return interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = ["--version"]
sys.stdout = open(os.devnull, "w")
sys.settrace(interrupt)
main()
"""


@pytest.mark.slow
def test_an_interrupt_at_any_line_from_start_to_end_is_one_line(environment: dict[str, str]) -> None:
    program = [sys.executable, "-c", INTERRUPTED_AT_EVERY_LINE]
    done = subprocess.run(program, capture_output=True, env=environment, check=True, timeout=TIMEOUT_S)
    reports = done.stdout.decode().splitlines()
    assert len(reports) > 500
    assert "/cli/__init__.py" in reports[0]
    assert "/cli/__init__.py" in reports[1]
    one_line = re.compile(r"130 b'(\\n)?snaploader: error: interrupted\\n' ")  # click may begin a line
    # A function cannot heed what comes before its first line.
    assert [report for report in reports[2:] if not one_line.match(report)] == []
    assert done.stderr == b""


@pytest.mark.slow
def test_a_traceback_is_shown_on_demand(environment: dict[str, str]) -> None:
    done = in_process_of_its_own("restore", "--ref", "main", "out", "-vv", env=environment)
    assert done.returncode == 3
    assert b"Traceback" in done.stderr


@pytest.mark.slow
def test_help_and_version(environment: dict[str, str]) -> None:
    done = in_process_of_its_own("--help", env=environment)
    assert done.returncode == 0
    assert b"SNAPLOADER_REMOTE_CACHE" in done.stdout
    assert in_process_of_its_own("--version", env=environment).stdout.startswith(b"snaploader")


@pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 70),
    reason=f"grpcio {grpc.__version__} reads GRPC_VERBOSITY when it is first used, not at its import",
)
def test_grpc_says_nothing_of_its_own_and_programs_see_no_difference(
    environment: dict[str, str], tmp_path: Path
) -> None:
    helper = tmp_path / "helper"
    helper.write_text('#!/bin/sh\necho "${GRPC_VERBOSITY-unset}" > "$0.saw"\necho "{}"\n')
    helper.chmod(0o755)
    environment = {name: value for name, value in environment.items() if name != "GRPC_VERBOSITY"}
    with EmbeddedServer() as server:
        remote = ["--remote-cache", server.url.replace("grpc://", "grpcs://"), "--credential-helper", helper]
        commands = [[*remote, "-q", "invalidate"], ["serve", "--listen", server.address]]
        for command in commands:
            done = subprocess.run(
                [*COMMAND, *command], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S * 4
            )
            assert done.returncode != 0
            assert done.stderr.startswith("snaploader: error: ")
            assert done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "helper.saw").read_text() == "unset\n"
