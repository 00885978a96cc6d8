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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from snaploader.errors import DataLoss, FailedPrecondition, NotFound, translate_os_errors
from snaploader.files import PRIVATE, flush_folder
from snaploader.workspace.host import state_folder, write_new
from snaploader.workspace.model import (
    MAX_VERSION,
    Readiness,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
    check_volumes,
    check_workspace_id,
    is_workspace_id,
)
from snaploader.workspace.policy import Policy

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Reader

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
        """The record of a workspace that the catalog knows.

        Args:
            new: The snapshot that it is being paused as, which the catalog does not know as complete yet.
        """
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
    """The folder of paused workspaces. Thread-safe; what is done to one id needs the lock of its workspace.

    Args:
        folder: Made if absent.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = state_folder(folder)

    @property
    def folder(self) -> str:
        """Where the records are."""
        return self._folder

    def path(self, name: str) -> str:
        """Where an entry is, or would be."""
        return f"{self._folder}/{name}"

    def write(self, record: PausedRecord) -> None:
        """Keep a record, in the place of an earlier one. It is on disk when the call returns."""
        workspace_id = check_workspace_id(record.workspace.id)
        data = json.dumps(encode(record), indent=1).encode()
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
                flush_folder(self._folder)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise

    def read(self, workspace_id: str) -> PausedRecord:
        """The record of a workspace.

        Raises:
            NotFound: There is none.
            DataLoss: It cannot be read, or is of another workspace.
        """
        return self._read(check_workspace_id(workspace_id), workspace_id)

    def read_leftover(self, name: str) -> PausedRecord:
        """The record that was set aside, or was being written, under that name. Raises as `read`."""
        return self._read(name, owner_of(name))

    def _read(self, name: str, workspace_id: str) -> PausedRecord:
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
        with translate_os_errors(f"cannot move {name!r} aside in {self._folder!r}"):
            try:
                os.rename(self.path(name), aside)
            except FileNotFoundError:
                return ""
            flush_folder(self._folder)
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
        with translate_os_errors(f"cannot list {self._folder!r}"):
            return sorted(os.listdir(self._folder))

    def _aside(self, name: str, kind: str) -> str:
        # A name may be as long as names can be, in bytes; its end matters little then.
        kept = os.fsdecode(os.fsencode(name)[:_MAX_KEPT_BYTES])
        return f"{self._folder}/{kept}{kind}{uuid.uuid4().hex}"


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
    """The values to be written as JSON."""
    return {
        "format": FORMAT,
        "workspace": _workspace(record.workspace),
        "policy": {"name": record.policy.name, "values": record.policy.to_mapping()},
        "snapshots": [_snapshot(snapshot) for snapshot in record.snapshots],
        "versions": [
            {
                "number": version.number,
                "snapshot_name": version.snapshot_name,
                "display_name": version.display_name,
            }
            for version in record.versions
        ],
    }


def decode(values: Any) -> PausedRecord:
    """The record in parsed JSON."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"this is no record of format {FORMAT}")
    workspace = _read_workspace(values["workspace"])
    snapshots = tuple(_read_snapshot(workspace.id, each) for each in values["snapshots"])
    names = {snapshot.name for snapshot in snapshots}
    if workspace.current_snapshot not in names:
        raise ValueError("the snapshot that the workspace is paused as is not among its snapshots")
    versions = tuple(
        KeptVersion(_number(each["number"]), _text(each["snapshot_name"]), _text(each["display_name"]))
        for each in values["versions"]
    )
    numbers = [0, *(version.number for version in versions)]
    if any(number >= following for number, following in pairwise(numbers)) or numbers[-1] > MAX_VERSION:
        raise ValueError("the numbers of the versions do not rise")
    if not names.issuperset(version.snapshot_name for version in versions):
        raise ValueError("a version names a snapshot that is not there")
    policy = Policy.from_mapping(_text(values["policy"]["name"]), values["policy"]["values"])
    return PausedRecord(workspace, policy, snapshots, versions)


