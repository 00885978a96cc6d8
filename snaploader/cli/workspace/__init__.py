"""`snaploader workspace`: long-lived sandboxes.

COMMANDS says which module each command is in; `records` has workspaces and their history as JSON and as text.
What needs the extra `workspace` is imported by `snaploader.cli.resources` when a command asks for it.
"""

from __future__ import annotations

import click

from snaploader.cli.options import CommandsOnDemand, Group, shared_options, workspace_options

COMMANDS = {
    "create": ("operations:create", "Make a workspace, and start it."),
    "adopt": ("operations:adopt", "Take in a workspace that the catalog does not know."),
    "ls": ("listing:list_", "List workspaces, and what each costs."),
    "show": ("listing:show", "Show a workspace and its history."),
    "snapshot": ("operations:snapshot", "Take a snapshot: a numbered version, with a name."),
    "version": ("operations:version", "Take a version before something is executed."),
    "versions": ("listing:versions", "List the versions of a workspace."),
    "rollback": ("operations:rollback", "Go back to a version."),
    "pause": ("operations:pause", "Park a workspace: keep its state, free all else."),
    "resume": ("operations:resume", "Bring a paused workspace back."),
    "start": ("operations:start", "Start a stopped workspace."),
    "stop": ("operations:stop", "Stop a workspace; its files stay."),
    "extend": ("operations:extend", "Move the deadline of a running workspace."),
    "commit": ("operations:commit", "Put a snapshot into the remote cache, to fork from."),
    "fork": ("operations:fork", "Make a workspace from a committed snapshot."),
    "rm": ("operations:remove", "Delete workspaces with all their snapshots."),
    "events": ("listing:events", "List what happened to workspaces."),
    "log": ("listing:log", "Print the end of what a workspace's command has printed."),
    "orphans": ("listing:orphans", "List what failed commits have left in the remote cache."),
    "set": ("policies:set_", "Change what the lifecycle goes by for a workspace."),
    "policy": ("policies:policy", "Named policies: what snapshots hold, when the lifecycle acts."),
    "template": ("templates:template", "Templates: what workspaces are made from, in versions."),
    "owner": ("policies:owner", "Show or set whether an owner may use workspaces."),
    "recover": ("lifecycle:recover", "Repair what a crash left, and take paused workspaces back."),
    "lifecycle": ("lifecycle:lifecycle", "Stop, start, park and delete as the policies say."),
}


@click.group(cls=Group, on_demand=CommandsOnDemand(__name__, COMMANDS))
@workspace_options
@shared_options
def workspace(**_shared: object) -> None:
    """Long-lived sandboxes whose state is kept as snapshots.

    A workspace is a folder and a command that runs in it. It goes on running when the command line ends.
    """
