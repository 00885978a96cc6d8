"""What happens when the supervisor of a workspace is killed, or cannot do its work."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from runtime_harness import Fifo, wait_gone

from snaploader.errors import FailedPrecondition, SnaploaderError
from snaploader.workspace.model import WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime, StopOutcome, runs, supervisor
from snaploader.workspace.runtime.contents import Layout
from snaploader.workspace.runtime.runs import ProcessIdentity, wait_ended

ID = "ws"


@dataclass
class Running:
    """A workspace whose command has left a daemon that takes no SIGTERM."""

    guard: ProcessIdentity
    supervisor: ProcessIdentity
    command: ProcessIdentity
    daemon: int

    def kill(self, *processes: ProcessIdentity) -> None:
        """SIGKILL, all stopped first so that none can react to the death of another."""
        for process in processes:
            process.send(signal.SIGSTOP)
        for process in processes:
            process.send(signal.SIGKILL)


@pytest.fixture
def running(runtime: ProcessRuntime, tmp_path: Path) -> Iterator[Running]:
    said = Fifo(tmp_path / "said")
    daemon = f"setsid sh -c 'trap \"\" TERM; echo $$ > {said.path}; while :; do sleep 1000; done'"
    spec = WorkspaceSpec(ID, command=("sh", "-c", f"({daemon} &); exec sleep 1000"))
    runtime.create(spec)
    runtime.start(spec)
    run = runs.read_run(Layout(str(tmp_path / "runtime")).folder(ID))
    assert run is not None
    assert run.guard is not None
    assert run.supervisor is not None
    assert run.command is not None
    pid = int(said.read())
    yield Running(run.guard, run.supervisor, run.command, pid)
    if not wait_gone(pid, 0):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("who", ["guard", "supervisor"])
def test_when_one_of_the_two_is_killed_the_other_kills_everything(
    who: str, running: Running, runtime: ProcessRuntime
) -> None:
    getattr(running, who).send(signal.SIGKILL)
    assert wait_ended([running.guard, running.supervisor, running.command], 10)
    assert wait_gone(running.daemon, 0)
    status = runtime.status(ID)
    assert not status.is_running
    assert status.exit_code == {"guard": -9, "supervisor": None}[who]
    assert runtime.stop(ID) is StopOutcome.NOT_RUNNING


def test_when_both_are_killed_the_command_dies(running: Running, runtime: ProcessRuntime) -> None:
    running.kill(running.guard, running.supervisor)
    assert wait_ended([running.guard, running.supervisor, running.command], 10)
    assert not runtime.status(ID).is_running


def test_stop_finds_what_both_left(running: Running, runtime: ProcessRuntime) -> None:
    running.kill(running.guard, running.supervisor)
    assert wait_ended([running.guard, running.supervisor, running.command], 10)
    assert not wait_gone(running.daemon, 0)
    assert runtime.stop(ID) is StopOutcome.KILLED
    assert wait_gone(running.daemon, 0)
    assert runtime.stop(ID) is StopOutcome.NOT_RUNNING


def test_sweep_finds_what_both_left(running: Running, runtime: ProcessRuntime) -> None:
    running.kill(running.guard, running.supervisor)
    assert wait_ended([running.guard, running.supervisor, running.command], 10)
    assert runtime.sweep() == [ID]
    assert wait_gone(running.daemon, 0)
    assert runtime.sweep() == []


def test_start_finds_what_both_left(running: Running, runtime: ProcessRuntime) -> None:
    running.kill(running.guard, running.supervisor)
    assert wait_ended([running.guard, running.supervisor, running.command], 10)
    runtime.start(WorkspaceSpec(ID, command=("sleep", "1000")))
    assert wait_gone(running.daemon, 0)
    assert runtime.status(ID).is_running


def test_a_supervisor_that_was_stopped_is_forced_all_the_same(
    running: Running, runtime: ProcessRuntime
) -> None:
    running.supervisor.send(signal.SIGSTOP)
    running.guard.send(signal.SIGSTOP)
    assert runtime.stop(ID, timeout_s=0.01) is StopOutcome.KILLED
    assert wait_gone(running.daemon, 0)


def test_a_supervisor_that_does_not_react_is_killed_with_its_tree(
    running: Running, runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snaploader.workspace.runtime.runs._KILL_TIMEOUT_S", 0.2)
    send = ProcessIdentity.send

    def send_all_but_requests(process: ProcessIdentity, number: int) -> None:
        if number == signal.SIGKILL:
            send(process, number)

    monkeypatch.setattr(ProcessIdentity, "send", send_all_but_requests)
    assert runtime.stop(ID, timeout_s=0) is StopOutcome.KILLED
    assert wait_gone(running.daemon, 0)
    assert wait_ended([running.guard, running.supervisor, running.command], 0)
    assert not runtime.status(ID).is_running


def test_a_supervisor_that_cannot_write_starts_nothing(runtime: ProcessRuntime, tmp_path: Path) -> None:
    spec = WorkspaceSpec(ID, command=("sh", "-c", f"echo > {tmp_path}/ran"))
    runtime.create(spec)
    record = runtime.root(ID).parent / "state/run.json"
    record.mkdir()
    (record / "in the way").touch()
    with pytest.raises(SnaploaderError):
        runtime.start(spec)
    assert not (tmp_path / "ran").exists()
    (record / "in the way").unlink()
    record.rmdir()


def test_a_supervisor_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    runtime = ProcessRuntime(tmp_path, interpreter="/bin/true", durable=False)
    spec = WorkspaceSpec(ID, command=("true",))
    runtime.create(spec)
    with pytest.raises(SnaploaderError, match="supervisor"):
        runtime.start(spec)
    assert not runtime.status(ID).is_running


def test_an_interpreter_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    runtime = ProcessRuntime(tmp_path, interpreter="/no/python", durable=False)
    spec = WorkspaceSpec(ID, command=("true",))
    runtime.create(spec)
    with pytest.raises(FailedPrecondition, match="/no/python"):
        runtime.start(spec)


def test_orders_that_were_cut_short_are_not_followed() -> None:
    fields = ["run", "end", "log", "token", "boot", "2.5", "1", "true", "A=1", "B=2"]
    whole = b"".join(field.encode() + b"\0" for field in (str(len(fields)), *fields))
    orders = supervisor.Orders(whole)
    assert orders.arguments == [b"true"]
    assert (orders.token, orders.boot_id, orders.grace_s) == ("token", "boot", 2.5)
    assert orders.environment == {b"A": b"1", b"B": b"2"}
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            supervisor.Orders(whole[:length])


@pytest.mark.parametrize("name", ["sleep", "a b", "a) S 1 (b", ""])
def test_a_stat_line_is_read_whatever_the_name(name: str) -> None:
    rest = " ".join(str(number) for number in range(5, 53))
    stat = supervisor.ProcessStat(f"77 ({name}) Z 42 {rest}\n".encode())
    assert stat.has_ended
    assert stat.parent == 42
    assert stat.start_ticks == 22


def test_descendants_are_found_at_every_depth(running: Running) -> None:
    below = supervisor.descendants(running.guard.pid)
    assert {running.supervisor.pid, running.command.pid, running.daemon} <= below.keys()
    assert running.guard.pid not in below
    assert supervisor.descendants(2**22 + 1) == {}


def test_a_log_goes_on_after_a_new_one_could_not_be_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 4)
    log = supervisor.Log(str(tmp_path / "log"))
    log.write(b"full")
    with monkeypatch.context() as patch:
        patch.setattr(supervisor.os, "open", fail)
        log.write(b"lost")
    log.write(b"more")
    os.close(log._fd)
    assert [(tmp_path / name).read_bytes() for name in ("log.1", "log")] == [b"full", b"more"]
