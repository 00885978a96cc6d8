"""Checks of how workspaces are made, run, seen and removed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.model import Scope, Volume, WorkspaceSpec
from snaploader.workspace.runtime.protocol import StopOutcome
from snaploader.workspace.testing.contract.model import (
    Harness,
    Suite,
    capture,
    new_id,
    new_spec,
    place,
    require,
    require_content,
    require_error,
    workspace,
    write,
)

check = Suite()


@check
def an_unknown_workspace_does_not_exist(harness: Harness) -> None:
    """One that was never made is not running, stops and is removed without a word, and cannot be used."""
    runtime, spec = harness.runtime, new_spec(harness)
    status = runtime.status(spec.workspace_id)
    require(not status.exists and not status.is_running, f"it is said to exist: {status}")
    outcome = runtime.stop(spec.workspace_id)
    require(outcome is StopOutcome.NOT_RUNNING, f"stopping it said {outcome}")
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
    spec = WorkspaceSpec(new_id(), volumes=(Volume("a", "/data"), Volume("b", "/data/inner")))
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
            outcome = runtime.stop(spec.workspace_id)
            require(outcome is StopOutcome.STOPPED, f"stopping it said {outcome}")
            stopped = runtime.status(spec.workspace_id)
            require(not stopped.is_running and stopped.pid is None, f"it was stopped and is {stopped}")
            outcome = runtime.stop(spec.workspace_id)
            require(outcome is StopOutcome.NOT_RUNNING, f"stopping it again said {outcome}")


@check
def a_workspace_without_a_command_runs_too(harness: Harness) -> None:
    """One that has no command counts as running from start to stop."""
    runtime = harness.runtime
    with workspace(harness, command=()) as spec:
        runtime.start(spec)
        runtime.wait_ready(spec)
        require(runtime.status(spec.workspace_id).is_running, "it was started and does not run")
        outcome = runtime.stop(spec.workspace_id)
        require(outcome is StopOutcome.STOPPED, f"stopping it said {outcome}")
        require(not runtime.status(spec.workspace_id).is_running, "it was stopped and runs")


@check
def other_processes_see_and_stop_a_running_workspace(harness: Harness) -> None:
    """What one runtime started goes on when that is closed, and another one stops it."""
    with workspace(harness) as spec:
        starter = harness.another()
        try:
            starter.start(spec)
        finally:
            starter.close()
        status = harness.runtime.status(spec.workspace_id)
        require(status.is_running, f"it went with the runtime that started it: {status}")
        outcome = harness.runtime.stop(spec.workspace_id)
        require(outcome is StopOutcome.STOPPED, f"stopping it said {outcome}")


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
        require(runtime.status(spec.workspace_id).placed == "again", "it was not placed again")


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
        other = harness.another()
        try:
            mine, theirs = (each.status(spec.workspace_id) for each in (harness.runtime, other))
            require(mine == theirs, f"one says {mine}, the other {theirs}")
            require(spec.workspace_id in other.workspaces(), "the other does not list it")
        finally:
            other.close()


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
