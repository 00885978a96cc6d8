"""A runtime without processes: real folders and captures, and a file that says what "runs"."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from snaploader._environment import HOST, HostEnvironment
from snaploader.errors import Cancelled, DeadlineExceeded, FailedPrecondition
from snaploader.workspace.model import Scope, WorkspaceSpec
from snaploader.workspace.runtime.folder import FolderRuntime
from snaploader.workspace.runtime.protocol import DEFAULT_STOP_TIMEOUT_S, Capture, StopOutcome
from snaploader.workspace.runtime.runs import read_run, write_run_without_command
from snaploader.workspace.runtime.supervisor import write_end

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_TIMEOUT_S = 30.0
"""How long a gate and who waits at it wait, unless told otherwise."""


class RuntimeGate:
    """Holds the calls that come to it until it is opened. Thread-safe."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_open = False
        self._arrived = 0

    def wait_reached(self, timeout_s: float = DEFAULT_TIMEOUT_S, calls: int = 1) -> bool:
        """Wait until that many calls have arrived; False when they have not in this time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._arrived >= calls, timeout_s)

    def open(self) -> None:
        """Let the held calls go on, and all later ones pass."""
        with self._condition:
            self._is_open = True
            self._condition.notify_all()

    def pass_through(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Arrive, and wait until the gate is open. TimeoutError when it is not in this time."""
        with self._condition:
            self._arrived += 1
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._is_open, timeout_s):
                raise TimeoutError(f"a gate was not opened within {timeout_s:g} s")


@dataclass(frozen=True, slots=True)
class RuntimeCall:
    """A call that a fake runtime received."""

    method: str
    workspace_id: str = ""
    """Empty for calls that are about none."""


