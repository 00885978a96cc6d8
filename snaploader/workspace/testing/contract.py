"""What every runtime must do, as checks that any implementation can be run through.

From pytest, with a `Harness` for the runtime at hand:

    import pytest
    from snaploader.workspace.testing import RUNTIME_CHECKS

    @pytest.mark.parametrize("check", RUNTIME_CHECKS, ids=str)
    def test_runtime(check, harness):
        check(harness)

A check returns when all is well, and raises AssertionError or what the runtime raised. Each makes workspaces
of its own, with new ids, and removes them; they do not depend on each other.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from cow import COWStore
from snaploader._proto import snaploader_pb2
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, SnaploaderError
from snaploader.keys import SnapshotKey
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.workspace.model import Scope, Volume, WorkspaceSpec
from snaploader.workspace.runtime.protocol import Runtime, StopOutcome

VOLUMES = (Volume("data", "/srv/data"), Volume("logs", "/var/log/app"))
"""Of the workspaces that the checks make."""
CHUNK = 64 << 10
"""Chunk size of the stores that the checks make, in bytes."""


class Harness(Protocol):
    """A runtime to check, and what the checks need beside it."""

    runtime: Runtime
    loader: SnapshotLoader
    command: tuple[str, ...]
    """Runs until it is asked to end."""
    scratch: str
    """A folder that the checks may write to."""

    def another(self) -> Runtime:
        """Return a runtime on the same state, as another process would have; the check closes it."""

    def write(self, workspace_id: str, path: str, data: bytes) -> None: ...

    def read(self, workspace_id: str, path: str) -> bytes | None:
        """Return what a file of a workspace holds, or None when there is none."""


@dataclass(frozen=True, slots=True)
class RuntimeCheck:
    """One thing that a runtime must do."""

    name: str
    """As in "stopping_twice_is_harmless"."""
    description: str
    function: Callable[[Harness], None]

    def __call__(self, harness: Harness) -> None:
        """Check it. AssertionError when the runtime does not do it."""
        self.function(harness)

    def __str__(self) -> str:
        return self.name


_checks: list[RuntimeCheck] = []


def check(function: Callable[[Harness], None]) -> Callable[[Harness], None]:
    """Decorator: the function is a check, named and described by its name and docstring."""
    _checks.append(RuntimeCheck(function.__name__, (function.__doc__ or "").strip(), function))
    return function


class LoaderWithoutContent:
    """In place of a loader: whatever it is asked for is gone from every cache."""

    def __getattr__(self, name: str) -> Any:
        raise NotFound(f"{name}: this content is gone from every cache")


def new_spec(
    harness: Harness, *, command: tuple[str, ...] | None = None, volumes: tuple[Volume, ...] = VOLUMES
) -> WorkspaceSpec:
    """Return the spec of a workspace that does not exist yet."""
    command = harness.command if command is None else command
    return WorkspaceSpec(f"check-{uuid.uuid4().hex[:12]}", command=command, volumes=volumes)


@contextmanager
def workspace(harness: Harness, spec: WorkspaceSpec | None = None) -> Iterator[WorkspaceSpec]:
    """Give a new workspace, which is removed at the end."""
    spec = spec or new_spec(harness)
    harness.runtime.create(spec)
    try:
        yield spec
    finally:
        harness.runtime.stop(spec.workspace_id, timeout_s=0)
        harness.runtime.remove(spec.workspace_id)


def new_store(harness: Harness, size: int) -> COWStore:
    return COWStore(f"{harness.scratch}/{uuid.uuid4().hex}", size=size, chunk_size=CHUNK)


def capture(harness: Harness, spec: WorkspaceSpec, scope: Scope) -> Snapshot:
    """Capture a workspace, save it locally and find it."""
    key = SnapshotKey(instance_name="runtime-checks")
    with harness.runtime.capture(spec, scope) as captured:
        saved = harness.loader.cache_snapshot(
            key,
            files=captured.files,
            chunked_files=captured.chunked_files,
            directories=captured.directories,
            vm_configuration=snaploader_pb2.VMConfiguration(),
            remote=False,
        )
    return harness.loader.get_snapshot_by_id(
        saved.snapshot_id, instance_name=key.instance_name, read_policy="local-only"
    )


def place(
    harness: Harness, spec: WorkspaceSpec, snapshot: Snapshot, token: str, base: Snapshot | None = None
) -> None:
    """Place a snapshot with the harness's loader; its token is told from then on."""
    harness.runtime.place(spec, harness.loader, snapshot, base=base, token=token)
    placed = harness.runtime.status(spec.workspace_id).placed
    require(placed == token, f"what was placed with token {token!r} is told as {placed!r}")


