"""Records of paused workspaces: what a host needs to take each back, should the catalog have lost it.

Each paused workspace has a folder named by its id, with a file `record.json` in it. It is written in a
folder `<id>.staging-<unique>`, flushed and renamed into place; it is removed by being renamed to
`<id>.trash-<unique>` first. So what is under an id is whole. What lies there and is nothing of that kind is
somebody else's: it is never removed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid

from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.files import flush_folder
from snaploader.folders import PRIVATE, open_new, open_private
from snaploader.workspace.names import check_workspace_id
from snaploader.workspace.recordformat import PausedRecord, decode, encode

STAGING = ".staging-"
TRASH = ".trash-"

_FILE = "record.json"
_MAX_BYTES = 64 << 20
_MAX_KEPT_BYTES = 200
"""Of the name of what is set aside, so that a file system takes the new one too."""


class PausedRecords:
    """The folder of paused workspaces. Thread-safe; what is done to one id needs the lock of its workspace.

    Args:
        folder: Made if absent.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        with translate_os_errors(f"cannot make {self._folder!r}"):
            parent, name = os.path.split(os.path.abspath(self._folder))
            open_private(parent, "the state directory", name)

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
        """Whether this is a folder as they are made here: with a record and nothing else, or yet without."""
        path = self.path(name)
        with translate_os_errors(f"cannot look at {path!r}"):
            try:
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    return False
                with os.scandir(path) as entries:
                    found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            except (FileNotFoundError, PermissionError):
                return False  # it is gone, or another user's
        return found == {_FILE: False} or (not found and (is_leftover(name) or _is_id(name)))

    def _names(self) -> list[str]:
        with translate_os_errors(f"cannot list {self._folder!r}"):
            return sorted(os.listdir(self._folder))

    def _aside(self, name: str, kind: str) -> str:
        # A name may be as long as names can be, in bytes; its end matters little then.
        kept = os.fsdecode(os.fsencode(name)[:_MAX_KEPT_BYTES])
        return f"{self._folder}/{kept}{kind}{uuid.uuid4().hex}"


def write_new(path: str, data: bytes) -> None:
    """Write a new file and flush it. Raises OSError, FileExistsError when there is one."""
    with os.fdopen(open_new(path, 0o600, os.O_WRONLY), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _open_without_waiting(path: str, flags: int) -> int:
    """As open(2): what lies there may be a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_id(name: str) -> bool:
    try:
        check_workspace_id(name)
    except InvalidArgument:
        return False
    return True


def is_leftover(name: str) -> bool:
    """Whether a name is that of a folder being written or removed."""
    return STAGING in name or TRASH in name


def owner_of(leftover: str) -> str:
    """The id of the workspace whose record a leftover was to be, or was."""
    return leftover.split(STAGING)[0].split(TRASH)[0]
