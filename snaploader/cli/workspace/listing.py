"""Looking at workspaces: what there is, what it costs, what happened."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import click

from snaploader.cli.options import option, workspace_command
from snaploader.cli.output import Branch, Column, record
from snaploader.cli.process import writing_to_stdout
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import KEY_VALUE, SIZE, format_size, time_words
from snaploader.cli.workspace.records import History, snapshot_record, timed_record
from snaploader.workspace import Event, OperationKind, RunStatus, Situation, Workspace, WorkspaceState
from snaploader.workspace.events import ABOUT_ALL, EVENT_TYPES

_BIRTHS = {OperationKind.CREATE, OperationKind.FORK}
"""What is still being made is no workspace yet."""

_VERSION = ("id", "number", "display_name", "source", "snapshot_name", "runtime_name", "created_at")
_RUN = ("transition", "status", "reason", "created_at", "completed_at", "deadline", "error")
_EVENT = ("id", "workspace_id", "type", "payload", "created_at")

FORK_EVENT = "workspace_fork"
"""Tells which commit a workspace was forked from."""


@workspace_command("workspace ls")
@option(
    "--state", type=click.Choice([state.value for state in WorkspaceState]), help="Only those in this state."
)
@option("--owner", help="Only those of this owner.")
@option("--label", multiple=True, type=KEY_VALUE, help="Only those with this label; repeatable: with each.")
@option("--all-hosts", is_flag=True, help="Those of other hosts too.")
@option("--deleted", is_flag=True, help="Deleted ones too.")
@option("--wide", is_flag=True, help="Tell the owner, the template, the deadline and the next start, too.")
@option("--tree", is_flag=True, help="Show the history of each.")
@option(
    "--sizes/--no-sizes",
    default=True,
    help="Tell what each costs, for which the chunks of all snapshots on this host are counted.",
)
def list_(
    workspaces: Workspaces,
    state: str | None,
    owner: str | None,
    label: tuple[tuple[str, str], ...],
    all_hosts: bool,
    deleted: bool,
    wide: bool,
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
            labels=dict(label),
            include_deleted=deleted,
        )
        found = [each for each in found if each.operation is None or each.operation.kind not in _BIRTHS]
        situations = reader.situations([each.id for each in found])
        active = {each.name: each.active_version for each in reader.templates()}
    now = datetime.now(UTC)
    here = [each for each in found if each.host == workspaces.host]
    costs, stored_bytes = _sizes(workspaces, here) if sizes else ({}, None)
    workspaces.output.data(
        {
            "workspaces": [
                {**timed_record(situations[each.id], now), "size": costs.get(each.id)} for each in found
            ],
            "stored_bytes": stored_bytes,
        }
    )
    if tree:
        forks = _forks(workspaces)
        for each in found:
            snapshots = workspaces.manager.list_snapshots(each.id, unmanaged=False)
            workspaces.output.tree(Branch(each.id, History(each, snapshots, forks).branches()))
        return
    columns: dict[str, Column] = {"workspace": "id"}
    if all_hosts:
        columns["host"] = "host"
    columns["state"] = functools.partial(_state, workspaces)
    columns["version>"] = lambda each: str(each.last_version or "-")
    if sizes:
        columns["exclusive>"] = functools.partial(_cost, costs, "exclusive_bytes")
        columns["shared>"] = functools.partial(_cost, costs, "shared_bytes")
    columns["used"] = "last_used_at"
    if wide:
        columns["owner"] = lambda each: each.owner or "-"
        columns["template"] = lambda each: _template(each, active) or "-"
        columns["deadline"] = lambda each: _time(situations[each.id].deadline)
        columns["next start"] = lambda each: _time(situations[each.id].next_start(now))
    workspaces.output.table(columns, found)
    if stored_bytes is not None:
        together = format_size(stored_bytes)
        workspaces.output.detail(
            f"{len(found)} workspaces; the snapshots of all on this host take {together}"
        )


@workspace_command("workspace show")
@click.argument("workspace_id", metavar="WORKSPACE")
def show(workspaces: Workspaces, workspace_id: str) -> None:
    """Show a workspace, what it costs, and its history as a tree of snapshots."""
    with workspaces.catalog.reading() as reader:
        situation = reader.situation(workspace_id)
        active = {each.name: each.active_version for each in reader.templates()}
    found, run, now = situation.workspace, situation.run, datetime.now(UTC)
    snapshots = (
        [] if found.state is WorkspaceState.DELETED else workspaces.manager.list_snapshots(workspace_id)
    )
    sizes, _ = _sizes(workspaces, [found])
    status = workspaces.runtime.status(workspace_id)
    workspaces.output.data(
        {
            **timed_record(situation, now),
            "pid": status.pid,
            "exit_code": status.exit_code,
            "latest_run": None if run is None else record(run, *_RUN),
            "size": sizes[workspace_id],
            "snapshots": [snapshot_record(info) for info in snapshots],
        }
    )
    lines = _lines(situation, _state(workspaces, found), now, _template(found, active))
    lines |= {
        "exclusive": _cost(sizes, "exclusive_bytes", found),
        "shared": _cost(sizes, "shared_bytes", found),
    }
    if status.pid is not None:
        lines["pid"] = str(status.pid)
    width = max(map(len, lines))
    for name, text in lines.items():
        workspaces.output.text(f"{name:<{width}}  {text}")
    workspaces.output.text()
    if not workspaces.output.as_json:
        workspaces.output.tree(Branch(found.id, History(found, snapshots, _forks(workspaces)).branches()))
    for info in snapshots:
        if not info.is_managed:
            told = info.told
            what = "" if told is None else f"  {told.kind} of {time_words(told.created_at)}, {told.scope}"
            workspaces.output.text(f"not managed by the catalog: {info.runtime_name}{what}")


def _time(time: datetime | None) -> str:
    return "-" if time is None else time_words(time)


def _template(workspace: Workspace, active: Mapping[str, int]) -> str:
    """What it was made from, with the active version where that is another one."""
    if workspace.template_version is None:
        return workspace.base
    newest = active.get(workspace.base, workspace.template_version)
    told = f"{workspace.base} {workspace.template_version}"
    return told if newest == workspace.template_version else f"{told} ({newest} is active)"


def _lines(situation: Situation, state: str, now: datetime, template: str) -> dict[str, str]:
    """What there is to tell, by what it is called; what is not set is left out."""
    workspace, run, next_start = situation.workspace, situation.run, situation.next_start(now)
    spec = workspace.spec
    lines = {
        "workspace": workspace.id,
        "state": state,
        "host": workspace.host,
        "owner": workspace.owner,
        "base" if workspace.template_version is None else "template": template,
        "updates": "automatic" if workspace.automatic_updates else "",
        "policy": workspace.policy,
        "schedule": workspace.autostart_schedule,
        "ttl": "" if workspace.ttl is None else str(workspace.ttl),
        "labels": ", ".join(f"{name}={value}" for name, value in sorted(spec.labels.items())),
        "image": spec.image,
        "devices": ", ".join(spec.devices),
        "vcpus": str(spec.resources.vcpus or ""),
        "memory": "" if spec.resources.memory_bytes is None else format_size(spec.resources.memory_bytes),
        "command": shlex.join(spec.command),
        "volumes": ", ".join(f"{volume.name}={volume.durable_dir}" for volume in spec.volumes),
        "ready": f"{spec.readiness.kind} {spec.readiness.target}" if spec.readiness.kind != "none" else "",
        "slot": "" if workspace.slot is None else str(workspace.slot),
        "created": time_words(workspace.created_at),
        "used": time_words(workspace.last_used_at),
        "deleting": "" if workspace.deleting_at is None else time_words(workspace.deleting_at),
        "operation": "" if workspace.operation is None else f"{workspace.operation.kind} is under way",
        "deadline": "" if situation.deadline is None else time_words(situation.deadline),
        "next start": "" if next_start is None else time_words(next_start),
        "failed": run.error if run is not None and run.status is RunStatus.FAILED else "",
    }
    return {name: text for name, text in lines.items() if text}


def _state(workspaces: Workspaces, workspace: Workspace) -> str:
    """What the catalog says, and what runs on this host where that does not agree with it."""
    state = f"{workspace.state}, dormant" if workspace.dormant_at is not None else str(workspace.state)
    is_at_rest = workspace.operation is None  # an operation stops what runs, and starts it again
    if workspace.state is not WorkspaceState.RUNNING or workspace.host != workspaces.host or not is_at_rest:
        return state
    status = workspaces.runtime.status(workspace.id)
    if status.is_running:
        return state
    code = status.exit_code  # or the negative number of the signal
    if code is None:
        return f"{state}; no process is"
    return f"{state}; its command has ended, {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _sizes(workspaces: Workspaces, shown: Iterable[Workspace]) -> tuple[dict[str, dict[str, int]], int]:
    """What each workspace takes on this host, and what all do together."""
    names = ("exclusive_bytes", "shared_bytes", "snapshots")
    with workspaces.catalog.reading() as reader:
        of_host = reader.workspaces(host=workspaces.host)
    if not any(each.last_version or each.current_snapshot or each.base_snapshot for each in of_host):
        return {each.id: dict.fromkeys(names, 0) for each in shown}, 0
    from snaploader.workspace.sizes import WorkspaceSize, measure  # and numpy, which takes long

    measured = measure(workspaces.caches.file_cache)
    sizes = {each.id: measured.workspaces.get(each.id, WorkspaceSize()) for each in shown}
    return {name: record(size, *names) for name, size in sizes.items()}, measured.stored_bytes


def _cost(sizes: Mapping[str, Mapping[str, int]], name: str, workspace: Workspace) -> str:
    return format_size(sizes[workspace.id][name]) if workspace.id in sizes else "-"


def _forks(workspaces: Workspaces) -> dict[str, list[str]]:
    """The workspaces that were forked from a commit and are not deleted, by its name."""
    alive = {each.id for each in workspaces.manager.workspaces()}
    forks: dict[str, list[str]] = {}
    for event in workspaces.manager.events(types=(FORK_EVENT,), limit=None):
        if event.workspace_id in alive:
            forks.setdefault(event.payload.get("origin", ""), []).append(event.workspace_id)
    return forks


@workspace_command("workspace versions")
@click.argument("workspace_id", metavar="WORKSPACE")
def versions(workspaces: Workspaces, workspace_id: str) -> None:
    """List the versions of a workspace, oldest first."""
    found = workspaces.manager.list_versions(workspace_id)
    workspaces.output.data({"versions": [record(each, *_VERSION) for each in found]})
    workspaces.output.table(
        {"version>": "number", "created": "created_at", "source": "source", "name": "display_name"}, found
    )


@workspace_command("workspace events")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
@option(
    "--after",
    type=click.IntRange(0),
    metavar="ID",
    help="Only events later than the one of this id, beginning with the first of them.",
)
@option(
    "--type",
    "types",
    type=click.Choice(EVENT_TYPES),
    metavar="TYPE",
    multiple=True,
    help="Only events of this type; repeatable.",
)
@option(
    "--limit",
    type=click.IntRange(1),
    default=1000,
    help="No more than so many: the newest, or with --after the first.",
)
def events(
    workspaces: Workspaces, workspace_id: str, after: int | None, types: tuple[str, ...], limit: int
) -> None:
    """List what happened to a workspace, or to all of them, oldest first; of deleted ones too."""
    with workspaces.catalog.reading() as reader:
        # Who follows what happens must miss nothing; who looks wants to see what happened last.
        newest = after is None
        found = reader.events(workspace_id, after=after or 0, types=types, limit=limit, newest=newest)
        if workspace_id and not found:
            reader.workspace(workspace_id)  # NotFound, unless it only has no such events
    workspaces.output.data({"events": [record(event, *_EVENT) for event in found]})
    workspaces.output.table(
        {
            "id>": "id",
            "time": lambda event: f"{event.created_at:%Y-%m-%d %H:%M:%S}",
            "workspace": "workspace_id",
            "type": "type",
            "payload": _payload,
        },
        found,
    )


def _payload(event: Event) -> str:
    """What an event says that is not told of every one."""
    payload = {name: value for name, value in event.payload.items() if name not in ABOUT_ALL}
    return json.dumps(payload) if payload else ""


@workspace_command("workspace log")
@click.argument("workspace_id", metavar="WORKSPACE")
@option("--max-size", type=SIZE, default="64KiB", help="No more than its last bytes.")
def log(workspaces: Workspaces, workspace_id: str, max_size: int) -> None:
    """Print the end of what the command of a workspace has printed, byte for byte; of earlier runs too."""
    with workspaces.catalog.reading() as reader:
        reader.workspace(workspace_id)
    data = workspaces.runtime.log_tail(workspace_id, max_size)
    workspaces.output.data({"log": data.decode(errors="replace")})
    if not workspaces.output.as_json:
        with writing_to_stdout():
            sys.stdout.buffer.write(data)


@workspace_command("workspace orphans")
@click.argument("workspace_id", metavar="[WORKSPACE]", default="")
def orphans(workspaces: Workspaces, workspace_id: str) -> None:
    """List what commits that failed have left in the remote cache: of one workspace, or of all on this host.

    Nothing of it is visible there. The next commit of the workspace reuses it, and clears the list.
    """
    found = workspaces.manager.orphaned_uploads(workspace_id)
    rows = [
        {
            **record(each, "workspace_id", "snapshot_name"),
            "blobs": len(each.digests),
            "size_bytes": each.size_bytes,
        }
        for each in found
    ]
    workspaces.output.data({"orphans": rows})
    workspaces.output.table(
        {"workspace": "workspace_id", "snapshot": "snapshot_name", "blobs>": "blobs", "size>": "size_bytes"},
        rows,
    )
