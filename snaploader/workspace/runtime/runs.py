"""What is written down of a workspace's latest run, by its supervisor or in its place."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from snaploader.errors import DataLoss
from snaploader.workspace.runtime import supervisor
from snaploader.workspace.runtime.files import read_file, replace_file
from snaploader.workspace.runtime.layout import Folder
from snaploader.workspace.runtime.processes import ProcessIdentity


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
        """Those that are known, the outer ones first."""
        return [each for each in (self.guard, self.supervisor, self.command) if each is not None]

    @property
    def is_running(self) -> bool:
        """Whether it goes on."""
        if self.has_ended:
            return False
        if not self.processes:
            return self.boot_id == supervisor.read_boot_id()
        return any(process.is_alive for process in self.processes)

    @property
    def was_cut_off(self) -> bool:
        """Whether nobody saw its end, so that processes may be left."""
        return not self.has_ended and self.boot_id == supervisor.read_boot_id() and not self.is_running


def read_run(folder: Folder) -> Run | None:
    """The latest run; None before the first. Raises OSError, and DataLoss when what is there is no run."""
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
    """Write down that a workspace runs that has no command. Raises OSError."""
    run = {
        "token": token,
        "boot_id": supervisor.read_boot_id(),
        "started_at_us": time.time_ns() // 1000,
    }
    replace_file(folder.run, json.dumps(run).encode())


def write_end(folder: Folder, run: Run, exit_code: int | None) -> None:
    """Write down that a run ended. Raises OSError."""
    supervisor.write_end(folder.end, run.token, exit_code)


def read_log(folder: Folder, max_bytes: int) -> bytes:
    """The last bytes of the output of the latest runs. Raises OSError."""
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
