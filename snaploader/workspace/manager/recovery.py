"""Putting a host in order after a crash or a restart: what is on it and what the catalog says agree again.

Each workspace is looked at under its lock, and passed over while somebody else holds that, so that a host on
which other processes are at work already is not disturbed. What the catalog does not know is left alone, as
it may be the wrong catalog; but paused workspaces that it has lost are taken back from their records.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
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
from snaploader.workspace.events import about_snapshot, add_event
from snaploader.workspace.host import WorkspaceLocks
from snaploader.workspace.manager.lifetime import START, bring_back, finish_deletion
from snaploader.workspace.manager.operation import RECOVERY, Services, runs_nevertheless, text_of
from snaploader.workspace.manager.snapshots import forget_remote, let_go, remove_unfinished
from snaploader.workspace.manager.undo import settle
from snaploader.workspace.model import (
    STOP_EVENT,
    RunStatus,
    RunTransition,
    SnapshotKind,
    SnapshotRecord,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
    is_workspace_id,
)
from snaploader.workspace.records import TRASH, PausedRecord, owner_of

log = logging.getLogger(__name__)

RESTORED = "workspace_restore"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was found, and what was done about it."""

    name: str
    """A workspace's id, or the name of what was found."""
    reason: str


@dataclass(frozen=True, slots=True)
class RecoverySummary:
    """What one `recover` did, each in the order in which it was done."""

    restored: tuple[str, ...] = ()
    """Ids of the workspaces that are paused: whole, with their slots."""
    adopted: tuple[str, ...] = ()
    """Those among them that the catalog had lost."""
    repaired: tuple[Note, ...] = ()
    """Workspaces with an operation that had been interrupted, or that did not run as they should."""
    pruned: tuple[Note, ...] = ()
    """Leftovers that were removed."""
    trashed: tuple[Note, ...] = ()
    """Records of paused workspaces that were renamed aside; the next start removes them."""
    unknown: tuple[Note, ...] = ()
    """What lies among the records of paused workspaces and is none: it was left alone."""
    busy: tuple[str, ...] = ()
    """Ids of workspaces that somebody else is working on: they were left alone."""
    problems: tuple[Note, ...] = ()
    """What could not be put right. The next recovery tries again."""


def recover(services: Services, locks: WorkspaceLocks, *, without_remote: bool = False) -> RecoverySummary:
    """See `WorkspaceManager.recover`."""
    recovery = _Recovery(services, locks, without_remote)
    for step in recovery.steps():
        with recovery.guarding(step.__name__.strip("_")):
            step()
    found = {each.name: tuple(getattr(recovery, each.name)) for each in fields(RecoverySummary)}
    summary = RecoverySummary(**found)
    log.info("recovered host %r: %s", services.host, summary)
    return summary


