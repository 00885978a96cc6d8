"""The interface between workspaces and what runs them: processes, containers, virtual machines.

What a runtime may rely on:

* Calls that change one workspace come one at a time; calls on different workspaces, and `status`, come at
  any time from any thread. Several processes may use one runtime's state at once.
* A caller may be killed at any moment. Each call must leave a state from which the next call goes on, in
  this process or another: the workspace as it was before the call, or as it is after it.

What it must do:

* A started workspace keeps running when the process that started it ends, and others see it and stop it.
* A stopped workspace's state does not change by itself, so a capture is consistent.
* A token that `place` was given and `status` tells is as durable as what was placed.

`snaploader.workspace.testing.RUNTIME_CHECKS` holds any implementation to this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from cow import COWStore
from snaploader.loader import DirectorySource, ProgressCallback, Snapshot, SnapshotLoader
from snaploader.workspace.model import Scope, WorkspaceSpec

DEFAULT_STOP_TIMEOUT_S = 10.0
"""How long a workspace may take to stop before it is forced to."""

Attachment: TypeAlias = COWStore | Path
"""A disk or a memory file: a store of this process, or the path of a regular file."""


class StopOutcome(StrEnum):
    """How a workspace came to stop."""

    STOPPED = "stopped"
    """By itself, when asked to."""
    KILLED = "killed"
    """By force."""
    NOT_RUNNING = "not-running"
    """It did not run."""


@dataclass(frozen=True, slots=True)
class RuntimeStatus:
    """What a runtime knows of a workspace at one moment."""

    workspace_id: str
    exists: bool = False
    """Whether the runtime holds state of it."""
    is_running: bool = False
    """Whether it was started, and neither was stopped nor ended by itself. One without a command runs until
    it is stopped or the host restarts."""
    pid: int | None = None
    """Of its command on this host, while it runs; None where there is no such process."""
    exit_code: int | None = None
    """How its last run ended: the exit status, or the negative number of the signal. None while it runs,
    before the first run, and when nobody saw the end."""
    started_at: datetime | None = None
    """When its latest run began; UTC."""
    placed: str = ""
    """The token of the last `place`; empty: none since it was created."""


@dataclass(frozen=True, slots=True)
class Capture:
    """A stopped workspace's content: arguments of `SnapshotLoader.cache_snapshot`. Valid within its block."""

    files: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    chunked_files: Mapping[str, COWStore | str | os.PathLike[str]] = field(default_factory=dict)
    directories: Mapping[str, DirectorySource] = field(default_factory=dict)


