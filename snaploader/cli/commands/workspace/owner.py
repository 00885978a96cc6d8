"""`snaploader workspace owner`."""

from __future__ import annotations

import click

from snaploader.cli.options import Command, with_workspaces
from snaploader.cli.workspaces import Workspaces
from snaploader.workspace.model import OwnerStatus


@click.command("owner", cls=Command, short_help="Show or set whether an owner may use workspaces.")
@click.argument("name", metavar="OWNER")
@click.argument("status", required=False, type=click.Choice([status.value for status in OwnerStatus]))
@with_workspaces
def owner(workspaces: Workspaces, name: str, status: str | None) -> None:
    """Show whether an owner is active or suspended, or make it so.

    The lifecycle stops the running workspaces of a suspended owner, and starts none.
    """
    if status is not None:
        with workspaces.catalog.transaction() as transaction:
            transaction.set_owner_status(name, OwnerStatus(status))
    with workspaces.catalog.reading() as reader:
        found = reader.owner_status(name)
    workspaces.output.json({"owner": name, "status": str(found)})
    workspaces.output.text(f"{name}: {found}")