def write(harness: Harness, spec: WorkspaceSpec, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        harness.write(spec.workspace_id, path, data)


def require_content(harness: Harness, spec: WorkspaceSpec, files: Mapping[str, bytes | None]) -> None:
    """Raise AssertionError unless files hold what is given; None is for what must not be there."""
    for path, expected in files.items():
        found = harness.read(spec.workspace_id, path)
        require(found == expected, f"{path} holds {found!r} instead of {expected!r}")


def require(is_met: bool, message: str) -> None:
    if not is_met:
        raise AssertionError(message)


def stop(harness: Harness, spec: WorkspaceSpec, expected: StopOutcome = StopOutcome.STOPPED) -> None:
    outcome = harness.runtime.stop(spec.workspace_id)
    require(outcome is expected, f"stopping it said {outcome}")


def require_error(kind: type[BaseException], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was expected and nothing was raised")


# How workspaces are made, run, seen and removed


@check
def an_unknown_workspace_does_not_exist(harness: Harness) -> None:
    """One that was never made is not running, stops and is removed without a word, and cannot be used."""
    runtime, spec = harness.runtime, new_spec(harness)
    require(not list(runtime.snapshots(spec.workspace_id)), "it is said to have snapshots")
    status = runtime.status(spec.workspace_id)
    require(not status.exists and not status.is_running, f"it is said to exist: {status}")
    stop(harness, spec, StopOutcome.NOT_RUNNING)
    runtime.remove(spec.workspace_id)
    for call in (
        lambda: runtime.start(spec),
        lambda: runtime.wait_ready(spec),
        lambda: capture(harness, spec, Scope.FULL),
        lambda: runtime.continue_on(spec, "snapshot"),
        lambda: runtime.attachments(spec.workspace_id),
        lambda: runtime.detach(spec.workspace_id, "disk"),
    ):
        require_error(NotFound, call)


@check
def it_says_what_it_captures(harness: Harness) -> None:
    """A runtime captures one scope at least, and others on the same state capture the same."""
    scopes = set(harness.runtime.scopes)
    require(bool(scopes) and scopes <= set(Scope), f"its scopes are {scopes}")
    with closing(harness.another()) as other:
        require(set(other.scopes) == scopes, f"another one says {set(other.scopes)} and this one {scopes}")


@check
def ids_that_are_none_are_refused(harness: Harness) -> None:
    """What is no workspace id is InvalidArgument, before anything is done."""
    runtime = harness.runtime
    for bad in ("", "..", "a/b", "A", "x.staging-1"):
        spec = WorkspaceSpec(bad)
        for call in (
            partial(runtime.create, spec),
            partial(runtime.start, spec),
            partial(runtime.stop, bad),
            partial(runtime.status, bad),
            partial(runtime.remove, bad),
        ):
            require_error(InvalidArgument, call)


@check
def a_workspace_is_made_once(harness: Harness) -> None:
    """After `create` it exists and does not run; a second time is refused."""
    with workspace(harness) as spec:
        status = harness.runtime.status(spec.workspace_id)
        require(status.exists and not status.is_running and not status.placed, f"it is {status}")
        require(spec.workspace_id in harness.runtime.workspaces(), "it is not listed")
        harness.write(spec.workspace_id, "/srv/data/file", b"kept")
        require_error(FailedPrecondition, lambda: harness.runtime.create(spec))
        require_content(harness, spec, {"/srv/data/file": b"kept"})


@check
def overlapping_volumes_are_refused(harness: Harness) -> None:
    """Volumes that cannot be together are InvalidArgument, and nothing is made."""
    spec = new_spec(harness, volumes=(Volume("a", "/data"), Volume("b", "/data/inner")))
    require_error(InvalidArgument, lambda: harness.runtime.create(spec))
    require(not harness.runtime.status(spec.workspace_id).exists, "it exists all the same")


@check
def a_started_workspace_runs_until_it_is_stopped(harness: Harness) -> None:
    """Starting, stopping and starting again; doing either twice is harmless."""
    runtime = harness.runtime
    with workspace(harness) as spec:
        for _ in range(2):
            runtime.start(spec)
            first = runtime.status(spec.workspace_id)
            runtime.start(spec)
            second = runtime.status(spec.workspace_id)
            require(first.is_running and first.started_at is not None, f"it was started and is {first}")
            require(second == first, f"a second start changed it from {first} to {second}")
            stop(harness, spec)
            stopped = runtime.status(spec.workspace_id)
            require(not stopped.is_running and stopped.pid is None, f"it was stopped and is {stopped}")
            stop(harness, spec, StopOutcome.NOT_RUNNING)


@check
def a_workspace_without_a_command_runs_too(harness: Harness) -> None:
    """One that has no command counts as running from start to stop."""
    runtime = harness.runtime
    with workspace(harness, new_spec(harness, command=())) as spec:
        runtime.start(spec)
        runtime.wait_ready(spec)
        require(runtime.status(spec.workspace_id).is_running, "it was started and does not run")
        stop(harness, spec)
        require(not runtime.status(spec.workspace_id).is_running, "it was stopped and runs")


@check
def other_processes_see_and_stop_a_running_workspace(harness: Harness) -> None:
    """What one runtime started goes on when that is closed, and another one stops it."""
    with workspace(harness) as spec:
        with closing(harness.another()) as starter:
            starter.start(spec)
        status = harness.runtime.status(spec.workspace_id)
        require(status.is_running, f"it went with the runtime that started it: {status}")
        stop(harness, spec)


@check
def a_running_workspace_is_not_touched(harness: Harness) -> None:
    """Capturing, replacing and removing one that runs is FailedPrecondition."""
    runtime = harness.runtime
    with workspace(harness) as spec:
        snapshot = capture(harness, spec, Scope.FULL)
        runtime.start(spec)
        for call in (
            lambda: capture(harness, spec, Scope.FULL),
            lambda: capture(harness, spec, Scope.DATA),
            lambda: place(harness, spec, snapshot, "t"),
            lambda: runtime.remove(spec.workspace_id),
        ):
            require_error(FailedPrecondition, call)
        require(runtime.status(spec.workspace_id).is_running, "it does not run any more")
        runtime.stop(spec.workspace_id)


@check
def readiness_is_told_of_running_workspaces_alone(harness: Harness) -> None:
    """`wait_ready` returns for one that runs and has no check; one that does not run is refused."""
    with workspace(harness) as spec:
        require_error(FailedPrecondition, lambda: harness.runtime.wait_ready(spec))
        harness.runtime.start(spec)
        harness.runtime.wait_ready(spec, 30, threading.Event())
        harness.runtime.stop(spec.workspace_id)
        require_error(FailedPrecondition, lambda: harness.runtime.wait_ready(spec))


@check
def a_removed_workspace_is_gone(harness: Harness) -> None:
    """After `remove` nothing is left, a second time is harmless, and the id can be placed again."""
    runtime = harness.runtime
    with workspace(harness) as spec:
        snapshot = capture(harness, spec, Scope.FULL)
        runtime.remove(spec.workspace_id)
        require(not runtime.status(spec.workspace_id).exists, "it exists still")
        require(spec.workspace_id not in runtime.workspaces(), "it is listed still")
        runtime.remove(spec.workspace_id)
        place(harness, spec, snapshot, "again")


@check
def sweeping_leaves_what_is_whole(harness: Harness) -> None:
    """`sweep` takes nothing from workspaces that are in order."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1"})
        harness.runtime.start(spec)
        harness.runtime.sweep()
        require(harness.runtime.status(spec.workspace_id).is_running, "it does not run any more")
        harness.runtime.stop(spec.workspace_id)
        require_content(harness, spec, {"/srv/data/a": b"1"})


@check
def all_runtimes_tell_the_same(harness: Harness) -> None:
    """State, token and list are told alike by every runtime on the same state."""
    with workspace(harness) as spec:
        snapshot = capture(harness, spec, Scope.FULL)
        place(harness, spec, snapshot, "shared")
        with closing(harness.another()) as other:
            mine, theirs = (each.status(spec.workspace_id) for each in (harness.runtime, other))
            require(mine == theirs, f"one says {mine}, the other {theirs}")
            require(spec.workspace_id in other.workspaces(), "the other does not list it")


@check
def workspaces_do_not_wait_for_each_other(harness: Harness) -> None:
    """Calls on different workspaces come from many threads at once, and none disturbs another."""

    def live(number: int) -> None:
        with workspace(harness) as spec:
            write(harness, spec, {"/srv/data/a": b"%d" % number})
            snapshot = capture(harness, spec, Scope.FULL)
            harness.runtime.start(spec)
            harness.runtime.stop(spec.workspace_id)
            write(harness, spec, {"/srv/data/a": b"other"})
            place(harness, spec, snapshot, str(number))
            require_content(harness, spec, {"/srv/data/a": b"%d" % number})
            require(harness.runtime.status(spec.workspace_id).placed == str(number), "a token was mixed up")

    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(live, range(4)):
            pass


# What snapshots hold, and what placing them brings back


@check
def a_full_snapshot_brings_back_everything(harness: Harness) -> None:
    """Placing a Full snapshot undoes every change since: files changed, made and removed."""
    before = {"/srv/data/a": b"1", "/var/log/app/b": b"2", "/etc/c": b"3", "/var/d": b"4", "/srv/data/e": b""}
    with workspace(harness) as spec:
        write(harness, spec, before)
        snapshot = capture(harness, spec, Scope.FULL)
        after = {"/srv/data/a": b"other", "/etc/c": b"other", "/new": b"n", "/srv/data/new": b"n"}
        write(harness, spec, after)
        place(harness, spec, snapshot, "back")
        require_content(harness, spec, {**before, "/new": None, "/srv/data/new": None})


@check
def a_data_snapshot_holds_the_volumes_alone(harness: Harness) -> None:
    """Placing a Data snapshot brings back the volumes, on a fresh rest."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1", "/etc/c": b"3"})
        snapshot = capture(harness, spec, Scope.DATA)
        names = {*snapshot.manifest.files, *snapshot.manifest.chunked_files, *snapshot.directories}
        expected = {f"volume.{volume.name}" for volume in VOLUMES}
        require(names == expected, f"it holds {sorted(names)} instead of {sorted(expected)}")
        write(harness, spec, {"/srv/data/a": b"other"})
        place(harness, spec, snapshot, "fresh")
        require_content(harness, spec, {"/srv/data/a": b"1", "/etc/c": None, "/var/log/app/b": None})


