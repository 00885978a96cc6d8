"""Kills one operation on a workspace at its first step, its second, and so on, and recovers each time.

    python chaos_kills.py OPERATION FOLDER CATALOG REMOTE STRIDE
    python chaos_kills.py OPERATION FOLDER CATALOG REMOTE once STEP

Each time a forked child does the operation on a new workspace and kills itself (SIGKILL) at the nth step;
another one recovers the host, every other time after one that was killed while it did so. The workspace must
then be as it was before the operation or as one is after it that was not killed, in all that can be seen of
it, and nothing else may be wrong. It must also be fit for use, and go without a trace. Ends when an operation
comes to its end unkilled. Prints the number of kills.
The second form kills it once, at a named step, and leaves all as it is then, what runs too.

A step is each one that the manager, the runtime and the file cache name and, unless the stride is 0, whatever
audit hooks tell of files, locks and processes. CATALOG is a URL; REMOTE is that of a remote cache, or empty.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chaos_world import (
    DATA,
    MTIME_NS,
    ChildFailedError,
    Killer,
    Place,
    World,
    fill,
    in_child,
    opened,
    picture,
    pids_of,
    stop_all,
)

from snaploader import FileCache, NotFound, RemoteCache, SnapshotLoader
from snaploader.policy import ReadPolicy
from snaploader.workspace.model import Readiness, Scope, SnapshotStatus
from snaploader.workspace.policy import Policy, ScopePolicy

COMMAND = ("sleep", "10000")
DATA_ONLY = "data-only"
RECOVERY_STEPS = 60
"""About as many as a recovery has."""
READY = Readiness("command", "test -e data/file", interval_s=0.02, timeout_s=60)

Act = Callable[[World, str], object]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to workspaces, and what is done before."""

    act: Act
    """The operation itself."""
    prepare: tuple[str, ...] = ()
    """Named steps of `PREPARATIONS`, after the workspace was created and filled."""
    event: str = ""
    """Of which the operation tells when it is done."""
    policy: str = "default"
    is_birth: bool = False
    """Whether the workspace is made by it."""
    is_remote: bool = False


def origin_of(workspace_id: str) -> str:
    """The workspace that is forked, or copied."""
    return f"{workspace_id}-origin"


def token_of(workspace_id: str) -> str:
    """What no other workspace holds, so that each is stored anew."""
    return workspace_id.removesuffix("-origin").rpartition("-")[2]


def template_of(world: World, workspace_id: str) -> Path:
    """A folder to create the workspace from."""
    template = Path(world.place.folder, "template")
    template.mkdir(exist_ok=True)
    fill(template, "template", token_of(workspace_id))
    return template


OPERATIONS = {
    "snapshot": Operation(lambda w, i: w.manager.create_snapshot(i, "named"), (), "snapshot_create"),
    "snapshot-stopped": Operation(
        lambda w, i: w.manager.create_snapshot(i, scope=Scope.DATA), ("stop",), "snapshot_create"
    ),
    "version": Operation(lambda w, i: w.manager.create_version(i), ("version", "change"), "version_create"),
    "version-after-pause": Operation(
        lambda w, i: w.manager.create_version(i), ("pause", "resume", "change"), "version_create"
    ),
    "pause": Operation(lambda w, i: w.manager.pause(i), (), "workspace_pause"),
    "pause-data": Operation(lambda w, i: w.manager.pause(i), ("version",), "workspace_pause", DATA_ONLY),
    "pause-again": Operation(
        lambda w, i: w.manager.pause(i), ("pause", "resume", "change"), "workspace_pause"
    ),
    "resume": Operation(lambda w, i: w.manager.resume(i), ("pause",), "workspace_resume"),
    "resume-data": Operation(lambda w, i: w.manager.resume(i), ("pause",), "workspace_resume", DATA_ONLY),
    "commit": Operation(lambda w, i: w.manager.commit(i, "kept"), (), "workspace_commit", is_remote=True),
    "commit-again": Operation(
        lambda w, i: w.manager.commit(i), ("commit", "change"), "workspace_commit", is_remote=True
    ),
    "commit-paused": Operation(
        lambda w, i: w.manager.commit(i), ("pause",), "workspace_commit", is_remote=True
    ),
    "rollback": Operation(lambda w, i: w.manager.rollback(i, 1), ("version", "change"), "version_rollback"),
    "rollback-keeping": Operation(
        lambda w, i: w.manager.rollback(i, 1, keep_current=True), ("version", "change"), "version_rollback"
    ),
    "delete": Operation(lambda w, i: w.manager.delete(i), ("version",), "workspace_delete"),
    "delete-paused": Operation(lambda w, i: w.manager.delete(i), ("version", "pause"), "workspace_delete"),
    "delete-committed": Operation(
        lambda w, i: w.manager.delete(i), ("commit", "change"), "workspace_delete", is_remote=True
    ),
    "start": Operation(lambda w, i: w.manager.start(i), ("stop",), "workspace_start"),
    "stop": Operation(lambda w, i: w.manager.stop(i), (), "workspace_stop"),
    "create": Operation(
        lambda w, i: w.manager.create(i, command=COMMAND, volumes=[DATA]),
        (),
        "workspace_create",
        is_birth=True,
    ),
    "create-from": Operation(
        lambda w, i: w.manager.create(i, command=COMMAND, volumes=[DATA], source=template_of(w, i)),
        (),
        "workspace_create",
        is_birth=True,
    ),
    "fork": Operation(
        lambda w, i: w.manager.fork(origin_of(i), i), (), "workspace_fork", is_birth=True, is_remote=True
    ),
}

