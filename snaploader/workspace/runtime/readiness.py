"""Readiness checks: whether what was started can be used, and waiting until it can or never will."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    translate_os_errors,
)
from snaploader.workspace.model import Readiness, parse_address, parse_url
from snaploader.workspace.runtime.contents import Folder
from snaploader.workspace.runtime.runs import Run, is_readable, read_log, read_run, wait_ended

MAX_TRY_S = 5.0
"""Longest one try."""

_SHELL = "/bin/sh"


@dataclass(frozen=True, slots=True)
class ProbedWorkspace:
    """What a readiness check is told of the workspace."""

    workspace_id: str
    target: str
    """As the workspace's `Readiness` says."""
    root: Path
    environment: Mapping[str, str]
    """That its command was started with."""


class ReadinessProbe(Protocol):
    """One try of a readiness check. Called on the waiting thread."""

    def __call__(self, workspace: ProbedWorkspace, timeout_s: float) -> str:
        """Return why the workspace is not ready, or nothing when it is. InvalidArgument ends the wait.

        Args:
            timeout_s: How long the try may take, at most `MAX_TRY_S`.
        """


def probe_none(workspace: ProbedWorkspace, timeout_s: float) -> str:  # noqa: ARG001
    return ""


def probe_tcp(workspace: ProbedWorkspace, timeout_s: float) -> str:
    """Ready when a connection to "host:port" is accepted."""
    address = parse_address(workspace.target)
    try:
        socket.create_connection(address, timeout_s).close()
    except OSError as error:
        return str(error)
    except UnicodeError as error:
        raise InvalidArgument(f"{workspace.target!r} is no address to connect to: {error}") from error
    return ""


def probe_http(workspace: ProbedWorkspace, timeout_s: float) -> str:
    """Ready when a GET of the URL is answered with a status of 200 to 399. Redirects are not followed."""
    target = parse_url(workspace.target)
    kind = http.client.HTTPSConnection if target.is_encrypted else http.client.HTTPConnection
    connection = kind(target.host, target.port, timeout=timeout_s)
    try:
        connection.request("GET", target.path)
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    except UnicodeError as error:
        raise InvalidArgument(f"{workspace.target!r} is no URL to get: {error}") from error
    finally:
        connection.close()
    return "" if 200 <= response.status <= 399 else f"HTTP status {response.status} {response.reason}"


def probe_command(workspace: ProbedWorkspace, timeout_s: float) -> str:
    """Ready when a shell command, run in the workspace's folder and environment, exits with 0."""
    try:
        process = subprocess.Popen(
            [_SHELL, "-c", workspace.target],
            cwd=workspace.root,
            env=workspace.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)  # such as a workspace that has removed its folder
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return f"it did not end within {timeout_s:g} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "" if status == 0 else f"exit status {status}"


PROBES: Mapping[str, ReadinessProbe] = MappingProxyType(
    {"none": probe_none, "tcp": probe_tcp, "http": probe_http, "command": probe_command}
)
"""The checks that are there without being given, by the kind in `Readiness`."""

_SHOWN_LOG_BYTES = 1000
_SHOWN_LOG_LINES = 10


class RunWatch:
    """The latest run of a workspace, watched until it is ready or has ended.

    FailedPrecondition: the workspace does not run. What the command leaves behind has `grace_s` to end.
    """

    def __init__(self, workspace_id: str, folder: Folder, grace_s: float) -> None:
        self._grace_s = grace_s
        self._workspace_id = workspace_id
        self._folder = folder
        run = self._read()
        if run is None:
            raise FailedPrecondition(f"workspace {workspace_id!r} does not run: start it first")
        self.run: Run = run

    def wait_ready(
        self,
        workspace: ProbedWorkspace,
        readiness: Readiness,
        probe: ReadinessProbe,
        timeout_s: float,
        cancelled: threading.Event | None,
    ) -> None:
        """Try until the probe finds the workspace ready; see `Runtime.wait_ready`."""
        name = f"workspace {self._workspace_id!r}"
        give_up_at = time.monotonic() + timeout_s
        tries, reason = 0, "there was no time to try"
        with nullcontext() if self.run.command is None else self.run.command.pidfd() as command:
            while True:
                self._check_running(command)
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
                    self._check_running(command)  # what answered may have been someone else
                    return
                tries += 1
                if tries == 1 or time.monotonic() < give_up_at:
                    reason = found  # one that was cut short by the deadline says less than the one before
                pause_s = max(0.0, min(readiness.interval_s, give_up_at - time.monotonic()))
                if cancelled is not None:
                    cancelled.wait(pause_s)
                elif command is not None:
                    is_readable(command, pause_s)
                else:
                    time.sleep(pause_s)

    def _check_running(self, command: int | None) -> None:
        """Raise FailedPrecondition when the run has ended; it says how. `command` is the pidfd of its own."""
        if self.run.command is None:
            now = self._read()
            has_ended = now is None or now.token != self.run.token or not now.is_running
        else:
            has_ended = command is None or is_readable(command, 0)
        if not has_ended:
            return
        # What the command left may still be on its way out; only then is the end written down.
        wait_ended(self.run.processes, self._grace_s + 1)
        now = self._read()
        how = "ended"
        if now is not None and now.exit_code is not None:
            how = f"ended with exit code {now.exit_code}"
            if now.exit_code < 0:
                how = f"was ended by signal {-now.exit_code}"
        with translate_os_errors(f"cannot read the log of workspace {self._workspace_id!r}"):
            text = read_log(self._folder, _SHOWN_LOG_BYTES).decode(errors="replace").strip()
        lines = text.splitlines()[-_SHOWN_LOG_LINES:]
        printed = "the last that it printed: " + "\n".join(lines) if lines else "it printed nothing"
        raise FailedPrecondition(f"the command of workspace {self._workspace_id!r} {how}; {printed}")

    def _read(self) -> Run | None:
        with translate_os_errors(f"cannot look at workspace {self._workspace_id!r}"):
            return read_run(self._folder)
