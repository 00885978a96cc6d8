"""Making workspaces: new ones, and forks."""

from __future__ import annotations

from pathlib import Path

import click

from snaploader.cli.commands.workspace.records import workspace_record
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.values import DURATION, KEY_VALUE
from snaploader.cli.workspaces import Workspaces
from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Readiness, Volume, Workspace

_DEFAULT = Readiness()


class WithCommand(Command):
    """Takes what stands after `--` for the command that is to run, whatever stands before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments up to `--`."""
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_COMMAND] = args[:at], tuple(args[at + 1 :])
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What the usage line shows."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND…]"]


_COMMAND = f"{__name__}.command"


@click.command("create", cls=WithCommand, short_help="Make a workspace, and start it.")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@option(
    "--volume",
    scope="workspace create",
    multiple=True,
    type=KEY_VALUE,
    metavar="NAME=/DIR",
    help="Durable directory: its name, and where the command sees it; repeatable.",
)
@option("--env", scope="workspace create", multiple=True, type=KEY_VALUE, help="Of the command; repeatable.")
@option("--ready-tcp", scope="workspace create", metavar="HOST:PORT", help="Ready when it takes connections.")
@option("--ready-http", scope="workspace create", metavar="URL", help="Ready when it answers 200 to 399.")
@option(
    "--ready-command", scope="workspace create", metavar="SHELL", help="Ready when this exits with 0 in it."
)
@option(
    "--ready-interval",
    scope="workspace create",
    type=DURATION,
    default=f"{_DEFAULT.interval_s:g}s",
    show_default=True,
    help="Between two tries.",
)
@option(
    "--ready-timeout",
    scope="workspace create",
    type=DURATION,
    default=f"{_DEFAULT.timeout_s:g}s",
    show_default=True,
    help="How long to try.",
)
@option("--owner", scope="workspace create", default="", help="Whose it is.")
@option("--base", scope="workspace create", default="", metavar="NAME", help="Template it is made from.")
@option("--policy", scope="workspace create", default="default", show_default=True, help="Its policy.")
@option(
    "--schedule",
    scope="workspace create",
    default="",
    metavar="CRON",
    help="When to start it, as in 'CRON_TZ=Europe/Berlin 30 9 * * 1-5'.",
)
@option(
    "--from",
    "source",
    scope="workspace create",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Its first content, which is copied.",
)
@option("--no-start", scope="workspace create", is_flag=True, help="Leave it stopped.")
@with_workspaces
def create(
    workspaces: Workspaces,
    workspace_id: str,
    volume: tuple[tuple[str, str], ...],
    env: tuple[tuple[str, str], ...],
    ready_tcp: str | None,
    ready_http: str | None,
    ready_command: str | None,
    ready_interval: float,
    ready_timeout: float,
    owner: str,
    base: str,
    policy: str,
    schedule: str,
    source: Path | None,
    no_start: bool,
) -> None:
    """Make a workspace and start the command in it, which goes on running; its id is printed.

    The command begins in the workspace's folder. Without one nothing runs, and the workspace counts as
    started.
    """
    checks = {"tcp": ready_tcp, "http": ready_http, "command": ready_command}
    readiness = _readiness(checks, ready_interval, ready_timeout)
    if source is not None and not source.is_dir():
        raise InvalidArgument(f"--from: there is no folder {str(source)!r}")
    workspace = workspaces.manager.create(
        workspace_id,
        command=click.get_current_context().meta.get(_COMMAND, ()),
        environment=dict(env),
        volumes=tuple(Volume(name, directory) for name, directory in volume),
        readiness=readiness,
        owner=owner,
        base=base,
        policy=policy,
        autostart_schedule=schedule,
        source=source,
        start=not no_start,
    )
    _print(workspaces, workspace)


@click.command("fork", cls=Command, short_help="Make a workspace from a committed snapshot.")
@click.argument("origin", metavar="SNAPSHOT|WORKSPACE")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@option("--owner", scope="workspace fork", help="Whose it is.  [default: that of the origin]")
@option("--policy", scope="workspace fork", help="Its policy.  [default: that of the origin]")
@option(
    "--env",
    scope="workspace fork",
    multiple=True,
    type=KEY_VALUE,
    help="Changes to the origin's environment; repeatable.",
)
@option("--schedule", scope="workspace fork", default="", metavar="CRON", help="When to start it.")
@option("--no-start", scope="workspace fork", is_flag=True, help="Leave it stopped.")
@with_workspaces
def fork(
    workspaces: Workspaces,
    origin: str,
    workspace_id: str,
    owner: str | None,
    policy: str | None,
    env: tuple[tuple[str, str], ...],
    schedule: str,
    no_start: bool,
) -> None:
    """Make a workspace from a committed snapshot, or from the latest one of a workspace; its id is printed.

    It runs the same command and shares all content with its origin, but does not depend on it.
    """
    workspace = workspaces.manager.fork(
        origin,
        workspace_id,
        environment=dict(env),
        owner=owner,
        policy=policy,
        autostart_schedule=schedule,
        start=not no_start,
    )
    _print(workspaces, workspace)


def _readiness(checks: dict[str, str | None], interval_s: float, timeout_s: float) -> Readiness:
    given = {kind: target for kind, target in checks.items() if target is not None}
    if len(given) > 1:
        names = " and ".join(f"--ready-{kind}" for kind in given)
        raise InvalidArgument(f"{names} exclude each other: give one")
    for kind, target in given.items():
        return Readiness(kind, target, interval_s, timeout_s)
    return Readiness(interval_s=interval_s, timeout_s=timeout_s)


def _print(workspaces: Workspaces, workspace: Workspace) -> None:
    workspaces.output.json(workspace_record(workspace))
    workspaces.output.text(workspace.id)
    workspaces.output.detail(f"{workspace.id} is {workspace.state}")
