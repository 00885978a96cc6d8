"""Disks and memory files that belong to workspaces kept as folders.

A file beside the workspace names them, so that no process captures a workspace without one that another
process has open. A path is usable by everyone, a store by the process that has it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cow import COWStore
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.files import ProcessExitStack, replace_file
from snaploader.formats.manifest import check_name
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.workspace.runtime.contents import NO_VOLUMES, ROOT, VOLUME_PREFIX, Folder, Layout, read_file
from snaploader.workspace.runtime.protocol import Attachment
from snaploader.workspace.runtime.runs import ProcessIdentity


@dataclass(frozen=True, slots=True)
class _Attached:
    """An attachment as all processes see it: a path, or a store."""

    path: str = ""
    store: str = ""
    """Token of the store, unique."""
    owner: ProcessIdentity | None = None
    """Who has the store open."""


class OpenStores:
    """Stores of one workspace that are open in this process, by their tokens."""

    def __init__(
        self, placed: Mapping[str, COWStore] | None = None, closing: ExitStack | None = None
    ) -> None:
        self.stores = dict(placed or {})
        self._placed = set(self.stores)
        """Those that came from a snapshot; the others are the caller's to close."""
        self._closing = closing or ExitStack()

    def let_go(self, token: str, store: COWStore) -> None:
        """Close a store that is no longer among them if it came from a snapshot, and that with the last."""
        if token in self._placed:
            store.close()
            self._placed.remove(token)
            if not self._placed:
                self.close()

    def close(self) -> None:
        """Close those that came from a snapshot, and let go of it."""
        self._closing.close()


class Attachments:
    """The attachments of all workspaces of a runtime, as `Runtime` says. Thread-safe.

    What changes a workspace's attachments is called under that workspace's lock.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._opened: dict[str, OpenStores] = {}

    def attach(self, workspace_id: str, name: str, content: COWStore | str | os.PathLike[str]) -> None:
        check_attachment_name(name)
        folder = self._layout.folder(workspace_id)
        known = _read(folder)
        if name in known:
            raise FailedPrecondition(
                f"workspace {workspace_id!r} has an attachment {name!r} already: detach it first"
            )
        if isinstance(content, COWStore):
            attached = _Attached(store=secrets.token_hex(8), owner=ProcessIdentity.current())
        else:
            attached = _Attached(path=os.path.abspath(content))
            _check_regular(name, attached.path, InvalidArgument)
        _write(folder, {**known, name: attached})
        if isinstance(content, COWStore):
            with self._lock:
                self._opened.setdefault(workspace_id, OpenStores()).stores[attached.store] = content

    def detach(self, workspace_id: str, name: str) -> None:
        folder = self._layout.folder(workspace_id)
        known = _read(folder)
        attached = known.pop(name, None)
        if attached is None:
            raise NotFound(f"workspace {workspace_id!r} has no attachment {name!r}")
        _write(folder, known)
        with self._lock:
            opened = self._opened.get(workspace_id, OpenStores())
            store = opened.stores.pop(attached.store, None)
        if store is not None:
            opened.let_go(attached.store, store)

    def usable(self, workspace_id: str) -> dict[str, Attachment]:
        known = _read(self._layout.folder(workspace_id))
        with self._lock:
            opened = self._opened.get(workspace_id, OpenStores())
            stores = dict(opened.stores)
        usable: dict[str, Attachment] = {}
        for name, attached in known.items():
            if attached.path:
                usable[name] = Path(attached.path)
            elif attached.store in stores and not stores[attached.store].closed:
                usable[name] = stores[attached.store]
        return usable

    def captured(self, workspace_id: str) -> dict[str, Attachment]:
        """Return all attachments for a capture. FailedPrecondition when one cannot be captured here."""
        usable = self.usable(workspace_id)
        for name, attached in _read(self._layout.folder(workspace_id)).items():
            if name not in usable:
                raise FailedPrecondition(_not_here(workspace_id, name, attached))
            if attached.path:
                _check_regular(name, attached.path, FailedPrecondition)
        return usable

    def open_from(
        self, workspace_id: str, loader: SnapshotLoader, snapshot: Snapshot, folder: Folder
    ) -> OpenStores:
        """Open the chunked files of a snapshot, and name them in a folder that is being built."""
        names = snapshot.manifest.chunked_files
        if not names:
            return OpenStores()
        for name in names:
            check_attachment_name(name)
        owner = ProcessIdentity.current()
        with ProcessExitStack() as undo:
            mine = f"{workspace_id}.{owner.pid}-{owner.start_ticks}-{secrets.token_hex(8)}"
            scratch = f"{self._layout.stores}/{mine}"
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            unpacked = undo.enter_context(loader.unpack_snapshot(snapshot.only(names), scratch))
            tokens = {name: secrets.token_hex(8) for name in names}
            _write(folder, {name: _Attached(store=token, owner=owner) for name, token in tokens.items()})
            closing = undo.pop_all()
        return OpenStores({tokens[name]: store for name, store in unpacked.chunked_files.items()}, closing)

    def replace(self, workspace_id: str, opened: OpenStores) -> None:
        """Use these stores from now on, and close those before that this runtime opened."""
        with self._lock:
            before = self._opened.pop(workspace_id, OpenStores())
            if opened.stores:
                self._opened[workspace_id] = opened
        before.close()

    def sweep(self) -> list[str]:
        """Remove the written chunks of processes that ended, and return their names."""
        swept = []
        for name in os.listdir(self._layout.stores):
            if not _is_in_use(name):
                shutil.rmtree(f"{self._layout.stores}/{name}", ignore_errors=True)
                swept.append(name)
        return swept

    def close(self) -> None:
        with self._lock:
            all_opened, self._opened = self._opened, {}
        for opened in all_opened.values():
            opened.close()


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
    if owner is None or owner == ProcessIdentity.current():
        where = "was closed"
    else:
        where = f"is open in process {owner.pid}" if owner.is_alive else "went with the process that had it"
    return (
        f"attachment {name!r} of workspace {workspace_id!r} {where}: capture the workspace there, or "
        "detach it, or go back to a snapshot"
    )


def _is_in_use(name: str) -> bool:
    """Whether the process that made a folder of stores, as its name says, is there still."""
    _, _, rest = name.partition(".")
    pid, _, rest = rest.partition("-")
    identity = ProcessIdentity.of(int(pid)) if pid.isdecimal() else None
    return identity is not None and str(identity.start_ticks) == rest.partition("-")[0]


def _read(folder: Folder) -> dict[str, _Attached]:
    with translate_os_errors(f"cannot read the attachments in {folder.path!r}"):
        data = read_file(folder.attachments)
    if data is None:
        return {}
    try:
        return {name: _parse(entry) for name, entry in json.loads(data).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataLoss(
            f"{folder.attachments!r} is damaged, maybe by a power failure: remove it, and attach again what "
            "the workspace needs"
        ) from error


def _parse(entry: dict[str, Any]) -> _Attached:
    if "path" in entry:
        return _Attached(path=entry["path"])
    owner = ProcessIdentity(entry["pid"], entry["start_ticks"], entry["boot_id"])
    return _Attached(store=entry["store"], owner=owner)


def _write(folder: Folder, attached: Mapping[str, _Attached]) -> None:
    entries = {
        name: {"path": each.path} if each.owner is None else {"store": each.store, **asdict(each.owner)}
        for name, each in attached.items()
    }
    with translate_os_errors(f"cannot note the attachments in {folder.path!r}"):
        replace_file(folder.attachments, json.dumps(entries).encode())
