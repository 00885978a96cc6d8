"""A workspace from its beginning to its end: created or forked, started, stopped, paused, resumed, deleted.

From its first transaction on a new workspace has its row, with an operation on it; until that has ended it
is not shown. A creation that fails, or whose process is killed, leaves nothing at all.

Pausing and resuming is local: the remote cache is not asked for anything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, TypedDict, Unpack

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.workspace.events import about_snapshot
from snaploader.workspace.host import HeldLock
from snaploader.workspace.manager.operation import (
    ALIVE,
    ON_HOST,
    USER,
    Services,
    Work,
    give_slot_back,
    new_operation,
    widest_scope,
    with_slot,
)
from snaploader.workspace.manager.snapshots import (
    completed,
    forget_remote,
    load_state,
    new_record,
    remove_unfinished,
)
from snaploader.workspace.manager.templates import begin_update, check_made_from_template, record_update
from snaploader.workspace.model import (
    STOP_EVENT,
    OperationKind,
    Readiness,
    Resources,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    SnapshotStatus,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
    check_spec,
    check_ttl,
)
from snaploader.workspace.policy import DEFAULT_POLICY, check_scopes
from snaploader.workspace.records import PausedRecord
from snaploader.workspace.schedule import parse_schedule
from snaploader.workspace.templates import TemplateVersion, made_from

log = logging.getLogger(__name__)

CREATE = "workspace_create"
FORK = "workspace_fork"
START = "workspace_start"
PAUSE = "workspace_pause"
RESUME = "workspace_resume"
DELETE = "workspace_delete"


class MadeWith(TypedDict, total=False):
    """What a workspace is made with; see the arguments of `WorkspaceManager.create`."""

    command: Iterable[str]
    environment: Mapping[str, str] | None
    volumes: Iterable[Volume]
    readiness: Readiness | None
    image: str
    devices: Iterable[str]
    resources: Resources | None
    labels: Mapping[str, str] | None
    owner: str
    base: str
    policy: str | None
    autostart_schedule: str
    ttl: timedelta | None
    template: str
    template_version: int | None
    automatic_updates: bool


def made_with(services: Services, workspace_id: str, **given: Unpack[MadeWith]) -> Workspace:
    """The workspace that is to be, made with this. TypeError or InvalidArgument when it cannot be."""
    if unknown := given.keys() - MadeWith.__annotations__.keys():
        raise TypeError(f"a workspace is not made with {min(unknown)!r}")
    command, devices = given.get("command", ()), given.get("devices", ())
    for what, texts in (("command", command), ("devices", devices)):
        if isinstance(texts, str):
            raise TypeError(
                f"the {what} must be a sequence such as ['sleep', '5'], and not one str: {texts!r}"
            )
    spec = WorkspaceSpec(
        workspace_id,
        tuple(command),
        given.get("environment") or {},
        tuple(given.get("volumes", ())),
        given.get("readiness") or Readiness(),
        given.get("image", ""),
        tuple(devices),
        given.get("resources") or Resources(),
        given.get("labels") or {},
    )
    base, policy, ttl = given.get("base", ""), given.get("policy"), given.get("ttl")
    version = _template_version(services, given.get("template", ""), given.get("template_version"), base)
    if version is not None:
        spec, base = made_from(version, spec), version.template
        policy = version.policy if policy is None else policy
        ttl = version.ttl if ttl is None else ttl
    elif given.get("automatic_updates"):
        raise InvalidArgument("name the template whose active version automatic updates are to take")
    workspace = new_workspace(
        services,
        spec,
        given.get("owner", ""),
        base,
        DEFAULT_POLICY if policy is None else policy,
        given.get("autostart_schedule", ""),
        ttl,
    )
    return replace(
        workspace,
        template_version=None if version is None else version.number,
        automatic_updates=given.get("automatic_updates", False),
    )


def _template_version(
    services: Services, template: str, number: int | None, base: str
) -> TemplateVersion | None:
    if not template:
        if number is not None:
            raise InvalidArgument(f"name the template whose version {number} is meant")
        return None
    if base not in {"", template}:
        raise InvalidArgument(f"a workspace of template {template!r} has that as its base, and not {base!r}")
    with services.catalog.reading() as reader:
        active = reader.template(template).active_version
        return reader.template_version(template, active if number is None else number)


def new_workspace(
    services: Services,
    spec: WorkspaceSpec,
    owner: str,
    base: str,
    policy: str,
    autostart_schedule: str,
    ttl: timedelta | None,
) -> Workspace:
    """The workspace that is to be. TypeError or InvalidArgument when it cannot be."""
    if autostart_schedule:
        parse_schedule(autostart_schedule)
    spec = check_spec(spec)
    now = services.clock()
    stopped = WorkspaceState.STOPPED
    ttl = check_ttl(ttl)
    return Workspace(spec, services.host, stopped, now, now, owner, base, policy, autostart_schedule, ttl)


def create(
    services: Services, workspace: Workspace, source: str | os.PathLike[str] | None, *, start: bool
) -> Workspace:
    """Reserve, make the files, keep what it began as, start, record. See `WorkspaceManager.create`."""
    _check_nothing_is_here(services, workspace.id)
    has_content = source is not None
    work = _begin(services, workspace, OperationKind.CREATE, widest_scope(services) if has_content else None)
    with work:
        services.runtime.create(workspace.spec, source)
        work.reach("made")
        base = work.capture().record if has_content else None
        return _finish(work, CREATE, base, start=start)


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
        source = {
            "origin": origin.name,
            "origin_workspace": origin.workspace_id,
            "origin_runtime_name": origin.runtime_name,
        }
        return _finish(work, FORK, derived, start=start, **source)


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
        remedy = "if that one is lost, adopt the workspace (`workspace adopt`); "
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
            check_scopes(tx.policy(workspace.policy), services.runtime.scopes)
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


def _finish(work: Work, event: str, base: SnapshotRecord | None, *, start: bool, **payload: Any) -> Workspace:
    """Start the new workspace, if it is to be, and show it once it is ready."""
    if start:
        work.start()
        work.wait_ready()
    name = "" if base is None else base.name
    with work.recording() as tx:
        if base is not None:
            tx.put_snapshot(completed(base))
            payload |= about_snapshot(base)
        if start:
            payload["run"] = work.record_run(tx, RunTransition.START).id
        payload["policy"] = work.workspace.policy
        work.record_event(tx, event, **payload)
        state = WorkspaceState.RUNNING if start else WorkspaceState.STOPPED
        return tx.update_workspace(work.workspace_id, state=state, current_snapshot=name, base_snapshot=name)


def start(services: Services, workspace_id: str, reason: str = USER, *, update: bool = False) -> Workspace:
    """Update, start, wait until it is ready, record. See `WorkspaceManager.start`."""
    if update:  # refused before it begins: a start that failed would keep the schedule from starting it
        with services.catalog.reading() as reader:
            check_made_from_template(reader.workspace(workspace_id))
    with_slot(services, workspace_id)
    work = Work.begin(
        services, workspace_id, OperationKind.START, allowed=[WorkspaceState.STOPPED], reason=reason
    )
    with work:
        taken = begin_update(work, asked=update)
        if not services.runtime.status(workspace_id).exists:
            bring_back(services, work.workspace, work.operation.token)
            work.reach("placed")
        work.start()
        work.wait_ready()
        with work.recording() as tx:
            record_update(work, tx, taken)
            run = work.record_run(tx, RunTransition.START)
            work.record_event(tx, START, run=run.id)
            return tx.update_workspace(workspace_id, state=WorkspaceState.RUNNING)


def stop(services: Services, workspace_id: str, reason: str = USER) -> Workspace:
    """Stop, record. See `WorkspaceManager.stop`."""
    work = Work.begin(
        services, workspace_id, OperationKind.STOP, allowed=[WorkspaceState.RUNNING], reason=reason
    )
    with work:
        work.stop()
        with work.recording() as tx:
            run = work.record_run(tx, RunTransition.STOP)
            work.record_event(tx, STOP_EVENT, run=run.id)
            return tx.update_workspace(workspace_id, state=WorkspaceState.STOPPED)


def pause(services: Services, workspace_id: str, reason: str = USER) -> SnapshotResult:
    """Stop, capture, keep a record, record, remove the files. See `WorkspaceManager.pause`."""
    with_slot(services, workspace_id)
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.PAUSE,
        allowed=ON_HOST,
        reason=reason,
        prepare=lambda tx, workspace: new_record(
            tx, services, workspace, SnapshotKind.PAUSE, tx.policy(workspace.policy).scopes.on_pause
        ),
    )
    with work:
        work.stop()
        saved = work.capture()
        services.content.file_cache.sync()  # its files, the only other copy, are removed
        record = completed(saved.record)
        paused = replace(
            work.workspace, current_snapshot=record.name, state=WorkspaceState.PAUSED, paused_at=work.now
        )
        if reason == USER:
            paused = replace(paused, last_used_at=work.now, dormant_at=None, deleting_at=None)
        with services.catalog.reading() as reader:
            kept = PausedRecord.of(reader, paused, record)
        services.records.write(kept)
        work.reach("kept")
        with work.recording() as tx:
            tx.put_snapshot(record)
            work.go_on_from(tx, record, state=paused.state, paused_at=paused.paused_at)
            run = work.record_run(tx, RunTransition.STOP)
            work.record_event(tx, PAUSE, **about_snapshot(record), run=run.id)
    work.afterwards("its files", lambda: services.runtime.remove(workspace_id))
    work.clean_up()
    return saved.result()


def resume(
    services: Services, workspace_id: str, reason: str = USER, *, ready_timeout_s: float | None = None
) -> Workspace:
    """Place the snapshot, update, start, wait until it is ready, record. See `WorkspaceManager.resume`."""
    work = Work.begin(
        services, workspace_id, OperationKind.RESUME, allowed=[WorkspaceState.PAUSED], reason=reason
    )
    with work:
        current, snapshot, base = load_state(services, work.workspace, work.workspace.current_snapshot)
        is_afresh = current.scope is Scope.DATA or not services.runtime.keeps_memory
        taken = begin_update(work, asked=False) if is_afresh else None
        work.place(snapshot, base)
        work.start()
        if is_afresh:
            work.wait_ready(ready_timeout_s)
        with work.recording() as tx:
            record_update(work, tx, taken)
            run = work.record_run(tx, RunTransition.START)
            work.record_event(tx, RESUME, **about_snapshot(current), run=run.id)
            workspace = tx.update_workspace(workspace_id, state=WorkspaceState.RUNNING, paused_at=None)
    work.afterwards("its record as paused", lambda: services.records.remove(workspace_id))
    work.clean_up()
    return workspace


def delete(
    services: Services, workspace_id: str, lock: HeldLock, reason: str, *, without_remote: bool
) -> Workspace:
    """Stop, record, remove everything and the lock's file. See `WorkspaceManager.delete`."""
    work = Work.begin(services, workspace_id, OperationKind.DELETE, allowed=ALIVE, reason=reason)
    with work:
        with services.catalog.reading() as reader:
            records = reader.snapshots(workspace_id, statuses=list(SnapshotStatus))
        commits = [each for each in records if each.kind is SnapshotKind.COMMIT and each.is_remote]
        try:
            for record in () if without_remote else commits:
                services.content.check_remote(record)
        except SnaploaderError as error:
            error.add_note(
                "if that remote cache is gone for good, delete with --forget-remote (or forget_remote=True): "
                "what it has of the commits stays there"
            )
            raise
        work.stop()
        with work.recording() as tx:
            for record in commits if without_remote else ():
                forget_remote(tx, record, services.clock())
            run = work.record_run(tx, RunTransition.DELETE)
            kept = sum(record.status is SnapshotStatus.COMPLETE for record in records)
            work.record_event(tx, DELETE, snapshots=kept, commits=len(commits), run=run.id)
            workspace = tx.update_workspace(
                workspace_id,
                state=WorkspaceState.DELETED,
                slot=None,
                current_snapshot="",
                base_snapshot="",
                paused_at=None,
            )
    for problem in finish_deletion(services, workspace_id):
        log.warning("workspace %r is deleted; recovery removes what is left: %s", workspace_id, problem)
    lock.remove_file()  # ids are never used again, so nobody needs the lock any more
    return workspace


