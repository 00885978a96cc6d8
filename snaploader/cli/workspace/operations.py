"""What is done to workspaces: making them, running them, taking snapshots and going back, removing them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from snaploader.cli.options import Command, destructive, option, workspace_command
from snaploader.cli.output import record
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import DURATION, KEY_VALUE, SIZE, format_size, parse_time, time_words
from snaploader.cli.workspace.records import snapshot_record, workspace_record
from snaploader.errors import InvalidArgument
from snaploader.workspace import (
    Readiness,
    Resources,
    Scope,
    SnapshotInfo,
    SnapshotResult,
    SnapshotSource,
    Volume,
    Workspace,
)

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULT = Readiness()

_RESULT = (
    *("workspace_id", "snapshot_name", "runtime_name", "display_name", "version", "created_at"),
    *("scope", "read_bytes", "stored_bytes", "uploaded_bytes"),
)
"""What is told of a `SnapshotResult`."""


class WithCommand(Command):
    """Takes what stands after `--` for the command that is to run, whatever stands before."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_COMMAND] = args[:at], tuple(args[at + 1 :])
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND…]"]


_COMMAND = f"{__name__}.command"


_SPEC = (
    option(
        "--volume",
        multiple=True,
        type=KEY_VALUE,
        metavar="NAME=/DIR",
        help="Durable directory: its name, and where the command sees it; repeatable.",
    ),
    option("--env", multiple=True, type=KEY_VALUE, help="Of the command; repeatable."),
    option("--label", multiple=True, type=KEY_VALUE, help="To find it by; repeatable."),
    option("--image", default="", help="What the runtime makes it of."),
    option("--device", multiple=True, help="Device of the host that it gets; repeatable."),
    option("--vcpus", type=click.IntRange(1), help="Virtual processors.  [default: the runtime's]"),
    option("--memory", type=SIZE, help="Its memory, as in 2GiB.  [default: the runtime's]"),
    option("--ready-tcp", metavar="HOST:PORT", help="Ready when it takes connections."),
    option("--ready-http", metavar="URL", help="Ready when it answers 200 to 399."),
    option("--ready-command", metavar="SHELL", help="Ready when this exits with 0 in it."),
    option("--ready-interval", type=DURATION, default=f"{_DEFAULT.interval_s:g}s", help="Between two tries."),
    option("--ready-timeout", type=DURATION, default=f"{_DEFAULT.timeout_s:g}s", help="How long to try."),
)
"""Options of what runs, which `made_with` reads."""

_MADE_WITH = (
    *_SPEC,
    option("--owner", default="", help="Whose it is."),
    option(
        "--template",
        default="",
        help="Template that it is made from; what is given besides takes the place of what that says.",
    ),
    option("--template-version", type=int, metavar="N", help="[default: the active one]"),
    option("--automatic-updates", is_flag=True, help="Let each start take the template's active version."),
    option("--base", default="", metavar="NAME", help="What it is made from.  [default: the template]"),
    option("--policy", help="Its policy.  [default: the template's, else default]"),
    option(
        "--schedule",
        "autostart_schedule",
        default="",
        metavar="CRON",
        help="When to start it, as in 'CRON_TZ=Europe/Berlin 30 9 * * 1-5'.",
    ),
    option("--ttl", type=DURATION, help="How long it runs after a start.  [default: as its policy says]"),
)
"""Options of what a workspace is made with, which `made_with` reads."""


def spec_options(function: F) -> F:
    """Give a command the options of what runs."""
    return functools.reduce(lambda decorated, decorate: decorate(decorated), reversed(_SPEC), function)


def made_with_options(function: F) -> F:
    """Give a command the options of what a workspace is made with."""
    return functools.reduce(lambda decorated, decorate: decorate(decorated), reversed(_MADE_WITH), function)


