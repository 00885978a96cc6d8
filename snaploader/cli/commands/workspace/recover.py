"""`snaploader workspace recover`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from snaploader.cli.exits import CheckFailed
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.workspaces import Workspaces

if TYPE_CHECKING:
    from snaploader.workspace.manager import RecoverySummary


@click.command(
    "recover", cls=Command, short_help="Repair what a crash left, and take paused workspaces back."
)
@option(
    "--rebind-state",
    scope="workspace recover",
    is_flag=True,
    help="Go on with this state directory: the one that the catalog knows for this host is lost for good.",
)
@option(
    "--forget-remote",
    scope="workspace recover",
    is_flag=True,
    help="Give up what a remote cache that is gone for good has of commits that failed or were deleted.",
)
@with_workspaces
def recover(workspaces: Workspaces, *, rebind_state: bool, forget_remote: bool) -> None:
    """Bring the catalog and what is on this host together again, after a crash or a restart.

    To be run before workspaces are used; `lifecycle` does it by itself. What somebody works on is left alone.
    What the catalog says is running is started again, also a command that had ended by itself.
    Ends with exit code 13 when something could not be put right.
    """
    summary = workspaces.manager.recover(rebind_state=rebind_state, forget_remote=forget_remote)
    workspaces.output.json(summary_record(summary))
    for line in summary_lines(summary):
        workspaces.output.text(line)
    if summary.problems:
        count = len(summary.problems)
        things = "1 thing" if count == 1 else f"{count} things"
        raise CheckFailed(f"{things} could not be put right")


def summary_record(summary: RecoverySummary) -> dict[str, Any]:
    """What was found and done."""
    return dataclasses.asdict(summary)


def summary_lines(summary: RecoverySummary) -> list[str]:
    """The same for people."""
    lines = [f"paused    {workspace_id}: {_how(summary, workspace_id)}" for workspace_id in summary.restored]
    lines += [f"repaired  {note.name}: {note.reason}" for note in summary.repaired]
    lines += [f"removed   {note.name}: {note.reason}" for note in summary.pruned]
    lines += [f"trashed   {note.name}: {note.reason}" for note in summary.trashed]
    lines += [f"left      {note.name}: {note.reason}" for note in summary.unknown]
    lines += [f"busy      {workspace_id}: somebody works on it" for workspace_id in summary.busy]
    lines += [f"problem   {note.name}: {note.reason}" for note in summary.problems]
    return lines or ["there was nothing to recover"]


def _how(summary: RecoverySummary, workspace_id: str) -> str:
    return "taken back, as the catalog had lost it" if workspace_id in summary.adopted else "whole"
