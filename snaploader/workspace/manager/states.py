"""In which states, and on which host, an operation on a workspace can be done."""

from __future__ import annotations

from collections.abc import Collection

from snaploader.errors import FailedPrecondition
from snaploader.workspace.model import Workspace, WorkspaceState

ON_HOST = (WorkspaceState.RUNNING, WorkspaceState.STOPPED)
"""States in which a workspace's files are on its host."""

ALIVE = (*ON_HOST, WorkspaceState.PAUSED)

_HINTS = {
    WorkspaceState.RUNNING: "it is running: stop or pause it first",
    WorkspaceState.STOPPED: "it is stopped: start it first",
    WorkspaceState.PAUSED: "it is paused: resume it first",
    WorkspaceState.DELETED: "it was deleted",
}


def check_ours(workspace: Workspace, host: str) -> None:
    """FailedPrecondition when the workspace lives on another host."""
    if workspace.host != host:
        raise FailedPrecondition(
            f"workspace {workspace.id!r} lives on host {workspace.host!r}, and this is host {host!r}: "
            "work on it there"
        )


def check_state(workspace: Workspace, kind: str, allowed: Collection[WorkspaceState]) -> None:
    """FailedPrecondition when an operation cannot be done in the workspace's state."""
    if workspace.state not in allowed:
        raise FailedPrecondition(
            f"workspace {workspace.id!r}: no {kind} is possible, because {_HINTS[workspace.state]}"
        )
