"""`snaploader workspace set`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from snaploader.cli.commands.workspace.records import workspace_record
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.workspaces import Workspaces, needing_an_extra
from snaploader.errors import InvalidArgument

CHANGE_EVENT = "workspace_change"


@click.command("set", cls=Command, short_help="Change a workspace's policy, owner or schedule.")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--policy", scope="workspace set", help="Name of its policy.")
@option("--owner", scope="workspace set", help="Whose it is; empty: nobody's.")
@option("--schedule", scope="workspace set", metavar="CRON", help="When to start it; empty: never.")
@with_workspaces
def set_(
    workspaces: Workspaces, workspace_id: str, policy: str | None, owner: str | None, schedule: str | None
) -> None:
    """Change what the lifecycle goes by. All else of a workspace is as it was made."""
    if schedule:
        with needing_an_extra("workspaces need"):
            from snaploader.workspace.decide import parse_schedule
        parse_schedule(schedule)
    given = {"policy": policy, "owner": owner, "autostart_schedule": schedule}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise InvalidArgument("there is nothing to change: give --policy, --owner or --schedule")
    with workspaces.catalog.transaction() as transaction:
        workspace = transaction.update_workspace(workspace_id, **changes)
        transaction.add_event(workspace_id, CHANGE_EVENT, changes, datetime.now(UTC))
    workspaces.output.json(workspace_record(workspace))
    workspaces.output.text(f"changed {workspace_id}")
