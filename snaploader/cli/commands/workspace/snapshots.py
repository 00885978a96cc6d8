"""Snapshots of workspaces: taking them, listing versions, going back, committing."""

from __future__ import annotations

import click

from snaploader.cli.commands.workspace.records import (
    result_record,
    time_words,
    version_record,
    workspace_record,
)
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.values import format_size
from snaploader.cli.workspaces import Workspaces
from snaploader.workspace.model import Scope, SnapshotResult, SnapshotSource


@click.command("snapshot", cls=Command, short_help="Take a snapshot: a numbered version, with a name.")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--name", scope="workspace snapshot", default="", help='What lists call it.  [default: "Version N"]')
@option(
    "--source",
    scope="workspace snapshot",
    type=click.Choice([source.value for source in SnapshotSource]),
    default=SnapshotSource.MANUAL.value,
    show_default=True,
    help="Why it is taken.",
)
@option(
    "--scope",
    scope="workspace snapshot",
    type=click.Choice([scope.value for scope in Scope], case_sensitive=False),
    default=Scope.FULL.value,
    show_default=True,
    help="Full: everything. Data: the durable directories alone.",
)
@with_workspaces
def snapshot(workspaces: Workspaces, workspace_id: str, name: str, source: str, scope: str) -> None:
    """Take a snapshot of a workspace, as its next version. It is stopped meanwhile."""
    result = workspaces.manager.create_snapshot(workspace_id, name, source, scope=Scope.parse(scope))
    _print(workspaces, result)


@click.command("version", cls=Command, short_help="Take a version before something is executed.")
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def version(workspaces: Workspaces, workspace_id: str) -> None:
    """Take a snapshot with source pre_exec and no name, as its next version. It is stopped meanwhile."""
    _print(workspaces, workspaces.manager.create_version(workspace_id))


@click.command("versions", cls=Command, short_help="List the versions of a workspace.")
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def versions(workspaces: Workspaces, workspace_id: str) -> None:
    """List the versions of a workspace, oldest first."""
    found = workspaces.manager.list_versions(workspace_id)
    workspaces.output.json({"versions": [version_record(each) for each in found]})
    workspaces.output.table(
        ["version>", "created", "source", "name"],
        [
            [str(each.number), time_words(each.created_at), str(each.source), each.display_name]
            for each in found
        ],
    )


@click.command("rollback", cls=Command, short_help="Go back to a version.")
@click.argument("workspace_id", metavar="WORKSPACE")
@click.argument("number", metavar="VERSION", type=int)
@option(
    "--keep-current",
    scope="workspace rollback",
    is_flag=True,
    help="First keep the present state as a version.",
)
@with_workspaces
def rollback(workspaces: Workspaces, workspace_id: str, number: int, keep_current: bool) -> None:
    """Go back to a version of a workspace. Its present state is lost, unless it is kept.

    Versions stay as they are, and the next one gets the next number.
    """
    workspace = workspaces.manager.rollback(workspace_id, number, keep_current=keep_current)
    workspaces.output.json({**workspace_record(workspace), "version": number})
    workspaces.output.text(f"{workspace_id} goes on from version {number}")


@click.command("commit", cls=Command, short_help="Put a snapshot into the remote cache, to fork from.")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--name", scope="workspace commit", default="", help="What lists call it.")
@with_workspaces
def commit(workspaces: Workspaces, workspace_id: str, name: str) -> None:
    """Take a snapshot and put it into the remote cache, where workspaces can be forked from it.

    What it holds is its policy's onCommit. A paused workspace stays paused.
    """
    result = workspaces.manager.commit(workspace_id, name)
    workspaces.output.json(result_record(result))
    workspaces.output.text(
        f"committed {result.snapshot_name}: {result.scope}, {format_size(result.uploaded_bytes)} uploaded"
    )


def _print(workspaces: Workspaces, result: SnapshotResult) -> None:
    workspaces.output.json(result_record(result))
    workspaces.output.text(
        f"version {result.version} of {result.workspace_id}: {result.scope}, "
        f"{format_size(result.read_bytes)} read, {format_size(result.stored_bytes)} stored"
    )