def made_with(
    *,
    volume: tuple[tuple[str, str], ...],
    env: tuple[tuple[str, str], ...],
    label: tuple[tuple[str, str], ...],
    device: tuple[str, ...],
    vcpus: int | None,
    memory: int | None,
    ready_tcp: str | None,
    ready_http: str | None,
    ready_command: str | None,
    ready_interval: float,
    ready_timeout: float,
    ttl: float | None,
    **details: Any,
) -> dict[str, Any]:
    """The arguments of `WorkspaceManager.create` that the options and the command after `--` make."""
    checks = {"tcp": ready_tcp, "http": ready_http, "command": ready_command}
    given = {kind: target for kind, target in checks.items() if target is not None}
    if len(given) > 1:
        names = " and ".join(f"--ready-{kind}" for kind in given)
        raise InvalidArgument(f"{names} exclude each other: give one")
    kind, target = next(iter(given.items()), (_DEFAULT.kind, _DEFAULT.target))
    return {
        "command": click.get_current_context().meta.get(_COMMAND, ()),
        "environment": dict(env),
        "volumes": tuple(Volume(name, directory) for name, directory in volume),
        "readiness": Readiness(kind, target, ready_interval, ready_timeout),
        "devices": device,
        "resources": Resources(vcpus, memory),
        "labels": dict(label),
        "ttl": None if ttl is None else timedelta(seconds=ttl),
        **details,
    }


@workspace_command("workspace create", cls=WithCommand)
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@made_with_options
@option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Its first content, which is copied.",
)
@option("--no-start", is_flag=True, help="Leave it stopped.")
def create(
    workspaces: Workspaces,
    /,
    workspace_id: str,
    source: Path | None,
    no_start: bool,
    **options: Any,
) -> None:
    """Make a workspace and start the command in it, which goes on running; its id is printed.

    The command begins in the workspace's folder. Without one nothing runs, and the workspace counts as
    started.
    """
    arguments = made_with(**options)
    if source is not None and not source.is_dir():
        raise InvalidArgument(f"--from: there is no folder {str(source)!r}")
    _print_new(
        workspaces,
        workspaces.manager.create(workspace_id, source=source, start=not no_start, **arguments),
    )


@workspace_command("workspace adopt", cls=WithCommand)
@click.argument("workspace_id", metavar="WORKSPACE")
@made_with_options
def adopt(workspaces: Workspaces, /, workspace_id: str, **options: Any) -> None:
    """Take in a workspace that this host has, and the catalog does not know: `doctor` names those.

    It is left as it is, running or stopped. The options and the command say what it was made with, which the
    next start goes by. Snapshots that are kept here come with it; versions are numbered anew.
    """
    workspace = workspaces.manager.adopt(workspace_id, **made_with(**options))
    snapshots = workspaces.manager.list_snapshots(workspace_id)
    taken_in = sum(info.is_managed for info in snapshots)
    told = f"adopted {workspace_id}, which is {workspace.state}, and {taken_in} snapshots of it"
    workspaces.output.data(workspace_record(workspace), told)


@workspace_command("workspace fork")
@click.argument("origin", metavar="SNAPSHOT|WORKSPACE")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@option("--owner", help="Whose it is.  [default: that of the origin]")
@option("--policy", help="Its policy.  [default: that of the origin]")
@option("--env", multiple=True, type=KEY_VALUE, help="Changes to the origin's environment; repeatable.")
@option("--label", multiple=True, type=KEY_VALUE, help="Changes to the origin's labels; repeatable.")
@option("--schedule", "autostart_schedule", default="", metavar="CRON", help="When to start it.")
@option("--no-start", is_flag=True, help="Leave it stopped.")
def fork(
    workspaces: Workspaces,
    /,
    origin: str,
    workspace_id: str,
    env: tuple[tuple[str, str], ...],
    label: tuple[tuple[str, str], ...],
    no_start: bool,
    **details: Any,
) -> None:
    """Make a workspace from a committed snapshot, or from the latest one of a workspace; its id is printed.

    It runs the same command and shares all content with its origin, but does not depend on it.
    """
    workspace = workspaces.manager.fork(
        origin,
        workspace_id,
        environment=dict(env),
        labels=dict(label),
        start=not no_start,
        **details,
    )
    _print_new(workspaces, workspace)


