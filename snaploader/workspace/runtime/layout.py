"""Where a runtime that keeps workspaces as folders keeps what.

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
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass

from snaploader.folders import open_private


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one workspace, or one that is to be."""

    path: str

    @property
    def root(self) -> str:
        """What the workspace sees."""
        return f"{self.path}/root"

    @property
    def state(self) -> str:
        """What the runtime keeps of it."""
        return f"{self.path}/state"

    @property
    def placed(self) -> str:
        """The file with the token of the last `place`."""
        return f"{self.state}/placed"

    @property
    def attachments(self) -> str:
        """The file that names the attachments."""
        return f"{self.state}/attachments.json"

    @property
    def run(self) -> str:
        """The file about the latest run."""
        return f"{self.state}/run.json"

    @property
    def end(self) -> str:
        """The file about the end of the latest run."""
        return f"{self.state}/end.json"

    @property
    def log(self) -> str:
        """The output of the command."""
        return f"{self.state}/log"

    @property
    def nothing(self) -> str:
        """A folder that is always empty."""
        return f"{self.state}/nothing"

    def index(self, entry: str) -> str:
        """The capture index of a directory of snapshots; its name may be as long as a file's."""
        return f"{self.state}/index/{hashlib.sha256(entry.encode()).hexdigest()[:32]}"

    def make(self) -> None:
        """Make the folders that all workspaces have. Raises OSError."""
        for path in (self.path, self.state, f"{self.state}/index", self.nothing):
            os.mkdir(path, mode=0o700)


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of a runtime."""

    base: str

    @property
    def workspaces(self) -> str:
        """The folder of the workspaces."""
        return f"{self.base}/workspaces"

    @property
    def locks(self) -> str:
        """The folder of the lock files."""
        return f"{self.base}/locks"

    @property
    def stores(self) -> str:
        """The folder of open stores."""
        return f"{self.base}/stores"

    def folder(self, workspace_id: str) -> Folder:
        """The workspace's."""
        return Folder(f"{self.workspaces}/{workspace_id}")

    def lock(self, workspace_id: str) -> str:
        """The workspace's lock file."""
        return f"{self.locks}/{workspace_id}"

    def staging(self, workspace_id: str) -> Folder:
        """A new path to build the workspace's folder at."""
        return Folder(f"{self.workspaces}/{workspace_id}.staging-{_unique()}")

    def trash(self, workspace_id: str) -> str:
        """A new path to move what is to be removed to."""
        return f"{self.workspaces}/{workspace_id}.trash-{_unique()}"

    def replaced(self, workspace_id: str) -> str:
        """Where the state before stands between two renames."""
        return f"{self.workspaces}/{workspace_id}.replaced"

    def store_folder(self, workspace_id: str, pid: int, start_ticks: int) -> str:
        """A new path for stores that a process has open."""
        return f"{self.stores}/{workspace_id}.{pid}-{start_ticks}-{_unique()}"

    def make(self) -> None:
        """Make the folders. Raises OSError."""
        for path in (self.base, self.workspaces, self.locks, self.stores):
            open_private(path, "a folder of the runtime")


def _unique() -> str:
    return secrets.token_hex(8)
