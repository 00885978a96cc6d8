"""Readiness checks: whether what was started can be used."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import parse_address, parse_url

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
        """Why the workspace is not ready; empty when it is. InvalidArgument ends the wait.

        Args:
            timeout_s: How long the try may take, at most `MAX_TRY_S`.
        """
        ...


def probe_none(workspace: ProbedWorkspace, timeout_s: float) -> str:  # noqa: ARG001
    """Ready at once."""
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
