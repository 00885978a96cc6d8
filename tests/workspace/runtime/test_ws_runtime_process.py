"""How ProcessRuntime runs a command: its environment, its end, and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runtime_harness import Fifo, wait_gone

from snaploader.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.model import Readiness, Volume, WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime, StopOutcome, runs
from snaploader.workspace.runtime.runs import ProcessIdentity

ID = "ws"
IGNORES_TERM = "trap '' TERM; "


def shell(script: str, **more: object) -> WorkspaceSpec:
    return WorkspaceSpec(ID, command=("sh", "-c", script), **more)  # type: ignore[arg-type]


def start(runtime: ProcessRuntime, spec: WorkspaceSpec) -> int:
    """Create and start; the command's pid."""
    runtime.create(spec)
    runtime.start(spec)
    pid = runtime.status(ID).pid
    assert pid is not None
    return pid


def start_ended(runtime: ProcessRuntime, script: str) -> None:
    """Create and start what ends by itself, maybe at once."""
    spec = shell(script)
    runtime.create(spec)
    runtime.start(spec)


def end_of(runtime: ProcessRuntime) -> int | None:
    """The exit code, after waiting for the run to end by itself."""
    never = Readiness(kind="tcp", target="127.0.0.1:1", interval_s=60.0, timeout_s=60.0)
    with pytest.raises(FailedPrecondition):
        runtime.wait_ready(WorkspaceSpec(ID, readiness=never))
    return runtime.status(ID).exit_code


def test_commands_get_a_small_environment_and_nothing_of_the_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_STARTER", "1")
    runtime = ProcessRuntime(tmp_path / "runtime", environment={"ALL": "everyone", "BOTH": "runtime"})
    said = Fifo(tmp_path / "said")
    start(runtime, shell(f"env > {said.path}; sleep 1000", environment={"BOTH": "mine", "ODD": "a b\nc=d"}))
    text = said.read()
    runtime.stop(ID)
    names = {line.split("=")[0] for line in text.splitlines()}
    assert names == {
        "PATH",
        "HOME",
        "LANG",
        "WORKSPACE_ID",
        "WORKSPACE_RUN",
        "ALL",
        "BOTH",
        "ODD",
        "PWD",
        "c",
    }
    assert f"HOME={runtime.root(ID)}\n" in text
    assert "WORKSPACE_ID=ws\n" in text
    assert "ALL=everyone\n" in text
    assert "BOTH=mine\n" in text
    assert "ODD=a b\nc=d\n" in text


def test_commands_run_in_the_root_folder_with_empty_input_and_umask_022(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    said = Fifo(tmp_path / "said")
    start(runtime, shell(f"(pwd; umask; wc -c; ls /proc/$$/fd) > {said.path}; sleep 1000"))
    lines = said.read().split()
    runtime.stop(ID)
    assert lines == [str(runtime.root(ID)), "0022", "0", "0", "1", "2"]


def test_ignored_signals_of_the_starter_are_not_inherited(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said = Fifo(tmp_path / "said")
    start(runtime, shell(f"grep -E 'SigIgn|SigBlk' /proc/self/status > {said.path}; sleep 1000"))
    text = said.read()
    runtime.stop(ID)
    # Signals 32 and 33 are the C library's own: it may have them blocked just then.
    own_of_libc = 0b11 << 31
    assert [int(line.split()[1], 16) & ~own_of_libc for line in text.splitlines()] == [0, 0]


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9)])
def test_exit_codes_are_kept(script: str, code: int, runtime: ProcessRuntime) -> None:
    start_ended(runtime, script)
    assert end_of(runtime) == code
    status = runtime.status(ID)
    assert not status.is_running
    assert status.pid is None
    assert status.started_at is not None
    assert runtime.stop(ID) is StopOutcome.NOT_RUNNING


def test_a_command_that_ended_can_be_started_again(runtime: ProcessRuntime, tmp_path: Path) -> None:
    start_ended(runtime, "exit 3")
    end_of(runtime)
    runtime.start(WorkspaceSpec(ID, command=("sleep", "1000")))
    status = runtime.status(ID)
    assert status.is_running
    assert status.exit_code is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("no-such-command",), "No such file"),
        (("./data",), "Permission denied"),
        (("/dev/null/x",), "Not a directory"),
        (("./broken",), "Exec format error"),
    ],
)
def test_a_command_that_cannot_be_executed_is_a_clear_error(
    command: tuple[str, ...], reason: str, runtime: ProcessRuntime
) -> None:
    spec = WorkspaceSpec(ID, command=command, volumes=(Volume("data", "/data"),))
    runtime.create(spec)
    broken = runtime.root(ID) / "broken"
    broken.write_bytes(b"\x7fELF and nothing more")
    broken.chmod(0o755)
    with pytest.raises(FailedPrecondition, match=reason) as caught:
        runtime.start(spec)
    assert repr(command[0]) in str(caught.value)
    assert not runtime.status(ID).is_running
    assert runtime.status(ID).exit_code == 127
    runtime.remove(ID)