def bring_back(services: Services, workspace: Workspace, token: str) -> None:
    """Place the snapshot that the workspace's state goes on from, for its files are gone from the host."""
    name = workspace.current_snapshot
    if not name:
        raise NotFound(
            f"the files of workspace {workspace.id!r} are gone from host {services.host!r}, and no snapshot "
            "was ever taken of it: delete it"
        )
    log.warning("workspace %r has lost its files: snapshot %r takes their place", workspace.id, name)
    _, snapshot, base = load_state(services, workspace, name)
    services.place(workspace.spec, snapshot, base, token)


def finish_deletion(services: Services, workspace_id: str) -> list[SnaploaderError]:
    """Remove all that is left of a deleted workspace; what went wrong. One failure does not stop the rest."""
    problems: list[SnaploaderError] = []
    for step in _removals(services, workspace_id):
        try:
            step()
        except SnaploaderError as error:
            problems.append(error)
        services.environment.after_step("delete.cleaned")
    return problems


def _removals(services: Services, workspace_id: str) -> Iterator[Callable[[], object]]:
    content, runtime = services.content, services.runtime
    yield lambda: services.stop(workspace_id)
    yield lambda: runtime.remove(workspace_id)
    yield lambda: services.records.remove(workspace_id)
    yield lambda: services.slots.release_all(workspace_id)
    with services.catalog.reading() as reader:
        records = reader.snapshots(workspace_id, statuses=list(SnapshotStatus))
    for record in records:
        yield partial(remove_unfinished, services, record)
    yield lambda: content.drop_unmanaged(content.pinned_names(workspace_id))
