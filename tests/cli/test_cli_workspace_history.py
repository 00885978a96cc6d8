"""A workspace's history as a tree: what follows what, and where it stands now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from snaploader.cli.output import Branch
from snaploader.cli.workspace.records import History
from snaploader.workspace.model import (
    Scope,
    SnapshotInfo,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)

EPOCH = datetime(2026, 1, 1, 12, tzinfo=UTC)


def history(
    of: Workspace, snapshots: Sequence[SnapshotInfo], forks: Mapping[str, Sequence[str]] | None = None
) -> list[Branch]:
    return History(of, snapshots, forks or {}).branches()


def workspace(current: str, state: WorkspaceState = WorkspaceState.RUNNING) -> Workspace:
    return Workspace(
        WorkspaceSpec("web"),
        host="here",
        state=state,
        created_at=EPOCH,
        last_used_at=EPOCH,
        current_snapshot=current,
    )


def snapshot(
    name: str,
    parent: str,
    minute: int,
    version: int | None = None,
    kind: SnapshotKind = SnapshotKind.VERSION,
    display_name: str = "",
) -> SnapshotInfo:
    record = SnapshotRecord(
        name=name,
        workspace_id="web",
        runtime_name=f"workspaces/web/{name}",
        kind=kind,
        scope=Scope.FULL,
        source=SnapshotSource.MANUAL,
        created_at=EPOCH + timedelta(minutes=minute),
        display_name=display_name,
        parent=parent,
        is_remote=kind is SnapshotKind.COMMIT,
        size_bytes=1 << 20,
    )
    return SnapshotInfo(record.runtime_name, True, True, record, version)


def versions(*parents: str) -> list[SnapshotInfo]:
    """Versions 1, 2, … named v1, v2, … with these parents."""
    return [snapshot(f"v{number}", parent, number, number) for number, parent in enumerate(parents, start=1)]


Shape = list["str | tuple[str, Shape]"]


def shape(branches: Sequence[Branch]) -> Shape:
    """The first words of each label, and what hangs from it."""
    found: Shape = []
    for branch in branches:
        label = branch.label.partition("  ")[0].removeprefix("version ")
        found.append((label, shape(branch.branches)) if branch.branches else label)
    return found


def test_what_follows_stands_below_and_is_not_indented() -> None:
    drawn = history(workspace("v3"), versions("", "v1", "v2"))
    assert shape(drawn) == ["1", "2", "3", "now: running"]


def test_what_a_rollback_left_hangs_from_where_the_workspace_went_on() -> None:
    drawn = history(workspace("v3"), versions("", "v1", "v1"))
    assert shape(drawn) == [("1", ["2"]), "3", "now: running"]


def test_just_after_a_rollback_everything_later_hangs_from_the_version() -> None:
    drawn = history(workspace("v1"), versions("", "v1", "v2"))
    assert shape(drawn) == [("1", [("2 snapshots, one after the other", ["2", "3"])]), "now: running"]


def test_several_lines_that_were_left_are_told_apart() -> None:
    drawn = history(workspace("v5"), versions("", "v1", "v2", "v1", "v1"))
    left = [("2 snapshots, one after the other", ["2", "3"]), "4"]
    assert shape(drawn) == [("1", left), "5", "now: running"]


def test_a_line_that_was_left_may_branch_itself() -> None:
    drawn = history(workspace("v5"), versions("", "v1", "v2", "v2", "v1"))
    left = [("2 snapshots, one after the other", [("2", ["3"]), "4"])]
    assert shape(drawn) == [("1", left), "5", "now: running"]


def test_a_workspace_without_snapshots_just_stands_somewhere() -> None:
    assert shape(history(workspace("", WorkspaceState.STOPPED), [])) == ["now: stopped"]


def test_a_deleted_workspace_stands_nowhere() -> None:
    assert history(workspace("v1", WorkspaceState.DELETED), []) == []


def test_a_snapshot_whose_parent_is_gone_begins_a_line_of_its_own() -> None:
    drawn = history(workspace("v2"), versions("", "gone"))
    assert shape(drawn) == [("1 snapshot on its own", ["1"]), "2", "now: running"]


def test_parents_in_a_circle_end_nowhere_and_are_left_out() -> None:
    assert shape(history(workspace(""), versions("v2", "v1"))) == ["now: running"]


def test_a_workspace_that_goes_on_from_what_is_gone_stands_in_a_line_of_its_own() -> None:
    drawn = history(workspace("gone"), versions("", "v1"))
    assert shape(drawn) == [("2 snapshots, one after the other", ["1", "2"]), "now: running"]


def test_snapshots_that_the_catalog_does_not_manage_have_no_place() -> None:
    unmanaged = SnapshotInfo("workspaces/web/lost", False, True)
    assert shape(history(workspace(""), [unmanaged])) == ["now: running"]


def test_a_long_history_is_neither_deep_nor_too_much_for_the_stack() -> None:
    parents = ["", *(f"v{number}" for number in range(1, 3000))]
    drawn = history(workspace("v3000"), versions(*parents))
    assert len(drawn) == 3001
    assert not any(branch.branches for branch in drawn)


def test_a_commit_shows_its_name_and_its_forks() -> None:
    infos = [snapshot("golden-1", "", 1, kind=SnapshotKind.COMMIT, display_name="golden")]
    drawn = history(workspace("golden-1"), infos, {"golden-1": ["web-3", "web-2"]})
    assert drawn[0] == Branch(
        'commit "golden"  Full, 2026-01-01 12:01, 1.0 MiB, remote',
        [Branch("golden-1"), Branch("fork web-2"), Branch("fork web-3")],
    )


def test_a_version_shows_number_name_scope_time_size_and_source() -> None:
    drawn = history(workspace("a"), [snapshot("a", "", 5, 7, display_name="before it broke")])
    assert drawn[0].label == 'version 7 "before it broke"  Full, 2026-01-01 12:05, 1.0 MiB, manual'
