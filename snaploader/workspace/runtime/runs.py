"""A run of a workspace's command: what is written down of it, and how it is ended.

Its supervisor writes both files, or whoever finds it gone. See `snaploader.workspace.runtime.supervisor`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from snaploader._environment import read_boot_id
from snaploader.errors import DataLoss, DeadlineExceeded
from snaploader.files import replace_file
from snaploader.workspace.runtime import supervisor
from snaploader.workspace.runtime.contents import Folder, read_file
from snaploader.workspace.runtime.processes import ProcessIdentity, kill_marked, kill_trees, wait_ended
from snaploader.workspace.runtime.protocol import StopOutcome

RUN_VARIABLE = "WORKSPACE_RUN"
"""Environment variable with the token of the run: processes are found by it whose supervisor was killed."""

_KILL_TIMEOUT_S = 10.0
"""How long killed processes may take to end; only one that waits for a broken device takes long."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workspace, from its start on."""

    token: str
    """Unique to the run."""
    boot_id: str
    started_at: datetime
    guard: ProcessIdentity | None
    """None, as the other two, when the workspace has no command."""
    supervisor: ProcessIdentity | None
    command: ProcessIdentity | None
    has_ended: bool = False
    """Whether its end was written down."""
    exit_code: int | None = None

    @property
    def processes(self) -> list[ProcessIdentity]:
        """The processes that are known, the outer ones first."""
        return [each for each in (self.guard, self.supervisor, self.command) if each is not None]

    @property
    def is_running(self) -> bool:
        """Whether the run goes on."""
        if self.has_ended:
            return False
        if not self.processes:
            return self.boot_id == read_boot_id()
        return any(process.is_alive for process in self.processes)

    @property
    def was_cut_off(self) -> bool:
        """Whether nobody saw its end, so that processes may be left."""
        return not self.has_ended and self.boot_id == read_boot_id() and not self.is_running


def read_run(folder: Folder) -> Run | None:
    """Return the latest run, or None before the first. Raises OSError, and DataLoss for a damaged file."""
    try:
        return _run_of(_read(folder.run), _read(folder.end))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataLoss(
            f"{folder.run!r} or {folder.end!r} is damaged ({error!r}): end what still runs of the "
            "workspace, and remove both"
        ) from error


def _run_of(run: dict[str, Any] | None, end: dict[str, Any] | None) -> Run | None:
    if run is None:
        return None
    has_ended = end is not None and end["token"] == run["token"]
    return Run(
        token=run["token"],
        boot_id=run["boot_id"],
        started_at=datetime.fromtimestamp(run["started_at_us"] / 1_000_000, UTC),
        guard=_identity(run, "guard"),
        supervisor=_identity(run, "supervisor"),
        command=_identity(run, "command"),
        has_ended=has_ended,
        exit_code=end["exit_code"] if end is not None and has_ended else None,
    )


def write_run_without_command(folder: Folder, token: str) -> None:
    """Write down that a workspace without a command runs. Raises OSError."""
    run = {
        "token": token,
        "boot_id": read_boot_id(),
        "started_at_us": time.time_ns() // 1000,
    }
    replace_file(folder.run, json.dumps(run).encode())


def write_end(folder: Folder, run: Run, exit_code: int | None) -> None:
    """Write down that a run ended. Raises OSError."""
    supervisor.write_end(folder.end, run.token, exit_code)


def read_log(folder: Folder, max_bytes: int) -> bytes:
    """Return the last bytes of the output of the latest runs. Raises OSError."""
    data = b""
    for path in (folder.log, f"{folder.log}.1"):
        if len(data) < max_bytes:
            data = _tail(path, max_bytes - len(data)) + data
    return data


def _tail(path: str, max_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
            return file.read(max_bytes)
    except FileNotFoundError:
        return b""


def _read(path: str) -> dict[str, Any] | None:
    data = read_file(path)
    try:
        value = None if data is None else json.loads(data)
    except ValueError:
        return None  # cut by a power failure, which has ended the run too
    return None if value is None else dict(value)


def _identity(run: dict[str, Any], name: str) -> ProcessIdentity | None:
    if name not in run:
        return None
    pid, start_ticks = run[name]
    return ProcessIdentity(pid, start_ticks, run["boot_id"])


def end_run(workspace_id: str, folder: Folder, run: Run, timeout_s: float, *, force: bool) -> StopOutcome:
    """Stop a run that has processes; see `Runtime.stop`."""
    outcome = StopOutcome.STOPPED
    if run.supervisor is not None:
        run.supervisor.send(signal.SIGTERM)
    if not wait_ended(run.processes, max(0.0, timeout_s)):
        if not force:
            raise DeadlineExceeded(
                f"workspace {workspace_id!r} still runs {timeout_s:g} s after it was asked to stop: give it "
                "more time, or force it"
            )
        outcome = StopOutcome.KILLED
        _kill(workspace_id, run)
    now = read_run(folder)
    if now is not None and not now.has_ended and kill_leftovers(workspace_id, folder, now):
        return StopOutcome.KILLED
    return outcome


def kill_leftovers(workspace_id: str, folder: Folder, run: Run) -> bool:
    """Kill what a run left whose supervisor and guard were killed; returns whether there was anything."""
    found, is_done = kill_marked(f"{RUN_VARIABLE}={run.token}".encode(), _KILL_TIMEOUT_S)
    if not is_done:
        raise _unkillable(workspace_id)
    write_end(folder, run, None)
    return found


def _kill(workspace_id: str, run: Run) -> None:
    outer = [process for process in (run.guard, run.supervisor) if process is not None]
    for process in outer:
        process.send(signal.SIGCONT)  # one that was stopped takes no other signal
    if run.supervisor is not None:
        run.supervisor.send(signal.SIGQUIT)
    if not wait_ended(run.processes, _KILL_TIMEOUT_S) and not kill_trees(outer, _KILL_TIMEOUT_S):
        raise _unkillable(workspace_id)


def _unkillable(workspace_id: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"processes of workspace {workspace_id!r} did not end {_KILL_TIMEOUT_S:g} s after they were killed: "
        "they wait for a device, or belong to another user"
    )
