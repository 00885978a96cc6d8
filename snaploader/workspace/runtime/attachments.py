"""Disks and memory files that belong to workspaces kept as folders.

A file beside the workspace names them, so that no process captures a workspace without one that another
process has open. A path is usable by everyone, a store by the process that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cow import COWStore
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.manifest import check_name
from snaploader.workspace.runtime.files import read_file, replace_file
from snaploader.workspace.runtime.layout import NO_VOLUMES, ROOT, VOLUME_PREFIX, Folder, Layout
from snaploader.workspace.runtime.processes import ProcessIdentity
from snaploader.workspace.runtime.protocol import Attachment


@dataclass(frozen=True, slots=True)
class _Attached:
    """An attachment as all processes see it."""

    path: str = ""
    owner: ProcessIdentity | None = None
    """Who has the store open; None for a path."""


@dataclass(slots=True)
class OpenedStores:
    """Stores of one workspace that are open in this process."""

    stores: dict[str, COWStore] = field(default_factory=dict)
    owned: dict[str, ExitStack] = field(default_factory=dict)
    """What closes a store that is not the caller's."""

    def drop(self, name: str) -> None:
        """Forget a store, and close it if it is ours."""
        self.stores.pop(name, None)
        closing = self.owned.pop(name, None)
        if closing is not None:
            closing.close()

    def close(self) -> None:
        """Drop all of them."""
        for name in list(self.stores):
            self.drop(name)


