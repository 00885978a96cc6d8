"""What workspaces should be: the same operations on plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, list[Any]]
"""Of a folder, as `chaos_world.tree_of` tells it."""

FULL, DATA = "Full", "Data"
RUNNING, STOPPED, PAUSED, DELETED = "running", "stopped", "paused", "deleted"
ON_HOST = (RUNNING, STOPPED)
EMPTY_ROOT: Tree = {".": ["folder", 0o755, 0, ""]}


class RefusedError(Exception):
    """The operation cannot be done in this state."""


@dataclass(frozen=True)
class Kept:
    """A snapshot."""

    scope: str
    content: Tree


@dataclass(frozen=True)
class Scopes:
    """A policy's."""

    on_pause: str = FULL
    on_commit: str = FULL


@dataclass(frozen=True)
class Model:
    """A workspace."""

    state: str
    content: Tree | None
    """While it is on the host."""
    base: Tree | None = None
    """What it was made from, where that was whole."""
    versions: tuple[Kept, ...] = ()
    paused: Kept | None = None
    commits: tuple[Kept, ...] = ()
    events: tuple[str, ...] = ()

    def with_event(self, event: str, **changes: Any) -> Model:
        """After something happened."""
        return replace(self, events=(*self.events, event), **changes)

    def keep(self, scope: str) -> Kept:
        """A snapshot of it as it is."""
        assert self.content is not None
        return Kept(scope, self.content if scope == FULL else durable(self.content))

    def placed(self, kept: Kept) -> Tree:
        """What it holds when a snapshot was put in its place."""
        if kept.scope == FULL:
            return kept.content
        return {**rest(self.base or EMPTY_ROOT), **kept.content}


def durable(tree: Tree) -> Tree:
    """What is in the volume."""
    return {name: entry for name, entry in tree.items() if is_durable(name)}


def rest(tree: Tree) -> Tree:
    """All else."""
    return {name: entry for name, entry in tree.items() if not is_durable(name)}


def is_durable(name: str) -> bool:
    """Whether a path is in the volume, or is it."""
    return name.split("/")[0] == "data"


def need(is_met: bool) -> None:
    """RefusedError unless this is so."""
    if not is_met:
        raise RefusedError


@dataclass(frozen=True)
class Call:
    """A call of a method of the manager, on one workspace that is there."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def event(self) -> str:
        """Of which it tells."""
        return EVENTS[self.method]


EVENTS = {
    "create_snapshot": "snapshot_create",
    "create_version": "version_create",
    "rollback": "version_rollback",
    "pause": "workspace_pause",
    "resume": "workspace_resume",
    "commit": "workspace_commit",
    "start": "workspace_start",
    "stop": "workspace_stop",
    "delete": "workspace_delete",
    "touch": "",
    "create": "workspace_create",
    "fork": "workspace_fork",
}


def after(model: Model, call: Call, scopes: Scopes) -> Model:
    """The workspace after the call. RefusedError when it cannot be made."""
    return _AFTER[call.method](model, call, scopes)


def _version(model: Model, call: Call, _: Scopes) -> Model:
    need(model.state in ON_HOST)
    kept = model.keep(call.options.get("scope", FULL))
    return model.with_event(call.event, versions=(*model.versions, kept))


def _rollback(model: Model, call: Call, _: Scopes) -> Model:
    number, keeps = call.options["version"], call.options.get("keep_current", False)
    need(number <= len(model.versions) and model.state in ON_HOST)
    versions = (*model.versions, model.keep(FULL)) if keeps else model.versions
    target = model.versions[number - 1]
    return model.with_event(call.event, versions=versions, content=model.placed(target))


def _pause(model: Model, call: Call, scopes: Scopes) -> Model:
    need(model.state in ON_HOST)
    return model.with_event(call.event, state=PAUSED, paused=model.keep(scopes.on_pause), content=None)


def _resume(model: Model, call: Call, _: Scopes) -> Model:
    need(model.state == PAUSED)
    assert model.paused is not None
    return model.with_event(call.event, state=RUNNING, content=model.placed(model.paused), paused=None)


def _commit(model: Model, call: Call, scopes: Scopes) -> Model:
    need(model.state != DELETED)
    if model.state == PAUSED:
        assert model.paused is not None
        need(model.paused.scope == FULL or scopes.on_commit == DATA)
        content = model.paused.content
        kept = Kept(scopes.on_commit, content if scopes.on_commit == FULL else durable(content))
    else:
        kept = model.keep(scopes.on_commit)
    return model.with_event(call.event, commits=(*model.commits, kept))


def _start(model: Model, call: Call, _: Scopes) -> Model:
    need(model.state == STOPPED)
    return model.with_event(call.event, state=RUNNING)


def _stop(model: Model, call: Call, _: Scopes) -> Model:
    need(model.state == RUNNING)
    return model.with_event(call.event, state=STOPPED)


def _delete(model: Model, call: Call, _: Scopes) -> Model:
    need(model.state != DELETED)
    return Model(DELETED, None, events=(*model.events, call.event))


def _touch(model: Model, _: Call, __: Scopes) -> Model:
    need(model.state != DELETED)
    return model


_AFTER: dict[str, Callable[[Model, Call, Scopes], Model]] = {
    "create_snapshot": _version,
    "create_version": _version,
    "rollback": _rollback,
    "pause": _pause,
    "resume": _resume,
    "commit": _commit,
    "start": _start,
    "stop": _stop,
    "delete": _delete,
    "touch": _touch,
}
