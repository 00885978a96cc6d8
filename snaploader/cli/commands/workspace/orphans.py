"""`snaploader workspace orphans`."""

from __future__ import annotations

import click

from snaploader.cli.options import Command, with_workspaces
from snaploader.cli.values import format_size
from snaploader.cli.workspaces import Workspaces


@click.command("orphans", cls=Command, short_help="List what failed commits have left in the remote cache.")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@with_workspaces
def orphans(workspaces: Workspaces, workspace_id: str) -> None:
    """List what commits that failed have left in the remote cache: of one workspace, or of all on this host.

    Nothing of it is visible there. The next commit of the workspace reuses it, and clears the list.
    """
    found = workspaces.manager.orphaned_uploads(workspace_id)
    workspaces.output.json(
        {
            "orphans": [
                {
                    "workspace_id": each.workspace_id,
                    "snapshot_name": each.snapshot_name,
                    "blobs": len(each.digests),
                    "size_bytes": each.size_bytes,
                }
                for each in found
            ]
        }
    )
    workspaces.output.table(
        ["workspace", "snapshot", "blobs>", "size>"],
        [
            [each.workspace_id, each.snapshot_name, str(len(each.digests)), format_size(each.size_bytes)]
            for each in found
        ],
    )
