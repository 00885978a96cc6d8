"""Pausing a workspace into a snapshot and a record, resuming it, and taking it back from its record.

All of it is local: the remote cache is not asked for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby

from snaploader.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
    Unavailable,
)
from snaploader.policy import ReadPolicy
from snaploader.workspace.host import WorkspaceLocks
from snaploader.workspace.manager.operation import ON_HOST, USER, Services, Work, with_slot
from snaploader.workspace.manager.repair import Findings, Note
from snaploader.workspace.manager.snapshots import base_of, completed, new_record
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecord

log = logging.getLogger(__name__)


PAUSE = "workspace_pause"
RESUME = "workspace_resume"
RESTORED = "workspace_restore"


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
        services.content.flush()  # its files, the only other copy, are removed
        record = completed(saved.record)
        paused = replace(
            work.as_used, current_snapshot=record.name, state=WorkspaceState.PAUSED, paused_at=work.now
        )
        with services.catalog.reading() as reader:
            kept = PausedRecord.of(reader, paused, record)
        services.records.write(kept)
        work.reach("kept")
        with work.recording() as tx:
            tx.put_snapshot(record)
            work.go_on_from(tx, record, state=paused.state, paused_at=paused.paused_at)
            work.record_run(tx, RunTransition.STOP)
            work.record_event(tx, PAUSE, snapshot=record.name, scope=record.scope.value)
    work.afterwards("its files", lambda: services.runtime.remove(workspace_id))
    work.clean_up()
    return saved.result()


def resume(
    services: Services, workspace_id: str, reason: str = USER, *, ready_timeout_s: float | None = None
) -> Workspace:
    """Place the snapshot, start, wait until it is ready, record. See `WorkspaceManager.resume`."""
    work = Work.begin(
        services, workspace_id, OperationKind.RESUME, allowed=[WorkspaceState.PAUSED], reason=reason
    )
    with work:
        with services.catalog.reading() as reader:
            current = reader.snapshot(work.workspace.current_snapshot)
            base = base_of(reader, work.workspace, current)
        work.place(services.content.find(current), None if base is None else services.content.find(base))
        work.start()
        if current.scope is Scope.DATA or not services.runtime.keeps_memory:
            work.wait_ready(ready_timeout_s)
        with work.recording() as tx:
            tx.update_workspace(workspace_id, state=WorkspaceState.RUNNING, paused_at=None)
            work.record_run(tx, RunTransition.START)
            work.record_event(tx, RESUME, snapshot=current.name, scope=current.scope.value)
            workspace = tx.workspace(workspace_id)
    work.afterwards("its record as paused", lambda: services.records.remove(workspace_id))
    work.clean_up()
    return workspace


def restore_paused(services: Services, locks: WorkspaceLocks, findings: Findings) -> None:
    """Register every paused workspace whose record is good, with its slot; move the other records aside."""
    for name in services.records.strangers():
        log.warning("%r is no record of a paused workspace, and is left alone", services.records.path(name))
        findings.unknown.append(Note(name, "it is no record of a paused workspace: move it away"))
    found: list[PausedRecord] = []

    def look_at(name: str) -> None:
        found.extend(_read(services, findings, name))

    for name in services.records.entries():
        with findings.guarding(name, log.warning):
            findings.under_lock(locks, name, partial(look_at, name))
    winners, losers = _by_slot(found)
    for record, reason in losers:
        give_up = partial(_give_up, services, findings, record.workspace, reason)
        _if_same(services, locks, findings, record, give_up)
    for record in winners:
        _if_same(services, locks, findings, record, partial(_restore, services, findings, record))


def _if_same(
    services: Services,
    locks: WorkspaceLocks,
    findings: Findings,
    record: PausedRecord,
    action: Callable[[], None],
) -> None:
    """Do something about a record, under its workspace's lock, unless somebody changed it since."""
    name = record.workspace.id

    def act() -> None:
        if _read(services, findings, name) == [record]:
            action()
        else:
            findings.busy[name] = None

    with findings.guarding(name, log.warning):
        findings.under_lock(locks, name, act)


def _read(services: Services, findings: Findings, name: str) -> list[PausedRecord]:
    """The record of that name, or nothing when it is not to be restored."""
    try:
        record = services.records.read(name)
    except (ResourceExhausted, Unavailable):
        raise  # which says nothing of the record
    except SnaploaderError as error:
        _trash(services, findings, name, error.message)
        return []
    return [record] if _is_paused(services, findings, record) else []


def _is_paused(services: Services, findings: Findings, record: PausedRecord) -> bool:
    """Whether the workspace of a record is paused here, as far as the catalog knows."""
    workspace_id = record.workspace.id
    with services.catalog.reading() as reader:
        try:
            known = reader.workspace(workspace_id)
        except NotFound:
            return True
    if known.host != services.host:
        findings.problems.append(
            Note(workspace_id, f"there is a record of it as paused, but it lives on host {known.host!r}")
        )
    elif known.state is not WorkspaceState.PAUSED and known.operation is None:
        services.records.remove(workspace_id)
        findings.pruned.append(Note(workspace_id, f"a record of it as paused, and it is {known.state}"))
    return known.host == services.host and known.state is WorkspaceState.PAUSED


