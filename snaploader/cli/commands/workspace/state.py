"""Pausing, resuming, starting, stopping and removing workspaces."""

from __future__ import annotations

import click

from snaploader.cli.commands.workspace.records import result_record, snapshot_record, workspace_record
from snaploader.cli.options import Command, destructive, option, with_workspaces
from snaploader.cli.values import DURATION, format_size
from snaploader.cli.workspaces import Workspaces


@click.command("pause", cls=Command, short_help="Park a workspace: keep its state, free all else.")
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def pause(workspaces: Workspaces, workspace_id: str) -> None:
    """Park a workspace: its state becomes a snapshot on this host, and its processes and files go.

    What the snapshot holds is its policy's onPause. `resume` brings it back.
    """
    result = workspaces.manager.pause(workspace_id)
    workspaces.output.json(result_record(result))
    workspaces.output.text(
        f"paused {workspace_id}: {result.scope}, {format_size(result.stored_bytes)} stored"
    )


@click.command("resume", cls=Command, short_help="Bring a paused workspace back.")
@click.argument("workspace_id", metavar="WORKSPACE")
@option(
    "--ready-timeout",
    scope="workspace resume",
    type=DURATION,
    help="How long it may take to be ready.  [default: as given to create]",
)
@with_workspaces
def resume(workspaces: Workspaces, workspace_id: str, ready_timeout: float | None) -> None:
    """Bring a paused workspace back, and wait until it is ready."""
    workspace = workspaces.manager.resume(workspace_id, ready_timeout_s=ready_timeout)
    workspaces.output.json(workspace_record(workspace))
    workspaces.output.text(f"resumed {workspace_id}")


@click.command("start", cls=Command, short_help="Start a stopped workspace.")
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def start(workspaces: Workspaces, workspace_id: str) -> None:
    """Start a workspace that was stopped, and wait until it is ready. A paused one is resumed instead."""
    workspace = workspaces.manager.start(workspace_id)
    workspaces.output.json(workspace_record(workspace))
    workspaces.output.text(f"started {workspace_id}")


@click.command("stop", cls=Command, short_help="Stop a workspace; its files stay.")
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def stop(workspaces: Workspaces, workspace_id: str) -> None:
    """Stop what runs in a workspace, by force what still runs after 10 seconds. Its files stay."""
    workspace = workspaces.manager.stop(workspace_id)
    workspaces.output.json(workspace_record(workspace))
    workspaces.output.text(f"stopped {workspace_id}")


@click.command("rm", cls=Command, short_help="Delete workspaces with all their snapshots.")
@click.argument("workspace_ids", metavar="WORKSPACE…", nargs=-1, required=True)
@option(
    "--forget-remote",
    scope="workspace rm",
    is_flag=True,
    help="Leave commits in the remote cache, which may be gone for good.",
)
@destructive("workspace rm")
@with_workspaces
def remove(
    workspaces: Workspaces, workspace_ids: tuple[str, ...], *, forget_remote: bool, yes: bool, dry_run: bool
) -> None:
    """Delete workspaces: what runs, their files, and their snapshots here and in the remote cache.

    Their events stay, and their ids are not used again. Forks keep all they have.
    """
    output = workspaces.output
    if dry_run or output.must_ask(yes=yes):
        snapshots = {each: workspaces.manager.list_snapshots(each) for each in workspace_ids}
        lines = []
        for workspace_id, infos in snapshots.items():
            remote = sum(info.record is not None and info.record.is_remote for info in infos)
            lines.append(
                f"{workspace_id}: its files and {len(infos)} snapshots, {remote} of them on the server"
            )
        if dry_run:
            output.json(
                {
                    "would_delete": [
                        {"id": each, "snapshots": [snapshot_record(info) for info in infos]}
                        for each, infos in snapshots.items()
                    ]
                }
            )
            for line in lines:
                output.text(f"would delete {line}")
            return
        where = "but leave the commits on the server" if forget_remote else "also on the server"
        output.confirm("\n".join([*lines, f"Delete this, {where}?"]))
    for workspace_id in workspace_ids:
        workspaces.manager.delete(workspace_id, forget_remote=forget_remote)
        workspaces.output.text(f"deleted {workspace_id}; its name cannot be used again")
    workspaces.output.json({"deleted": list(workspace_ids)})