def _print_new(workspaces: Workspaces, workspace: Workspace) -> None:
    workspaces.output.data(workspace_record(workspace), workspace.id)
    workspaces.output.detail(f"{workspace.id} is {workspace.state}")


@workspace_command("workspace pause")
@click.argument("workspace_id", metavar="WORKSPACE")
def pause(workspaces: Workspaces, workspace_id: str) -> None:
    """Park a workspace: its state becomes a snapshot on this host, and its processes and files go.

    What the snapshot holds is its policy's onPause. `resume` brings it back.
    """
    result = workspaces.manager.pause(workspace_id)
    stored = format_size(result.stored_bytes)
    workspaces.output.data(
        record(result, *_RESULT), f"paused {workspace_id}: {result.scope}, {stored} stored"
    )


@workspace_command("workspace resume")
@click.argument("workspace_id", metavar="WORKSPACE")
@option(
    "--ready-timeout", type=DURATION, help="How long it may take to be ready.  [default: as given to create]"
)
def resume(workspaces: Workspaces, workspace_id: str, ready_timeout: float | None) -> None:
    """Bring a paused workspace back, and wait until it is ready."""
    workspace = workspaces.manager.resume(workspace_id, ready_timeout_s=ready_timeout)
    workspaces.output.data(workspace_record(workspace), f"resumed {workspace_id}")


@workspace_command("workspace extend")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--by", type=DURATION, help="By how much.")
@option("--until", metavar="TIME", help="Until when: ISO 8601, UTC if it names no zone.")
def extend(workspaces: Workspaces, workspace_id: str, by: float | None, until: str | None) -> None:
    """Move the deadline of a running workspace to a later time.

    No later than maxTtlSeconds of its policy allows. It counts as a use of the workspace.
    """
    if by is not None and until is None:
        deadline = workspaces.manager.extend(workspace_id, timedelta(seconds=by))
    elif until is not None and by is None:
        deadline = workspaces.manager.extend(workspace_id, parse_time(until, "--until"))
    else:
        raise InvalidArgument("give one of --by and --until")
    workspaces.output.data(
        {"id": workspace_id, "deadline": deadline}, f"{workspace_id} runs until {time_words(deadline)}"
    )


@workspace_command("workspace start")
@click.argument("workspace_id", metavar="WORKSPACE")
@option(
    "--update", is_flag=True, help="Take the active version of its template, also without automatic updates."
)
def start(workspaces: Workspaces, workspace_id: str, update: bool) -> None:
    """Start a workspace that was stopped, and wait until it is ready. A paused one is resumed instead."""
    workspace = workspaces.manager.start(workspace_id, update=update)
    workspaces.output.data(workspace_record(workspace), f"started {workspace_id}")


@workspace_command("workspace stop")
@click.argument("workspace_id", metavar="WORKSPACE")
def stop(workspaces: Workspaces, workspace_id: str) -> None:
    """Stop what runs in a workspace, by force what still runs after 10 seconds. Its files stay."""
    workspace = workspaces.manager.stop(workspace_id)
    workspaces.output.data(workspace_record(workspace), f"stopped {workspace_id}")


