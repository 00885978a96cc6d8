"""Putting a host in order after a crash or a restart: what is on it and what the catalog says agree again.

Each workspace is looked at under its lock, and passed over while somebody else holds that, so that a host on
which other processes are at work already is not disturbed. What the catalog does not know is left alone: it
may be the wrong catalog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from snaploader.errors import DataLoss, InvalidArgument, NotFound
from snaploader.workspace.host import WorkspaceLocks
from snaploader.workspace.manager import pause, repair
from snaploader.workspace.manager.lifetime import finish_deletion
from snaploader.workspace.manager.operation import Services
from snaploader.workspace.manager.repair import Findings, Note, RecoverySummary
from snaploader.workspace.manager.snapshots import forget_remote, remove_unfinished
from snaploader.workspace.model import SnapshotKind, SnapshotRecord, SnapshotStatus, WorkspaceState
from snaploader.workspace.records import TRASH, PausedRecord, owner_of

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Reader

log = logging.getLogger(__name__)


def recover(services: Services, locks: WorkspaceLocks, *, without_remote: bool = False) -> RecoverySummary:
    """See `WorkspaceManager.recover`."""
    recovery = _Recovery(services, locks, without_remote)
    for step in recovery.steps():
        with recovery.findings.guarding(step.__name__.strip("_"), log.warning):
            step()
    summary = recovery.findings.summary()
    log.info("recovered host %r: %s", services.host, summary)
    return summary


class _Recovery:
    def __init__(self, services: Services, locks: WorkspaceLocks, without_remote: bool) -> None:
        self.without_remote = without_remote
        self.services = services
        self.locks = locks
        self.findings = Findings()

    def steps(self) -> Iterable[Callable[[], None]]:
        """In this order."""
        return (
            self._sweep_records,
            self._sweep_runtime,
            self._settle_operations,
            self._take_paused_back,
            self._reconcile_workspaces,
            *((self._forget_remote,) if self.without_remote else ()),
            self._finish_deletions,
            self._finish_snapshots,
            self._free_slots,
            self._remove_locks,
        )

    def _sweep_records(self) -> None:
        """Folders of records that were being written or removed, or were trashed by an earlier recovery."""
        for name in self.services.records.leftovers():
            with self.findings.guarding(name, log.warning):
                if self._under_lock(owner_of(name), partial(self._sweep_record, name)):
                    self.findings.pruned.append(Note(name, "a record that was being written or removed"))

    def _sweep_record(self, name: str) -> None:
        """Remove a leftover for good; first, what only a record that was given up keeps in the cache.

        In this order: a recovery that is killed in between finds the record again.
        """
        records = self.services.records
        if TRASH in name:
            with suppress(NotFound, DataLoss):  # what it was of is not known, and may be needed
                self._let_go_of(records.read_leftover(name))
        records.sweep(name)

    def _let_go_of(self, record: PausedRecord) -> None:
        workspace_id = record.workspace.id
        with self.services.catalog.reading() as reader, suppress(NotFound):
            reader.workspace(workspace_id)
            return  # the catalog says what becomes of its snapshots
        if not self.services.has_traces_of(workspace_id):
            self.services.content.drop_unmanaged(snapshot.name for snapshot in record.snapshots)

    def _sweep_runtime(self) -> None:
        for name in self.services.runtime.sweep():
            self.findings.pruned.append(Note(name, "left over by the runtime"))

    def _settle_operations(self) -> None:
        """What was under way is finished or taken back."""
        with self.services.catalog.reading() as reader:
            ids = [each.id for each in reader.workspaces_with_operation(self.services.host)]
        for workspace_id in ids:
            with self.findings.guarding(workspace_id, log.warning):
                self._under_lock(workspace_id, partial(self._settle, workspace_id))

    def _settle(self, workspace_id: str) -> None:
        operation = repair.settle(self.services, workspace_id)
        if operation is not None:
            self.findings.repaired.append(Note(workspace_id, f"a {operation.kind} had been interrupted"))

    def _take_paused_back(self) -> None:
        pause.restore_paused(self.services, self.locks, self.findings)

    def _reconcile_workspaces(self) -> None:
        with self.services.catalog.reading() as reader:
            ids = [each.id for each in reader.workspaces(host=self.services.host)]
        for workspace_id in ids:
            with self.findings.guarding(workspace_id, log.warning):
                self._under_lock(
                    workspace_id,
                    partial(repair.reconcile, self.services, workspace_id, self.findings),
                )

    def _forget_remote(self) -> None:
        """What the remote cache may have of commits that failed, or are on their way out."""
        with self.services.catalog.reading() as reader:
            records = reader.unfinished_snapshots(self.services.host)
        for record in records:
            if record.kind is SnapshotKind.COMMIT and record.is_remote:
                with self.findings.guarding(record.name, log.warning):
                    self._under_lock(record.workspace_id, partial(self._forget_commit, record.name))

    def _forget_commit(self, name: str) -> None:
        with self.services.catalog.transaction() as tx:
            record = tx.snapshot(name)
            if record.status is SnapshotStatus.PENDING or not record.is_remote:
                return  # somebody was at it meanwhile
            forget_remote(tx, record, self.services.clock())
        self.findings.repaired.append(Note(name, "what the remote cache may have of it is forgotten"))

    def _finish_deletions(self) -> None:
        """Whatever is left of deleted workspaces."""
        services = self.services
        left = {
            *services.runtime.workspaces(),
            *services.slots.owners().values(),
            *services.records.entries(),
        }
        with services.catalog.reading() as reader:
            left |= {record.workspace_id for record in reader.unfinished_snapshots(services.host)}
            # Not by listing the deleted ones: they only ever become more.
            left -= {each.id for each in reader.workspaces(host=services.host)}
            deleted = [
                workspace_id for workspace_id in sorted(left) if self._was_deleted(reader, workspace_id)
            ]
        for workspace_id in deleted:
            with self.findings.guarding(workspace_id, log.warning):
                self._under_lock(workspace_id, partial(self._finish_deletion, workspace_id))

    def _was_deleted(self, reader: Reader, workspace_id: str) -> bool:
        try:
            workspace = reader.workspace(workspace_id)
        except (NotFound, InvalidArgument):  # a name on disk may be anything
            return False
        return (workspace.host, workspace.state) == (self.services.host, WorkspaceState.DELETED)

    def _finish_deletion(self, workspace_id: str) -> None:
        problems = finish_deletion(self.services, workspace_id)
        self.findings.problems += [Note(workspace_id, problem.message) for problem in problems]
        self.findings.pruned.append(Note(workspace_id, "what was left of a deleted workspace"))

    def _finish_snapshots(self) -> None:
        """Snapshots on their way out, and commits that failed and may be visible remotely."""
        with self.services.catalog.reading() as reader:
            records = reader.unfinished_snapshots(self.services.host)
        for record in records:
            with self.findings.guarding(record.name, log.warning):
                self._under_lock(record.workspace_id, partial(self._finish_snapshot, record.name))

    def _finish_snapshot(self, name: str) -> None:
        try:
            with self.services.catalog.reading() as reader:
                record = reader.snapshot(name)
                workspace = reader.workspace(record.workspace_id)
        except NotFound:
            return
        if workspace.operation is None and _is_leftover(record):
            remove_unfinished(self.services, record)
            self.findings.pruned.append(Note(name, f"a snapshot that was {record.status}"))

    def _free_slots(self) -> None:
        """Slots of workspaces that are gone, or have another one. Those of unknown ones are left alone."""
        for slot, owner in self.services.slots.owners().items():
            with self.findings.guarding(f"slot {slot}", log.warning):
                self._under_lock(owner, partial(self._free_slot, slot, owner))

    def _free_slot(self, slot: int, owner: str) -> None:
        try:
            with self.services.catalog.reading() as reader:
                workspace = reader.workspace(owner)
        except NotFound:
            reason = "its workspace is unknown"
            if owner in self.services.runtime.workspaces() or owner in self.services.records.entries():
                return
        else:
            if workspace.host != self.services.host and workspace.state is not WorkspaceState.DELETED:
                reason = f"it is that of workspace {owner!r}, which lives on host {workspace.host!r}: "
                reason += "if that was the name of this host, give it that name again"
                self.findings.problems.append(Note(f"slot {slot}", reason))
                return
            if workspace.slot == slot:
                return
            reason = f"workspace {owner!r} does not have it"
        self.services.slots.release(slot, owner)
        self.findings.pruned.append(Note(f"slot {slot}", reason))

    def _remove_locks(self) -> None:
        """Lock files of workspaces that are gone."""
        for workspace_id in self.locks.ids():
            with self.findings.guarding(workspace_id, log.warning), self.services.catalog.reading() as reader:
                try:
                    if reader.workspace(workspace_id).state is not WorkspaceState.DELETED:
                        continue
                except NotFound:
                    pass
                lock = self.locks.try_acquire(workspace_id)
                if lock is not None:
                    lock.remove_file()
                    lock.release()

    def _under_lock(self, workspace_id: str, action: Callable[[], object]) -> bool:
        return self.findings.under_lock(self.locks, workspace_id, action)


def _is_leftover(record: SnapshotRecord) -> bool:
    """Whether nobody will do more about a snapshot: an orphan that is hidden stays for the next commit."""
    return record.status is not SnapshotStatus.ORPHANED or record.is_remote