def _scripted(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Note the calls of a method, and let them wait or fail as the script says."""

    @wraps(method)
    def call(runtime: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        about: Any = next(iter((*args, *kwargs.values())), "")
        workspace_id = about.workspace_id if isinstance(about, WorkspaceSpec) else about
        with runtime._called(method.__name__, workspace_id):
            return method(runtime, *args, **kwargs)

    return call


class FakeRuntime(FolderRuntime):
    """Implements `snaploader.workspace.runtime.Runtime` without running anything. Thread-safe.

    What "runs" stands in the folder, so it goes on when this object or its process ends, and other
    objects on the same folder see it. `root(workspace_id)` is where a test reads and writes files.

    Args:
        directory: A scratch folder. Nothing in it outlives a power failure, for speed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, _environment: HostEnvironment = HOST) -> None:
        super().__init__(directory, durable=False, index_placed=False, _environment=_environment)
        self.keeps_memory = False
        """Whether it is to say that it does; see `Runtime.keeps_memory`."""
        self.scopes = frozenset(Scope)
        """What it is to say that it can capture; see `Runtime.scopes`."""
        self.kept: dict[str, tuple[str, ...]] = {}
        """What it is to say that it keeps of workspaces, by their ids; see `Runtime.snapshots`."""
        self.calls: list[RuntimeCall] = []
        """Every call received, in order of arrival; those of `status` are left out."""
        self._script = threading.Lock()
        self._failures: dict[str, deque[tuple[BaseException, bool]]] = defaultdict(deque)
        self._gates: dict[str, deque[RuntimeGate]] = defaultdict(deque)
        self._unready: set[str] = set()
        self._stubborn: set[str] = set()

    def fail_next(
        self, method: str, error: BaseException, *, times: int = 1, after_effect: bool = False
    ) -> None:
        """Let the next calls of a method raise `error`.

        Args:
            times: How many calls.
            after_effect: Raise when the work is done, instead of doing nothing. For `capture`: when its
                block is left.
        """
        _check_method(method)
        with self._script:
            self._failures[method].extend([(error, after_effect)] * times)

    def hold_next(self, method: str) -> RuntimeGate:
        """Let the next call of a method wait, before it does anything, until the gate is opened."""
        _check_method(method)
        gate = RuntimeGate()
        with self._script:
            self._gates[method].append(gate)
        return gate

    def set_ready(self, workspace_id: str, is_ready: bool = True) -> None:
        """Say whether a workspace becomes ready once started, as all do at first.

        If not, `wait_ready` fails: at once, or in its time when it has an event to be cancelled by.
        """
        (self._unready.discard if is_ready else self._unready.add)(workspace_id)

    def ignore_stop(self, workspace_id: str) -> None:
        """Let the workspace stop only by force from now on."""
        self._stubborn.add(workspace_id)

    def end(self, workspace_id: str, exit_code: int = 1) -> None:
        """Let the workspace's command end by itself."""
        folder = self._existing(workspace_id)
        run = read_run(folder)
        if run is not None:
            write_end(folder.end, run.token, exit_code)

    @_scripted
    def start(self, spec: WorkspaceSpec) -> None:
        folder = self._existing(spec.workspace_id)
        if not self._is_running(spec.workspace_id):
            write_run_without_command(folder)

    @_scripted
    def wait_ready(
        self, spec: WorkspaceSpec, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> None:
        name = f"workspace {spec.workspace_id!r}"
        timeout_s = spec.readiness.timeout_s if timeout_s is None else timeout_s
        self._existing(spec.workspace_id)
        if not self._is_running(spec.workspace_id):
            raise FailedPrecondition(f"{name} does not run")
        if spec.workspace_id not in self._unready:
            return
        if cancelled is not None and cancelled.wait(timeout_s):
            raise Cancelled(f"waiting for {name} was called off")
        raise DeadlineExceeded(f"{name} was not ready within {timeout_s:g} s: it is set not to be")

    @_scripted
    def stop(
        self, workspace_id: str, *, timeout_s: float = DEFAULT_STOP_TIMEOUT_S, force: bool = True
    ) -> StopOutcome:
        if self._find(workspace_id) is None or not self._is_running(workspace_id):
            return StopOutcome.NOT_RUNNING
        is_stubborn = workspace_id in self._stubborn
        if is_stubborn and not force:
            raise DeadlineExceeded(f"workspace {workspace_id!r} did not stop within {timeout_s:g} s")
        self.end(workspace_id, -9 if is_stubborn else -15)
        return StopOutcome.KILLED if is_stubborn else StopOutcome.STOPPED

    @contextmanager
    def capture(self, spec: WorkspaceSpec, scope: Scope) -> Iterator[Capture]:
        """See `Runtime.capture`."""
        with self._called("capture", spec.workspace_id), super().capture(spec, scope) as captured:
            yield captured

    def snapshots(self, workspace_id: str) -> tuple[str, ...]:
        return self.kept.get(workspace_id, ())

    create = _scripted(FolderRuntime.create)
    continue_on = _scripted(FolderRuntime.continue_on)
    place = _scripted(FolderRuntime.place)
    remove = _scripted(FolderRuntime.remove)
    workspaces = _scripted(FolderRuntime.workspaces)
    sweep = _scripted(FolderRuntime.sweep)
    attach = _scripted(FolderRuntime.attach)
    detach = _scripted(FolderRuntime.detach)
    attachments = _scripted(FolderRuntime.attachments)

    @contextmanager
    def _called(self, method: str, workspace_id: str = "") -> Iterator[None]:
        with self._script:
            self.calls.append(RuntimeCall(method, workspace_id))
            gate = self._gates[method].popleft() if self._gates[method] else None
            error, is_after = self._failures[method].popleft() if self._failures[method] else (None, False)
        if gate is not None:
            gate.pass_through()
        if error is not None and not is_after:
            raise error
        yield
        if error is not None:
            raise error


def _check_method(method: str) -> None:
    if method.startswith("_") or not callable(getattr(FakeRuntime, method, None)):
        raise ValueError(f"a runtime has no method {method!r}")
