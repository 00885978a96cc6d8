"""`snaploader workspace events`."""

from __future__ import annotations

import json

import click

from snaploader.cli.commands.workspace.records import event_records
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.workspaces import Workspaces


@click.command("events", cls=Command, short_help="List what happened to workspaces.")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@option(
    "--after",
    scope="workspace events",
    type=click.IntRange(0),
    metavar="ID",
    help="Only events later than the one of this id, beginning with the first of them.",
)
@option(
    "--type", "types", scope="workspace events", multiple=True, help="Only events of this type; repeatable."
)
@option(
    "--limit",
    scope="workspace events",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="No more than so many: the newest, or with --after the first.",
)
@with_workspaces
def events(
    workspaces: Workspaces, workspace_id: str, after: int | None, types: tuple[str, ...], limit: int
) -> None:
    """List what happened to a workspace, or to all of them, oldest first; of deleted ones too."""
    with workspaces.catalog.reading() as reader:
        # Who follows what happens must miss nothing; who looks wants to see what happened last.
        is_following = after is not None
        found = reader.events(
            workspace_id, after=after or 0, types=types, limit=limit, newest=not is_following
        )
        if workspace_id and not found:
            reader.workspace(workspace_id)  # NotFound, unless it only has no such events
    records = event_records(found)
    workspaces.output.json({"events": records})
    workspaces.output.table(
        ["id>", "time", "workspace", "type", "payload"],
        [
            [
                str(event.id),
                f"{event.created_at:%Y-%m-%d %H:%M:%S}",
                event.workspace_id,
                event.type,
                json.dumps(record["payload"]) if record["payload"] else "",
            ]
            for event, record in zip(found, records, strict=True)
        ],
    )
