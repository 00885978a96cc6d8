"""Records of paused workspaces: what a host needs to take each back, should the catalog have lost it.

Each paused workspace has a folder named by its id, with a file `record.json` in it. It is written in a
folder `<id>.staging-<unique>`, flushed and renamed into place; it is removed by being renamed to
`<id>.trash-<unique>` first. So what is under an id is whole. What lies there and is nothing of that kind is
somebody else's: it is never removed.

The format is a JSON object, `"format": 1`. Times are ISO 8601 in UTC; names and values are those of the
fields in `snaploader.workspace.model`, and a policy is spelled as `Policy.to_mapping` does.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, TypeAlias

from snaploader.errors import DataLoss, FailedPrecondition, NotFound, translate_os_errors
from snaploader.files import PRIVATE, flush_folder
from snaploader.workspace.catalog import Reader
from snaploader.workspace.catalog.tables import settings_document, settings_of
from snaploader.workspace.host import state_folder, write_new
from snaploader.workspace.model import (
    MAX_VERSION,
    Readiness,
    Resources,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
    check_spec,
    check_workspace_id,
    is_workspace_id,
    runtime_name,
)
from snaploader.workspace.policy import Policy

STAGING = ".staging-"
TRASH = ".trash-"

FORMAT = 1
"""Never to be given to anything else."""

_FILE = "record.json"
_MAX_BYTES = 64 << 20
_MAX_KEPT_BYTES = 200
"""So much of its name keeps what is set aside, so that a file system takes the new name too."""


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """A version as a record keeps it; the snapshot's name leads to the rest."""

    number: int
    snapshot_name: str
    display_name: str


@dataclass(frozen=True, slots=True)
class PausedRecord:
    """A paused workspace, as far as a catalog must know it to resume it and to go on with its history."""

    workspace: Workspace
    """Paused, with its slot."""
    policy: Policy
    snapshots: tuple[SnapshotRecord, ...]
    """All complete ones, the one it is paused as among them."""
    versions: tuple[KeptVersion, ...] = ()
    """In the order of their numbers."""

    @classmethod
    def of(cls, reader: Reader, workspace: Workspace, new: SnapshotRecord | None = None) -> PausedRecord:
        """The record of a workspace; `new` is what it is being paused as, not complete in the catalog yet."""
        snapshots = [
            # Of pauses only the one that it is paused as counts: an earlier one is on its way out.
            snapshot
            for snapshot in reader.snapshots(workspace.id)
            if snapshot.kind is not SnapshotKind.PAUSE or snapshot.name == workspace.current_snapshot
        ]
        versions = tuple(
            KeptVersion(version.number, version.snapshot_name, version.display_name)
            for version in reader.versions(workspace.id)
        )
        return cls(
            replace(workspace, operation=None, last_version=0),
            reader.policy(workspace.policy),
            tuple(snapshots if new is None else [*snapshots, new]),
            versions,
        )


