"""Workspaces, runs and policies of the lifecycle's tests, with what does not matter filled in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from snaploader.workspace.model import Run, RunStatus, RunTransition, Workspace, WorkspaceSpec, WorkspaceState

NOW = datetime(2026, 5, 11, 12, 0, tzinfo=UTC)
"""A Monday."""
CREATED = NOW - timedelta(days=30)
TICK_APART = timedelta(microseconds=1)
"""The smallest difference of two times."""


def workspace(
    state: WorkspaceState = WorkspaceState.RUNNING, *, workspace_id: str = "ws", **values: Any
) -> Workspace:
    values = {"host": "here", "created_at": CREATED, "last_used_at": NOW, **values}
    return Workspace(WorkspaceSpec(workspace_id), state=state, **values)


def run(
    transition: RunTransition = RunTransition.START, status: RunStatus = RunStatus.SUCCEEDED, **values: Any
) -> Run:
    created = values.pop("created_at", NOW - timedelta(hours=1))
    values = {"completed_at": created, **values}
    return Run(1, "ws", transition, status, created, **values)
