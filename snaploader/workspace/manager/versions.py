"""Snapshots that are kept: numbered versions, going back to one, and commits to the remote cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

from snaploader.digest import Digest
from snaploader.errors import Cancelled, FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.workspace.catalog import Reader, Transaction
from snaploader.workspace.events import about_snapshot
from snaploader.workspace.manager.operation import (
    ALIVE,
    ON_HOST,
    Services,
    Work,
    runs_nevertheless,
    widest_scope,
)
from snaploader.workspace.manager.snapshots import (
    Saved,
    completed,
    let_go,
    load_state,
    new_record,
    remove_unfinished,
)
from snaploader.workspace.model import (
    MAX_VERSION,
    OperationKind,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    SnapshotSource,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecord

log = logging.getLogger(__name__)

SNAPSHOT_CREATE = "snapshot_create"
VERSION_CREATE = "version_create"
VERSION_ROLLBACK = "version_rollback"
COMMIT = "workspace_commit"


@dataclass(frozen=True, slots=True)
class OrphanedUpload:
    """What a commit that failed has left in the remote cache. The next commit need not send it again."""

    workspace_id: str
    snapshot_name: str
    digests: frozenset[Digest]
    """Those of its blobs that the remote cache holds."""

    @property
    def size_bytes(self) -> int:
        """The size of all of them together."""
        return sum(digest.size_bytes for digest in self.digests)


def take(
    services: Services,
    workspace_id: str,
    event: str = VERSION_CREATE,
    source: str = SnapshotSource.PRE_EXEC,
    scope: Scope | None = None,
    display_name: str = "",
) -> SnapshotResult:
    """Stop, capture, continue, start, record: a new version. See `WorkspaceManager.create_snapshot`."""
    scope = scope or widest_scope(services)
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.SNAPSHOT,
        allowed=ON_HOST,
        prepare=lambda tx, workspace: new_record(
            tx, services, workspace, SnapshotKind.VERSION, scope, source=source, display_name=display_name
        ),
    )
    with work:
        work.stop()
        saved = work.capture()
        work.continue_on(saved.record)
        work.start_again()
        record = completed(saved.record)
        with work.recording() as tx:
            tx.put_snapshot(record)
            version = tx.add_version(workspace_id, record.name, record.created_at, record.display_name)
            work.go_on_from(tx, record)
            work.record_event(tx, event, **about_snapshot(record, version))
    work.clean_up()
    return saved.result(version.display_name, version.number)


def rollback(services: Services, workspace_id: str, number: int, *, keep_current: bool) -> Workspace:
    """Stop, replace, start, record: back to a version. See `WorkspaceManager.rollback`."""
    check_number(number)
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        name = reader.version(workspace_id, number).snapshot_name
    # Before anything is stopped: what cannot be loaded cannot be gone back to.
    target, snapshot, base = load_state(services, workspace, name)
    work = Work.begin(
        services,
        workspace_id,
        OperationKind.ROLLBACK,
        allowed=ON_HOST,
        prepare=(
            lambda tx, workspace: new_record(
                tx,
                services,
                workspace,
                SnapshotKind.VERSION,
                widest_scope(services),
                source=SnapshotSource.ROLLBACK,
            )
        )
        if keep_current
        else None,
        target=target.name,
        version=number,
    )
    with work:
        work.stop()
        kept = work.capture().record if keep_current else None
        if kept is not None:
            services.content.file_cache.sync()  # what it was taken of is replaced
        work.place(snapshot, base)
    return finish_rollback(work, target, kept)


def check_number(number: int) -> None:
    """InvalidArgument when no version can have this number."""
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_VERSION:
        raise InvalidArgument(f"{number!r} is no version: versions are whole numbers from 1 to {MAX_VERSION}")


def finish_rollback(
    work: Work, target: SnapshotRecord, kept: SnapshotRecord | None, *, until_ready: bool = True
) -> Workspace:
    """Start and record. A workspace that cannot be started, or is not ready, is rolled back, and stopped.

    `kept` is what was captured of the state before, if that was wanted.
    """
    problem = _start(work, until_ready=until_ready)
    with work.recording() as tx:
        assert work.operation.version is not None
        payload = about_snapshot(target, tx.version(work.workspace_id, work.operation.version))
        if kept is not None:
            tx.put_snapshot(completed(kept))
            version = tx.add_version(work.workspace_id, kept.name, kept.created_at, kept.display_name)
            payload |= {
                "kept_snapshot": kept.name,
                "kept_runtime_name": kept.runtime_name,
                "kept_version": version.number,
            }
        is_stopped = problem is not None and not isinstance(problem, Cancelled)
        state = WorkspaceState.STOPPED if is_stopped else work.workspace.state
        work.go_on_from(tx, target, state=state)
        work.record_event(tx, VERSION_ROLLBACK, **payload)
        if is_stopped:
            work.record_run(tx, RunTransition.START, error=str(problem))
        workspace = tx.workspace(work.workspace_id)
    work.clean_up()
    if problem is not None:
        how = "stopped" if is_stopped else "may not be ready yet"
        problem.add_note(f"workspace {work.workspace_id!r} is rolled back, and {how}")
        raise problem
    return workspace


def _start(work: Work, *, until_ready: bool) -> Exception | None:
    """Start what ran before; why it does not run now. Cancelled: it runs, and nobody waited for more."""
    if not work.was_running:
        return None
    try:
        work.start()
    except Exception as error:  # noqa: BLE001 - whatever it is, the rollback is recorded first
        if not runs_nevertheless(work.services, work.workspace_id):
            return error
    try:
        if until_ready:
            work.wait_ready()
    except Cancelled as error:
        return error
    except Exception as error:  # noqa: BLE001 - as above
        try:
            work.stop()
        except SnaploaderError:
            log.warning("workspace %r is left to recovery to stop", work.workspace_id, exc_info=True)
        return error
    return None


def is_placed(work: Work) -> bool:
    """Whether a rollback has replaced the workspace's state."""
    if work.operation.kind is not OperationKind.ROLLBACK:
        return False
    return work.services.runtime.status(work.workspace_id).placed == work.operation.token


