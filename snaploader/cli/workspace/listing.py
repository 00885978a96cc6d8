"""Looking at workspaces: what there is, what it costs, what happened."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from snaploader.cli.commands import Command, option
from snaploader.cli.options import with_workspaces
from snaploader.cli.output import Branch
from snaploader.cli.process import writing_to_stdout
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import SIZE, format_size
from snaploader.cli.workspace.records import (
    event_record,
    exit_words,
    history,
    run_record,
    size_record,
    snapshot_record,
    time_words,
    version_record,
    workspace_record,
)
from snaploader.workspace import OperationKind, Run, RunStatus, SnapshotInfo, Workspace, WorkspaceState
from snaploader.workspace.sizes import HostSizes, WorkspaceSize, measure

if TYPE_CHECKING:
    from snaploader.workspace.runtime import RuntimeStatus

_COLUMNS = ("workspace", "host", "state", "version>", "exclusive>", "shared>", "used")

_BIRTHS = {OperationKind.CREATE, OperationKind.FORK}
"""What is still being made is no workspace yet."""

FORK_EVENT = "workspace_fork"
"""Tells which commit a workspace was forked from."""


_ls_option = functools.partial(option, scope="workspace ls")


@click.command("ls", cls=Command)
@_ls_option(
    "--state", type=click.Choice([state.value for state in WorkspaceState]), help="Only those in this state."
)
@_ls_option("--owner", help="Only those of this owner.")
@_ls_option("--all-hosts", is_flag=True, help="Those of other hosts too.")
@_ls_option("--deleted", is_flag=True, help="Deleted ones too.")
@_ls_option("--tree", is_flag=True, help="Show the history of each.")
@_ls_option(
    "--sizes/--no-sizes",
    default=True,
    help="Tell what each costs, for which the chunks of all snapshots on this host are counted.",
)
@with_workspaces
def list_(
    workspaces: Workspaces,
    state: str | None,
    owner: str | None,
    all_hosts: bool,
    deleted: bool,
    tree: bool,
    sizes: bool,
) -> None:
    """List the workspaces of this host, and what their snapshots take in its cache.

    Exclusive bytes are in chunks that no other workspace of this host refers to; shared ones are in chunks
    that others refer to as well.
    """
    with workspaces.catalog.reading() as reader:
        found = reader.workspaces(
            host=None if all_hosts else workspaces.host,
            state=None if state is None else WorkspaceState(state),
            owner=owner,
            include_deleted=deleted,
        )
    found = [each for each in found if each.operation is None or each.operation.kind not in _BIRTHS]
    measured = measure(workspaces.caches.file_cache) if sizes else None
    here = [each for each in found if each.host == workspaces.host]
    costs = {} if measured is None else {each.id: _size(measured, each) for each in here}
    workspaces.output.json(
        {
            "workspaces": [
                {**workspace_record(each), "size": size_record(costs[each.id]) if each.id in costs else None}
                for each in found
            ],
            "stored_bytes": None if measured is None else measured.stored_bytes,
        }
    )
    if tree:
        forks = _forks(workspaces)
        for each in found:
            _print_tree(workspaces, each, workspaces.manager.list_snapshots(each.id), forks)
        return
    rows = [
        {
            "workspace": each.id,
            "host": each.host,
            "state": _state(each, _status(workspaces, each)),
            "version>": str(each.last_version or "-"),
            "exclusive>": format_size(costs[each.id].exclusive_bytes) if each.id in costs else "-",
            "shared>": format_size(costs[each.id].shared_bytes) if each.id in costs else "-",
            "used": time_words(each.last_used_at),
        }
        for each in found
    ]
    left_out = set() if all_hosts else {"host"}
    left_out |= set() if sizes else {"exclusive>", "shared>"}
    columns = [column for column in _COLUMNS if column not in left_out]
    workspaces.output.table(columns, [[row[column] for column in columns] for row in rows])
    if measured is not None:
        together = format_size(measured.stored_bytes)
        workspaces.output.detail(
            f"{len(found)} workspaces; the snapshots of all on this host take {together}"
        )


@click.command("show", cls=Command)
@click.argument("workspace_id", metavar="WORKSPACE")
@with_workspaces
def show(workspaces: Workspaces, workspace_id: str) -> None:
    """Show a workspace, what it costs, and its history as a tree of snapshots."""
    with workspaces.catalog.reading() as reader:
        found = reader.workspace(workspace_id)
        run = reader.latest_run(workspace_id)
    snapshots = (
        [] if found.state is WorkspaceState.DELETED else workspaces.manager.list_snapshots(workspace_id)
    )
    size = _size(measure(workspaces.caches.file_cache), found)
    status = workspaces.runtime.status(workspace_id)
    workspaces.output.json(
        {
            **workspace_record(found),
            "pid": status.pid,
            "exit_code": status.exit_code,
            "latest_run": run_record(run),
            "size": size_record(size),
            "snapshots": [snapshot_record(info) for info in snapshots],
        }
    )
    lines = _lines(found, run, size, status if found.host == workspaces.host else None)
    if status.pid is not None:
        lines["pid"] = str(status.pid)
    width = max(map(len, lines))
    for name, text in lines.items():
        workspaces.output.text(f"{name:<{width}}  {text}")
    workspaces.output.text()
    if not workspaces.output.as_json:
        _print_tree(workspaces, found, snapshots, _forks(workspaces))
    for info in snapshots:
        if not info.is_managed:
            workspaces.output.text(f"not managed by the catalog: {info.runtime_name}")


def _lines(
    workspace: Workspace, run: Run | None, size: WorkspaceSize, status: RuntimeStatus | None
) -> dict[str, str]:
    """What there is to tell, by what it is called; what is not set is left out."""
    spec = workspace.spec
    lines = {
        "workspace": workspace.id,
        "state": _state(workspace, status),
        "host": workspace.host,
        "owner": workspace.owner,
        "base": workspace.base,
        "policy": workspace.policy,
        "schedule": workspace.autostart_schedule,
        "command": shlex.join(spec.command),
        "volumes": ", ".join(f"{volume.name}={volume.durable_dir}" for volume in spec.volumes),
        "ready": f"{spec.readiness.kind} {spec.readiness.target}" if spec.readiness.kind != "none" else "",
        "slot": "" if workspace.slot is None else str(workspace.slot),
        "created": time_words(workspace.created_at),
        "used": time_words(workspace.last_used_at),
        "deleting": "" if workspace.deleting_at is None else time_words(workspace.deleting_at),
        "operation": "" if workspace.operation is None else f"{workspace.operation.kind} is under way",
        "deadline": "" if run is None or run.deadline is None else time_words(run.deadline),
        "failed": run.error if run is not None and run.status is RunStatus.FAILED else "",
        "exclusive": format_size(size.exclusive_bytes),
        "shared": format_size(size.shared_bytes),
    }
    return {name: text for name, text in lines.items() if text}


def _status(workspaces: Workspaces, workspace: Workspace) -> RuntimeStatus | None:
    """What runs of a workspace that is to run on this host."""
    if workspace.state is not WorkspaceState.RUNNING or workspace.host != workspaces.host:
        return None
    return workspaces.runtime.status(workspace.id)


def _state(workspace: Workspace, status: RuntimeStatus | None) -> str:
    """What the catalog says, and what does not agree with it.

    Args:
        status: What the runtime says; None of a workspace of another host.
    """
    state = f"{workspace.state}, dormant" if workspace.dormant_at is not None else str(workspace.state)
    is_at_rest = workspace.operation is None  # an operation stops what runs, and starts it again
    if status is None or status.is_running or workspace.state is not WorkspaceState.RUNNING or not is_at_rest:
        return state
    if status.exit_code is None:
        return f"{state}; no process is"
    return f"{state}; its command has ended, {exit_words(status.exit_code)}"


def _size(sizes: HostSizes, workspace: Workspace) -> WorkspaceSize:
    return sizes.workspaces.get(workspace.id, WorkspaceSize())


def _print_tree(
    workspaces: Workspaces,
    workspace: Workspace,
    snapshots: Sequence[SnapshotInfo],
    forks: Mapping[str, list[str]],
) -> None:
    workspaces.output.tree(Branch(workspace.id, history(workspace, snapshots, forks)))


def _forks(workspaces: Workspaces) -> dict[str, list[str]]:
    """The workspaces that were forked from a commit and are not deleted, by its name."""
    alive = {each.id for each in workspaces.manager.workspaces()}
    forks: dict[str, list[str]] = {}
    for event in workspaces.manager.events(types=(FORK_EVENT,), limit=None):
        if event.workspace_id in alive:
            forks.setdefault(event.payload.get("origin", ""), []).append(event.workspace_id)
    return forks


@click.command("versions", cls=Command)
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


_events_option = functools.partial(option, scope="workspace events")


@click.command("events", cls=Command)
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@_events_option(
    "--after",
    type=click.IntRange(0),
    metavar="ID",
    help="Only events later than the one of this id, beginning with the first of them.",
)
@_events_option("--type", "types", multiple=True, help="Only events of this type; repeatable.")
@_events_option(
    "--limit",
    type=click.IntRange(1),
    default=1000,
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
    records = [event_record(event) for event in found]
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


@click.command("log", cls=Command)
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--max-size", scope="workspace log", type=SIZE, default="64KiB", help="No more than its last bytes.")
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


@click.command("orphans", cls=Command)
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