def _by_slot(records: list[PausedRecord]) -> tuple[list[PausedRecord], list[tuple[PausedRecord, str]]]:
    """One record for each slot, the newest, and the others with why they lose."""
    winners, losers = [], []
    records = sorted(records, key=lambda each: each.workspace.created_at, reverse=True)
    by_slot = sorted(records, key=lambda each: each.workspace.slot or 0)
    for slot, group in groupby(by_slot, key=lambda each: each.workspace.slot):
        winner, *others = group
        winners.append(winner)
        reason = f"its slot {slot} is that of workspace {winner.workspace.id!r}, which is newer"
        losers += [(other, reason) for other in others]
    return winners, losers


def _restore(services: Services, findings: Findings, record: PausedRecord) -> None:
    """Reserve the slot, and let the catalog say that the workspace is paused. Nothing is started."""
    workspace = record.workspace
    assert workspace.slot is not None
    if not _reserve(services, workspace.slot, workspace.id):
        owner = services.slots.owner(workspace.slot)
        reason = f"its slot {workspace.slot} cannot be reserved: "
        reason += f"workspace {owner!r} holds it" if owner is not None else "there is no such slot"
        _give_up(services, findings, workspace, reason)
        return
    try:
        is_adopted = _register(services, record)
    except (NotFound, DataLoss, InvalidArgument) as error:
        services.slots.release(workspace.slot, workspace.id)
        _trash(services, findings, workspace.id, error.message)
        return
    findings.restored.append(workspace.id)
    if is_adopted:
        findings.adopted.append(workspace.id)


def _reserve(services: Services, slot: int, workspace_id: str) -> bool:
    """Take the slot, also from a workspace that is gone or has another one by now."""
    if services.slots.reserve(slot, workspace_id):
        return True
    owner = services.slots.owner(slot)
    if owner is None or not _is_stale(services, slot, owner):
        return False
    services.slots.release(slot, owner)
    return services.slots.reserve(slot, workspace_id)


def _is_stale(services: Services, slot: int, owner: str) -> bool:
    with services.catalog.reading() as reader:
        try:
            holder = reader.workspace(owner)
        except NotFound:
            return owner not in services.runtime.workspaces() and owner not in services.records.entries()
    if holder.state is WorkspaceState.DELETED:
        return True
    return holder.slot != slot and holder.host == services.host


def _register(services: Services, record: PausedRecord) -> bool:
    """Bring catalog and record together; whether the workspace was not in the catalog.

    Raises:
        NotFound, DataLoss: It was not, and its snapshot is not whole on this host.
        InvalidArgument: It was not, and the record says of it what no catalog can hold.
    """
    with services.catalog.reading() as reader:
        try:
            known = reader.workspace(record.workspace.id)
        except NotFound:
            known = None
    if known is None:
        _adopt(services, record)
        return True
    if known.slot != record.workspace.slot:
        with services.catalog.transaction() as tx:
            tx.update_workspace(known.id, slot=record.workspace.slot)
        if known.slot is not None:
            services.slots.release(known.slot, known.id)
    return False


def _adopt(services: Services, record: PausedRecord) -> None:
    """Give the catalog back what it lost: the workspace, its snapshots that are still here, its versions."""
    present = [snapshot for snapshot in record.snapshots if _is_whole(services, snapshot)]
    names = {snapshot.name for snapshot in present}
    workspace = replace(record.workspace, host=services.host, operation=None)
    if workspace.current_snapshot not in names:
        raise NotFound(f"the snapshot {workspace.current_snapshot!r} that it is paused as is not whole here")
    if workspace.base_snapshot not in names:
        workspace = replace(workspace, base_snapshot="")
    with services.catalog.transaction() as tx:
        if record.policy.name not in {policy.name for policy in tx.policies()}:
            tx.put_policy(record.policy)
        tx.add_workspace(workspace)
        for snapshot in present:
            tx.put_snapshot(snapshot)
        for version in record.versions:
            # One whose content is lost leaves a gap: its number meant that content, and never means another.
            if version.snapshot_name not in names:
                tx.reserve_versions(workspace.id, version.number)
                continue
            tx.reserve_versions(workspace.id, version.number - 1)
            created_at = tx.snapshot(version.snapshot_name).created_at
            tx.add_version(workspace.id, version.snapshot_name, created_at, version.display_name)
        payload = {"snapshot": workspace.current_snapshot}
        tx.add_event(workspace.id, RESTORED, payload, services.clock())


def _is_whole(services: Services, record: SnapshotRecord) -> bool:
    policy = ReadPolicy.LOCAL_FIRST if record.is_remote else ReadPolicy.LOCAL_ONLY
    try:
        services.content.find(record, policy)
    except (NotFound, DataLoss, InvalidArgument):
        return False
    return True


def _give_up(services: Services, findings: Findings, workspace: Workspace, reason: str) -> None:
    """Move a record aside that lost its slot; where the catalog knows it, it has no slot any more."""
    with findings.guarding(workspace.id, log.warning):
        with services.catalog.transaction() as tx:
            try:
                known = tx.lock_workspace(workspace.id)
            except NotFound:
                pass
            else:
                if known.slot == workspace.slot:
                    tx.update_workspace(workspace.id, slot=None)
        _trash(services, findings, workspace.id, reason)


def _trash(services: Services, findings: Findings, name: str, reason: str) -> None:
    with findings.guarding(name, log.warning):
        if services.records.trash(name):  # else somebody has removed it meanwhile
            log.warning("the record of paused workspace %r is moved aside: %s", name, reason)
            findings.trashed.append(Note(name, reason))
