"""Checks that all that is kept of workspaces agrees: catalog, pins, manifests, records, slots and runtime.

Nothing is changed. What another process or thread is working on looks wrong meanwhile: so whatever seems
wrong with a workspace is looked at again under its lock, and passed over when somebody else holds that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import filterfalse
from typing import TYPE_CHECKING, TypeAlias

from snaploader.context import CallContext
from snaploader.errors import DataLoss, NotFound
from snaploader.policy import ReadPolicy
from snaploader.workspace.model import (
    SnapshotRecord,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
    is_workspace_id,
    pin_name,
)
from snaploader.workspace.records import TRASH
from snaploader.workspace.runtime import RuntimeStatus
from snaploader.workspace.sizes import workspace_id_of

if TYPE_CHECKING:
    from snaploader.workspace.manager import WorkspaceManager


class FindingKind(StrEnum):
    """What can be wrong."""

    OPERATION = "operation"
    """An operation is under way, and nobody is doing it."""
    UNFINISHED = "unfinished"
    """A snapshot is being taken or removed, and nobody is doing it."""
    UNMANAGED = "unmanaged"
    """Something of a workspace or a snapshot is here that the catalog does not know, or not any more."""
    UNPINNED = "unpinned"
    """A snapshot may be evicted that must stay."""
    INCOMPLETE = "incomplete"
    """A snapshot is not whole: its manifest or a blob is missing or damaged."""
    PROCESS = "process"
    """What runs is not what the catalog says."""
    FOLDER = "folder"
    """The runtime holds no state of a workspace that has some, or state of one that has none."""
    RECORD = "record"
    """The record of a paused workspace is missing or wrong, or one of another is there."""
    SLOT = "slot"
    """A slot is not held by the workspace that has it."""
    LEFTOVER = "leftover"
    """Something is half made or half removed, and nobody is doing it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: FindingKind
    workspace_id: str
    """Empty where it belongs to none."""
    detail: str
    is_known: bool = True
    """Whether the catalog knows the workspace. What it does not know, recovery leaves alone."""

    def __str__(self) -> str:
        return f"{self.workspace_id}: {self.detail}" if self.workspace_id else self.detail


@CallContext().on_behalf()  # the loader is asked as the manager asks it
def check(manager: WorkspaceManager) -> list[Finding]:
    """Everything that is wrong with the workspaces of the manager's host.

    Reads the manifest of each snapshot that is kept here, and looks for every blob, but does not read
    content: `FileCache.verify` does. What others are working on is left out.

    Raises:
        SnaploaderError: the catalog, the caches or the runtime cannot be asked.
    """
    here = _Here(manager)
    findings = [Finding(kind, "", detail, is_known=False) for kind, detail in _nameless(here)]
    for workspace_id in _workspace_ids(manager, here):
        if list(_wrong(manager, here, workspace_id)):
            findings += _look_again(manager, workspace_id)
    return findings


_Wrong: TypeAlias = "Iterator[tuple[FindingKind, str]]"
"""What is wrong with one workspace: kind and detail."""


class _Here:
    """Names of all that is on this host, listed at once."""

    def __init__(self, manager: WorkspaceManager) -> None:
        self.pins: defaultdict[str, set[str]] = defaultdict(set)
        for pin in manager.file_cache.pins(pin_name("")):
            self.pins[workspace_id_of(pin)].add(pin)
        self.slots: defaultdict[str, set[int]] = defaultdict(set)
        for slot, owner in manager.slots.owners().items():
            self.slots[owner].add(slot)
        self.records = set(manager.records.entries())
        self.strangers = manager.records.strangers()
        self.leftovers: defaultdict[str, list[str]] = defaultdict(list)
        # What recovery moves aside among the records is to stay until the next start.
        staged = [name for name in manager.records.leftovers() if TRASH not in name]
        for name in [*staged, *manager.runtime.leftovers()]:
            self.leftovers[name.partition(".")[0]].append(name)