@check
def a_data_snapshot_is_placed_on_a_base(harness: Harness) -> None:
    """With a base, all but the volumes comes from there."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"base", "/etc/c": b"base", "/var/log/app/x": b"base"})
        base = capture(harness, spec, Scope.FULL)
        write(harness, spec, {"/srv/data/a": b"data", "/etc/c": b"lost"})
        data = capture(harness, spec, Scope.DATA)
        place(harness, spec, data, "mixed", base)
        expected = {"/srv/data/a": b"data", "/etc/c": b"base", "/var/log/app/x": b"base"}
        require_content(harness, spec, expected)


@check
def a_workspace_without_volumes_has_data_snapshots(harness: Harness) -> None:
    """A Data snapshot of one without volumes holds nothing, and can be taken and placed."""
    with workspace(harness, new_spec(harness, volumes=())) as spec:
        write(harness, spec, {"/etc/c": b"3"})
        snapshot = capture(harness, spec, Scope.DATA)
        place(harness, spec, snapshot, "empty")
        require_content(harness, spec, {"/etc/c": None})


@check
def a_snapshot_makes_new_workspaces(harness: Harness) -> None:
    """Placing under an id that is not there makes the workspace, whose changes are its own."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1", "/etc/c": b"3"})
        snapshot = capture(harness, spec, Scope.FULL)
        fork = new_spec(harness)
        place(harness, fork, snapshot, "fork")
        try:
            require_content(harness, fork, {"/srv/data/a": b"1", "/etc/c": b"3"})
            write(harness, fork, {"/srv/data/a": b"forked"})
            require_content(harness, spec, {"/srv/data/a": b"1"})
            harness.runtime.start(fork)
            harness.runtime.stop(fork.workspace_id)
        finally:
            harness.runtime.remove(fork.workspace_id)