class PausedRecords:
    """The folder of paused workspaces. Thread-safe; what is done to one needs the lock of its workspace."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = state_folder(folder)

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def write(self, record: PausedRecord) -> None:
        """Keep a record, in the place of an earlier one. It is on disk when the call returns."""
        workspace_id = check_workspace_id(record.workspace.id)
        data = json.dumps(encode(record), indent=1, default=_plain).encode()
        if self.exists(workspace_id) and not self._is_ours(workspace_id):
            raise FailedPrecondition(
                f"{self.path(workspace_id)!r} is no record of a paused workspace: move it away"
            )
        staging = self._aside(workspace_id, STAGING)
        with translate_os_errors(f"cannot write the record of paused workspace {workspace_id!r}"):
            try:
                os.mkdir(staging, PRIVATE)
                write_new(f"{staging}/{_FILE}", data)
                flush_folder(staging)
                self.remove(workspace_id)
                os.rename(staging, self.path(workspace_id))
                flush_folder(self.folder)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise

    def read(self, name: str) -> PausedRecord:
        """The record of the workspace of that id, or what is left of one under the name of a leftover.

        NotFound when there is none, DataLoss when it cannot be read, or is of another workspace.
        """
        workspace_id = check_workspace_id(owner_of(name))
        path = f"{self.path(name)}/{_FILE}"
        what = f"the record of paused workspace {workspace_id!r}"
        with translate_os_errors(f"cannot read {what}"):
            if not os.path.lexists(self.path(name)):
                raise NotFound(f"there is no record of a paused workspace {workspace_id!r}")
            with open(path, "rb", opener=_open_without_waiting) as file:
                data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise DataLoss(f"{what} is larger than {_MAX_BYTES} bytes: {path!r}")
        try:
            record = decode(json.loads(data))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise DataLoss(f"{what} is damaged ({error!r}): {path!r}") from error
        if record.workspace.id != workspace_id:
            raise DataLoss(f"{what} is that of workspace {record.workspace.id!r}: {path!r}")
        return record

    def remove(self, workspace_id: str) -> bool:
        """Remove the record of a workspace; whether there was one. What is none in its place stays."""
        if not self._is_ours(check_workspace_id(workspace_id)):
            return False
        aside = self.trash(workspace_id)
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
        return bool(aside)

    def trash(self, name: str) -> str:
        """Rename an entry aside, for the next sweep; its new path, empty when there was none."""
        aside = self._aside(name, TRASH)
        with translate_os_errors(f"cannot move {name!r} aside in {self.folder!r}"):
            try:
                os.rename(self.path(name), aside)
            except FileNotFoundError:
                return ""
            flush_folder(self.folder)
        return aside

    def exists(self, workspace_id: str) -> bool:
        """Whether there is a record of a workspace, or something else in its place."""
        with translate_os_errors(f"cannot look for a record of workspace {workspace_id!r}"):
            return os.path.lexists(self.path(workspace_id))

    def entries(self) -> list[str]:
        """The names of the records in the folder, of unreadable ones too, sorted."""
        return [name for name in self._names() if not is_leftover(name) and self._is_ours(name)]

    def leftovers(self) -> list[str]:
        """The names of what was left over by writing and removing, sorted."""
        return [name for name in self._names() if is_leftover(name) and self._is_ours(name)]

    def strangers(self) -> list[str]:
        """The names in the folder of what no record is, nor ever was, sorted."""
        return [name for name in self._names() if not self._is_ours(name)]

    def sweep(self, name: str) -> None:
        """Remove a leftover. What cannot be removed stays for the next time."""
        if self._is_ours(name):
            shutil.rmtree(self.path(name), ignore_errors=True)

    def _is_ours(self, name: str) -> bool:
        """Whether this is a folder as they are made here: with a record alone, or still empty."""
        path = self.path(name)
        with translate_os_errors(f"cannot look at {path!r}"):
            try:
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    return False
                with os.scandir(path) as entries:
                    found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            except (FileNotFoundError, PermissionError):
                return False  # it is gone, or another user's
        return found == {_FILE: False} or (not found and (is_leftover(name) or is_workspace_id(name)))

    def _names(self) -> list[str]:
        with translate_os_errors(f"cannot list {self.folder!r}"):
            return sorted(os.listdir(self.folder))

    def _aside(self, name: str, kind: str) -> str:
        # A name may be as long as names can be, in bytes; its end matters little then.
        kept = os.fsdecode(os.fsencode(name)[:_MAX_KEPT_BYTES])
        return f"{self.folder}/{kept}{kind}{uuid.uuid4().hex}"


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens as open(2) does, without waiting: what lies there may be a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_leftover(name: str) -> bool:
    """Whether a name is that of a folder being written or removed."""
    return STAGING in name or TRASH in name


def owner_of(leftover: str) -> str:
    """The id of the workspace whose record a leftover was to be, or was."""
    return leftover.split(STAGING)[0].split(TRASH)[0]


def encode(record: PausedRecord) -> dict[str, Any]:
    """The values to be written as JSON, by `_plain` where JSON has none like them."""
    workspace = record.workspace
    return {
        "format": FORMAT,
        "workspace": {
            **_fields(_SPEC, workspace.spec),
            **_fields(_OPTIONAL_SPEC, workspace.spec),
            **_fields(_WORKSPACE, workspace),
            **settings_document(workspace),
        },
        "policy": {"name": record.policy.name, "values": record.policy.to_mapping()},
        "snapshots": [_snapshot_fields(snapshot) for snapshot in record.snapshots],
        "versions": [_fields(_VERSION, version) for version in record.versions],
    }


def decode(values: Any) -> PausedRecord:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"this is no record of format {FORMAT}")
    optional = {name: read for name, read in _OPTIONAL_SPEC.items() if name in values["workspace"]}
    spec = check_spec(WorkspaceSpec(**_read({**_SPEC, **optional}, values["workspace"])))
    fields = {**_read(_WORKSPACE, values["workspace"]), **settings_of(values["workspace"])}
    workspace = Workspace(spec, state=WorkspaceState.PAUSED, **fields)
    snapshots = tuple(_snapshot(workspace.id, each) for each in values["snapshots"])
    names = {snapshot.name for snapshot in snapshots}
    if workspace.current_snapshot not in names:
        raise ValueError("the snapshot that the workspace is paused as is not among its snapshots")
    versions = tuple(KeptVersion(**_read(_VERSION, each)) for each in values["versions"])
    numbers = [0, *(version.number for version in versions)]
    if any(number >= following for number, following in pairwise(numbers)) or numbers[-1] > MAX_VERSION:
        raise ValueError("the numbers of the versions do not rise")
    if not names.issuperset(version.snapshot_name for version in versions):
        raise ValueError("a version names a snapshot that is not there")
    policy = Policy.from_mapping(_text(values["policy"]["name"]), values["policy"]["values"])
    return PausedRecord(workspace, policy, snapshots, versions)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    return dict(value) if isinstance(value, Mapping) else asdict(value)


def _fields(readers: _Readers, value: object) -> dict[str, Any]:
    return {name: getattr(value, name) for name in readers}


def _read(readers: _Readers, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: read(values[name]) for name, read in readers.items()}


def _snapshot_fields(snapshot: SnapshotRecord) -> dict[str, Any]:
    """The fields of a snapshot; an earlier release reads no source but those that are well known."""
    fields = _fields(_SNAPSHOT, snapshot)
    if not isinstance(SnapshotSource.parse(snapshot.source), SnapshotSource):
        fields |= {"source": SnapshotSource.MANUAL, "source_text": snapshot.source}
    return fields


def _snapshot(workspace_id: str, values: Mapping[str, Any]) -> SnapshotRecord:
    fields = _read(_SNAPSHOT, values)
    name, its_id = fields["name"], fields["runtime_name"]
    if its_id != runtime_name(workspace_id, name):
        raise ValueError(f"its snapshot {name!r} has the id {its_id!r}, which is another's")
    source = SnapshotSource.parse(_text(values.get("source_text") or fields["source"]))
    return SnapshotRecord(workspace_id=workspace_id, **{**fields, "source": source})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number from 0")
    return value


def _slot(value: Any) -> int:
    if value is None:
        raise ValueError("it lacks its slot")
    return _number(value)


def _time(text: Any) -> datetime:
    time = datetime.fromisoformat(_text(text))
    if time.tzinfo is None:
        raise ValueError(f"the time {text!r} has no time zone")
    return time.astimezone(UTC)


def _time_if_any(text: Any) -> datetime | None:
    return None if text is None else _time(text)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(_text, values))


def _named_texts(values: Any) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in values.items()}


def _volumes(values: Any) -> tuple[Volume, ...]:
    return tuple(Volume(**_read({"name": _text, "durable_dir": _text}, each)) for each in values)


def _readiness(values: Any) -> Readiness:
    readers: _Readers = {"kind": _text, "target": _text, "interval_s": float, "timeout_s": float}
    return Readiness(**_read(readers, values))


# The fields that are kept, in this order, and what reads each.

_Readers: TypeAlias = Mapping[str, Callable[[Any], Any]]

_SPEC: _Readers = {
    "workspace_id": check_workspace_id,
    "command": _texts,
    "environment": _named_texts,
    "volumes": _volumes,
    "readiness": _readiness,
}
_OPTIONAL_SPEC: _Readers = {
    "image": _text,
    "devices": _texts,
    "resources": lambda values: Resources(values.get("vcpus"), values.get("memory_bytes")),
    "labels": _named_texts,
}
"""Those that a record of an earlier release does not have."""
_WORKSPACE: _Readers = {
    "host": _text,
    "created_at": _time,
    "last_used_at": _time,
    "owner": _text,
    "base": _text,
    "policy": _text,
    "autostart_schedule": _text,
    "slot": _slot,
    "current_snapshot": _text,
    "base_snapshot": _text,
    "paused_at": _time_if_any,
    "dormant_at": _time_if_any,
    "deleting_at": _time_if_any,
}
_SNAPSHOT: _Readers = {
    "name": _text,
    "runtime_name": _text,
    "kind": SnapshotKind,
    "scope": Scope,
    "source": SnapshotSource,
    "created_at": _time,
    "display_name": _text,
    "parent": _text,
    "manifest_ref": _text,
    "is_remote": bool,
    "size_bytes": _number,
}
_VERSION: _Readers = {"number": _number, "snapshot_name": _text, "display_name": _text}
