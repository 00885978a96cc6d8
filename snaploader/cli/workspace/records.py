"""Workspaces, snapshots and what happens to them: as JSON records, as words, and as a tree of snapshots.

In the tree, what follows one after the other stands one below the other. Where a workspace went on twice
from one snapshot, after a rollback, the line that leads to its present state goes on, and what a rollback
left hangs from the snapshot it went on from. So a long history is not a deep one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from snaploader.cli.output import Branch, record
from snaploader.cli.values import format_size, time_words
from snaploader.workspace import (
    SnapshotInfo,
    SnapshotKind,
    SnapshotRecord,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)

if TYPE_CHECKING:
    from snaploader.workspace import Situation  # which needs the extra

_NOW = ""
"""Stands for the present state, which is no snapshot; all of those have names."""


def timed_record(situation: Situation, now: datetime) -> dict[str, Any]:
    """The same, and when the lifecycle is to stop and to start it."""
    times = {"deadline": situation.deadline, "next_start_at": situation.next_start(now)}
    return {**workspace_record(situation.workspace), **times}


def workspace_record(workspace: Workspace) -> dict[str, Any]:
    """All that the catalog knows of a workspace itself."""
    operation = workspace.operation
    names = ("id", "state", "host", "owner", "base", "policy", "autostart_schedule")
    template = ("template_version", "automatic_updates")
    counts = ("slot", "last_version", "current_snapshot", "base_snapshot")
    times = ("created_at", "last_used_at", "paused_at", "dormant_at", "deleting_at")
    under_way = ("kind", "host", "started_at", "snapshot_name", "version")
    return {
        **record(workspace, *names),
        **ttl_record(workspace.ttl),
        **record(workspace, *template),
        **spec_record(workspace.spec),
        **record(workspace, *counts, *times),
        "operation": None if operation is None else record(operation, *under_way),
    }


def ttl_record(ttl: timedelta | None) -> dict[str, Any]:
    """A TTL in seconds; None: as the policy says."""
    return {"ttl_s": None if ttl is None else ttl.total_seconds()}


def spec_record(spec: WorkspaceSpec) -> dict[str, Any]:
    """All of a spec but its id."""
    return {
        **record(spec, "command", "environment"),
        "volumes": [record(volume, "name", "durable_dir") for volume in spec.volumes],
        "readiness": record(spec.readiness, "kind", "target", "interval_s", "timeout_s"),
        **record(spec, "image", "devices", "labels"),
        "resources": record(spec.resources, "vcpus", "memory_bytes"),
    }


def snapshot_record(info: SnapshotInfo) -> dict[str, Any]:
    """A snapshot of a workspace; one that the catalog does not manage may have little more than its name."""
    values = record(
        info, "runtime_name", "is_managed", "is_local", "is_in_runtime", "version", "display_name"
    )
    known = info.record or info.told
    if known is not None:
        values |= record(known, "name", "kind", "scope", "source", "created_at", "parent")
    if info.record is not None:
        values |= record(info.record, "is_remote", "size_bytes")
    return values


class History:
    """The snapshots of a workspace by parent, oldest first, and where it stands now.

    A snapshot whose parent is not there any more begins a line of its own. Those that the catalog does not
    manage have no place in it.

    Args:
        forks: Ids of workspaces that were forked from a snapshot, by its name.
    """

    def __init__(
        self, workspace: Workspace, snapshots: Iterable[SnapshotInfo], forks: Mapping[str, Collection[str]]
    ) -> None:
        self._workspace = workspace
        self._forks = forks
        managed = [(info.record, info.version) for info in snapshots if info.record is not None]
        managed.sort(key=lambda pair: (pair[0].created_at, pair[0].name))
        self._managed = {record.name: (record, version) for record, version in managed}
        parents = {record.name: record.parent for record, _ in managed}
        if workspace.state is not WorkspaceState.DELETED:
            parents[_NOW] = workspace.current_snapshot
        self._parents = {name: parent for name, parent in parents.items() if parent in self._managed}
        self._children: dict[str, list[str]] = {}
        for name, parent in self._parents.items():
            self._children.setdefault(parent, []).append(name)
        self._roots = [name for name in parents if name not in self._parents]
        self._trunk = self._path(_NOW) if _NOW in parents else set()

    def branches(self) -> list[Branch]:
        """The line to the present state, below the others that begin without a parent."""
        if not self._roots:
            return []
        main = self._next(self._roots)
        others = [self._line(name) for name in self._roots if name != main]
        return [*(Branch(_heading(line), line) for line in others), *self._line(main)]

    def _path(self, name: str) -> set[str]:
        """An entry and all that it goes back to."""
        path = {name}
        while name in self._parents and self._parents[name] not in path:
            name = self._parents[name]
            path.add(name)
        return path

    def _next(self, names: list[str]) -> str:
        """The one that leads to the present state, or else the newest."""
        return next((name for name in names if name in self._trunk), names[-1])

    def _line(self, name: str) -> list[Branch]:
        line = []
        while True:
            children = self._children.get(name, [])
            following = self._next(children) if children else None
            beside = self._aside(child for child in children if child != following)
            line.append(self._entry(name, beside))
            if following is None:
                return line
            name = following

    def _aside(self, names: Iterable[str]) -> list[Branch]:
        """Lines that end elsewhere; one of several entries has a heading."""
        lines = [self._line(name) for name in names]
        return [line[0] if len(line) == 1 else Branch(_heading(line), line) for line in lines]

    def _entry(self, name: str, beside: list[Branch]) -> Branch:
        if name == _NOW:
            return Branch(f"now: {self._workspace.state}", beside)
        record, version = self._managed[name]
        notes = [record.name] if record.kind is SnapshotKind.COMMIT else []
        notes += [f"fork {workspace_id}" for workspace_id in sorted(self._forks.get(name, ()))]
        return Branch(_label(record, version), [*map(Branch, notes), *beside])


def _heading(line: list[Branch]) -> str:
    return "1 snapshot on its own" if len(line) == 1 else f"{len(line)} snapshots, one after the other"


def _label(record: SnapshotRecord, version: int | None) -> str:
    what = str(record.kind) if version is None else f"{record.kind} {version}"
    words = [str(record.scope), time_words(record.created_at), format_size(record.size_bytes)]
    if record.kind is SnapshotKind.VERSION:
        words.append(str(record.source))
    if record.is_remote:
        words.append("remote")
    name = f' "{record.display_name}"' if record.display_name else ""
    return f"{what}{name}  {', '.join(words)}"