def _workspace_ids(manager: WorkspaceManager, here: _Here) -> list[str]:
    """Ids of all workspaces of which anything is known or left, sorted."""
    with manager.catalog.reading() as reader:
        # Deleted ones only ever become more: those that anything is left of are found by that.
        ids = {each.id for each in reader.workspaces(host=manager.host)}
        ids.update(record.workspace_id for record in reader.unfinished_snapshots(manager.host))
    ids.update(here.pins, here.slots, here.records, here.leftovers, manager.runtime.workspaces())
    return sorted(filter(is_workspace_id, ids))


def _nameless(here: _Here) -> _Wrong:
    """What cannot be any workspace's."""
    for owner, pins in here.pins.items():
        if not is_workspace_id(owner):
            yield from ((FindingKind.UNMANAGED, f"pin {name!r} is of no workspace") for name in sorted(pins))
    for name in sorted({*here.strangers, *filterfalse(is_workspace_id, here.records)}):
        yield FindingKind.RECORD, f"{name!r} is no record of a paused workspace"
    for owner, names in here.leftovers.items():
        if not is_workspace_id(owner):
            yield from ((FindingKind.LEFTOVER, f"{name!r} was left") for name in names)


def _look_again(manager: WorkspaceManager, workspace_id: str) -> list[Finding]:
    """What is wrong with a workspace while nobody works on it; nothing when somebody does."""
    held = manager.locks.try_acquire(workspace_id)
    if held is None:
        return []
    try:
        wrong = list(_wrong(manager, _Here(manager), workspace_id))
        is_known = False
        with manager.catalog.reading() as reader, suppress(NotFound):
            reader.workspace(workspace_id)
            is_known = True
        return [Finding(kind, workspace_id, detail, is_known) for kind, detail in wrong]
    finally:
        held.release()


def _wrong(manager: WorkspaceManager, here: _Here, workspace_id: str) -> _Wrong:
    """What seems wrong with a workspace."""
    status = manager.runtime.status(workspace_id)
    with manager.catalog.reading() as reader:
        try:
            workspace = reader.workspace(workspace_id)
        except NotFound:
            yield from _left(here, status, "the catalog does not know it")
            return
        snapshots = reader.snapshots(workspace_id, statuses=tuple(SnapshotStatus))
    if workspace.host != manager.host:
        yield from _left(here, status, f"it lives on host {workspace.host!r}")
        return
    yield from _unfinished(workspace, snapshots)
    if workspace.state is WorkspaceState.DELETED:
        yield from _left(here, status, "it is deleted")
        return
    yield from _snapshots(manager, here, workspace, snapshots)
    yield from _runtime(workspace, status)
    yield from _record(manager, here, workspace)
    yield from _slots(manager, here, workspace)
    yield from _leftovers(here, workspace_id)


def _left(here: _Here, status: RuntimeStatus, why: str) -> _Wrong:
    """What is here of a workspace that nothing should be here of."""
    workspace_id = status.workspace_id
    if status.is_running:
        yield FindingKind.PROCESS, f"process {status.pid} runs, but {why}"
    if status.exists:
        yield FindingKind.FOLDER, f"the runtime holds state of it, but {why}"
    for pin in sorted(here.pins.get(workspace_id, ())):
        yield FindingKind.UNMANAGED, f"pin {pin!r} keeps a snapshot, but {why}"
    if workspace_id in here.records:
        yield FindingKind.RECORD, f"there is a record of it as paused, but {why}"
    for slot in sorted(here.slots.get(workspace_id, ())):
        yield FindingKind.SLOT, f"it holds slot {slot}, but {why}"
    yield from _leftovers(here, workspace_id)


def _unfinished(workspace: Workspace, snapshots: Sequence[SnapshotRecord]) -> _Wrong:
    operation = workspace.operation
    if operation is not None:
        began = f"{operation.started_at:%Y-%m-%d %H:%M:%S} on host {operation.host!r}"
        yield FindingKind.OPERATION, f"{operation.kind} began at {began}, and nobody is doing it"
    for record in snapshots:
        if record.status in {SnapshotStatus.PENDING, SnapshotStatus.DELETING}:
            detail = f"snapshot {record.name!r} is {record.status}, and nobody is doing it"
            yield FindingKind.UNFINISHED, detail


