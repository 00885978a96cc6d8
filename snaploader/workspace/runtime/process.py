"""A runtime that needs no hypervisor: a workspace is a folder with a supervised command in it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from snaploader._environment import HOST, HostEnvironment, read_boot_id
from snaploader.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    translate_os_errors,
)
from snaploader.files import closing_fd
from snaploader.workspace.model import WorkspaceSpec
from snaploader.workspace.runtime import supervisor
from snaploader.workspace.runtime.contents import Folder, make_durable, volumes_of
from snaploader.workspace.runtime.folder import FolderRuntime, locked
from snaploader.workspace.runtime.protocol import DEFAULT_STOP_TIMEOUT_S, StopOutcome
from snaploader.workspace.runtime.readiness import PROBES, ProbedWorkspace, ReadinessProbe, RunWatch
from snaploader.workspace.runtime.runs import (
    RUN_VARIABLE,
    end_run,
    is_readable,
    kill_leftovers,
    new_token,
    read_log,
    read_run,
    write_run_without_command,
)

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where commands are looked for, unless the environment given says otherwise."""

_HANDSHAKE_TIMEOUT_S = 60.0
_MAX_ANSWER_BYTES = 1000


class ProcessRuntime(FolderRuntime):
    """Implements `Runtime` with folders and processes. Thread-safe; processes may share one root directory.

    A workspace's command runs with its root folder as the working directory, a durable directory /a/b being
    a/b in there; as the user who starts it, and free to do whatever that user may: this is no sandbox for
    code that is not trusted. Its environment is PATH (`DEFAULT_PATH`), HOME (the root folder), LANG
    (C.UTF-8), WORKSPACE_ID and WORKSPACE_RUN, then `environment`, then that of the workspace; nothing
    is inherited. Its umask is 022, its standard input is empty. What it prints goes to a log of
    at most 1 MiB, before which up to 1 MiB is kept.

    A run ends with its command: what that leaves behind is asked to end, and killed after `grace_s`.
    Processes cannot leave a run by becoming daemons.

    Args:
        root_directory: Where workspaces are kept; made if absent, for this user alone.
        checks: Readiness checks by kind, beside tcp, http and command.
        environment: For all commands.
        durable: Whether what was placed survives a power failure from the moment that `place` returns.
        index_placed: Whether the first capture after a `place` reads only what was changed since. Costs
            `place` 55 ms.
        grace_s: How long what a command leaves behind may take to end.
        interpreter: A Python 3.11 or later that runs the supervisors. Default: the one running.
    """

    def __init__(
        self,
        root_directory: str | os.PathLike[str],
        *,
        checks: Mapping[str, ReadinessProbe] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
        durable: bool = True,
        index_placed: bool = True,
        grace_s: float = 5.0,
        interpreter: str = "",
        _environment: HostEnvironment = HOST,
    ) -> None:
        taken = PROBES.keys() & checks.keys()
        if taken:
            raise InvalidArgument(f"a readiness check cannot be named {min(taken)!r}: there is one already")
        super().__init__(
            root_directory, durable=durable, index_placed=index_placed, _environment=_environment
        )
        self._probes = {**PROBES, **checks}
        self._environment = dict(environment)
        self._grace_s = grace_s
        self._interpreter = interpreter or sys.executable

    def start(self, spec: WorkspaceSpec) -> None:
        """See `Runtime.start`. Durable directories that are gone are made again."""
        workspace_id = spec.workspace_id
        with self._changing(workspace_id, f"cannot start workspace {workspace_id!r}") as lock:
            folder = self._existing(workspace_id)
            run = read_run(folder)
            if run is not None and run.is_running:
                return
            if run is not None:
                kill_leftovers(workspace_id, folder, run)
            make_durable(folder, volumes_of(spec), None)  # what was put in place of one is let be
            if spec.command:
                self._launch(spec, folder, lock)
            else:
                write_run_without_command(folder)

    def stop(
        self, workspace_id: str, *, timeout_s: float = DEFAULT_STOP_TIMEOUT_S, force: bool = True
    ) -> StopOutcome:
        """See `Runtime.stop`. Asks with SIGTERM, sent to every process of the workspace."""
        if self._find(workspace_id) is None:
            return StopOutcome.NOT_RUNNING
        with self._changing(workspace_id, f"cannot stop workspace {workspace_id!r}"):
            folder = self._find(workspace_id)
            if folder is None:
                return StopOutcome.NOT_RUNNING
            return end_run(workspace_id, folder, timeout_s, force=force)

    def wait_ready(
        self, spec: WorkspaceSpec, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> None:
        """See `Runtime.wait_ready`. One try takes up to 5 s, and is not interrupted by `cancelled`."""
        readiness = spec.readiness
        probe = self._probes.get(readiness.kind)
        if probe is None:
            raise InvalidArgument(
                f"there is no readiness check of kind {readiness.kind!r}: use {', '.join(self._probes)}, or "
                "give the runtime one of that name"
            )
        timeout_s = readiness.timeout_s if timeout_s is None else timeout_s
        folder = self._existing(spec.workspace_id)
        watch = RunWatch(spec.workspace_id, folder, self._grace_s)
        environment = self._environment_of(spec, folder, watch.run.token)
        workspace = ProbedWorkspace(spec.workspace_id, readiness.target, Path(folder.root), environment)
        watch.wait_ready(workspace, readiness, probe, timeout_s, cancelled)

    def log_tail(self, workspace_id: str, max_bytes: int = 1 << 16) -> bytes:
        """Return the last bytes that a workspace printed in its latest runs. NotFound as `root`."""
        with translate_os_errors(f"cannot read the log of workspace {workspace_id!r}"):
            return read_log(self._existing(workspace_id), max_bytes)

    def sweep(self) -> list[str]:
        """See `Runtime.sweep`. Also kills what is left of runs whose supervisor was killed."""
        swept = super().sweep()
        for workspace_id in self.workspaces():
            folder = self._layout.folder(workspace_id)
            with (
                translate_os_errors(f"cannot clean up workspace {workspace_id!r}"),
                locked(self._layout.lock(workspace_id), wait=False) as held,
            ):
                run = read_run(folder) if held is not None else None
                if run is not None and kill_leftovers(workspace_id, folder, run):
                    swept.append(workspace_id)
        return sorted(swept)

    def _environment_of(self, spec: WorkspaceSpec, folder: Folder, token: str) -> dict[str, str]:
        return {
            "PATH": DEFAULT_PATH,
            "HOME": folder.root,
            "LANG": "C.UTF-8",
            "WORKSPACE_ID": spec.workspace_id,
            **self._environment,
            **spec.environment,
            RUN_VARIABLE: token,
        }

    def _launch(self, spec: WorkspaceSpec, folder: Folder, lock: int) -> None:
        """Start the command under a supervisor of its own; returns when it runs and that is written down.

        Until then the supervisor holds the workspace's lock too, by its descriptor.
        """
        token = new_token()
        environment = self._environment_of(spec, folder, token)
        orders = _encode_orders(spec, folder, token, environment, self._grace_s)
        handshake, answer = os.pipe2(os.O_CLOEXEC)
        with closing_fd(handshake):
            with closing_fd(answer):
                self._spawn(orders, folder, answer, lock)
            if not is_readable(handshake, _HANDSHAKE_TIMEOUT_S):
                raise DeadlineExceeded(
                    f"the supervisor of workspace {spec.workspace_id!r} gave no answer within "
                    f"{_HANDSHAKE_TIMEOUT_S:g} s; see {folder.log!r}"
                )
            reply = os.read(handshake, _MAX_ANSWER_BYTES).decode()
            self._host.after_step("start.answered")
        if reply == "ok":
            return
        code, _, what = reply.partition(" ")
        if not code.isdecimal():
            raise Internal(f"the supervisor of workspace {spec.workspace_id!r} failed; see {folder.log!r}")
        if what != supervisor.NOT_EXECUTED:
            raise OSError(int(code), os.strerror(int(code)), folder.run)
        raise FailedPrecondition(
            f"command {spec.command[0]!r} of workspace {spec.workspace_id!r} {what}: "
            f"{os.strerror(int(code))}. A path is relative to {folder.root!r}; a name is looked for in "
            f"{environment['PATH']!r}"
        )

    def _spawn(self, orders: bytes, folder: Folder, answer: int, lock: int) -> None:
        with (
            closing_fd(
                os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            ) as log,
            translate_os_errors("cannot start a supervisor", absent=FailedPrecondition),
        ):
            # The process started here ends as soon as it has left the guard and the supervisor behind, who
            # are thereby not this process's children.
            first = subprocess.Popen(
                [self._interpreter, "-I", "-S", supervisor.__file__, str(answer), str(lock)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=folder.root,
                env={},
                pass_fds=(answer, lock),
                start_new_session=True,
            )
        try:
            self._host.after_step("start.spawned")
            first.communicate(orders)
            self._host.after_step("start.ordered")
        except BaseException:
            first.kill()
            first.wait()
            raise


def _encode_orders(
    spec: WorkspaceSpec, folder: Folder, token: str, environment: Mapping[str, str], grace_s: float
) -> bytes:
    for name in environment:
        if not name or "=" in name:
            raise InvalidArgument(
                f"{name!r} cannot be an environment variable of workspace {spec.workspace_id!r}"
            )
    variables = [f"{name}={value}" for name, value in environment.items()]
    fields = [folder.run, folder.end, folder.log, token, read_boot_id(), str(grace_s)]
    fields += [str(len(spec.command)), *spec.command, *variables]
    fields.insert(0, str(len(fields)))  # so that orders cut short by a starter's end are not followed
    for field in fields:
        if "\0" in field:
            raise InvalidArgument(
                f"{field[:80]!r} cannot be given to a process of workspace {spec.workspace_id!r}: it holds a "
                "NUL character"
            )
    return b"".join(os.fsencode(field) + b"\0" for field in fields)
