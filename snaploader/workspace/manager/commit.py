"""Committing a workspace to the remote cache, and what is left of commits that failed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition
from snaploader.workspace.catalog import Transaction
from snaploader.workspace.manager.operation import ALIVE, Services, Work
from snaploader.workspace.manager.snapshots import Saved, completed, let_go, new_record, remove_unfinished
from snaploader.workspace.model import (
    OperationKind,
    SnapshotKind,
    SnapshotRecord,
    SnapshotResult,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecord

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
            work.record_event(tx, COMMIT, snapshot=record.name, scope=record.scope.value)
    for orphan in orphans:
        gone = replace(orphan, status=SnapshotStatus.DELETING)
        work.afterwards(f"commit {gone.name!r}", partial(remove_unfinished, services, gone))
    if is_paused:
        work.afterwards("its record as paused", partial(_rewrite_record, services, workspace_id))
        work.afterwards(f"snapshot {record.name!r}", partial(let_go, services, record))
    work.clean_up()
    return saved.result()


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
