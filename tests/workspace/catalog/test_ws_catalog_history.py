"""Snapshots, versions, events and runs."""

from __future__ import annotations

import pytest
from catalog_data import HOST, NOON, add, add_version, later, snapshot, workspace
from sqlalchemy import select

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.catalog.tables import snapshot_sources
from snaploader.workspace.model import (
    MAX_VERSION,
    Event,
    Run,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    SnapshotStatus,
    Version,
    WorkspaceState,
)

FULL_SNAPSHOT = SnapshotRecord(
    name="ws.1",
    workspace_id="ws",
    runtime_name="workspaces/ws/ws.1",
    kind=SnapshotKind.COMMIT,
    scope=Scope.DATA,
    source=SnapshotSource.PRE_EXEC,
    created_at=later(microseconds=1),
    status=SnapshotStatus.ORPHANED,
    display_name="before\nthe ümlauts",
    parent="ws.0",
    manifest_ref="ab" * 32,
    is_remote=True,
    size_bytes=2**62,
)


@pytest.fixture(autouse=True)
def _workspaces(catalog: Catalog) -> None:
    add(catalog, workspace(), workspace("other"), workspace("far", host="host-b"))


class TestSnapshots:
    def test_one_comes_back_as_it_was_put(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.put_snapshot(FULL_SNAPSHOT)
        with catalog.reading() as reader:
            assert reader.snapshot("ws.1") == FULL_SNAPSHOT

    def test_putting_it_again_replaces_it(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("ws.1", status=SnapshotStatus.PENDING))
            transaction.put_snapshot(FULL_SNAPSHOT)
        with catalog.reading() as reader:
            assert reader.snapshot("ws.1") == FULL_SNAPSHOT

    def test_replacing_one_keeps_its_version(self, catalog: Catalog) -> None:
        add_version(catalog, "snap")
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("snap", is_remote=True))
        with catalog.reading() as reader:
            assert reader.version("ws", 1).snapshot_name == "snap"

    def test_an_unknown_one_is_not_found(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            with pytest.raises(NotFound, match="no snapshot 'nothing'"):
                transaction.snapshot("nothing")
            with pytest.raises(NotFound):
                transaction.set_snapshot_status("nothing", SnapshotStatus.COMPLETE)

    def test_its_workspace_must_be_known(self, catalog: Catalog) -> None:
        with pytest.raises(NotFound, match="'nobody'"), catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("x", "nobody"))

    def test_it_stays_with_its_workspace(self, catalog: Catalog) -> None:
        with pytest.raises(FailedPrecondition, match="belongs to"), catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("x"))
            transaction.put_snapshot(snapshot("x", "other"))

    def test_a_runtime_name_is_of_one_snapshot(self, catalog: Catalog) -> None:
        twin = SnapshotRecord(**{**_fields(snapshot("b")), "runtime_name": snapshot("a").runtime_name})
        with pytest.raises(FailedPrecondition), catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("a"))
            transaction.put_snapshot(twin)

    def test_they_are_listed_by_time_and_status(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("late", created_at=later(hours=1)))
            transaction.put_snapshot(snapshot("b"))
            transaction.put_snapshot(snapshot("a"))
            transaction.put_snapshot(snapshot("pending", status=SnapshotStatus.PENDING))
            transaction.put_snapshot(snapshot("foreign", "other"))
        with catalog.reading() as reader:
            assert [each.name for each in reader.snapshots("ws")] == ["a", "b", "late"]
            pending = reader.snapshots("ws", statuses=[SnapshotStatus.PENDING, SnapshotStatus.DELETING])
            assert [each.name for each in pending] == ["pending"]

    def test_the_unfinished_ones_of_a_host_are_listed(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            for status in SnapshotStatus:
                transaction.put_snapshot(snapshot(f"own-{status}", status=status))
                transaction.put_snapshot(snapshot(f"far-{status}", "far", status=status))
        with catalog.reading() as reader:
            names = [each.name for each in reader.unfinished_snapshots(HOST)]
        assert names == ["own-deleting", "own-orphaned", "own-pending"]

    def test_removing_one_takes_its_version_too_and_can_be_repeated(self, catalog: Catalog) -> None:
        add_version(catalog, "a")
        add_version(catalog, "b")
        for _attempt in range(2):
            with catalog.transaction() as transaction:
                transaction.remove_snapshot("b")
        with catalog.reading() as reader:
            assert [version.number for version in reader.versions("ws")] == [1]
        assert add_version(catalog, "c") == 3

    def test_a_version_whose_snapshot_leaves_is_not_shown(self, catalog: Catalog) -> None:
        add_version(catalog, "a")
        with catalog.transaction() as transaction:
            transaction.set_snapshot_status("a", SnapshotStatus.DELETING)
        with catalog.reading() as reader:
            assert reader.versions("ws") == []
            with pytest.raises(NotFound):
                reader.version("ws", 1)


class TestVersions:
    def test_numbers_of_each_workspace_rise_from_1(self, catalog: Catalog) -> None:
        assert [add_version(catalog, name) for name in "abc"] == [1, 2, 3]
        assert add_version(catalog, "d", "other") == 1
        with catalog.reading() as reader:
            assert [version.number for version in reader.versions("ws")] == [1, 2, 3]
            assert reader.workspace("ws").last_version == 3

    def test_one_tells_what_its_snapshot_is(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("a", source=SnapshotSource.PRE_EXEC))
            made = transaction.add_version("ws", "a", later(seconds=5), "before the upgrade")
        expected = Version(
            id=made.id,
            workspace_id="ws",
            number=1,
            snapshot_name="a",
            runtime_name="workspaces/ws/a",
            display_name="before the upgrade",
            source=SnapshotSource.PRE_EXEC,
            created_at=later(seconds=5),
        )
        assert made == expected
        with catalog.reading() as reader:
            assert reader.version("ws", 1) == expected

    def test_one_tells_in_what_words_its_snapshot_says_why(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("a", source="nightly"))
            assert transaction.add_version("ws", "a", later(seconds=5)).source == "nightly"
        with catalog.reading() as reader:
            assert reader.version("ws", 1).source == "nightly"
            assert [each.source for each in reader.versions("ws")] == ["nightly"]
            assert reader.snapshot("a").source == "nightly"

    def test_words_go_with_their_snapshot(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            for name in "ab":
                transaction.put_snapshot(snapshot(name, source="nightly"))
            transaction.remove_snapshot("a")
            transaction.forget_workspace("ws")
        with catalog._engine.connect() as connection:
            assert connection.execute(select(snapshot_sources)).all() == []

    def test_one_without_a_name_is_called_by_its_number(self, catalog: Catalog) -> None:
        add_version(catalog, "a")
        add_version(catalog, "b")
        with catalog.reading() as reader:
            assert [each.display_name for each in reader.versions("ws")] == ["Version 1", "Version 2"]

    @pytest.mark.parametrize("number", [0, -1, 2, MAX_VERSION, 2**63, 2**200])
    def test_a_number_that_there_is_not_is_not_found(self, catalog: Catalog, number: int) -> None:
        add_version(catalog, "a")
        with catalog.reading() as reader, pytest.raises(NotFound, match=f"no version {number}"):
            reader.version("ws", number)

    def test_a_number_is_not_used_again_after_a_failure(self, catalog: Catalog) -> None:
        with pytest.raises(ZeroDivisionError), catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot("a"))
            assert transaction.add_version("ws", "a", NOON).number == 1
            raise ZeroDivisionError
        assert add_version(catalog, "b") == 1  # nobody has seen it

    @pytest.mark.parametrize(
        "record",
        [snapshot("x", status=SnapshotStatus.PENDING), snapshot("x", "other")],
        ids=["pending", "of another workspace"],
    )
    def test_only_a_complete_snapshot_of_its_own_can_be_one(
        self, catalog: Catalog, record: SnapshotRecord
    ) -> None:
        with pytest.raises(FailedPrecondition, match="only a complete"), catalog.transaction() as transaction:
            transaction.put_snapshot(record)
            transaction.add_version("ws", "x", NOON)

    def test_a_snapshot_is_one_version(self, catalog: Catalog) -> None:
        add_version(catalog, "a")
        with (
            pytest.raises(FailedPrecondition, match="a version already"),
            catalog.transaction() as transaction,
        ):
            transaction.add_version("ws", "a", NOON)

    def test_the_last_number_is_the_last(self, catalog: Catalog) -> None:
        add(catalog, workspace("old", last_version=MAX_VERSION - 1))
        assert add_version(catalog, "a", "old") == MAX_VERSION
        with pytest.raises(ResourceExhausted, match="fork it"):
            add_version(catalog, "b", "old")

    def test_a_deleted_workspace_gets_none(self, catalog: Catalog) -> None:
        add(catalog, workspace("gone", state=WorkspaceState.DELETED))
        with pytest.raises(FailedPrecondition, match="deleted"):
            add_version(catalog, "a", "gone")


class TestEvents:
    def test_they_are_listed_in_the_order_of_writing(self, catalog: Catalog) -> None:
        payload = {"version": 1, "nested": {"list": [1, None, "ü\x00\udc80"]}, "": 0.5}
        with catalog.transaction() as transaction:
            first = transaction.add_event("ws", "version_create", payload, NOON)
            second = transaction.add_event("other", "snapshot_create", {}, later(hours=-1))
        assert first == Event(first.id, "ws", "version_create", payload, NOON)
        with catalog.reading() as reader:
            assert reader.events() == [first, second]
            assert reader.events("ws") == [first]
            assert reader.events(after=first.id) == [second]
            assert reader.events(types=["snapshot_create", "none"]) == [second]
            assert reader.events(limit=1) == [first]
            assert reader.events("nobody") == []

    def test_a_listing_is_bounded_unless_told_otherwise(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            for number in range(1005):
                transaction.add_event("ws", "tick", {"number": number}, NOON)
        with catalog.reading() as reader:
            assert len(reader.events()) == 1000
            assert len(reader.events(limit=None)) == 1005

    def test_one_of_a_deleted_workspace_can_be_written(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.update_workspace("ws", state=WorkspaceState.DELETED)
            transaction.add_event("ws", "workspace_delete", {}, NOON)
        with catalog.reading() as reader:
            assert [event.type for event in reader.events("ws")] == ["workspace_delete"]

    def test_its_workspace_must_be_known(self, catalog: Catalog) -> None:
        with pytest.raises(NotFound), catalog.transaction() as transaction:
            transaction.add_event("nobody", "x", {}, NOON)

    @pytest.mark.parametrize("payload", [{"x": NOON}, {"x": float("nan")}])
    def test_a_payload_is_json(self, catalog: Catalog, payload: dict[str, object]) -> None:
        with pytest.raises(InvalidArgument, match="JSON"), catalog.transaction() as transaction:
            transaction.add_event("ws", "x", payload, NOON)

    def test_ids_are_not_used_again(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            last = transaction.add_event("ws", "x", {}, NOON).id
            transaction.forget_workspace("ws")
        with catalog.transaction() as transaction:
            assert transaction.add_event("other", "x", {}, NOON).id > last


class TestRuns:
    def test_one_begins_and_ends(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            begun = transaction.add_run("ws", RunTransition.START, NOON, "user", deadline=later(hours=8))
        assert begun == Run(
            id=begun.id,
            workspace_id="ws",
            transition=RunTransition.START,
            status=RunStatus.RUNNING,
            created_at=NOON,
            deadline=later(hours=8),
            reason="user",
        )
        with catalog.reading() as reader:
            assert reader.latest_run("ws") == begun
        with catalog.transaction() as transaction:
            ended = transaction.finish_run(begun.id, RunStatus.FAILED, later(minutes=1), "no such command")
        assert (ended.status, ended.completed_at, ended.error) == (
            RunStatus.FAILED,
            later(minutes=1),
            "no such command",
        )
        with catalog.reading() as reader:
            assert reader.runs("ws") == [ended]

    def test_the_latest_is_the_one_that_was_written_last(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            transaction.add_run("ws", RunTransition.START, NOON, "user")
            last = transaction.add_run("ws", RunTransition.STOP, later(hours=-1), "user")
            transaction.add_run("other", RunTransition.START, NOON, "user")
        with catalog.reading() as reader:
            assert reader.latest_run("ws") == last
            assert reader.latest_run("far") is None
            assert [run.transition for run in reader.runs("ws")] == [RunTransition.START, RunTransition.STOP]

    def test_it_ends_once(self, catalog: Catalog) -> None:
        with catalog.transaction() as transaction:
            run = transaction.add_run("ws", RunTransition.START, NOON, "user")
            transaction.finish_run(run.id, RunStatus.SUCCEEDED, NOON)
            with pytest.raises(FailedPrecondition, match="ended before"):
                transaction.finish_run(run.id, RunStatus.FAILED, NOON)
            with pytest.raises(InvalidArgument, match="succeeded or failed"):
                transaction.finish_run(run.id, RunStatus.RUNNING, NOON)
            with pytest.raises(NotFound, match="no run"):
                transaction.finish_run(run.id + 1, RunStatus.FAILED, NOON)


def _fields(record: SnapshotRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