PREPARATIONS: dict[str, Act] = {
    "version": lambda w, i: w.manager.create_version(i),
    "change": lambda w, i: fill(w.root(i), "second", token_of(i)),
    "pause": lambda w, i: w.manager.pause(i),
    "resume": lambda w, i: w.manager.resume(i),
    "commit": lambda w, i: w.manager.commit(i),
    "stop": lambda w, i: w.manager.stop(i),
}


def prepare(world: World, operation: Operation, workspace_id: str) -> None:
    """Bring a workspace to where the operation begins."""
    if operation.is_birth:
        if operation.is_remote:
            make(world, operation, origin_of(workspace_id))
            world.manager.commit(origin_of(workspace_id))
        return
    make(world, operation, workspace_id)
    for name in operation.prepare:
        PREPARATIONS[name](world, workspace_id)


def make(world: World, operation: Operation, workspace_id: str) -> None:
    """A workspace with content."""
    options = {"volumes": [DATA], "readiness": READY, "policy": operation.policy}
    world.manager.create(workspace_id, command=COMMAND, **options, start=False)
    fill(world.root(workspace_id), "first", token_of(workspace_id))
    world.manager.start(workspace_id)  # which waits until it is ready


def prepare_host(world: World) -> None:
    """What workspaces refer to."""
    with world.catalog.transaction() as tx:
        tx.put_policy(Policy(DATA_ONLY, ScopePolicy(Scope.DATA)))


def expect(is_met: bool, what: str) -> None:
    if not is_met:
        raise AssertionError(what)


