"""What lies where in the folder of a runtime, and how the folder of a workspace is filled.

    <base>/workspaces/<id>/root/             what the workspace sees; a durable directory /a/b is root/a/b
                           state/placed      token of the last `place`
                           state/attachments.json
                           state/index/      capture indexes
                           state/nothing/    empty, for a snapshot that has no volumes to hold
                           state/run.json, end.json, log, log.1      of the latest run
    <base>/workspaces/<id>.staging-<unique>  being built
                      <id>.trash-<unique>    being removed
                      <id>.replaced          the state before, between two renames of `place`
    <base>/locks/<id>                        locked by whoever changes the workspace
    <base>/stores/<id>.<pid>-<start>-<unique>/    written chunks of stores that a process has open

An id holds no dot, so what has one is left over from a call that is under way, or was killed.

A workspace's folder and its snapshots hold the same, in directories of their own. The command runs as the
user who captures it, and a snapshot may come from anywhere, so both may hold symbolic links to other places.
Durable directories are reached without following any.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cow import clone_range, data_extents
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.files import closing_fd, copy_range, open_private
from snaploader.formats.dirtree import DirectoryTree
from snaploader.formats.manifest import check_name
from snaploader.loader import DirectorySource, ProgressCallback, Snapshot, SnapshotLoader
from snaploader.loader.scan import write_restored_index
from snaploader.workspace.model import Scope, WorkspaceSpec, check_volumes

ROOT = "root"
"""Name of the directory in a snapshot that holds all but the volumes."""
VOLUME_PREFIX = "volume."
"""Of the names of volumes in a snapshot."""
NO_VOLUMES = "volumes"
"""Name of the empty directory in a snapshot of a workspace without volumes: no snapshot holds nothing."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)


class Folder:
    """The folder of one workspace, or one that becomes it when it is finished."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = f"{path}/root"
        self.state = f"{path}/state"
        self.placed = f"{self.state}/placed"
        self.attachments = f"{self.state}/attachments.json"
        self.run = f"{self.state}/run.json"
        self.end = f"{self.state}/end.json"
        self.log = f"{self.state}/log"
        self.nothing = f"{self.state}/nothing"

    def index(self, entry: str) -> str:
        """Return the path of the capture index of a directory, by the directory's name in a snapshot."""
        return f"{self.state}/index/{hashlib.sha256(entry.encode()).hexdigest()[:32]}"

    def make(self) -> None:
        """Make the folders that all workspaces have. Raises OSError."""
        for path in (self.path, self.state, f"{self.state}/index", self.nothing):
            os.mkdir(path, mode=0o700)


class Layout:
    """The paths of a runtime."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.workspaces = f"{base}/workspaces"
        self.locks = f"{base}/locks"
        self.stores = f"{base}/stores"

    def folder(self, workspace_id: str) -> Folder:
        return Folder(f"{self.workspaces}/{workspace_id}")

    def lock(self, workspace_id: str) -> str:
        return f"{self.locks}/{workspace_id}"

    def replaced(self, workspace_id: str) -> str:
        """Return where the state before stands between two renames."""
        return f"{self.workspaces}/{workspace_id}.replaced"

    def beside(self, workspace_id: str, purpose: str) -> str:
        """A new path beside the workspace, for its folder while it is built or removed."""
        return f"{self.workspaces}/{workspace_id}.{purpose}-{secrets.token_hex(8)}"

    def make(self) -> None:
        """Make the folders. Raises OSError."""
        open_private(self.base, "a folder of the runtime", "workspaces", "locks", "stores")


def read_file(path: str) -> bytes | None:
    """Return what a file holds, or None when it is not there. Raises OSError."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None


def make_beneath(root: str, path: str) -> None:
    """Make a folder and those above it, up to `root`, if they are not there.

    NotADirectoryError when anything on the way is a symbolic link or a file: nothing is made elsewhere.
    """
    fd = os.open(root, _FOLDER)
    try:
        for part in path.split("/"):
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            inner = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
    finally:
        os.close(fd)