def _workspace(workspace: Workspace) -> dict[str, Any]:
    spec = workspace.spec
    return {
        "workspace_id": workspace.id,
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "volumes": [{"name": each.name, "durable_dir": each.durable_dir} for each in spec.volumes],
        "readiness": {
            "kind": spec.readiness.kind,
            "target": spec.readiness.target,
            "interval_s": spec.readiness.interval_s,
            "timeout_s": spec.readiness.timeout_s,
        },
        "host": workspace.host,
        "created_at": _stamp(workspace.created_at),
        "last_used_at": _stamp(workspace.last_used_at),
        "owner": workspace.owner,
        "base": workspace.base,
        "policy": workspace.policy,
        "autostart_schedule": workspace.autostart_schedule,
        "slot": workspace.slot,
        "current_snapshot": workspace.current_snapshot,
        "base_snapshot": workspace.base_snapshot,
        "paused_at": _stamp(workspace.paused_at),
        "dormant_at": _stamp(workspace.dormant_at),
        "deleting_at": _stamp(workspace.deleting_at),
    }


def _read_workspace(values: Mapping[str, Any]) -> Workspace:
    readiness = values["readiness"]
    if values["slot"] is None:
        raise ValueError("it lacks its slot")
    spec = WorkspaceSpec(
        check_workspace_id(values["workspace_id"]),
        tuple(map(_text, values["command"])),
        {_text(name): _text(value) for name, value in values["environment"].items()},
        check_volumes(Volume(_text(each["name"]), _text(each["durable_dir"])) for each in values["volumes"]),
        Readiness(
            _text(readiness["kind"]),
            _text(readiness["target"]),
            float(readiness["interval_s"]),
            float(readiness["timeout_s"]),
        ),
    )
    return Workspace(
        spec,
        host=_text(values["host"]),
        state=WorkspaceState.PAUSED,
        created_at=_time(values["created_at"]),
        last_used_at=_time(values["last_used_at"]),
        owner=_text(values["owner"]),
        base=_text(values["base"]),
        policy=_text(values["policy"]),
        autostart_schedule=_text(values["autostart_schedule"]),
        slot=_number(values["slot"]),
        current_snapshot=_text(values["current_snapshot"]),
        base_snapshot=_text(values["base_snapshot"]),
        paused_at=_time_if_any(values["paused_at"]),
        dormant_at=_time_if_any(values["dormant_at"]),
        deleting_at=_time_if_any(values["deleting_at"]),
    )


def _snapshot(snapshot: SnapshotRecord) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "runtime_name": snapshot.runtime_name,
        "kind": snapshot.kind.value,
        "scope": snapshot.scope.value,
        "source": snapshot.source.value,
        "created_at": _stamp(snapshot.created_at),
        "display_name": snapshot.display_name,
        "parent": snapshot.parent,
        "manifest_ref": snapshot.manifest_ref,
        "is_remote": snapshot.is_remote,
        "size_bytes": snapshot.size_bytes,
    }


def _read_snapshot(workspace_id: str, values: Mapping[str, Any]) -> SnapshotRecord:
    return SnapshotRecord(
        name=_text(values["name"]),
        workspace_id=workspace_id,
        runtime_name=_text(values["runtime_name"]),
        kind=SnapshotKind(values["kind"]),
        scope=Scope(values["scope"]),
        source=SnapshotSource(values["source"]),
        created_at=_time(values["created_at"]),
        display_name=_text(values["display_name"]),
        parent=_text(values["parent"]),
        manifest_ref=_text(values["manifest_ref"]),
        is_remote=bool(values["is_remote"]),
        size_bytes=_number(values["size_bytes"]),
    )


def _stamp(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat(timespec="microseconds")


def _time(text: Any) -> datetime:
    time = datetime.fromisoformat(_text(text))
    if time.tzinfo is None:
        raise ValueError(f"the time {text!r} has no time zone")
    return time.astimezone(UTC)


def _time_if_any(text: Any) -> datetime | None:
    return None if text is None else _time(text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number from 0")
    return value