class Kills:
    """One operation, killed again and again on one host."""

    def __init__(self, name: str, place: Place, stride: int) -> None:
        self.name = name
        self.operation = OPERATIONS[name]
        self.place = place if self.operation.is_remote else replace(place, remote="")
        self.stride = stride
        self.folder = Path(place.folder)

    def run(self) -> int:
        """How often it was killed."""
        in_child(lambda: self._within(prepare_host))
        in_child(lambda: self._try(self._new_id(0), 0))
        expected = self._keep_picture(self._new_id(0), "after")
        in_child(lambda: self._within(lambda world: self._use_and_delete(world, self._new_id(0))))
        for kills, number in enumerate(itertools.count(1, self.stride or 1)):
            workspace_id = self._new_id(number)
            has_ended = in_child(partial(self._try, workspace_id, number))
            if kills % 2:
                in_child(partial(self._kill_recovery, 1 + kills * 7 % RECOVERY_STEPS))
            try:
                in_child(partial(self._look, workspace_id, expected))
            except ChildFailedError as error:
                raise AssertionError(f"{self.name} is wrong when killed at step {number}") from error
            if has_ended:
                return kills
        raise AssertionError("unreachable")

    def _kill_recovery(self, step: int) -> None:
        """Recover the host, to be killed at a step of that."""
        killer = Killer(step, with_events=True)
        with opened(self.place, killer.step) as world:
            killer.is_armed = True
            world.manager.recover()
            killer.is_armed = False

    def kill_once(self, step: int) -> None:
        """Kill it at a named step, and leave it so."""
        in_child(lambda: self._within(prepare_host))
        expect(not in_child(lambda: self._try(self._new_id(step), step)), "it was not killed")

    def _new_id(self, number: int) -> str:
        return f"{self.name}-{number:06}"

    def _within(self, action: Callable[[World], object], killer: Killer | None = None) -> None:
        if killer is None:
            with opened(self.place) as world:
                action(world)
            return
        with opened(self.place, killer.step) as world:
            action(world)

    def _try(self, workspace_id: str, number: int) -> None:
        """Prepare, look, and do the operation, to be killed at a step of it."""
        killer = Killer(number, with_events=self.stride > 0)

        def act(world: World) -> None:
            prepare(world, self.operation, workspace_id)
            self._path("before").write_text(json.dumps(picture(world, workspace_id)))
            killer.is_armed = True
            self.operation.act(world, workspace_id)
            killer.is_armed = False

        self._within(act, killer)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _keep_picture(self, workspace_id: str, name: str) -> dict[str, Any]:
        def keep(world: World) -> None:
            self._path(name).write_text(json.dumps(picture(world, workspace_id)))

        in_child(lambda: self._within(keep))
        return dict(json.loads(self._path(name).read_text()))

    def _look(self, workspace_id: str, expected: dict[str, Any]) -> None:
        def look(world: World) -> None:
            summary = world.manager.recover()
            expect(not summary.problems, f"recovery had problems: {summary.problems}")
            expect(not summary.busy, f"recovery found locks held: {summary.busy}")
            self._compare(world, workspace_id, expected)
            world.cache.prune()
            findings = world.findings()
            expect(not findings, f"after recovery: {findings}")
            again = world.manager.recover()
            expect(not (again.repaired or again.problems), f"recovered again: {again}")
            self._check_hidden(world, workspace_id)
            self._use_and_delete(world, workspace_id)

        self._within(look)

    def _compare(self, world: World, workspace_id: str, after: dict[str, Any]) -> None:
        before = json.loads(self._path("before").read_text())
        found = json.loads(json.dumps(picture(world, workspace_id)))
        token, first = token_of(workspace_id), token_of(self._new_id(0))
        is_done = found["state"] != "none" and found["events"][-1:] == [self.operation.event]
        # A preparation may have ended with an event of that type.
        if is_done and found["events"] != before.get("events"):
            wanted, token_wanted = after, first
        else:
            wanted, token_wanted = before, token
            if found.get("events") == [*before.get("events", ()), "operation_recovered"]:
                found["events"].pop()
        wanted, found = loosely(wanted, token_wanted), loosely(found, token)
        if found != wanted:
            names = sorted(set(found) | set(wanted))
            differing = {n: (wanted.get(n), found.get(n)) for n in names if wanted.get(n) != found.get(n)}
            raise AssertionError(f"neither before nor after, (wanted, found): {differing}")

    def _check_hidden(self, world: World, workspace_id: str) -> None:
        """Nothing of a commit that failed is visible to another host."""
        if not self.operation.is_remote:
            return
        with world.catalog.reading() as reader:
            records = reader.snapshots(workspace_id, statuses=[SnapshotStatus.ORPHANED])
        with (
            FileCache(self.folder / "other") as cache,
            RemoteCache(self.place.remote) as remote,
            SnapshotLoader(cache, remote, workers=1) as loader,
        ):
            for record in records:
                expect(not record.is_remote, f"{record.name} is still to be withdrawn")
                try:
                    loader.get_snapshot_by_id(record.runtime_name, read_policy=ReadPolicy.NEWEST)
                except NotFound:
                    continue
                raise AssertionError(f"commit {record.name} failed, and is visible")

    def _use_and_delete(self, world: World, workspace_id: str) -> None:
        """Whatever happened, the workspace is fit for use, and can be deleted without a trace."""
        manager = world.manager
        found = picture(world, workspace_id)
        if found["state"] == "none":
            self.operation.act(world, workspace_id)
            found = picture(world, workspace_id)
        elif found["state"] == "paused":
            manager.resume(workspace_id)
            self._check_resumed(world, workspace_id)
        if found["state"] != "deleted":
            if found["state"] == "running":
                pids = pids_of(workspace_id)
                status = world.runtime.status(workspace_id)
                expect(pids == [status.pid], f"it runs as {status.pid}, and there are {pids}")
            version = manager.create_version(workspace_id).version
            expect(version == found["last_version"] + 1, f"version {version} after {found['last_version']}")
            manager.delete(workspace_id)
        if self.operation.is_birth and self.operation.is_remote:
            manager.delete(origin_of(workspace_id))
        findings = world.findings()
        expect(not findings, f"after deletion: {findings}")
        expect(not pids_of(workspace_id), f"processes are left: {pids_of(workspace_id)}")
        expect(not world.cache.pins(), f"pins are left: {world.cache.pins()}")
        expect(not world.runtime.workspaces(), f"folders are left: {world.runtime.workspaces()}")
        expect(not manager.slots.owners(), f"slots are left: {manager.slots.owners()}")
        expect(not manager.locks.ids(), f"locks are left: {manager.locks.ids()}")
        bad = world.cache.verify()
        expect(not (bad.bad_blobs or bad.bad_refs or bad.bad_pins), f"the cache is damaged: {bad}")

    def _check_resumed(self, world: World, workspace_id: str) -> None:
        root = world.root(workspace_id)
        word = "second" if "change" in self.operation.prepare else "first"
        expect(
            (root / "data/file").read_text() == f"data {word} {token_of(workspace_id)}",
            "the pause brought other content back",
        )
        is_full = self.operation.policy != DATA_ONLY
        expect((root / "etc/secret").exists() == is_full, "a pause holds what its scope does not, or less")


def loosely(seen: dict[str, Any], token: str) -> dict[str, Any]:
    """A picture without what only one workspace holds, and the times of folders that are made anew."""
    content = {name: list(entry) for name, entry in (seen.get("content") or {}).items()}
    for entry in content.values():
        entry[3] = entry[3].replace(token.encode().hex(), "TOKEN")
        if entry[2] > MTIME_NS + 10**17:
            entry[2] = 0
    return {**seen, "content": content or None}


def main() -> None:
    name, folder, catalog, remote, stride, *step = sys.argv[1:]
    place = Place(folder, catalog, remote)
    if stride == "once":
        Kills(name, place, 0).kill_once(int(step[0]))
        return
    try:
        print(Kills(name, place, int(stride)).run())
    finally:
        stop_all(place)


if __name__ == "__main__":
    main()