def _snapshots(
    manager: WorkspaceManager, here: _Here, workspace: Workspace, snapshots: Sequence[SnapshotRecord]
) -> _Wrong:
    pins = here.pins.get(workspace.id, set())
    for pin in sorted(pins - {pin_name(record.name) for record in snapshots}):
        yield FindingKind.UNMANAGED, f"pin {pin!r} keeps a snapshot that the catalog does not know"
    complete = {record.name: record for record in snapshots if record.status is SnapshotStatus.COMPLETE}
    needed = {workspace.current_snapshot, workspace.base_snapshot} - {""}
    for name in sorted(needed - complete.keys()):
        yield FindingKind.INCOMPLETE, f"it goes on from snapshot {name!r}, which the catalog does not have"
    for record in complete.values():
        if pin_name(record.name) in pins:
            problem = _problem(manager, record)
            if problem:
                yield FindingKind.INCOMPLETE, f"snapshot {record.name!r} is not whole: {problem}"
        elif not record.is_remote or record.name in needed:
            yield FindingKind.UNPINNED, f"snapshot {record.name!r} is not pinned, and may be evicted"


def _problem(manager: WorkspaceManager, record: SnapshotRecord) -> str:
    """What a pinned snapshot lacks; empty when it is whole."""
    try:
        pin = manager.file_cache.pinned(pin_name(record.name))
        if record.manifest_ref and record.manifest_ref not in pin.refs:
            return f"its pin does not keep its manifest {record.manifest_ref}"
        manager.loader.get_snapshot_by_id(
            record.runtime_name, instance_name=manager.instance_name, read_policy=ReadPolicy.LOCAL_ONLY
        )
    except (NotFound, DataLoss) as error:
        return error.message
    return ""


def _runtime(workspace: Workspace, status: RuntimeStatus) -> _Wrong:
    should_run = workspace.state is WorkspaceState.RUNNING
    if should_run and not status.is_running:
        code, ended = status.exit_code, ""
        if code is not None:
            ended = f": its command has ended, {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        yield FindingKind.PROCESS, f"it is running, but no process is{ended}"
    if status.is_running and not should_run:
        yield FindingKind.PROCESS, f"it is {workspace.state}, but process {status.pid} runs"
    should_exist = workspace.state is not WorkspaceState.PAUSED
    if should_exist and not status.exists:
        yield FindingKind.FOLDER, f"it is {workspace.state}, but the runtime holds no state of it"
    if status.exists and not should_exist:
        yield FindingKind.FOLDER, "it is paused, but the runtime holds state of it"


def _record(manager: WorkspaceManager, here: _Here, workspace: Workspace) -> _Wrong:
    if workspace.state is not WorkspaceState.PAUSED:
        if workspace.id in here.records:
            yield FindingKind.RECORD, f"it is {workspace.state}, but there is a record of it as paused"
        return
    try:
        kept = manager.records.read(workspace.id).workspace
    except (NotFound, DataLoss) as error:
        yield FindingKind.RECORD, error.message
        return
    for field in ("slot", "current_snapshot", "base_snapshot"):
        told, known = getattr(kept, field), getattr(workspace, field)
        if told != known:
            yield FindingKind.RECORD, f"its record as paused says {field} {told!r}, the catalog {known!r}"


def _slots(manager: WorkspaceManager, here: _Here, workspace: Workspace) -> _Wrong:
    held = here.slots.get(workspace.id, set())
    if workspace.slot is not None and workspace.slot not in held:
        owner = manager.slots.owner(workspace.slot)
        holder = "nobody holds" if owner is None else f"workspace {owner!r} holds"
        yield FindingKind.SLOT, f"{holder} its slot {workspace.slot}"
    for slot in sorted(held - {workspace.slot}):
        yield FindingKind.SLOT, f"it holds slot {slot}, which the catalog does not say"


def _leftovers(here: _Here, workspace_id: str) -> _Wrong:
    """What was half made or half removed; its maker would hold the workspace's lock."""
    for name in here.leftovers.get(workspace_id, ()):
        yield FindingKind.LEFTOVER, f"{name!r} was left half made or half removed"