@runtime_checkable
class Runtime(Protocol):
    """Runs workspaces on this host, and captures and replaces their state. Thread-safe.

    All methods raise InvalidArgument for what is no workspace id. Unless they say otherwise, they raise
    NotFound when the runtime holds no state of the workspace.
    """

    @property
    def keeps_memory(self) -> bool:
        """Whether a workspace that is placed from a Full snapshot goes on where it was, with its memory.

        Where it does not, its process starts afresh, and is waited for until it is ready.
        """

    @property
    def scopes(self) -> Collection[Scope]:
        """The scopes that it can capture and place. A policy that asks for another is refused when set."""

    def create(self, spec: WorkspaceSpec, source: str | os.PathLike[str] | None = None) -> None:
        """Make the state of a new workspace: its durable directories, and the content of `source`.

        Args:
            source: A folder whose content the workspace begins with; it is copied.

        Raises:
            InvalidArgument: the volumes cannot be, or `source` holds something else in their place.
            FailedPrecondition: the runtime holds state of this workspace already.
            NotFound: `source` is not there.
        """

    def start(self, spec: WorkspaceSpec) -> None:
        """Start the workspace; returns when it runs, ready or not. Nothing happens when it runs already.

        Raises:
            FailedPrecondition: its command cannot be started.
        """

    def wait_ready(
        self, spec: WorkspaceSpec, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> None:
        """Return when the workspace's readiness check says that it is ready.

        Args:
            timeout_s: Instead of that of the check.
            cancelled: Ends the wait when it is set.

        Raises:
            DeadlineExceeded: it was not ready in time; says what was tried and how that failed last.
            FailedPrecondition: it does not run, or ended meanwhile; says how.
            InvalidArgument: the runtime has no check of that kind.
            Cancelled: `cancelled` was set.
        """

    def stop(
        self, workspace_id: str, *, timeout_s: float = DEFAULT_STOP_TIMEOUT_S, force: bool = True
    ) -> StopOutcome:
        """Ask the workspace to stop; returns when nothing of it runs any more.

        One that the runtime does not know is not running.

        Args:
            timeout_s: How long it may take.
            force: Kill what still runs then. Without, it goes on running.

        Raises:
            DeadlineExceeded: it still runs after `timeout_s`, and `force` was not given; or it cannot
                be killed.
        """

    def status(self, workspace_id: str) -> RuntimeStatus:
        """Return what is known of the workspace now; an unknown one does not exist."""

    def capture(self, spec: WorkspaceSpec, scope: Scope) -> AbstractContextManager[Capture]:
        """Give the content of a stopped workspace, which is saved within the block.

        `Scope.DATA` holds the volumes alone, each under the name "volume.<volume's name>"; `Scope.FULL`
        holds all that `place` needs to bring back the whole.

        Raises:
            FailedPrecondition: it runs; or something that was put in place of a durable directory, or an
                attachment of another process, cannot be captured.
        """

    def continue_on(self, spec: WorkspaceSpec, runtime_name: str) -> None:
        """Go on, on top of what was captured and saved under `runtime_name`.

        Called between a capture and the next start. A folder goes on by itself; a machine gets a new layer
        above that snapshot.
        """

    def place(
        self,
        spec: WorkspaceSpec,
        loader: SnapshotLoader,
        snapshot: Snapshot,
        *,
        base: Snapshot | None = None,
        token: str,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Replace the whole state of a stopped or new workspace by a snapshot's: all of it, or nothing.

        Args:
            loader: Fetches the content. It must stay open while the attachments are used that come from
                the snapshot.
            snapshot: Of scope Full or Data. A Data one brings back the volumes.
            base: Where all else comes from under a Data snapshot; None: there is nothing else.
            token: What `status` says of the workspace from then on, so that a caller can tell after a
                crash whether the state was replaced. Not empty.

        Raises:
            FailedPrecondition: the workspace runs; or the snapshot does not fit it.
            NotFound, DataLoss, Unavailable: content cannot be fetched.
            ResourceExhausted: the disk is full.
        """

    def remove(self, workspace_id: str) -> None:
        """Remove all state of a stopped workspace. Nothing happens when there is none.

        Raises:
            FailedPrecondition: it runs.
        """

    def snapshots(self, workspace_id: str) -> Collection[str]:
        """Return the runtime names of the snapshots that the runtime itself keeps of a workspace.

        Those are beside what the loader's caches hold, such as layers that `continue_on` put a machine on.
        Empty for a workspace that it does not know.
        """

    def workspaces(self) -> list[str]:
        """List the ids of all workspaces that there is state of, sorted."""

    def leftovers(self) -> list[str]:
        """List names of what was half made or half removed, sorted; each begins with an id and a dot.

        Those that others are working on are among them; they hold their workspace's lock meanwhile.
        """

    def sweep(self) -> list[str]:
        """Clean up what killed processes left half done; returns the names of what was, sorted.

        What others are working on is left alone. Called at start-up.
        """

    def attach(self, workspace_id: str, name: str, content: COWStore | str | os.PathLike[str]) -> None:
        """Add a disk or a memory file to the workspace, for Full snapshots to hold.

        A store stays the caller's to close, and this process alone can capture the workspace while it is
        attached. A file must not be written while the workspace is stopped.

        Raises:
            InvalidArgument: the name is not one, or the path is no regular file.
            FailedPrecondition: something of that name is attached.
        """

    def detach(self, workspace_id: str, name: str) -> None:
        """Take an attachment away; a store that `place` opened is closed. NotFound when there is none."""

    def attachments(self, workspace_id: str) -> Mapping[str, Attachment]:
        """Return what is attached and usable in this process, by name.

        After `place` of a snapshot with chunked files, those are here as stores that fetch what is touched.
        Stores of other processes are left out.
        """

    def close(self) -> None:
        """Let go of everything in this process; workspaces go on running. Idempotent."""
