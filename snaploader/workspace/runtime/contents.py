"""What a workspace's folder holds and what its snapshots do: the same, in directories of their own.

The command runs as the user who captures it, and a snapshot may come from anywhere, so both may hold symbolic
links to other places. Durable directories are reached without following any.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from snaploader.errors import FailedPrecondition, InvalidArgument
from snaploader.formats.dirtree import DirectoryTree
from snaploader.formats.manifest import check_name
from snaploader.loader import DirectorySource, ProgressCallback, Snapshot, SnapshotLoader
from snaploader.loader.place import write_restored_index
from snaploader.workspace.model import Scope, Volume, WorkspaceSpec
from snaploader.workspace.runtime.files import make_beneath
from snaploader.workspace.runtime.layout import Folder
from snaploader.workspace.volumes import check_volumes

ROOT = "root"
"""Name of the directory in a snapshot that holds all but the volumes."""
VOLUME_PREFIX = "volume."
"""Of the names of volumes in a snapshot."""
NO_VOLUMES = "volumes"
"""Name of the empty directory in a snapshot of a workspace without volumes: no snapshot holds nothing."""

log = logging.getLogger(__name__)


def volumes_of(spec: WorkspaceSpec) -> tuple[Volume, ...]:
    """The volumes in normal form. InvalidArgument when a workspace or a snapshot cannot have them."""
    volumes = check_volumes(spec.volumes)
    for volume in volumes:
        check_name(_entry(volume))
    return volumes


def make_durable(
    folder: Folder, volumes: Sequence[Volume], kind: type[InvalidArgument | FailedPrecondition]
) -> None:
    """Make the durable directories that are not there; raise `kind` where something else is."""
    for volume in volumes:
        try:
            make_beneath(folder.root, _beneath_root(volume))
        except NotADirectoryError as error:
            raise kind(
                f"durable directory {volume.durable_dir!r} of volume {volume.name!r} cannot be reached: "
                "it is, or lies behind, a symbolic link or a file. Put a folder in its place"
            ) from error


def make_durable_again(folder: Folder, volumes: Sequence[Volume]) -> None:
    """Make the durable directories that are gone; leave alone what was put in place of one."""
    for volume in volumes:
        with suppress(NotADirectoryError):
            make_beneath(folder.root, _beneath_root(volume))


def check_fits(snapshot: Snapshot, volumes: Sequence[Volume], workspace_id: str) -> None:
    """FailedPrecondition when the snapshot holds volumes that the workspace does not have."""
    known = {_entry(volume) for volume in volumes}
    unknown = [name for name in snapshot.directories if name.startswith(VOLUME_PREFIX) and name not in known]
    if unknown:
        raise FailedPrecondition(
            f"the snapshot holds volume {min(unknown).removeprefix(VOLUME_PREFIX)!r}, which workspace "
            f"{workspace_id!r} does not have: place it in a workspace with the same volumes"
        )


def sources(folder: Folder, volumes: Sequence[Volume], scope: Scope) -> dict[str, DirectorySource]:
    """What to save of a workspace's folder. FailedPrecondition when it cannot be."""
    if not stat.S_ISDIR(os.stat(folder.root, follow_symlinks=False).st_mode):
        raise FailedPrecondition(f"{folder.root!r} is no folder any more: put one in its place")
    make_durable(folder, volumes, FailedPrecondition)
    found = {
        _entry(volume): DirectorySource(
            f"{folder.root}/{_beneath_root(volume)}", index=folder.index(_entry(volume))
        )
        for volume in volumes
    }
    if not volumes:
        found[NO_VOLUMES] = DirectorySource(folder.nothing)
    if scope is Scope.FULL:
        exclude = [_beneath_root(volume) for volume in volumes]
        found[ROOT] = DirectorySource(folder.root, exclude=exclude, index=folder.index(ROOT))
    return found


def restore(
    folder: Folder,
    volumes: Sequence[Volume],
    loader: SnapshotLoader,
    snapshot: Snapshot,
    rest: Snapshot | None,
    *,
    with_indexes: bool,
    progress: ProgressCallback | None,
) -> None:
    """Fill a new folder, which nobody else uses: the volumes from one snapshot, all else from `rest`."""
    written: list[tuple[DirectoryTree, Path, str]] = []

    def write(source: Snapshot, entry: str, target: str) -> None:
        loader.restore_directory(source, entry, target, progress=progress)
        written.append((source.directories[entry], Path(target), folder.index(entry)))

    if rest is not None and ROOT in rest.directories:
        write(rest, ROOT, folder.root)
    else:
        os.mkdir(folder.root, 0o755)
    make_durable(folder, volumes, FailedPrecondition)
    for volume in volumes:
        if _entry(volume) in snapshot.directories:
            write(snapshot, _entry(volume), f"{folder.root}/{_beneath_root(volume)}")
    if with_indexes and written:
        _write_indexes(written)


def _write_indexes(written: Sequence[tuple[DirectoryTree, Path, str]]) -> None:
    # Each waits a moment for the clock; together they wait once.
    with ThreadPoolExecutor(len(written), thread_name_prefix="snaploader-index") as threads:
        for warning in threads.map(lambda directory: write_restored_index(*directory), written):
            if warning:
                log.warning("%s", warning)


def _entry(volume: Volume) -> str:
    """The name of a volume in a snapshot."""
    return VOLUME_PREFIX + volume.name


def _beneath_root(volume: Volume) -> str:
    return volume.durable_dir.removeprefix("/")