class Attachments:
    """The attachments of all workspaces of a runtime. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._opened: dict[str, OpenedStores] = {}

    def attach(self, workspace_id: str, name: str, content: COWStore | str | os.PathLike[str]) -> None:
        """See `Runtime.attach`."""
        check_attachment_name(name)
        folder = self._layout.folder(workspace_id)
        if isinstance(content, COWStore):
            attached = _Attached(owner=ProcessIdentity.current())
        else:
            path = os.path.abspath(content)
            _check_regular(name, path, InvalidArgument)
            attached = _Attached(path=path)
        with self._lock:
            known = _read(folder)
            if name in known:
                raise FailedPrecondition(
                    f"workspace {workspace_id!r} has an attachment {name!r} already: detach it first"
                )
            _write(folder, {**known, name: attached})
            if isinstance(content, COWStore):
                self._opened.setdefault(workspace_id, OpenedStores()).stores[name] = content

    def detach(self, workspace_id: str, name: str) -> None:
        """See `Runtime.detach`."""
        folder = self._layout.folder(workspace_id)
        with self._lock:
            known = _read(folder)
            if name not in known:
                raise NotFound(f"workspace {workspace_id!r} has no attachment {name!r}")
            _write(folder, {other: known[other] for other in known if other != name})
            if workspace_id in self._opened:
                self._opened[workspace_id].drop(name)

    def usable(self, workspace_id: str) -> dict[str, Attachment]:
        """See `Runtime.attachments`."""
        with self._lock:
            known = _read(self._layout.folder(workspace_id))
            opened = self._opened.get(workspace_id, OpenedStores()).stores
            return {
                name: opened[name] if attached.owner else Path(attached.path)
                for name, attached in known.items()
                if attached.owner is None or name in opened
            }

    def captured(self, workspace_id: str) -> dict[str, COWStore | Path]:
        """All of them, for a capture. FailedPrecondition when one cannot be captured here."""
        usable = self.usable(workspace_id)
        for name, attached in _read(self._layout.folder(workspace_id)).items():
            content = usable.get(name)
            if content is None or (isinstance(content, COWStore) and content.closed):
                raise FailedPrecondition(_not_here(workspace_id, name, attached))
            if isinstance(content, Path):
                _check_regular(name, str(content), FailedPrecondition)
        return usable

    def open_from(
        self, workspace_id: str, loader: SnapshotLoader, snapshot: Snapshot, folder: Folder
    ) -> OpenedStores:
        """Open the chunked files of a snapshot, and name them in a folder that is being built."""
        names = snapshot.manifest.chunked_files
        if not names:
            return OpenedStores()
        for name in names:
            check_attachment_name(name)
        owner = ProcessIdentity.current()
        # Only these: plain files and directories are placed otherwise.
        manifest = replace(snapshot.manifest, files={}, directories={})
        opened = OpenedStores()
        with ExitStack() as undo:
            scratch = self._layout.store_folder(workspace_id, owner.pid, owner.start_ticks)
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            unpacked = loader.unpack_snapshot(replace(snapshot, manifest=manifest), scratch)
            undo.callback(unpacked.close)
            _write(folder, {name: _Attached(owner=owner) for name in names})
            last = _LastOf(len(names), undo.pop_all())
        for name, store in unpacked.chunked_files.items():
            opened.stores[name] = store
            opened.owned[name] = ExitStack()
            opened.owned[name].callback(last.one_less)
            opened.owned[name].callback(store.close)
        return opened

    def replace(self, workspace_id: str, opened: OpenedStores) -> None:
        """Use these stores from now on; those before are closed if they are ours."""
        with self._lock:
            before = self._opened.pop(workspace_id, OpenedStores())
            if opened.stores:
                self._opened[workspace_id] = opened
        before.close()

    def forget(self, workspace_id: str) -> None:
        """Drop the stores of a workspace that is gone."""
        self.replace(workspace_id, OpenedStores())

    def sweep(self) -> list[str]:
        """Remove the written chunks of processes that ended; their names."""
        swept = []
        for name in os.listdir(self._layout.stores):
            if not _is_in_use(name):
                shutil.rmtree(f"{self._layout.stores}/{name}", ignore_errors=True)
                swept.append(name)
        return swept

    def close(self) -> None:
        """Close the stores that are ours."""
        with self._lock:
            all_opened, self._opened = self._opened, {}
        for opened in all_opened.values():
            opened.close()


class _LastOf:
    """Closes what several stores share, with the last of them."""

    def __init__(self, count: int, shared: ExitStack) -> None:
        self._count = count
        self._shared = shared

    def one_less(self) -> None:
        self._count -= 1
        if not self._count:
            self._shared.close()


def check_attachment_name(name: str) -> None:
    """InvalidArgument when no attachment can have this name."""
    check_name(name)
    if name in {ROOT, NO_VOLUMES} or name.startswith(VOLUME_PREFIX):
        raise InvalidArgument(
            f"no attachment can be named {name!r}: snapshots hold the workspace's folders under such names"
        )


def _check_regular(name: str, path: str, kind: type[InvalidArgument | FailedPrecondition]) -> None:
    with translate_os_errors(f"cannot look at attachment {name!r}", absent=kind):
        is_regular = stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode)
    if not is_regular:
        raise kind(f"attachment {name!r} is no regular file: {path!r}")


def _not_here(workspace_id: str, name: str, attached: _Attached) -> str:
    owner = attached.owner
    where = "was closed" if owner is None or owner == ProcessIdentity.current() else None
    if where is None:
        assert owner is not None
        where = f"is open in process {owner.pid}" if owner.is_alive else "went with the process that had it"
    return (
        f"attachment {name!r} of workspace {workspace_id!r} {where}: capture the workspace there, or "
        "detach it, or go back to a snapshot"
    )


def _is_in_use(name: str) -> bool:
    _, _, rest = name.partition(".")
    pid, _, rest = rest.partition("-")
    identity = ProcessIdentity.of(int(pid)) if pid.isdecimal() else None
    return identity is not None and str(identity.start_ticks) == rest.partition("-")[0]


def _read(folder: Folder) -> dict[str, _Attached]:
    with translate_os_errors(f"cannot read the attachments in {folder.path!r}"):
        data = read_file(folder.attachments)
    if data is None:
        return {}
    return {name: _parse(entry) for name, entry in json.loads(data).items()}


def _parse(entry: dict[str, Any]) -> _Attached:
    if "path" in entry:
        return _Attached(path=entry["path"])
    return _Attached(owner=ProcessIdentity(entry["pid"], entry["start_ticks"], entry["boot_id"]))


def _write(folder: Folder, attached: Mapping[str, _Attached]) -> None:
    entries = {
        name: (
            {"path": each.path}
            if each.owner is None
            else {
                "pid": each.owner.pid,
                "start_ticks": each.owner.start_ticks,
                "boot_id": each.owner.boot_id,
            }
        )
        for name, each in attached.items()
    }
    with translate_os_errors(f"cannot note the attachments in {folder.path!r}"):
        replace_file(folder.attachments, json.dumps(entries).encode())