@workspace_command("workspace rm")
@click.argument("workspace_ids", metavar="WORKSPACE…", nargs=-1, required=True)
@option(
    "--forget-remote", is_flag=True, help="Leave commits in the remote cache, which may be gone for good."
)
@destructive
def remove(
    workspaces: Workspaces, workspace_ids: tuple[str, ...], *, forget_remote: bool, yes: bool, dry_run: bool
) -> None:
    """Delete workspaces: what runs, their files, and their snapshots here and in the remote cache.

    Their events stay, and their ids are not used again. Forks keep all they have.
    """
    output = workspaces.output
    if dry_run or output.must_ask(yes=yes):
        snapshots = {each: _snapshots_that_go(workspaces, each) for each in workspace_ids}
        lines = []
        for workspace_id, infos in snapshots.items():
            remote = sum(info.record is not None and info.record.is_remote for info in infos)
            lines.append(
                f"{workspace_id}: its files and {len(infos)} snapshots, {remote} of them on the server"
            )
        if dry_run:
            going = [
                {"id": each, "snapshots": [snapshot_record(info) for info in infos]}
                for each, infos in snapshots.items()
            ]
            output.data({"would_delete": going}, *(f"would delete {line}" for line in lines))
            return
        where = "but leave the commits on the server" if forget_remote else "also on the server"
        output.confirm("\n".join([*lines, f"Delete this, {where}?"]))
    for workspace_id in workspace_ids:
        workspaces.manager.delete(workspace_id, forget_remote=forget_remote)
        output.text(f"deleted {workspace_id}; its name cannot be used again")
    output.data({"deleted": list(workspace_ids)})


def _snapshots_that_go(workspaces: Workspaces, workspace_id: str) -> list[SnapshotInfo]:
    """The snapshots that go with a workspace: all but those that other programs saved with the loader."""
    found = workspaces.manager.list_snapshots(workspace_id)
    return [info for info in found if info.is_managed or info.told is not None or not info.is_local]


@workspace_command("workspace snapshot")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--name", default="", help='What lists call it.  [default: "Version N"]')
@option(
    "--source",
    default=SnapshotSource.MANUAL.value,
    metavar="WORDS",
    help="Why it is taken: manual, pre_exec, rollback, or in words of your own.",
)
@option(
    "--scope",
    type=click.Choice([scope.value for scope in Scope], case_sensitive=False),
    default=Scope.FULL.value,
    help="Full: everything. Data: the durable directories alone.",
)
def snapshot(workspaces: Workspaces, workspace_id: str, name: str, source: str, scope: str) -> None:
    """Take a snapshot of a workspace, as its next version. It is stopped meanwhile."""
    result = workspaces.manager.create_snapshot(workspace_id, name, source, scope=Scope.parse(scope))
    _print_version(workspaces, result)


@workspace_command("workspace version")
@click.argument("workspace_id", metavar="WORKSPACE")
def version(workspaces: Workspaces, workspace_id: str) -> None:
    """Take a snapshot with source pre_exec and no name, as its next version. It is stopped meanwhile."""
    _print_version(workspaces, workspaces.manager.create_version(workspace_id))


@workspace_command("workspace rollback")
@click.argument("workspace_id", metavar="WORKSPACE")
@click.argument("number", metavar="VERSION", type=int)
@option("--keep-current", is_flag=True, help="First keep the present state as a version.")
def rollback(workspaces: Workspaces, workspace_id: str, number: int, keep_current: bool) -> None:
    """Go back to a version of a workspace. Its present state is lost, unless it is kept.

    Versions stay as they are, and the next one gets the next number.
    """
    workspace = workspaces.manager.rollback(workspace_id, number, keep_current=keep_current)
    workspaces.output.data(
        {**workspace_record(workspace), "version": number}, f"{workspace_id} goes on from version {number}"
    )


@workspace_command("workspace commit")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--name", default="", help="What lists call it.")
def commit(workspaces: Workspaces, workspace_id: str, name: str) -> None:
    """Take a snapshot and put it into the remote cache, where workspaces can be forked from it.

    What it holds is its policy's onCommit. A paused workspace stays paused.
    """
    result = workspaces.manager.commit(workspace_id, name)
    workspaces.output.data(
        record(result, *_RESULT),
        f"committed {result.snapshot_name}: {result.scope}, {format_size(result.uploaded_bytes)} uploaded",
    )


def _print_version(workspaces: Workspaces, result: SnapshotResult) -> None:
    workspaces.output.data(
        record(result, *_RESULT),
        f"version {result.version} of {result.workspace_id}: {result.scope}, "
        f"{format_size(result.read_bytes)} read, {format_size(result.stored_bytes)} stored",
    )
