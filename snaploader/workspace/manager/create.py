"""New workspaces: created from nothing or a folder, or forked from a commit.

From its first transaction on a new workspace has its row, with an operation on it; until that has ended it
is not shown. A creation that fails, or whose process is killed, leaves nothing at all.
"""

from __future__ import annotations

import os
from dataclasses import replace

from snaploader.errors import FailedPrecondition, NotFound
from snaploader.workspace.catalog import Reader
from snaploader.workspace.manager.commit import COMMIT
from snaploader.workspace.manager.operation import Services, Work, give_slot_back, new_operation
from snaploader.workspace.manager.snapshots import completed, new_record
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotStatus,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.policy import parse_schedule

CREATE = "workspace_create"
FORK = "workspace_fork"


def new_workspace(
    services: Services, spec: WorkspaceSpec, owner: str, base: str, policy: str, autostart_schedule: str
) -> Workspace:
    """The workspace that is to be. TypeError or InvalidArgument when it cannot be."""
    if autostart_schedule:
        parse_schedule(autostart_schedule)
    for what, texts in (
        ("command", spec.command),
        ("environment", [*spec.environment, *spec.environment.values()]),
    ):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"the {what} of a workspace must be of str: it holds {text!r}")
    now = services.clock()
    stopped = WorkspaceState.STOPPED
    return Workspace(spec, services.host, stopped, now, now, owner, base, policy, autostart_schedule)


def create(
    services: Services, workspace: Workspace, source: str | os.PathLike[str] | None, *, start: bool
) -> Workspace:
    """Reserve, make the files, keep what it began as, start, record. See `WorkspaceManager.create`."""
    _check_nothing_is_here(services, workspace.id)
    has_content = source is not None
    work = _begin(services, workspace, OperationKind.CREATE, Scope.FULL if has_content else None)
    with work:
        services.runtime.create(workspace.spec, source)
        work.reach("made")
        base = work.capture().record if has_content else None
        return _finish(work, CREATE, base, start=start, template=workspace.base)


def fork(services: Services, workspace: Workspace, origin: SnapshotRecord, *, start: bool) -> Workspace:
    """Reserve, derive, place, start, record. See `WorkspaceManager.fork`."""
    _check_nothing_is_here(services, workspace.id)
    snapshot = services.content.find(origin)
    work = _begin(services, workspace, OperationKind.FORK, origin.scope)
    assert work.pending is not None
    with work:
        derived = services.content.derive(work.pending, snapshot, remote=False).record
        work.reach("derived")
        work.place(services.content.find(derived), None)
        derived = replace(derived, size_bytes=origin.size_bytes)
        source = {"origin": origin.name, "origin_workspace": origin.workspace_id}
        return _finish(work, FORK, derived, start=start, **source)


def find_commit(reader: Reader, name: str) -> SnapshotRecord:
    """The commit of that name, or the latest commit of the workspace of that id."""
    if "." not in name:
        reader.workspace(name)
        commits = [record for record in reader.snapshots(name) if record.kind is SnapshotKind.COMMIT]
        if not commits:
            raise NotFound(f"workspace {name!r} has no commit to fork from: commit it first")
        # Not by their times alone: clocks may be set back.
        events = reader.events(name, types=[COMMIT], limit=None)
        order = {event.payload["snapshot"]: event.id for event in events}
        return max(commits, key=lambda commit: (order.get(commit.name, 0), commit.created_at))
    record = reader.snapshot(name)
    if record.kind is not SnapshotKind.COMMIT:
        raise FailedPrecondition(
            f"snapshot {name!r} is a {record.kind}, and only a commit can be forked: "
            f"commit workspace {record.workspace_id!r} first"
        )
    if record.status is not SnapshotStatus.COMPLETE:
        raise FailedPrecondition(f"commit {name!r} is {record.status}: it cannot be forked")
    return record


def _check_nothing_is_here(services: Services, workspace_id: str) -> None:
    """Refuse an id of which this host has something that the catalog does not know: it may be the wrong one.

    Once the operation has begun, what is here of that id is what it made, and goes when it is taken back.
    """
    if not services.has_traces_of(workspace_id):
        return
    if services.find_workspace(workspace_id) is not None:
        return  # the catalog knows it, and refuses the id itself
    if services.records.exists(workspace_id):
        what = f"a record of it as paused, {services.records.path(workspace_id)!r},"
        remedy = "if that one is lost, let `recover` take the workspace back; "
    else:
        what = "files of it"
        remedy = ""
    raise FailedPrecondition(
        f"workspace {workspace_id!r} cannot be made: this host has {what} which this catalog does not know. "
        f"Use the catalog that does; {remedy}or stop it and remove what is here of it by hand"
    )


def _begin(services: Services, workspace: Workspace, kind: OperationKind, base_scope: Scope | None) -> Work:
    """Take a slot and the id, and say what is under way. Without `base_scope` it begins as no snapshot."""
    slot = services.slots.acquire(workspace.id)
    workspace = replace(workspace, slot=slot)
    try:
        with services.catalog.transaction() as tx:
            tx.add_workspace(workspace)
            pending = None
            if base_scope is not None:
                pending = new_record(tx, services, workspace, SnapshotKind.BASE, base_scope)
            operation = new_operation(services, kind, "" if pending is None else pending.name)
            tx.begin_operation(workspace.id, operation)
            if pending is not None:
                tx.put_snapshot(pending)
    except BaseException:
        give_slot_back(services, slot, workspace.id)
        raise
    work = Work(services, workspace, operation, pending=pending)
    work.reach("begun")
    return work


def _finish(work: Work, event: str, base: SnapshotRecord | None, *, start: bool, **payload: str) -> Workspace:
    """Start the new workspace, if it is to be, and show it once it is ready."""
    if start:
        work.start()
        work.wait_ready()
    name = "" if base is None else base.name
    with work.recording() as tx:
        if base is not None:
            tx.put_snapshot(completed(base))
        if start:
            work.record_run(tx, RunTransition.START)
        if name:
            payload["snapshot"] = name
        work.record_event(tx, event, **payload)
        state = WorkspaceState.RUNNING if start else WorkspaceState.STOPPED
        return tx.update_workspace(work.workspace_id, state=state, current_snapshot=name, base_snapshot=name)