def carry_on(work: Work) -> None:
    """Finish a rollback of which only the catalog and the runtime know."""
    content = work.services.content
    with work.services.catalog.reading() as reader:
        target = reader.snapshot(work.operation.snapshot_name)
        pending = reader.snapshots(work.workspace_id, statuses=[SnapshotStatus.PENDING])
    kept = next((record for record in pending if content.is_pinned(record)), None)
    if kept is not None:
        kept = content.as_saved(kept)
    finish_rollback(work, target, kept, until_ready=False)


def commit(services: Services, workspace_id: str, display_name: str) -> SnapshotResult:
    """Capture, start again, upload, record. See `WorkspaceManager.commit`."""
    services.content.need_remote(f"a commit of workspace {workspace_id!r}")

    def prepare(tx: Transaction, workspace: Workspace) -> SnapshotRecord:
        scope = tx.policy(workspace.policy).scopes.commit_scope
        if workspace.state is WorkspaceState.PAUSED:
            paused = tx.snapshot(workspace.current_snapshot)
            if not paused.scope.includes(scope):
                raise FailedPrecondition(
                    f"workspace {workspace_id!r} is paused as {paused.scope} and onCommit is {scope}: "
                    "resume it, then commit"
                )
        return new_record(tx, services, workspace, SnapshotKind.COMMIT, scope, display_name=display_name)

    work = Work.begin(services, workspace_id, OperationKind.COMMIT, allowed=ALIVE, prepare=prepare)
    is_paused = work.workspace.state is WorkspaceState.PAUSED
    with work:
        saved = _upload_paused(work) if is_paused else _capture_and_upload(work)
        record = completed(saved.record)
        with work.recording() as tx:
            tx.put_snapshot(record)
            if not is_paused:
                work.go_on_from(tx, record)
            orphans = tx.snapshots(workspace_id, statuses=[SnapshotStatus.ORPHANED])
            for orphan in orphans:
                tx.set_snapshot_status(orphan.name, SnapshotStatus.DELETING)
            work.record_event(tx, COMMIT, **about_snapshot(record))
    for orphan in orphans:
        gone = replace(orphan, status=SnapshotStatus.DELETING)
        work.afterwards(f"commit {gone.name!r}", partial(remove_unfinished, services, gone))
    if is_paused:
        work.afterwards("its record as paused", partial(_rewrite_record, services, workspace_id))
        work.afterwards(f"snapshot {record.name!r}", partial(let_go, services, record))
    work.clean_up()
    return saved.result()


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


def orphaned_uploads(services: Services, workspace_id: str) -> list[OrphanedUpload]:
    """What failed commits have left in the remote cache. See `WorkspaceManager.orphaned_uploads`."""
    with services.catalog.reading() as reader:
        if workspace_id:
            reader.workspace(workspace_id)
        orphans = [
            record
            for record in reader.unfinished_snapshots(services.host)
            if record.status is SnapshotStatus.ORPHANED and workspace_id in {"", record.workspace_id}
        ]
    uploads = [
        OrphanedUpload(orphan.workspace_id, orphan.name, services.content.uploaded(orphan))
        for orphan in orphans
    ]
    return [upload for upload in uploads if upload.digests]


def _capture_and_upload(work: Work) -> Saved:
    """The workspace is stopped while it is captured, and not while that is uploaded."""
    work.stop()
    saved = work.capture()
    work.continue_on(saved.record)
    work.start_again()
    uploaded = work.services.content.upload(saved)
    work.reach("uploaded")
    return uploaded


def _upload_paused(work: Work) -> Saved:
    """Nothing is captured: a paused workspace is its snapshot."""
    content = work.services.content
    assert work.pending is not None
    with work.services.catalog.reading() as reader:
        paused = reader.snapshot(work.workspace.current_snapshot)
    uploaded = content.derive(work.pending, content.find(paused), remote=True)
    work.reach("uploaded")
    record = uploaded.record
    is_all = paused.scope is record.scope
    size_bytes = paused.size_bytes if is_all else content.as_saved(record).size_bytes
    return replace(uploaded, record=replace(record, size_bytes=size_bytes))


def _rewrite_record(services: Services, workspace_id: str) -> None:
    with services.catalog.reading() as reader:
        record = PausedRecord.of(reader, reader.workspace(workspace_id))
    services.records.write(record)
