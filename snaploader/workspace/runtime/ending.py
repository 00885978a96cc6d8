"""Ending a workspace's run: asking first, then by force, until nothing of it is left."""

from __future__ import annotations

import signal

from snaploader.errors import DeadlineExceeded
from snaploader.workspace.runtime import runs
from snaploader.workspace.runtime.launch import RUN_VARIABLE
from snaploader.workspace.runtime.layout import Folder
from snaploader.workspace.runtime.processes import kill_marked, kill_trees, wait_ended
from snaploader.workspace.runtime.protocol import StopOutcome
from snaploader.workspace.runtime.runs import Run

_KILL_TIMEOUT_S = 10.0
"""How long killed processes may take to end; only one that waits for a broken device takes long."""


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
    now = runs.read_run(folder)
    if now is not None and not now.has_ended and kill_leftovers(workspace_id, folder, now):
        return StopOutcome.KILLED
    return outcome


def kill_leftovers(workspace_id: str, folder: Folder, run: Run) -> bool:
    """Kill what a run left whose supervisor and guard were both killed; whether there was anything."""
    found, is_done = kill_marked(f"{RUN_VARIABLE}={run.token}".encode(), _KILL_TIMEOUT_S)
    if not is_done:
        raise _unkillable(workspace_id)
    runs.write_end(folder, run, None)
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
