"""`snaploader workspace`: long-lived sandboxes. One module for each kind of command.

What needs the extra `workspace` is imported by `snaploader.cli.workspaces` when a command asks for it.
"""

from __future__ import annotations

import click

from snaploader.cli.commands.workspace.create import create, fork
from snaploader.cli.commands.workspace.events import events
from snaploader.cli.commands.workspace.lifecycle import lifecycle
from snaploader.cli.commands.workspace.listing import list_, show
from snaploader.cli.commands.workspace.log import log
from snaploader.cli.commands.workspace.orphans import orphans
from snaploader.cli.commands.workspace.owner import owner
from snaploader.cli.commands.workspace.policy import policy
from snaploader.cli.commands.workspace.recover import recover
from snaploader.cli.commands.workspace.settings import set_
from snaploader.cli.commands.workspace.snapshots import commit, rollback, snapshot, version, versions
from snaploader.cli.commands.workspace.state import pause, remove, resume, start, stop
from snaploader.cli.options import Group, shared_options, workspace_options


@click.group(
    cls=Group, short_help="Long-lived sandboxes: versions, rollback, pause, commit, fork, lifecycle."
)
@workspace_options
@shared_options
def workspace(**_shared: object) -> None:
    """Long-lived sandboxes whose state is kept as snapshots.

    A workspace is a folder and a command that runs in it. It goes on running when the command line ends.
    """


for command in (
    create,
    list_,
    show,
    snapshot,
    version,
    versions,
    rollback,
    pause,
    resume,
    start,
    stop,
    commit,
    fork,
    remove,
    events,
    log,
    orphans,
    set_,
    policy,
    owner,
    recover,
    lifecycle,
):
    workspace.add_command(command)