def copy_tree(source: str, target: str) -> None:
    """Copy the content of a folder to a new one: modes, times and symbolic links too.

    Blocks are shared where the disk can, and holes stay holes. InvalidArgument for what no snapshot can hold.
    """
    with translate_os_errors(f"cannot copy {source!r}"):
        if not stat.S_ISDIR(os.stat(source).st_mode):
            raise InvalidArgument(f"{source!r} is no folder that a workspace could begin with")
        try:
            shutil.copytree(source, target, symlinks=True, copy_function=_copy_file)
        except shutil.Error as error:
            _, _, reason = error.args[0][0]
            raise InvalidArgument(f"cannot copy {source!r}: {reason}") from error


def _copy_file(source: str, target: str) -> None:
    status = os.stat(source, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(f"{source!r} is no file, folder or symbolic link, and cannot be copied")
    with (
        # Of an OSError, copytree keeps nothing but the text.
        translate_os_errors(f"cannot copy {source!r}"),
        closing_fd(os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as reader,
        closing_fd(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as writer,
    ):
        size = os.fstat(reader).st_size
        if not clone_range(reader, 0, 0, writer, 0):  # of length 0: up to the end
            for start, end in data_extents(reader, size):
                copy_range(reader, writer, start, end)
        os.ftruncate(writer, size)
    shutil.copystat(source, target, follow_symlinks=False)


def volumes_of(spec: WorkspaceSpec) -> dict[str, str]:
    """Return the durable directories' paths below the root, by the names that snapshots give the volumes.

    InvalidArgument when a workspace or a snapshot cannot have them.
    """
    volumes = check_volumes(spec.volumes)
    return {
        check_name(VOLUME_PREFIX + volume.name): volume.durable_dir.removeprefix("/") for volume in volumes
    }


def make_durable(
    folder: Folder, volumes: Mapping[str, str], kind: type[InvalidArgument | FailedPrecondition] | None
) -> None:
    """Make the durable directories that are not there; raise `kind`, if any, where something else is."""
    for entry, path in volumes.items():
        try:
            make_beneath(folder.root, path)
        except NotADirectoryError as error:
            if kind is None:
                continue
            raise kind(
                f"durable directory {'/' + path!r} of volume {entry.removeprefix(VOLUME_PREFIX)!r} cannot be "
                "reached: it is, or lies behind, a symbolic link or a file. Put a folder in its place"
            ) from error


def check_fits(snapshot: Snapshot, volumes: Mapping[str, str], workspace_id: str) -> None:
    """Raise FailedPrecondition when the snapshot holds volumes that the workspace does not have."""
    unknown = {name for name in snapshot.directories if name.startswith(VOLUME_PREFIX)} - volumes.keys()
    if unknown:
        raise FailedPrecondition(
            f"the snapshot holds volume {min(unknown).removeprefix(VOLUME_PREFIX)!r}, which workspace "
            f"{workspace_id!r} does not have: place it in a workspace with the same volumes"
        )


def sources(folder: Folder, volumes: Mapping[str, str], scope: Scope) -> dict[str, DirectorySource]:
    """Return what to save of a workspace's folder. FailedPrecondition when it cannot be saved."""
    if not stat.S_ISDIR(os.stat(folder.root, follow_symlinks=False).st_mode):
        raise FailedPrecondition(f"{folder.root!r} is no folder any more: put one in its place")
    make_durable(folder, volumes, FailedPrecondition)
    found = {
        entry: DirectorySource(f"{folder.root}/{path}", index=folder.index(entry))
        for entry, path in volumes.items()
    }
    if not volumes:
        found[NO_VOLUMES] = DirectorySource(folder.nothing)
    if scope is Scope.FULL:
        found[ROOT] = DirectorySource(folder.root, exclude=[*volumes.values()], index=folder.index(ROOT))
    return found


def restore(
    folder: Folder,
    volumes: Mapping[str, str],
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
    for entry, path in volumes.items():
        if entry in snapshot.directories:
            write(snapshot, entry, f"{folder.root}/{path}")
    if not with_indexes or not written:
        return
    # Each waits a moment for the clock; together they wait once.
    with ThreadPoolExecutor(len(written), thread_name_prefix="snaploader-index") as threads:
        for warning in threads.map(lambda directory: write_restored_index(*directory), written):
            if warning:
                _log.warning("%s", warning)
