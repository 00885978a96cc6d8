"""`snaploader workspace log`."""

from __future__ import annotations

import sys

import click

from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.streams import writing_to_stdout
from snaploader.cli.values import SIZE
from snaploader.cli.workspaces import Workspaces


@click.command("log", cls=Command, short_help="Print the end of what a workspace's command has printed.")
@click.argument("workspace_id", metavar="WORKSPACE")
@option(
    "--max-size",
    scope="workspace log",
    type=SIZE,
    default="64KiB",
    show_default=True,
    help="No more than its last bytes.",
)
@with_workspaces
def log(workspaces: Workspaces, workspace_id: str, max_size: int) -> None:
    """Print the end of what the command of a workspace has printed, byte for byte; of earlier runs too."""
    with workspaces.catalog.reading() as reader:
        reader.workspace(workspace_id)
    data = workspaces.runtime.log_tail(workspace_id, max_size)
    workspaces.output.json({"log": data.decode(errors="replace")})
    if not workspaces.output.as_json:
        with writing_to_stdout():
            sys.stdout.buffer.write(data)