class _Recovery:
    """A recovery and what it finds. For one thread."""

    def __init__(self, services: Services, locks: WorkspaceLocks, without_remote: bool) -> None:
        self.services = services
        self.locks = locks
        self.without_remote = without_remote
        self.restored: list[str] = []
        self.adopted: list[str] = []
        self.repaired: list[Note] = []
        self.pruned: list[Note] = []
        self.trashed: list[Note] = []
        self.unknown: list[Note] = []
        self.busy: dict[str, None] = {}
        self.problems: list[Note] = []

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

    @contextmanager
    def guarding(self, name: str) -> Iterator[None]:
        """Let nothing that goes wrong with one thing stop the others."""
        try:
            yield
        except Exception as error:
            log.warning("recovery of %r failed", name, exc_info=True)
            self.problems.append(Note(name, text_of(error)))

    def _attempt(self, name: str, workspace_id: str, action: Callable[..., object], *args: object) -> None:
        """Do something about one thing of a workspace, unless somebody else works on that workspace.

        One lock at a time: each takes a descriptor, and with PostgreSQL a connection.
        """
        with self.guarding(name):
            if not is_workspace_id(workspace_id):
                action(*args)  # no workspace can have this name, so nobody works on it
                return
            lock = self.locks.try_acquire(workspace_id)
            if lock is None:
                self.busy[workspace_id] = None
                return
            try:
                action(*args)
            finally:
                lock.release()

    def _attempt_each(self, workspace_ids: Iterable[str], action: Callable[[str], object]) -> None:
        for workspace_id in workspace_ids:
            self._attempt(workspace_id, workspace_id, action, workspace_id)

    # Leftovers

    def _sweep_records(self) -> None:
        """Folders of records that were being written or removed, or were trashed by an earlier recovery."""
        for name in self.services.records.leftovers():
            self._attempt(name, owner_of(name), self._sweep_record, name)

    def _sweep_record(self, name: str) -> None:
        """Remove a leftover for good; first, what only a record that was given up keeps in the cache.

        In this order: a recovery that is killed in between finds the record again.
        """
        services = self.services
        if TRASH in name:
            with suppress(
                NotFound, DataLoss, InvalidArgument
            ):  # what it was of is not known, and may be needed
                record = services.records.read(name)
                workspace_id = record.workspace.id
                # Else the catalog says what becomes of its snapshots.
                is_known = services.find_workspace(workspace_id) is not None
                if not is_known and not services.has_traces_of(workspace_id):
                    services.content.drop_unmanaged(snapshot.name for snapshot in record.snapshots)
        services.records.sweep(name)
        self.pruned.append(Note(name, "a record that was being written or removed"))

    def _sweep_runtime(self) -> None:
        for name in self.services.runtime.sweep():
            self.pruned.append(Note(name, "left over by the runtime"))

    def _settle_operations(self) -> None:
        """What was under way is finished or taken back."""
        with self.services.catalog.reading() as reader:
            ids = [each.id for each in reader.workspaces_with_operation(self.services.host)]
        self._attempt_each(ids, self._settle)

    def _settle(self, workspace_id: str) -> None:
        operation = settle(self.services, workspace_id)
        if operation is not None:
            self.repaired.append(Note(workspace_id, f"a {operation.kind} had been interrupted"))

    # Paused workspaces

    def _take_paused_back(self) -> None:
        """Register every paused workspace whose record is good; move the other records aside."""
        records = self.services.records
        for name in records.strangers():
            log.warning("%r is no record of a paused workspace, and is left alone", records.path(name))
            self.unknown.append(Note(name, "it is no record of a paused workspace: move it away"))
        found: list[PausedRecord] = []
        self._attempt_each(records.entries(), lambda name: found.extend(self._to_restore(name)))
        winners, losers = _by_slot(found)
        for record, reason in losers:
            self._if_same(record, self._give_up, record.workspace, reason)
        for record in winners:
            self._if_same(record, self._restore, record)

    def _if_same(self, record: PausedRecord, action: Callable[..., None], *args: object) -> None:
        """Do something about a record, under its workspace's lock, unless somebody changed it since."""
        name = record.workspace.id

        def act() -> None:
            if self._to_restore(name) == [record]:
                action(*args)
            else:
                self.busy[name] = None

        self._attempt(name, name, act)

    def _to_restore(self, name: str) -> list[PausedRecord]:
        """The record of that name; nothing when it is not to be restored, and what that takes is done."""
        try:
            record = self.services.records.read(name)
        except (ResourceExhausted, Unavailable):
            raise  # which says nothing of the record
        except SnaploaderError as error:
            self._trash(name, error.message)
            return []
        known = self.services.find_workspace(name)
        if known is None:
            return [record]
        if known.host != self.services.host:
            reason = f"there is a record of it as paused, but it lives on host {known.host!r}"
            self.problems.append(Note(name, reason))
            return []
        if known.state is WorkspaceState.PAUSED:
            stranger = self._unknown_snapshot(record)
            if not stranger:
                return [record]
            self._trash(
                name, f"it is of another workspace: the catalog does not know its snapshot {stranger!r}"
            )
            return []
        if known.operation is None:
            self.services.records.remove(name)
            self.pruned.append(Note(name, f"a record of it as paused, and it is {known.state}"))
        return []

    def _unknown_snapshot(self, record: PausedRecord) -> str:
        """What a record says that its workspace is paused as, if the catalog knows no such snapshot of it."""
        current = record.workspace.current_snapshot
        with self.services.catalog.reading() as reader, suppress(NotFound):
            return "" if reader.snapshot(current).workspace_id == record.workspace.id else current
        return current

    def _restore(self, record: PausedRecord) -> None:
        """Reserve the slot, and let the catalog say that the workspace is paused. Nothing is started."""
        workspace, slots = record.workspace, self.services.slots
        assert workspace.slot is not None
        if not self._reserve(workspace.slot, workspace.id):
            owner = slots.owner(workspace.slot)
            reason = f"its slot {workspace.slot} cannot be reserved: "
            reason += f"workspace {owner!r} holds it" if owner is not None else "there is no such slot"
            self._give_up(workspace, reason)
            return
        known = self.services.find_workspace(workspace.id)
        if known is None:
            try:
                self._adopt(record)
            except (NotFound, DataLoss, InvalidArgument) as error:
                slots.release(workspace.slot, workspace.id)
                self._trash(workspace.id, error.message)
                return
        elif known.slot != workspace.slot:
            with self.services.catalog.transaction() as tx:
                tx.update_workspace(known.id, slot=workspace.slot)
            if known.slot is not None:
                slots.release(known.slot, known.id)
        self.restored.append(workspace.id)
        if known is None:
            self.adopted.append(workspace.id)

    def _reserve(self, slot: int, workspace_id: str) -> bool:
        """Take the slot, also from a workspace that is gone or has another one by now."""
        slots = self.services.slots
        if slots.reserve(slot, workspace_id):
            return True
        owner = slots.owner(slot)
        if owner is None or not self._is_stale(slot, owner, self.services.find_workspace(owner)):
            return False
        slots.release(slot, owner)
        return slots.reserve(slot, workspace_id)

    def _is_stale(self, slot: int, owner: str, workspace: Workspace | None) -> bool:
        """Whether the owner of a slot has lost it: the catalog does not know it, or says something else."""
        if workspace is None:
            services = self.services
            return owner not in services.runtime.workspaces() and owner not in services.records.entries()
        is_here = workspace.host == self.services.host or workspace.state is WorkspaceState.DELETED
        return is_here and workspace.slot != slot

    def _adopt(self, record: PausedRecord) -> None:
        """Give the catalog back what it lost: the workspace, its snapshots that are here, its versions."""
        present = [snapshot for snapshot in record.snapshots if self._is_whole(snapshot)]
        names = {snapshot.name for snapshot in present}
        workspace = replace(record.workspace, host=self.services.host, operation=None)
        current = workspace.current_snapshot
        if current not in names:
            raise NotFound(f"the snapshot {current!r} that it is paused as is not whole here")
        if workspace.base_snapshot not in names:
            workspace = replace(workspace, base_snapshot="")
        with self.services.catalog.transaction() as tx:
            if record.policy.name not in {policy.name for policy in tx.policies()}:
                tx.put_policy(record.policy)
            paused_at = workspace.paused_at or workspace.last_used_at
            if workspace.template_version is not None and not any(
                version.number == workspace.template_version and version.created_at <= paused_at
                for version in tx.template_versions(workspace.base)
            ):
                # The catalog that knew it is lost: another version may get its number, or has it.
                workspace = replace(workspace, template_version=None, automatic_updates=False)
            tx.add_workspace(workspace)
            for snapshot in present:
                tx.put_snapshot(snapshot)
            for version in record.versions:
                # One whose content is lost leaves a gap: its number meant that, and never means another.
                if version.snapshot_name not in names:
                    tx.reserve_versions(workspace.id, version.number)
                    continue
                tx.reserve_versions(workspace.id, version.number - 1)
                created_at = tx.snapshot(version.snapshot_name).created_at
                tx.add_version(workspace.id, version.snapshot_name, created_at, version.display_name)
            about = {
                **about_snapshot(tx.snapshot(current)),
                "policy": workspace.policy,
                "slot": workspace.slot,
            }
            add_event(tx, workspace.id, RESTORED, about, self.services.clock())

    def _is_whole(self, record: SnapshotRecord) -> bool:
        policy = ReadPolicy.LOCAL_FIRST if record.is_remote else ReadPolicy.LOCAL_ONLY
        with suppress(NotFound, DataLoss, InvalidArgument):
            self.services.content.find(record, policy)
            return True
        return False

    def _give_up(self, workspace: Workspace, reason: str) -> None:
        """Move a record aside that lost its slot; where the catalog knows it, it has no slot any more."""
        with self.guarding(workspace.id), self.services.catalog.transaction() as tx, suppress(NotFound):
            if tx.lock_workspace(workspace.id).slot == workspace.slot:
                tx.update_workspace(workspace.id, slot=None)
        self._trash(workspace.id, reason)

    def _trash(self, name: str, reason: str) -> None:
        if self.services.records.trash(name):  # else somebody has removed it meanwhile
            log.warning("the record of paused workspace %r is moved aside: %s", name, reason)
            self.trashed.append(Note(name, reason))

    # Workspaces on which nothing is under way

    def _reconcile_workspaces(self) -> None:
        with self.services.catalog.reading() as reader:
            ids = [each.id for each in reader.workspaces(host=self.services.host)]
        self._attempt_each(ids, self._reconcile)

    def _reconcile(self, workspace_id: str) -> None:
        services = self.services
        with services.catalog.reading() as reader:
            workspace = reader.workspace(workspace_id)
        if workspace.operation is not None or workspace.host != services.host:
            return
        slot = workspace.slot
        if slot is not None and not services.slots.reserve(slot, workspace_id):
            self.repaired.append(Note(workspace_id, f"its slot {slot} is taken by others, so it has none"))
            with services.catalog.transaction() as tx:
                workspace = tx.update_workspace(workspace_id, slot=None)
        if workspace.state is WorkspaceState.PAUSED:
            workspace = self._settle_paused(workspace)
        elif services.records.remove(workspace_id):
            self.pruned.append(Note(workspace_id, "a record of it as paused"))
        if workspace.state is WorkspaceState.RUNNING:
            self._settle_running(workspace)
        elif workspace.state is WorkspaceState.STOPPED:
            self._settle_stopped(workspace)
        with services.catalog.reading() as reader:
            records = reader.snapshots(workspace_id)
        for record in records:
            if record.kind is SnapshotKind.COMMIT and record.name != workspace.current_snapshot:
                let_go(services, record)  # it has gone on from it: it need not stay on this host

    def _settle_paused(self, workspace: Workspace) -> Workspace:
        """A paused workspace has a record and a slot, and nothing else here; without them it is stopped."""
        services = self.services
        if services.runtime.status(workspace.id).exists:
            services.stop(workspace.id)
            services.runtime.remove(workspace.id)
            self.pruned.append(Note(workspace.id, "files of a paused workspace"))
        with services.catalog.reading() as reader:
            expected = PausedRecord.of(reader, workspace)
            current = reader.snapshot(workspace.current_snapshot)
        try:
            self._renew_record(expected, current)
        except NotFound as problem:
            reason = f"paused without a record, now stopped: {problem.message}"
            self.repaired.append(Note(workspace.id, reason))
            return self._mark_stopped(workspace, problem)
        return workspace

    def _renew_record(self, expected: PausedRecord, current: SnapshotRecord) -> None:
        """Let the record be what it must be. NotFound when the slot, or record and snapshot, are lost."""
        workspace, records = expected.workspace, self.services.records
        if workspace.slot is None:
            raise NotFound("it has lost its slot")
        with suppress(NotFound, DataLoss):
            if records.read(workspace.id) != expected:
                # Policies change, and touching a workspace does not write its record.
                records.write(expected)
            return
        self.services.content.find(current, ReadPolicy.LOCAL_ONLY)
        records.write(expected)
        self.repaired.append(Note(workspace.id, "its record as paused was written again"))
        if workspace.id not in self.restored:
            self.restored.append(workspace.id)

    def _settle_running(self, workspace: Workspace) -> None:
        services = self.services
        status = services.runtime.status(workspace.id)
        if status.is_running:
            return
        try:
            if not status.exists:
                bring_back(services, workspace, uuid.uuid4().hex)
            services.runtime.start(workspace.spec)
        except SnaploaderError as error:
            if not runs_nevertheless(services, workspace.id):
                log.warning("workspace %r cannot be started", workspace.id, exc_info=True)
                reason = f"it did not run and is now stopped: {error.message}"
                self.repaired.append(Note(workspace.id, reason))
                self._mark_stopped(workspace, error)
                return
        with services.catalog.transaction() as tx:
            add_event(tx, workspace.id, START, {"reason": RECOVERY}, services.clock())
        self.repaired.append(Note(workspace.id, "it did not run, and was started"))

    def _settle_stopped(self, workspace: Workspace) -> None:
        status = self.services.runtime.status(workspace.id)
        if status.is_running:
            self.services.stop(workspace.id)
            self.repaired.append(Note(workspace.id, "it ran, and was stopped"))
        if not status.exists:
            bring_back(self.services, workspace, uuid.uuid4().hex)
            reason = "its files were gone, and its snapshot took their place"
            self.repaired.append(Note(workspace.id, reason))

    def _mark_stopped(self, workspace: Workspace, error: SnaploaderError) -> Workspace:
        """Let the catalog say that it is stopped, because starting it or keeping it paused failed."""
        with self.services.catalog.transaction() as tx:
            now = self.services.clock()
            if workspace.state is WorkspaceState.RUNNING:
                run = tx.add_run(workspace.id, RunTransition.START, now, RECOVERY)
                tx.finish_run(run.id, RunStatus.FAILED, now, error.message)
            add_event(tx, workspace.id, STOP_EVENT, {"reason": RECOVERY, "error": error.message}, now)
            return tx.update_workspace(workspace.id, state=WorkspaceState.STOPPED, paused_at=None)

    # What is on its way out

    def _forget_remote(self) -> None:
        """What the remote cache may have of commits that failed, or are on their way out."""
        for record in self._unfinished_snapshots():
            if record.kind is SnapshotKind.COMMIT and record.is_remote:
                self._attempt(record.name, record.workspace_id, self._forget_commit, record.name)

    def _forget_commit(self, name: str) -> None:
        with self.services.catalog.transaction() as tx:
            record = tx.snapshot(name)
            if record.status is SnapshotStatus.PENDING or not record.is_remote:
                return  # somebody was at it meanwhile
            forget_remote(tx, record, self.services.clock())
        self.repaired.append(Note(name, "what the remote cache may have of it is forgotten"))

    def _unfinished_snapshots(self) -> list[SnapshotRecord]:
        with self.services.catalog.reading() as reader:
            return reader.unfinished_snapshots(self.services.host)

    def _finish_deletions(self) -> None:
        """Whatever is left of deleted workspaces."""
        services = self.services
        left = {
            *services.runtime.workspaces(),
            *services.slots.owners().values(),
            *services.records.entries(),
            *(record.workspace_id for record in self._unfinished_snapshots()),
        }
        with services.catalog.reading() as reader:
            # Not by listing the deleted ones: they only ever become more.
            left -= {each.id for each in reader.workspaces(host=services.host)}
        found = map(services.find_workspace, sorted(filter(is_workspace_id, left)))
        deleted = (services.host, WorkspaceState.DELETED)
        gone = [each.id for each in found if each is not None and (each.host, each.state) == deleted]
        self._attempt_each(gone, self._finish_deletion)

    def _finish_deletion(self, workspace_id: str) -> None:
        problems = finish_deletion(self.services, workspace_id)
        self.problems += [Note(workspace_id, problem.message) for problem in problems]
        self.pruned.append(Note(workspace_id, "what was left of a deleted workspace"))

    def _finish_snapshots(self) -> None:
        """Snapshots on their way out, and commits that failed and may be visible remotely."""
        for record in self._unfinished_snapshots():
            self._attempt(record.name, record.workspace_id, self._finish_snapshot, record.name)

    def _finish_snapshot(self, name: str) -> None:
        try:
            with self.services.catalog.reading() as reader:
                record = reader.snapshot(name)
                workspace = reader.workspace(record.workspace_id)
        except NotFound:
            return
        # An orphan that is hidden stays for the next commit.
        is_leftover = record.status is not SnapshotStatus.ORPHANED or record.is_remote
        if workspace.operation is None and is_leftover:
            remove_unfinished(self.services, record)
            self.pruned.append(Note(name, f"a snapshot that was {record.status}"))

    def _free_slots(self) -> None:
        """Slots of workspaces that are gone, or have another one. Those of unknown ones are left alone."""
        for slot, owner in self.services.slots.owners().items():
            self._attempt(f"slot {slot}", owner, self._free_slot, slot, owner)

    def _free_slot(self, slot: int, owner: str) -> None:
        workspace = self.services.find_workspace(owner)
        if self._is_stale(slot, owner, workspace):
            is_unknown = workspace is None
            reason = "its workspace is unknown" if is_unknown else f"workspace {owner!r} does not have it"
            self.services.slots.release(slot, owner)
            self.pruned.append(Note(f"slot {slot}", reason))
        elif workspace is not None and workspace.host != self.services.host:
            reason = f"it is that of workspace {owner!r}, which lives on host {workspace.host!r}: "
            reason += "if that was the name of this host, give it that name again"
            self.problems.append(Note(f"slot {slot}", reason))

    def _remove_locks(self) -> None:
        """Lock files of workspaces that are gone."""
        for workspace_id in self.locks.ids():
            with self.guarding(workspace_id):
                workspace = self.services.find_workspace(workspace_id)
                if workspace is not None and workspace.state is not WorkspaceState.DELETED:
                    continue
                lock = self.locks.try_acquire(workspace_id)
                if lock is not None:
                    lock.remove_file()
                    lock.release()


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
