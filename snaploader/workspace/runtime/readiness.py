"""Waiting until a workspace is ready, or cannot become so."""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Self

from snaploader.errors import Cancelled, DeadlineExceeded, FailedPrecondition, translate_os_errors
from snaploader.workspace.model import Readiness
from snaploader.workspace.runtime import runs
from snaploader.workspace.runtime.layout import Folder
from snaploader.workspace.runtime.probes import MAX_TRY_S, ProbedWorkspace, ReadinessProbe
from snaploader.workspace.runtime.processes import is_readable, wait_ended
from snaploader.workspace.runtime.runs import Run

_SHOWN_LOG_BYTES = 1000
_SHOWN_LOG_LINES = 10


class RunWatch:
    """Notices the end of a workspace's run. A context manager.

    Args:
        grace_s: How long what the command leaves behind may take to end.

    Raises:
        FailedPrecondition: The workspace does not run.
    """

    def __init__(self, workspace_id: str, folder: Folder, grace_s: float) -> None:
        self._grace_s = grace_s
        self._workspace_id = workspace_id
        self._folder = folder
        run = self._read()
        if run is None:
            raise FailedPrecondition(f"workspace {workspace_id!r} does not run: start it first")
        self.run: Run = run
        self._fd = None if run.command is None else run.command.open()

    def check(self) -> None:
        """FailedPrecondition when the run has ended; says how."""
        if self._has_ended:
            raise self._error()

    def pause(self, time_s: float, cancelled: threading.Event | None) -> None:
        """Wait that long, or less when there is something to notice."""
        if cancelled is not None:
            cancelled.wait(time_s)
        elif self._fd is not None:
            is_readable(self._fd, time_s)
        else:
            time.sleep(time_s)

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _has_ended(self) -> bool:
        if self.run.command is None:
            now = self._read()
            return now is None or now.token != self.run.token or not now.is_running
        return self._fd is None or is_readable(self._fd, 0)

    def _error(self) -> FailedPrecondition:
        # What the command left may still be on its way out; only then is the end written down.
        wait_ended(self.run.processes, self._grace_s + 1)
        now = self._read()
        how = "ended"
        if now is not None and now.exit_code is not None:
            how = f"ended with exit code {now.exit_code}"
            if now.exit_code < 0:
                how = f"was ended by signal {-now.exit_code}"
        return FailedPrecondition(
            f"the command of workspace {self._workspace_id!r} {how}{self._last_lines()}"
        )

    def _last_lines(self) -> str:
        with translate_os_errors(f"cannot read the log of workspace {self._workspace_id!r}"):
            text = runs.read_log(self._folder, _SHOWN_LOG_BYTES).decode(errors="replace").strip()
        lines = text.splitlines()[-_SHOWN_LOG_LINES:]
        return "; it printed nothing" if not lines else "; the last that it printed: " + "\n".join(lines)

    def _read(self) -> Run | None:
        with translate_os_errors(f"cannot look at workspace {self._workspace_id!r}"):
            return runs.read_run(self._folder)


def wait_ready(
    watch: RunWatch,
    workspace: ProbedWorkspace,
    readiness: Readiness,
    probe: ReadinessProbe,
    timeout_s: float,
    cancelled: threading.Event | None,
) -> None:
    """Try until the probe has nothing against it; see `Runtime.wait_ready`."""
    name = f"workspace {workspace.workspace_id!r}"
    give_up_at = time.monotonic() + timeout_s
    tries, reason = 0, "there was no time to try"
    while True:
        watch.check()
        if cancelled is not None and cancelled.is_set():
            raise Cancelled(f"waiting for {name} to be ready was called off")
        left_s = give_up_at - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(
                f"{name} was not ready within {timeout_s:g} s. Its readiness check, {readiness.kind} "
                f"{readiness.target!r}, failed {tries} times, the last time with: {reason}"
            )
        found = probe(workspace, min(left_s, MAX_TRY_S))
        if not found:
            watch.check()  # what answered may have been someone else
            return
        tries += 1
        if tries == 1 or time.monotonic() < give_up_at:
            reason = found  # one that was cut short by the deadline says less than the one before
        watch.pause(max(0.0, min(readiness.interval_s, give_up_at - time.monotonic())), cancelled)
