"""Checks of what snapshots hold, and of what placing them brings back."""

from __future__ import annotations

from snaploader.errors import FailedPrecondition, InvalidArgument, SnaploaderError
from snaploader.workspace.model import Scope
from snaploader.workspace.testing.contract.model import (
    VOLUMES,
    Harness,
    LoaderWithoutContent,
    Suite,
    capture,
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
def a_full_snapshot_brings_back_everything(harness: Harness) -> None:
    """Placing a Full snapshot undoes every change since: files changed, made and removed."""
    before = {"/srv/data/a": b"1", "/var/log/app/b": b"2", "/etc/c": b"3", "/var/d": b"4", "/srv/data/e": b""}
    with workspace(harness) as spec:
        write(harness, spec, before)
        snapshot = capture(harness, spec, Scope.FULL)
        write(
            harness, spec, {"/srv/data/a": b"other", "/etc/c": b"other", "/new": b"n", "/srv/data/new": b"n"}
        )
        place(harness, spec, snapshot, "back")
        require_content(harness, spec, {**before, "/new": None, "/srv/data/new": None})
        require(harness.runtime.status(spec.workspace_id).placed == "back", "the token is not told")


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
    with workspace(harness, volumes=()) as spec:
        write(harness, spec, {"/etc/c": b"3"})
        snapshot = capture(harness, spec, Scope.DATA)
        place(harness, spec, snapshot, "empty")
        require_content(harness, spec, {"/etc/c": None})
        require(harness.runtime.status(spec.workspace_id).placed == "empty", "the token is not told")


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
        require(harness.runtime.status(spec.workspace_id).placed == "three", "the last token is not told")


@check
def a_failed_placement_changes_nothing(harness: Harness) -> None:
    """When content is not to be had, state and token stay as they were."""
    with workspace(harness) as spec:
        write(harness, spec, {"/srv/data/a": b"1"})
        snapshot = capture(harness, spec, Scope.FULL)
        place(harness, spec, snapshot, "good")
        write(harness, spec, {"/srv/data/a": b"2"})
        require_error(
            SnaploaderError,
            lambda: place(harness, spec, snapshot, "bad", loader=LoaderWithoutContent()),
        )
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
    with workspace(harness) as spec, workspace(harness, volumes=VOLUMES[:1]) as smaller:
        snapshot = capture(harness, spec, Scope.DATA)
        require_error(
            FailedPrecondition,
            lambda: place(harness, smaller, snapshot, "t"),
        )