@pytest.mark.parametrize(
    "spec",
    [
        WorkspaceSpec(ID, command=("sh", "a\0b")),
        WorkspaceSpec(ID, command=("sh",), environment={"": "x"}),
        WorkspaceSpec(ID, command=("sh",), environment={"A=B": "x"}),
        WorkspaceSpec(ID, command=("sh",), environment={"A": "x\0y"}),
    ],
)
def test_what_no_process_can_be_given_is_refused(spec: WorkspaceSpec, runtime: ProcessRuntime) -> None:
    runtime.create(spec)
    with pytest.raises(InvalidArgument):
        runtime.start(spec)
    assert runtime.status(ID).started_at is None


def test_starting_what_was_never_made_is_not_found(runtime: ProcessRuntime) -> None:
    with pytest.raises(NotFound):
        runtime.start(shell("true"))


def test_a_process_that_ignores_the_request_is_killed_after_the_timeout(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    said = Fifo(tmp_path / "said")
    pid = start(runtime, shell(f"{IGNORES_TERM}echo > {said.path}; while :; do sleep 1000; done"))
    said.read()
    with pytest.raises(DeadlineExceeded, match="still runs"):
        runtime.stop(ID, timeout_s=0.01, force=False)
    assert runtime.status(ID).is_running
    assert runtime.stop(ID, timeout_s=0.01) is StopOutcome.KILLED
    assert wait_gone(pid, 0)
    assert runtime.status(ID).exit_code == -9


def test_a_process_may_take_its_time_to_stop(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said, go = Fifo(tmp_path / "said"), Fifo(tmp_path / "go")
    script = f"trap 'read line < {go.path}; exit 7' TERM; echo > {said.path}; while :; do sleep 0.01; done"
    start(runtime, shell(script))
    said.read()
    outcomes: list[StopOutcome] = []
    stopping = threading.Thread(target=lambda: outcomes.append(runtime.stop(ID)))
    stopping.start()
    go.path.write_text("go\n")  # waits until the handler reads
    stopping.join()
    assert outcomes == [StopOutcome.STOPPED]
    assert runtime.status(ID).exit_code == 7


def test_a_stopped_process_is_woken_to_end(runtime: ProcessRuntime) -> None:
    pid = start(runtime, shell("exec sleep 1000"))
    os.kill(pid, signal.SIGSTOP)
    assert runtime.stop(ID) is StopOutcome.STOPPED


def daemon(said: Fifo, trap: str = "") -> str:
    """A script that leaves a daemon: a process of another session, whose parent has ended."""
    return f"""(setsid sh -c '{trap}echo $$ > {said.path}; while :; do sleep 1000; done' &)"""


def test_daemons_are_stopped_too(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said = Fifo(tmp_path / "said")
    start(runtime, shell(f"{daemon(said)}; exec sleep 1000"))
    pid = int(said.read())
    assert runtime.stop(ID) is StopOutcome.STOPPED
    assert wait_gone(pid, 0)


def test_daemons_that_ignore_the_request_are_killed(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said = Fifo(tmp_path / "said")
    trap = 'trap "" TERM; '
    start(runtime, shell(f"{daemon(said, trap)}; exec sleep 1000"))
    pid = int(said.read())
    assert runtime.stop(ID, timeout_s=0.05) is StopOutcome.KILLED
    assert wait_gone(pid, 0)


def test_daemons_go_when_the_command_ends(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said, go = Fifo(tmp_path / "said"), Fifo(tmp_path / "go")
    start(runtime, shell(f"{daemon(said)}; read line < {go.path}; exit 5"))
    pid = int(said.read())
    go.path.write_text("go\n")
    assert end_of(runtime) == 5
    assert wait_gone(pid, 0)


def test_daemons_that_ignore_the_request_are_killed_after_the_grace(tmp_path: Path) -> None:
    runtime = ProcessRuntime(tmp_path / "runtime", durable=False, grace_s=0.05)
    said, go = Fifo(tmp_path / "said"), Fifo(tmp_path / "go")
    trap = 'trap "" TERM; '
    start(runtime, shell(f"{daemon(said, trap)}; read line < {go.path}"))
    pid = int(said.read())
    go.path.write_text("go\n")
    assert end_of(runtime) == 0
    assert wait_gone(pid, 0)


def test_signals_to_the_commands_group_do_not_reach_its_supervisor(runtime: ProcessRuntime) -> None:
    start_ended(runtime, "kill -9 0")
    assert end_of(runtime) == -9


def test_output_goes_to_the_log(runtime: ProcessRuntime) -> None:
    start_ended(runtime, "echo out; echo err >&2")
    end_of(runtime)
    assert runtime.log_tail(ID) == b"out\nerr\n"
    assert runtime.log_tail(ID, 4) == b"err\n"


def test_the_log_is_bounded_and_keeps_the_latest(runtime: ProcessRuntime) -> None:
    start_ended(runtime, "head -c 3500000 /dev/zero | tr '\\0' x; echo; echo last")
    end_of(runtime)
    logs = [path.stat().st_size for path in runtime.root(ID).parent.glob("state/log*")]
    assert len(logs) == 2
    assert max(logs) <= 1 << 20
    tail = runtime.log_tail(ID, 1 << 30)
    assert tail.endswith(b"xx\nlast\n")
    assert len(tail) == sum(logs) > 1 << 20


def test_durable_directories_that_are_gone_are_made_at_start(runtime: ProcessRuntime) -> None:
    spec = shell("exec sleep 1000", volumes=(Volume("data", "/a/data"), Volume("logs", "/logs")))
    runtime.create(spec)
    (runtime.root(ID) / "a/data").rmdir()
    (runtime.root(ID) / "logs").rmdir()
    (runtime.root(ID) / "logs").symlink_to("/")
    runtime.start(spec)
    assert (runtime.root(ID) / "a/data").is_dir()
    assert (runtime.root(ID) / "logs").is_symlink()


SCRIPT = """
import sys
from snaploader.workspace.model import WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime
runtime = ProcessRuntime(sys.argv[1])
runtime.start(WorkspaceSpec("ws", command=("sleep", "1000")))
"""


@pytest.mark.slow
def test_a_workspace_outlives_the_program_that_started_it(runtime: ProcessRuntime, tmp_path: Path) -> None:
    runtime.create(WorkspaceSpec(ID))
    starter = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "runtime"], check=True, timeout=300)
    assert starter.returncode == 0
    status = runtime.status(ID)
    assert status.is_running
    assert status.pid is not None
    pid = status.pid
    assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    assert runtime.stop(ID) is StopOutcome.STOPPED
    assert wait_gone(pid, 0)


def test_concurrent_starts_start_one_command(runtime: ProcessRuntime, tmp_path: Path) -> None:
    said = Fifo(tmp_path / "said")
    spec = shell(f"echo $$ >> {tmp_path}/pids; echo > {said.path}; exec sleep 1000")
    runtime.create(spec)
    others = [ProcessRuntime(tmp_path / "runtime") for _ in range(4)]
    barrier = threading.Barrier(len(others))

    def begin(other: ProcessRuntime) -> None:
        barrier.wait()
        other.start(spec)

    threads = [threading.Thread(target=begin, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said.read()
    pid = runtime.status(ID).pid
    assert {other.status(ID).pid for other in others} == {pid}
    runtime.stop(ID)
    assert (tmp_path / "pids").read_text() == f"{pid}\n"


def test_a_process_is_known_by_more_than_its_pid() -> None:
    me = ProcessIdentity.current()
    assert me.is_alive
    for other in (
        ProcessIdentity(me.pid, me.start_ticks + 1, me.boot_id),
        ProcessIdentity(me.pid, me.start_ticks, "another-boot"),
    ):
        assert not other.is_alive
        with other.pidfd() as fd:
            assert fd is None
        other.send(signal.SIGKILL)
    assert runs.wait_ended([ProcessIdentity(me.pid, 0, me.boot_id)], 0)
    open_before = os.listdir("/proc/self/fd")
    assert not runs.wait_ended([me, me], 0)
    assert os.listdir("/proc/self/fd") == open_before


def test_a_run_of_another_boot_is_over(runtime: ProcessRuntime) -> None:
    spec = WorkspaceSpec(ID)
    runtime.create(spec)
    runtime.start(spec)
    assert runtime.status(ID).is_running
    record = runtime.root(ID).parent / "state/run.json"
    boot_id = ProcessIdentity.current().boot_id
    record.write_text(record.read_text().replace(boot_id, "0" * 36))
    assert not runtime.status(ID).is_running
    assert runtime.stop(ID) is StopOutcome.NOT_RUNNING
    runtime.start(spec)
    assert runtime.status(ID).is_running


def test_a_record_cut_by_a_power_failure_is_no_run(runtime: ProcessRuntime) -> None:
    spec = WorkspaceSpec(ID)
    runtime.create(spec)
    runtime.start(spec)
    (runtime.root(ID).parent / "state/run.json").write_bytes(b"")
    assert not runtime.status(ID).is_running
    assert runtime.stop(ID) is StopOutcome.NOT_RUNNING


def test_checks_cannot_take_the_names_of_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'tcp'"):
        ProcessRuntime(tmp_path, checks={"tcp": lambda workspace, timeout_s: ""})
