"""Workspaces that are folders: how they are made, captured, replaced and removed.

What runs in them is for subclasses to say. Every change is built beside the workspace and moved into place
in one step, under the workspace's lock; what a killed process leaves is told by its name (see
`snaploader.workspace.runtime.contents`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from cow import COWStore
from snaploader._environment import HOST, HostEnvironment
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.files import (
    ProcessExitStack,
    closing_fd,
    flush_file_system,
    flush_folder,
    lock_new,
    remove_tree,
    replace_file,
    unlock,
)
from snaploader.loader import ProgressCallback, Snapshot, SnapshotLoader
from snaploader.workspace.model import Scope, WorkspaceSpec, check_workspace_id
from snaploader.workspace.runtime import contents
from snaploader.workspace.runtime.attachments import Attachments, OpenStores
from snaploader.workspace.runtime.contents import Folder, Layout
from snaploader.workspace.runtime.protocol import Attachment, Capture, Runtime, RuntimeStatus
from snaploader.workspace.runtime.runs import read_run

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What renameat2(2) says where the kernel or the file system cannot exchange."""


class FolderRuntime(Runtime):
    """The part of `Runtime` that is about folders. Arguments and promises are those of `ProcessRuntime`."""

    def __init__(
        self,
        root_directory: str | os.PathLike[str],
        *,
        durable: bool = True,
        index_placed: bool = True,
        _environment: HostEnvironment = HOST,
    ) -> None:
        self._layout = Layout(os.path.abspath(root_directory))
        self._durable = durable
        self._index_placed = index_placed
        self._host = _environment
        with translate_os_errors(f"cannot use {self._layout.base!r} for workspaces"):
            self._layout.make()
        self._attachments = Attachments(self._layout)

    keeps_memory = False  # a folder has none
    scopes = frozenset(Scope)

    def root(self, workspace_id: str) -> Path:
        """Return the folder that the workspace sees. NotFound when there is none."""
        return Path(self._existing(workspace_id).root)

    def create(self, spec: WorkspaceSpec, source: str | os.PathLike[str] | None = None) -> None:
        volumes = contents.volumes_of(spec)
        workspace_id = check_workspace_id(spec.workspace_id)
        with self._changing(workspace_id, f"cannot create workspace {workspace_id!r}"):
            folder = self._layout.folder(workspace_id)
            if os.path.lexists(folder.path):
                raise FailedPrecondition(f"workspace {workspace_id!r} is there already: {folder.path!r}")
            with self._building(workspace_id) as staging:
                if source is None:
                    os.mkdir(staging.root, 0o755)
                else:
                    contents.copy_tree(self._outside(source), staging.root)
                contents.make_durable(staging, volumes, InvalidArgument)
                self._host.after_step("create.built")
                self._install(staging, folder, has_content=source is not None)
                self._host.after_step("create.installed")

    @contextmanager
    def capture(self, spec: WorkspaceSpec, scope: Scope) -> Iterator[Capture]:
        """See `Runtime.capture`. A durable directory that is gone is captured empty."""
        volumes = contents.volumes_of(spec)
        workspace_id = spec.workspace_id
        with self._changing(workspace_id, f"cannot capture workspace {workspace_id!r}"):
            folder = self._existing(workspace_id)
            self._check_stopped(workspace_id, "capture")
            directories = contents.sources(folder, volumes, scope)
            is_bare = scope is Scope.DATA or not os.path.lexists(folder.attachments)
        attached = {} if is_bare else self._attachments.captured(workspace_id)
        yield Capture(directories=directories, chunked_files=attached)

    def continue_on(self, spec: WorkspaceSpec, runtime_name: str) -> None:  # noqa: ARG002
        self._existing(spec.workspace_id)

    def place(
        self,
        spec: WorkspaceSpec,
        loader: SnapshotLoader,
        snapshot: Snapshot,
        *,
        base: Snapshot | None = None,
        token: str,
        progress: ProgressCallback | None = None,
    ) -> None:
        volumes = contents.volumes_of(spec)
        workspace_id = check_workspace_id(spec.workspace_id)
        if not token:
            raise InvalidArgument("a placement needs a token")
        rest = snapshot if contents.ROOT in snapshot.directories else base
        contents.check_fits(snapshot, volumes, workspace_id)
        with self._changing(workspace_id, f"cannot replace the state of workspace {workspace_id!r}"):
            folder = self._layout.folder(workspace_id)
            self._check_stopped(workspace_id, "replace")
            with self._building(workspace_id) as staging, ExitStack() as undo:
                contents.restore(
                    staging,
                    volumes,
                    loader,
                    snapshot,
                    rest,
                    with_indexes=self._index_placed,
                    progress=progress,
                )
                self._host.after_step("place.restored")
                opened = self._attachments.open_from(workspace_id, loader, rest or snapshot, staging)
                undo.callback(opened.close)
                replace_file(staging.placed, token.encode())
                for path, kept in ((folder.log, staging.log), (f"{folder.log}.1", f"{staging.log}.1")):
                    with suppress(FileNotFoundError):
                        os.link(path, kept)
                self._host.after_step("place.built")
                self._install(staging, folder)
                undo.pop_all()
                self._attachments.replace(workspace_id, opened)
                self._host.after_step("place.installed")

    def remove(self, workspace_id: str) -> None:
        with self._changing(workspace_id, f"cannot remove workspace {workspace_id!r}"):
            folder = self._layout.folder(workspace_id)
            self._check_stopped(workspace_id, "remove")
            if os.path.lexists(folder.path):
                trash = self._layout.beside(workspace_id, "trash")
                os.rename(folder.path, trash)
                self._host.after_step("remove.trashed")
                if self._durable:
                    flush_folder(self._layout.workspaces)
                remove_tree(trash)
                self._host.after_step("remove.removed")
            self._attachments.replace(workspace_id, OpenStores())
            os.unlink(self._layout.lock(workspace_id))

    def status(self, workspace_id: str) -> RuntimeStatus:
        folder = self._find(workspace_id)
        if folder is None:
            return RuntimeStatus(workspace_id)
        with translate_os_errors(f"cannot look at workspace {workspace_id!r}"):
            run = read_run(folder)
            placed = (contents.read_file(folder.placed) or b"").decode(errors="replace")
        if run is None:
            return RuntimeStatus(workspace_id, exists=True, placed=placed)
        is_running = run.is_running
        return RuntimeStatus(
            workspace_id,
            exists=True,
            is_running=is_running,
            pid=run.command.pid if is_running and run.command is not None else None,
            exit_code=run.exit_code,
            started_at=run.started_at,
            placed=placed,
        )

    def snapshots(self, workspace_id: str) -> tuple[str, ...]:
        """See `Runtime.snapshots`: a folder keeps none."""
        check_workspace_id(workspace_id)
        return ()

    def workspaces(self) -> list[str]:
        with translate_os_errors("cannot list the workspaces"):
            names = {name.removesuffix(".replaced") for name in os.listdir(self._layout.workspaces)}
        return sorted(name for name in names if "." not in name)

    def leftovers(self) -> list[str]:
        with translate_os_errors("cannot list the workspaces"):
            return sorted(name for name in os.listdir(self._layout.workspaces) if "." in name)

    def sweep(self) -> list[str]:
        with translate_os_errors("cannot clean up the workspaces"):
            swept = self._attachments.sweep()
            for name in os.listdir(self._layout.workspaces):
                workspace_id, dot, _ = name.partition(".")
                if not dot:
                    continue
                with locked(self._layout.lock(workspace_id), wait=False) as held:
                    if held is not None:
                        self._tidy(workspace_id, name)
                        swept.append(name)
            # Locks of workspaces that are gone.
            known = {name.partition(".")[0] for name in os.listdir(self._layout.workspaces)}
            for workspace_id in set(os.listdir(self._layout.locks)) - known:
                path = self._layout.lock(workspace_id)
                with locked(path, wait=False) as held:
                    if held is not None and not os.path.lexists(self._layout.folder(workspace_id).path):
                        os.unlink(path)
        return sorted(swept)

    def attach(self, workspace_id: str, name: str, content: COWStore | str | os.PathLike[str]) -> None:
        with self._changing(workspace_id, f"cannot attach {name!r} to workspace {workspace_id!r}"):
            self._existing(workspace_id)
            self._attachments.attach(workspace_id, name, content)

    def detach(self, workspace_id: str, name: str) -> None:
        with self._changing(workspace_id, f"cannot detach {name!r} from workspace {workspace_id!r}"):
            self._existing(workspace_id)
            self._attachments.detach(workspace_id, name)

    def attachments(self, workspace_id: str) -> Mapping[str, Attachment]:
        self._existing(workspace_id)
        return self._attachments.usable(workspace_id)

    def close(self) -> None:
        self._attachments.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outside(self, source: str | os.PathLike[str]) -> str:
        """A source's path. InvalidArgument when copying it would copy the copy."""
        path = os.path.realpath(source)
        if os.path.commonpath([path, os.path.realpath(self._layout.base)]) == path:
            raise InvalidArgument(f"{path!r} cannot be copied: the workspaces are within it")
        return path

    def _find(self, workspace_id: str) -> Folder | None:
        """The workspace's folder, if there is one."""
        folder = self._layout.folder(check_workspace_id(workspace_id))
        if os.path.lexists(folder.path):
            return folder
        if os.path.lexists(self._layout.replaced(workspace_id)):
            with self._changing(workspace_id, f"cannot repair workspace {workspace_id!r}"):
                return folder
        return None

    def _existing(self, workspace_id: str) -> Folder:
        folder = self._find(workspace_id)
        if folder is None:
            raise NotFound(f"there is no workspace {workspace_id!r} in {self._layout.base!r}")
        return folder

    def _is_running(self, workspace_id: str) -> bool:
        run = read_run(self._layout.folder(workspace_id))
        return run is not None and run.is_running

    def _check_stopped(self, workspace_id: str, what: str) -> None:
        if os.path.lexists(self._layout.folder(workspace_id).path) and self._is_running(workspace_id):
            raise FailedPrecondition(f"workspace {workspace_id!r} is running: stop it to {what} it")

    @contextmanager
    def _changing(self, workspace_id: str, what: str) -> Iterator[int]:
        """Hold the workspace's lock, with the folder whole; gives the lock's descriptor."""
        path = self._layout.lock(check_workspace_id(workspace_id))
        with translate_os_errors(what), locked(path) as fd:
            assert fd is not None
            replaced = self._layout.replaced(workspace_id)
            if os.path.lexists(replaced):
                self._tidy(workspace_id, os.path.basename(replaced))
            yield fd

    @contextmanager
    def _building(self, workspace_id: str) -> Iterator[Folder]:
        """A folder to build in; what was not installed is removed."""
        staging = Folder(self._layout.beside(workspace_id, "staging"))
        with ProcessExitStack() as undo:
            undo.callback(remove_tree, staging.path)
            staging.make()
            yield staging

    def _install(self, staging: Folder, folder: Folder, *, has_content: bool = True) -> None:
        """Put a finished folder in its place, in one step. What was there is at `staging` then, or gone."""
        if self._durable and has_content:
            flush_file_system(staging.path)
        if not os.path.lexists(folder.path):
            os.rename(staging.path, folder.path)
        elif exchange(staging.path, folder.path):
            self._host.after_step("place.exchanged")
        else:
            replaced = self._layout.replaced(os.path.basename(folder.path))
            os.rename(folder.path, replaced)
            self._host.after_step("place.moved-away")
            os.rename(staging.path, folder.path)
            self._host.after_step("place.moved-in")
            os.rename(replaced, staging.path)
        if self._durable:
            flush_folder(self._layout.workspaces)

    def _tidy(self, workspace_id: str, name: str) -> None:
        """Deal with what a killed process left, under the workspace's lock."""
        folder, leftover = self._layout.folder(workspace_id), f"{self._layout.workspaces}/{name}"
        if leftover == self._layout.replaced(workspace_id) and not os.path.lexists(folder.path):
            os.rename(leftover, folder.path)
        else:
            remove_tree(leftover)


@contextmanager
def locked(path: str, *, wait: bool = True) -> Iterator[int | None]:
    """Hold the lock of a workspace, flock(2) on a small file; gives its descriptor. Raises OSError.

    Without `wait`, None is given where another holds it. A lock goes with the processes that hold its
    descriptor. The supervisor of a workspace inherits it until it has written down what it started, so nobody
    can find the workspace half started, whoever is killed.
    """
    try:
        fd = lock_new(path, wait=wait)
    except BlockingIOError:
        yield None
        return
    pid = os.getpid()
    with closing_fd(fd):
        yield fd
        unlock(fd, pid)  # not after an error: a supervisor that is still starting goes on to hold it


def exchange(first: str, second: str) -> bool:
    """Let two paths change places in one step; returns False where that cannot be done. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), first)