@check
def what_is_placed_can_be_run_and_captured(harness: Harness) -> None:
    """A workspace goes on from what was placed: it runs, changes, and its next snapshot has the changes."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1"})
        first = capture(harness, spec, Scope.FULL)
        place(harness, spec, first, "one")
        harness.runtime.start(spec)
        harness.runtime.stop(spec.workspace_id)
        write(harness, spec, {"/srv/data/a": b"2", "/etc/c": b"3"})
        second = capture(harness, spec, Scope.FULL)
        harness.runtime.continue_on(spec, "second")
        place(harness, spec, first, "two")
        require_content(harness, spec, {"/srv/data/a": b"1", "/etc/c": None})
        place(harness, spec, second, "three")
        require_content(harness, spec, {"/srv/data/a": b"2", "/etc/c": b"3"})


@check
def a_failed_placement_changes_nothing(harness: Harness) -> None:
    """When content cannot be fetched, state and token stay as they were."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1"})
        snapshot = capture(harness, spec, Scope.FULL)
        place(harness, spec, snapshot, "good")
        write(harness, spec, {"/srv/data/a": b"2"})
        empty: Any = LoaderWithoutContent()
        bad = partial(harness.runtime.place, spec, empty, snapshot, token=spec.workspace_id)
        require_error(SnaploaderError, bad)
        require_content(harness, spec, {"/srv/data/a": b"2"})
        require(harness.runtime.status(spec.workspace_id).placed == "good", "the token changed")
        left = [name for name in harness.runtime.leftovers() if name.startswith(f"{spec.workspace_id}.")]
        require(not left, f"it left {left}")


