"""Runs of a workspace's command: what is written down of them, their processes, and how they are ended.

A run's supervisor writes both of its files, or whoever finds it gone does. See
`snaploader.workspace.runtime.supervisor`.

A pid alone is used again, so a process is known by its pid, the clock tick at which it began and the boot of
the host, which never change. psutil tells the time of its beginning instead, which moves when the host's
clock is set; so what is needed of /proc is read by the supervisor's functions, which cannot use psutil.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import select
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from snaploader._environment import read_boot_id
from snaploader.errors import DataLoss, DeadlineExceeded
from snaploader.files import closing_fd, replace_file
from snaploader.workspace.runtime.contents import Folder, read_file
from snaploader.workspace.runtime.protocol import StopOutcome
from snaploader.workspace.runtime.supervisor import descendants, read_stat, write_end

RUN_VARIABLE = "WORKSPACE_RUN"
"""Environment variable with the token of the run: processes are found by it whose supervisor was killed."""

_KILL_TIMEOUT_S = 10.0
"""How long killed processes may take to end; only one that waits for a broken device takes long."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that ran on this host, or runs."""

    pid: int
    start_ticks: int
    """When it began, in clock ticks since the host started."""
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process that has this pid now, or None when there is none or it waits for its parent."""
        stat = read_stat(pid)
        if stat is None or stat.has_ended:
            return None
        return cls(pid, stat.start_ticks, read_boot_id())

    @classmethod
    def current(cls) -> Self:
        identity = cls.of(os.getpid())
        assert identity is not None
        return identity

    @property
    def is_alive(self) -> bool:
        return self == ProcessIdentity.of(self.pid)

    @contextmanager
    def pidfd(self) -> Iterator[int | None]:
        """Give a descriptor that becomes readable when the process ends, pidfd_open(2); None when it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        with closing_fd(fd):
            # Checked after it was opened: from then on the descriptor means this process and no later one.
            yield fd if self.is_alive else None

    def send(self, number: int) -> None:
        with self.pidfd() as fd, suppress(ProcessLookupError):
            if fd is not None:
                signal.pidfd_send_signal(fd, number)


def wait_ended(processes: Iterable[ProcessIdentity], timeout_s: float) -> bool:
    """Wait until all processes have ended; returns whether they have in this time."""
    give_up_at = time.monotonic() + timeout_s
    with ExitStack() as opened:
        fds = [opened.enter_context(process.pidfd()) for process in processes]
        return all(fd is None or is_readable(fd, give_up_at - time.monotonic()) for fd in fds)


def is_readable(fd: int, timeout_s: float) -> bool:
    """Wait until a descriptor is readable; returns whether it is in this time. Looks once at the least."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(timeout_s * 1000))))


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workspace, from its start on."""

    token: str
    """Unique to the run."""
    boot_id: str
    started_at: datetime
    guard: ProcessIdentity | None = None
    """None, as the other two, when the workspace has no command."""
    supervisor: ProcessIdentity | None = None
    command: ProcessIdentity | None = None
    has_ended: bool = False
    """Whether its end was written down."""
    exit_code: int | None = None

    @property
    def processes(self) -> list[ProcessIdentity]:
        """The processes that are known, the outer ones first."""
        return [each for each in (self.guard, self.supervisor, self.command) if each is not None]

    @property
    def is_running(self) -> bool:
        if self.has_ended:
            return False
        if not self.processes:
            return self.boot_id == read_boot_id()
        return any(process.is_alive for process in self.processes)


def read_run(folder: Folder) -> Run | None:
    """Return the latest run, or None before the first. Raises OSError, and DataLoss for a damaged file."""
    try:
        run, end = _read(folder.run), _read(folder.end)
        if run is None:
            return None
        has_ended = end is not None and end["token"] == run["token"]
        boot_id = run["boot_id"]
        known = {name: run[name] for name in ("guard", "supervisor", "command") if name in run}
        return Run(
            token=run["token"],
            boot_id=boot_id,
            started_at=datetime.fromtimestamp(run["started_at_us"] / 1_000_000, UTC),
            **{name: ProcessIdentity(pid, ticks, boot_id) for name, (pid, ticks) in known.items()},
            has_ended=has_ended,
            exit_code=end["exit_code"] if end is not None and has_ended else None,
        )
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataLoss(
            f"{folder.run!r} or {folder.end!r} is damaged ({error!r}): end what still runs of the "
            "workspace, and remove both"
        ) from error


def new_token() -> str:
    return secrets.token_hex(16)


