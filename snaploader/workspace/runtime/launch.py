"""Starting a workspace's command under its supervisor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping

from snaploader.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    translate_os_errors,
)
from snaploader.workspace.model import WorkspaceSpec
from snaploader.workspace.runtime import supervisor
from snaploader.workspace.runtime.layout import Folder
from snaploader.workspace.runtime.processes import is_readable

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where commands are looked for, unless the environment given says otherwise."""

RUN_VARIABLE = "WORKSPACE_RUN"
"""Environment variable with the token of the run: processes are found by it whose supervisor was killed."""

_HANDSHAKE_TIMEOUT_S = 60.0
_MAX_ANSWER_BYTES = 1000


def environment_of(
    spec: WorkspaceSpec, folder: Folder, token: str, common: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of a workspace's command: nothing is inherited."""
    return {
        "PATH": DEFAULT_PATH,
        "HOME": folder.root,
        "LANG": "C.UTF-8",
        "WORKSPACE_ID": spec.workspace_id,
        **common,
        **spec.environment,
        RUN_VARIABLE: token,
    }


def launch(
    spec: WorkspaceSpec,
    folder: Folder,
    token: str,
    environment: Mapping[str, str],
    *,
    lock: int,
    grace_s: float,
    interpreter: str,
    after_step: Callable[[str], None],
) -> None:
    """Start the command under a supervisor of its own; returns when it runs and that is written down.

    Args:
        lock: Descriptor of the workspace's lock, which the supervisor holds too until then.
        grace_s: How long processes may take to end that outlive the command.
        interpreter: Path of the Python that runs it.

    Raises:
        FailedPrecondition: The command cannot be executed.
        DeadlineExceeded: The supervisor does not answer.
        OSError: The run cannot be written down.
    """
    orders = _encode_orders(spec, folder, token, environment, grace_s)
    handshake, answer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            _spawn(orders, folder, answer, lock, interpreter, after_step)
        finally:
            os.close(answer)
        if not is_readable(handshake, _HANDSHAKE_TIMEOUT_S):
            raise DeadlineExceeded(
                f"the supervisor of workspace {spec.workspace_id!r} gave no answer within "
                f"{_HANDSHAKE_TIMEOUT_S:g} s; see {folder.log!r}"
            )
        reply = os.read(handshake, _MAX_ANSWER_BYTES).decode()
        after_step("start.answered")
    finally:
        os.close(handshake)
    if reply == "ok":
        return
    code, _, what = reply.partition(" ")
    if not code.isdecimal():
        raise Internal(f"the supervisor of workspace {spec.workspace_id!r} failed; see {folder.log!r}")
    if what != supervisor.NOT_EXECUTED:
        raise OSError(int(code), os.strerror(int(code)), folder.run)
    raise FailedPrecondition(
        f"command {spec.command[0]!r} of workspace {spec.workspace_id!r} {what}: {os.strerror(int(code))}. "
        f"A path is relative to {folder.root!r}; a name is looked for in {environment['PATH']!r}"
    )


def _spawn(
    orders: bytes, folder: Folder, answer: int, lock: int, interpreter: str, after_step: Callable[[str], None]
) -> None:
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # The process started here ends as soon as it has left the guard and the supervisor behind, who
        # are thereby not this process's children.
        with translate_os_errors("cannot start a supervisor", absent=FailedPrecondition):
            first = subprocess.Popen(
                [interpreter, "-I", "-S", supervisor.__file__, str(answer), str(lock)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=folder.root,
                env={},
                pass_fds=(answer, lock),
                start_new_session=True,
            )
    finally:
        os.close(log)
    try:
        after_step("start.spawned")
        first.communicate(orders)
        after_step("start.ordered")
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
    fields = [folder.run, folder.end, folder.log, token, str(grace_s)]
    fields += [str(len(spec.command)), *spec.command, *variables]
    fields.insert(0, str(len(fields)))  # so that orders cut short by a starter's end are not followed
    for field in fields:
        if "\0" in field:
            raise InvalidArgument(
                f"{field[:80]!r} cannot be given to a process of workspace {spec.workspace_id!r}: it holds a "
                "NUL character"
            )
    return b"".join(os.fsencode(field) + b"\0" for field in fields)