@check
def a_placement_needs_a_token(harness: Harness) -> None:
    """An empty token is InvalidArgument: nobody could tell that it was placed."""
    with workspace(harness) as spec:
        snapshot = capture(harness, spec, Scope.FULL)
        require_error(InvalidArgument, lambda: place(harness, spec, snapshot, ""))


@check
def volumes_that_a_workspace_lacks_are_not_dropped(harness: Harness) -> None:
    """Placing a snapshot with a volume that the workspace does not have is FailedPrecondition."""
    with workspace(harness) as spec, workspace(harness, new_spec(harness, volumes=VOLUMES[:1])) as smaller:
        snapshot = capture(harness, spec, Scope.DATA)
        require_error(FailedPrecondition, lambda: place(harness, smaller, snapshot, "t"))


# Disks and memory files beside a workspace's folder


@check
def an_attached_store_is_in_full_snapshots(harness: Harness) -> None:
    """A store that is attached is captured with Full, not with Data, and comes back as a lazy store."""
    runtime = harness.runtime
    content = bytes(range(256)) * (CHUNK // 256)
    with workspace(harness) as spec, new_store(harness, 4 * CHUNK) as store:
        store.write_at(CHUNK, content)
        runtime.attach(spec.workspace_id, "disk", store)
        require(runtime.attachments(spec.workspace_id) == {"disk": store}, "it is not among the attachments")
        data = capture(harness, spec, Scope.DATA)
        require(not data.manifest.chunked_files, "a Data snapshot holds the disk")
        full = capture(harness, spec, Scope.FULL)
        require(set(full.manifest.chunked_files) == {"disk"}, "a Full snapshot does not hold the disk")
        store.write_at(0, b"later")
        place(harness, spec, full, "t")
        require(not store.closed, "the caller's store was closed")
        placed = runtime.attachments(spec.workspace_id)["disk"]
        require(isinstance(placed, COWStore) and placed is not store, f"the disk came back as {placed}")
        assert isinstance(placed, COWStore)
        lazy = placed.statistics().lazy_chunks
        require(lazy == 1, f"{lazy} chunks are fetched when touched, and not the one that has data")
        require(placed.read_at(0, 5) == bytes(5), "the disk has what was written after the snapshot")
        require(placed.read_at(CHUNK, CHUNK) == content, "the disk came back with other content")
        placed.write_at(0, b"changed")
        changed = capture(harness, spec, Scope.FULL)
        place(harness, spec, changed, "u")
        require(placed.closed, "a store that was opened by place was not closed by the next one")
        again = runtime.attachments(spec.workspace_id)["disk"]
        assert isinstance(again, COWStore)
        require(again.read_at(0, 7) == b"changed", "a change of the disk is not in the next snapshot")


@check
def attachments_are_told_apart_by_name(harness: Harness) -> None:
    """A name is used once, until it is detached; bad names are refused."""
    runtime = harness.runtime
    with workspace(harness) as spec, new_store(harness, CHUNK) as store:
        runtime.attach(spec.workspace_id, "disk", store)
        require_error(FailedPrecondition, lambda: runtime.attach(spec.workspace_id, "disk", store))
        for bad in ("", "..", "a/b", "root", "volume.data"):
            require_error(InvalidArgument, partial(runtime.attach, spec.workspace_id, bad, store))
        runtime.detach(spec.workspace_id, "disk")
        require(not store.closed, "detaching closed the caller's store")
        require_error(NotFound, lambda: runtime.detach(spec.workspace_id, "disk"))
        runtime.attach(spec.workspace_id, "disk", store)


@check
def a_store_of_another_process_is_not_left_out(harness: Harness) -> None:
    """Capturing with Full where a store is not open is FailedPrecondition, rather than without it."""
    with workspace(harness) as spec, new_store(harness, CHUNK) as store:
        with closing(harness.another()) as other:
            other.attach(spec.workspace_id, "disk", store)
            require(not harness.runtime.attachments(spec.workspace_id), "the other's store is told as usable")
            require_error(FailedPrecondition, lambda: capture(harness, spec, Scope.FULL))
            capture(harness, spec, Scope.DATA)
        require_error(FailedPrecondition, lambda: capture(harness, spec, Scope.FULL))
        harness.runtime.detach(spec.workspace_id, "disk")
        capture(harness, spec, Scope.FULL)


RUNTIME_CHECKS: tuple[RuntimeCheck, ...] = tuple(_checks)
"""Every check, in a sensible order."""
