"""What snapshots there are: those that the catalog manages, and those that only the cache knows."""

from __future__ import annotations

from snaploader.workspace.manager.services import Services
from snaploader.workspace.model import SnapshotInfo, SnapshotStatus
from snaploader.workspace.names import runtime_name


def list_snapshots(services: Services, workspace_id: str) -> list[SnapshotInfo]:
    """All snapshots of a workspace, unmanaged ones last. See `WorkspaceManager.list_snapshots`."""
    content = services.content
    # Names of pins are made once: one that is there before and after the catalog was read, and is not in it,
    # is no snapshot that is being taken or removed meanwhile.
    pinned = set(content.pinned_names(workspace_id))
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
        if record.status is not SnapshotStatus.COMPLETE:
            continue
        version = versions.get(record.name)
        infos.append(
            SnapshotInfo(
                record.runtime_name,
                is_managed=True,
                is_local=content.is_local(record.runtime_name),
                record=record,
                version=None if version is None else version.number,
                display_name=record.display_name if version is None else version.display_name,
            )
        )
    known = {record.name for record in records}
    for name in content.pinned_names(workspace_id):
        if name in pinned and name not in known:
            found = runtime_name(workspace_id, name)
            infos.append(SnapshotInfo(found, is_managed=False, is_local=content.is_local(found)))
    return infos
