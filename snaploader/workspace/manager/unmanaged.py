"""What a host holds of a workspace, joined with what the catalog knows: snapshots listed, workspaces adopted.

A snapshot says of itself, in its manifest, which workspace it is of, and what it was to it. So those that the
catalog has lost, or never had, are found, and taken in with a workspace that is adopted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC

from snaploader._proto.snaploader_pb2 import VMMetadata
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from snaploader.formats.manifest import Manifest
from snaploader.loader.results import vm_metadata_of
from snaploader.policy import ReadPolicy
from snaploader.workspace.events import about_snapshot
from snaploader.workspace.manager.operation import Services, Work, give_slot_back, new_operation
from snaploader.workspace.manager.snapshots import SnapshotContent
from snaploader.workspace.model import (
    OperationKind,
    RunTransition,
    Scope,
    SnapshotInfo,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    SnapshotStatus,
    Workspace,
    WorkspaceState,
    check_display_name,
    runtime_name,
)
from snaploader.workspace.policy import check_scopes

log = logging.getLogger(__name__)

ADOPT = "workspace_adopt"

_MAX_NAME = 120
"""Longer names than the manager makes are none: what a manifest says may come from anywhere."""


def list_snapshots(services: Services, workspace_id: str, *, unmanaged: bool) -> list[SnapshotInfo]:
    """The snapshots of a workspace, unmanaged ones last. See `WorkspaceManager.list_snapshots`."""
    held = _held(services, workspace_id) if unmanaged else {}
    in_runtime = set(services.runtime.snapshots(workspace_id))
    with services.catalog.reading() as reader:
        reader.workspace(workspace_id)
        records = reader.snapshots(workspace_id, statuses=list(SnapshotStatus))
        versions = {version.snapshot_name: version for version in reader.versions(workspace_id)}
    # Within one tick of the clock versions are in the order of their numbers.
    records.sort(
        key=lambda each: (each.created_at, versions[each.name].number if each.name in versions else 0)
    )
    infos = []
    for record in records:
        held.pop(record.runtime_name, None)
        if record.status is not SnapshotStatus.COMPLETE:
            continue
        version = versions.get(record.name)
        infos.append(
            SnapshotInfo(
                record.runtime_name,
                is_managed=True,
                is_local=services.content.is_local(record.runtime_name),
                is_in_runtime=record.runtime_name in in_runtime,
                record=record,
                version=None if version is None else version.number,
                display_name=record.display_name if version is None else version.display_name,
            )
        )
    # Names are made once: what was there before the catalog was read, is not in it, and is there still, is no
    # snapshot that is being taken or removed meanwhile.
    still = _held(services, workspace_id) if held else {}
    return [*infos, *(still[name] for name in sorted(held) if name in still)]


def adopt(services: Services, workspace: Workspace) -> Workspace:
    """Take a slot, and record all that is here of the workspace. See `WorkspaceManager.adopt`."""
    workspace_id = workspace.id
    status = services.runtime.status(workspace_id)
    _check_can_be_adopted(services, workspace_id, exists=status.exists)
    snapshots = _snapshots_to_adopt(services, workspace_id)
    bases = [record for record in snapshots if record.kind is SnapshotKind.BASE]
    own = [slot for slot, owner in services.slots.owners().items() if owner == workspace_id]
    workspace = replace(
        workspace,
        state=WorkspaceState.RUNNING if status.is_running else WorkspaceState.STOPPED,
        slot=own[0] if own else services.slots.acquire(workspace_id),
        current_snapshot=snapshots[-1].name if snapshots else "",
        base_snapshot=bases[0].name if bases else "",
    )
    try:
        return _record(services, workspace, snapshots)
    except BaseException:
        assert workspace.slot is not None
        if not own:
            give_slot_back(services, workspace.slot, workspace_id)
        raise


def _record(services: Services, workspace: Workspace, snapshots: list[SnapshotRecord]) -> Workspace:
    work = Work(services, workspace, new_operation(services, OperationKind.CREATE))
    with services.catalog.transaction() as tx:
        tx.add_workspace(workspace)
        check_scopes(tx.policy(workspace.policy), services.runtime.scopes)
        versions = 0
        for record in snapshots:
            tx.put_snapshot(record)
            if record.kind is SnapshotKind.VERSION:
                tx.add_version(workspace.id, record.name, record.created_at, record.display_name)
                versions += 1
        payload = (
            {} if not workspace.current_snapshot else about_snapshot(tx.snapshot(workspace.current_snapshot))
        )
        if workspace.state is WorkspaceState.RUNNING:
            payload["run"] = work.record_run(tx, RunTransition.START).id
        payload |= {"policy": workspace.policy, "slot": workspace.slot, "state": workspace.state.value}
        work.record_event(tx, ADOPT, **payload, snapshots=len(snapshots), versions=versions)
        return tx.workspace(workspace.id)


def _check_can_be_adopted(services: Services, workspace_id: str, *, exists: bool) -> None:
    known = services.find_workspace(workspace_id)
    if known is not None:
        raise FailedPrecondition(
            f"workspace {workspace_id!r} cannot be adopted: the catalog knows it, as {known.state} on host "
            f"{known.host!r}"
        )
    if services.records.exists(workspace_id):
        raise FailedPrecondition(
            f"workspace {workspace_id!r} cannot be adopted: there is a record of it as paused, "
            f"{services.records.path(workspace_id)!r}. Let `recover` take it back, or move that away"
        )
    if not exists:
        raise NotFound(
            f"the runtime of host {services.host!r} holds nothing of workspace {workspace_id!r}: there is "
            "nothing to adopt"
        )


def _snapshots_to_adopt(services: Services, workspace_id: str) -> list[SnapshotRecord]:
    """The snapshots that this host keeps whole, in the order in which they were taken, but for pauses."""
    content, found = services.content, []
    for info in _held(services, workspace_id).values():
        told = info.told
        if told is None or told.kind is SnapshotKind.PAUSE or not content.is_pinned(told):
            continue
        try:
            content.find(told, ReadPolicy.LOCAL_ONLY)
            is_remote = told.kind is SnapshotKind.COMMIT and content.is_remote(told)
        except (NotFound, DataLoss, InvalidArgument) as error:
            log.warning("snapshot %r is not adopted: %s", told.name, error)
            continue
        if told.kind is not SnapshotKind.COMMIT or is_remote:
            found.append(replace(content.as_saved(told), is_remote=is_remote))
    parents = {record.name: record.parent for record in found}
    # Within one tick of the clock a snapshot is younger than the one that it was taken on top of.
    return sorted(
        found, key=lambda record: (record.created_at, _ancestors(record.name, parents), record.name)
    )


def _ancestors(name: str, parents: Mapping[str, str]) -> int:
    """How many snapshots one goes back to; one that goes back to itself is as old as any."""
    count = 0
    while name in parents and count < len(parents):
        name, count = parents[name], count + 1
    return count


def _held(services: Services, workspace_id: str) -> dict[str, SnapshotInfo]:
    """What the file cache and the runtime hold of a workspace, by runtime name."""
    content = services.content
    held = dict(_in_cache(content, workspace_id))
    for name in content.pinned_names(workspace_id):
        found = runtime_name(workspace_id, name)
        held.setdefault(found, SnapshotInfo(found, is_managed=False, is_local=content.is_local(found)))
    for name in services.runtime.snapshots(workspace_id):
        info = held.get(name) or SnapshotInfo(name, is_managed=False, is_local=content.is_local(name))
        held[name] = replace(info, is_in_runtime=True)
    return held


def _in_cache(content: SnapshotContent, workspace_id: str) -> Iterator[tuple[str, SnapshotInfo]]:
    """The snapshots whose manifests are in the file cache, and say that they are of this workspace."""
    words = workspace_id.encode()
    for ref in content.file_cache.refs():
        data = b""
        with suppress(NotFound):
            data = content.file_cache.get_ref(ref, use=False)
        if words not in data:
            continue  # most are of others, and need not be parsed
        try:
            metadata = vm_metadata_of(Manifest.parse_local(data))
            if metadata is None or metadata.vm_id != workspace_id or not metadata.snapshot_id:
                continue
            if ref != content.manifest_ref(metadata.snapshot_id):
                continue  # another name of it, or one of another instance
        except InvalidArgument:
            continue  # it is damaged, or says what no snapshot can be called
        told = _told(metadata, ref)
        name = "" if told is None else told.display_name
        info = SnapshotInfo(
            metadata.snapshot_id, is_managed=False, is_local=True, told=told, display_name=name
        )
        yield info.runtime_name, info


def _told(metadata: VMMetadata, ref: str) -> SnapshotRecord | None:
    """The record that a snapshot's metadata makes; None where no manager has written it."""
    workspace_id, properties = metadata.vm_id, metadata.properties
    name = metadata.snapshot_id.removeprefix(runtime_name(workspace_id, ""))
    parent = properties["parent"]
    if metadata.snapshot_id != runtime_name(workspace_id, name) or max(len(name), len(parent)) > _MAX_NAME:
        return None
    with suppress(ValueError, OverflowError, InvalidArgument):
        return SnapshotRecord(
            name,
            workspace_id,
            metadata.snapshot_id,
            SnapshotKind(properties["kind"]),
            Scope(properties["scope"]),
            SnapshotSource.parse(properties["source"]),
            metadata.created_timestamp.ToDatetime(UTC),
            display_name=check_display_name(properties["display_name"]),
            parent=parent,
            manifest_ref=ref,
        )
    return None