def write_run_without_command(folder: Folder) -> None:
    """Write down that a workspace without a command runs. Raises OSError."""
    now_us = time.time_ns() // 1000
    run = {"token": new_token(), "boot_id": read_boot_id(), "started_at_us": now_us}
    replace_file(folder.run, json.dumps(run).encode())


def read_log(folder: Folder, max_bytes: int) -> bytes:
    """Return the last bytes of the output of the latest runs. Raises OSError."""
    data = b""
    for path in (folder.log, f"{folder.log}.1"):
        with suppress(FileNotFoundError), open(path, "rb") as file:
            left_bytes = max_bytes - len(data)
            file.seek(max(0, os.fstat(file.fileno()).st_size - left_bytes))
            data = file.read(left_bytes) + data
    return data


def _read(path: str) -> dict[str, Any] | None:
    data = read_file(path)
    try:
        value = None if data is None else json.loads(data)
    except ValueError:
        return None  # cut by a power failure, which has ended the run too
    return None if value is None else dict(value)


def end_run(workspace_id: str, folder: Folder, timeout_s: float, *, force: bool) -> StopOutcome:
    """Stop the latest run, if it goes on; see `Runtime.stop`."""
    run = read_run(folder)
    if run is None or not run.is_running:
        was_left = run is not None and kill_leftovers(workspace_id, folder, run)
        return StopOutcome.KILLED if was_left else StopOutcome.NOT_RUNNING
    if not run.processes:
        write_end(folder.end, run.token, None)
        return StopOutcome.STOPPED
    outcome = StopOutcome.STOPPED
    if run.supervisor is not None:
        run.supervisor.send(signal.SIGTERM)
    if not wait_ended(run.processes, timeout_s):
        if not force:
            raise DeadlineExceeded(
                f"workspace {workspace_id!r} still runs {timeout_s:g} s after it was asked to stop: give it "
                "more time, or force it"
            )
        outcome = StopOutcome.KILLED
        _force(workspace_id, run)
    now = read_run(folder)
    was_left = now is not None and kill_leftovers(workspace_id, folder, now)
    return StopOutcome.KILLED if was_left else outcome


def kill_leftovers(workspace_id: str, folder: Folder, run: Run) -> bool:
    """Kill what a run left if nobody saw its end; returns whether there was anything."""
    if run.has_ended or run.is_running or run.boot_id != read_boot_id():
        return False
    give_up_at = time.monotonic() + _KILL_TIMEOUT_S
    found = False
    while marked := _marked(f"{RUN_VARIABLE}={run.token}".encode()):
        found = True
        _kill(workspace_id, marked, give_up_at)
    write_end(folder.end, run.token, None)
    return found


def _force(workspace_id: str, run: Run) -> None:
    outer = [process for process in (run.guard, run.supervisor) if process is not None]
    for process in outer:
        process.send(signal.SIGCONT)  # one that was stopped takes no other signal
    if run.supervisor is not None:
        run.supervisor.send(signal.SIGQUIT)
    if wait_ended(run.processes, _KILL_TIMEOUT_S):
        return
    give_up_at = time.monotonic() + _KILL_TIMEOUT_S
    while below := _below(outer):
        _kill(workspace_id, below, give_up_at)
    # They come last: as long as they live, what others orphan stays below them.
    _kill(workspace_id, outer, give_up_at)


def _below(roots: list[ProcessIdentity]) -> list[ProcessIdentity]:
    alive = [root for root in roots if root.is_alive]
    pids = {pid for root in alive for pid in descendants(root.pid)} - {root.pid for root in alive}
    return [process for pid in pids if (process := ProcessIdentity.of(pid)) is not None]


def _kill(workspace_id: str, processes: list[ProcessIdentity], give_up_at: float) -> None:
    for process in processes:
        process.send(signal.SIGKILL)
    if not wait_ended(processes, give_up_at - time.monotonic()):
        raise DeadlineExceeded(
            f"processes of workspace {workspace_id!r} did not end {_KILL_TIMEOUT_S:g} s after they were "
            "killed: they wait for a device, or belong to another user"
        )


def _marked(mark: bytes) -> list[ProcessIdentity]:
    """Find processes that have `mark`, a variable "NAME=value", in the environment they began with."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with (
            suppress(OSError),  # ended, or another user's
            open(f"/proc/{name}/environ", "rb", buffering=0) as file,
        ):
            has_mark = mark in file.read().split(b"\0")
            if has_mark and (process := ProcessIdentity.of(int(name))) is not None:
                found.append(process)
    return found
