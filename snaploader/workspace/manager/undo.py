"""Taking an operation back that failed, or that a killed process left in the middle."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from snaploader.errors import Cancelled, FailedPrecondition, SnaploaderError
from snaploader.workspace.manager.operation import (
    ENDING,
    RECOVERY,
    USER,
    Services,
    Work,
    runs_nevertheless,
    text_of,
)
from snaploader.workspace.manager.snapshots import remove_unfinished
from snaploader.workspace.manager.versions import carry_on, is_placed
from snaploader.workspace.model import (
    Operation,
    OperationKind,
    RunTransition,
    SnapshotKind,
    SnapshotRecord,
    SnapshotStatus,
    WorkspaceState,
)

log = logging.getLogger(__name__)

FAILED = "operation_failed"
RECOVERED = "operation_recovered"

_TRANSITIONS = {
    OperationKind.START: RunTransition.START,
    OperationKind.RESUME: RunTransition.START,
    OperationKind.STOP: RunTransition.STOP,
    OperationKind.PAUSE: RunTransition.STOP,
    OperationKind.DELETE: RunTransition.DELETE,
}


def undo_failed(work: Work, error: BaseException) -> None:
    """Take the operation back because of `error`, which gets a note for whatever could not be done.

    Never raises: what cannot be taken back now, such as without the catalog, is left to recovery.
    """
    try:
        undo(work, error)
    except Exception as second:
        log.exception("an operation on workspace %r is left to recovery", work.workspace_id)
        error.add_note(f"the {work.operation.kind} could not be taken back either, recovery will: {second}")
        # If one after which nothing runs may have been recorded, nothing is started before that is known.
        if not work.was_restarted and not (work.may_be_recorded and work.operation.kind in ENDING):
            _restart(work, error)


def undo(work: Work, error: BaseException | None = None) -> None:
    """Bring the workspace back to its state before the operation; without `error` its process was killed.

    The runtime is put in order first, then the catalog says so, and then the content that was taken goes.
    """
    if not _is_under_way(work):
        if error is not None:
            error.add_note(
                f"whether the {work.operation.kind} was recorded is not known: see the workspace's events"
            )
        return
    if is_placed(work):
        if error is not None:
            error.add_note(f"workspace {work.workspace_id!r} is rolled back nevertheless")
        carry_on(work)
        return
    _put_back(work)
    if work.operation.kind in {OperationKind.CREATE, OperationKind.FORK}:
        _forget(work)
        return
    restart_error = _restart(work, error)
    for record in _record(work, error, restart_error):
        try:
            remove_unfinished(work.services, record)
        except SnaploaderError as problem:
            log.warning("snapshot %r is left to recovery", record.name, exc_info=True)
            if error is not None:
                error.add_note(f"snapshot {record.name!r} is not removed yet, recovery will: {problem}")


def settle(services: Services, workspace_id: str) -> Operation | None:
    """Finish or take back what is under way on a workspace, whose lock proves that nobody is doing it.

    Returns what that was, if anything. FailedPrecondition when it is under way on another host.
    """
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        operation = workspace.operation
        if operation is None:
            return None
        pending = reader.snapshots(workspace_id, statuses=[SnapshotStatus.PENDING])
    if operation.host != services.host:
        raise FailedPrecondition(
            f"workspace {workspace_id!r}: a {operation.kind} on host {operation.host!r} did not end: "
            "run recovery there"
        )
    log.warning("workspace %r: a %s did not end; it is put right", workspace_id, operation.kind)
    undo(Work(services, workspace, operation, pending=next(iter(pending), None), reason=RECOVERY))
    return operation


def _is_under_way(work: Work) -> bool:
    workspace = work.services.find_workspace(work.workspace_id)
    operation = None if workspace is None else workspace.operation
    return operation is not None and operation.token == work.operation.token


def _put_back(work: Work) -> None:
    """Bring what is on this host to what it was, but for running."""
    services, workspace_id = work.services, work.workspace_id
    match work.operation.kind:
        case OperationKind.CREATE | OperationKind.FORK | OperationKind.RESUME:
            # Nothing of it was in the runtime, which was seen before the operation began.
            services.stop(workspace_id)
            services.runtime.remove(workspace_id)
        case OperationKind.START:
            services.stop(workspace_id)
        case OperationKind.PAUSE:
            services.records.remove(workspace_id)


def _restart(work: Work, error: BaseException | None) -> BaseException | None:
    """Start the runtime again if it ran before the operation; why that failed, if it did."""
    work.was_restarted = True
    if not work.was_running:
        return None
    try:
        work.services.runtime.start(work.workspace.spec)
    except Exception as second:
        if runs_nevertheless(work.services, work.workspace_id):
            return None
        log.warning("workspace %r could not be started again", work.workspace_id, exc_info=True)
        if error is not None:
            error.add_note(f"workspace {work.workspace_id!r} could not be started again: {second}")
        return second
    return None


def _record(
    work: Work, error: BaseException | None, restart_error: BaseException | None
) -> list[SnapshotRecord]:
    """End the operation in the catalog; the snapshots whose content is to go."""
    services, kind = work.services, work.operation.kind
    with services.catalog.transaction() as tx:
        tx.end_operation(work.workspace_id, work.operation.token)
        unfinished = []
        for record in tx.snapshots(work.workspace_id, statuses=[SnapshotStatus.PENDING]):
            is_commit = record.kind is SnapshotKind.COMMIT and services.content.is_pinned(record)
            status = SnapshotStatus.ORPHANED if is_commit else SnapshotStatus.DELETING
            unfinished.append(replace(record, status=status, is_remote=is_commit))
        if any(record.status is SnapshotStatus.ORPHANED for record in unfinished):
            # Earlier failed commits go: what keeps failing must not fill the disk with pins.
            orphans = tx.snapshots(work.workspace_id, statuses=[SnapshotStatus.ORPHANED])
            unfinished += [replace(record, status=SnapshotStatus.DELETING) for record in orphans]
        for record in unfinished:
            tx.put_snapshot(record)
        if restart_error is not None:
            tx.update_workspace(work.workspace_id, state=WorkspaceState.STOPPED)
            work.record_run(tx, RunTransition.START, error=text_of(restart_error))
        elif error is not None and _is_failed_run(work, error):
            work.record_run(tx, _TRANSITIONS[kind], error=text_of(error))
        about: dict[str, Any] = {"operation": kind.value}
        if work.operation.snapshot_name:
            about["snapshot"] = work.operation.snapshot_name
        if work.operation.version is not None:
            about["version"] = work.operation.version
        if error is None:
            work.record_event(tx, RECOVERED, **about, outcome="undone")
        else:
            work.record_event(tx, FAILED, **about, error=text_of(error))
    return unfinished


def _is_failed_run(work: Work, error: BaseException) -> bool:
    """Whether the lifecycle must hold back: after a start that failed, or what it tried itself."""
    if isinstance(error, Cancelled):
        return False  # the manager closes, which says nothing of the workspace
    transition = _TRANSITIONS.get(work.operation.kind)
    return transition is RunTransition.START or (transition is not None and work.reason != USER)


def _forget(work: Work) -> None:
    """Leave nothing of a workspace whose creation failed."""
    services = work.services
    with services.catalog.reading() as reader:
        records = reader.snapshots(work.workspace_id, statuses=list(SnapshotStatus))
    for record in records:
        services.content.hide(record)
        services.content.unpin(record)
    if work.workspace.slot is not None:
        services.slots.release(work.workspace.slot, work.workspace_id)
    with services.catalog.transaction() as tx:
        tx.end_operation(work.workspace_id, work.operation.token)
        tx.forget_workspace(work.workspace_id)
