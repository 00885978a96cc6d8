"""Workspaces and what is under way on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from catalog_data import HOST, NOON, add, full_workspace, later, operation, snapshot, workspace
from sqlalchemy.event import listen, remove

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.catalog import Catalog, Transaction
from snaploader.workspace.catalog.tables import spec_document
from snaploader.workspace.model import (
    OwnerStatus,
    Resources,
    RunStatus,
    RunTransition,
    SnapshotStatus,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.policy import DEFAULT_POLICY, Policy


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_gets_an_empty_catalog_of_its_own(catalog: Catalog, database: str, attempt: int) -> None:
    with catalog.transaction() as transaction:
        transaction.set_owner_status("someone", transaction.owner_status(str(attempt)))
    with catalog.reading() as reader:
        assert reader.workspaces() == []
        assert [policy.name for policy in reader.policies()] == [DEFAULT_POLICY]
    assert catalog.dialect == database


def test_a_workspace_comes_back_as_it_was_added(catalog: Catalog) -> None:
    add(catalog, full_workspace(), workspace("plain"))
    with catalog.reading() as reader:
        assert reader.workspace("full") == full_workspace()
        assert reader.workspace("plain") == workspace("plain")


def test_what_a_spec_lacks_is_left_out_of_its_document() -> None:
    assert spec_document(workspace().spec).keys() == {"command", "environment", "volumes", "readiness"}
    resources = spec_document(WorkspaceSpec("one", resources=Resources(vcpus=2)))["resources"]
    assert resources == {"vcpus": 2}


def test_workspaces_are_found_by_all_of_some_labels(catalog: Catalog) -> None:
    labels = {"a": {"team": "web", "tier": "1"}, "b": {"team": "web"}, "c": {"team": "db"}, "d": {}}
    specs = [WorkspaceSpec(name, labels=each) for name, each in labels.items()]
    add(catalog, *(dataclasses.replace(workspace(), spec=spec) for spec in specs))
    with catalog.reading() as reader:

        def found(**how: Any) -> list[str]:
            return [each.id for each in reader.workspaces(**how)]

        assert found(labels={"team": "web"}) == ["a", "b"]
        assert found(labels={"team": "web", "tier": "1"}) == ["a"]
        assert found(labels={"team": "web", "tier": "2"}) == []
        assert found(labels={"tier": ""}) == []
        assert found(labels={"team": "web"}, limit=1) == ["a"]
        assert found(labels={"team": "web"}, limit=1, after="a") == ["b"]
        assert found(labels={"team": "web"}, state=WorkspaceState.PAUSED) == []


def test_an_unknown_workspace_is_not_found(catalog: Catalog) -> None:
    with catalog.reading() as reader, pytest.raises(NotFound, match="no workspace 'nobody'"):
        reader.workspace("nobody")


def test_a_transaction_that_raises_leaves_nothing(catalog: Catalog) -> None:
    with pytest.raises(ZeroDivisionError), catalog.transaction() as transaction:
        transaction.add_workspace(workspace())
        raise ZeroDivisionError
    with catalog.reading() as reader:
        assert reader.workspaces() == []


def test_a_transaction_reads_what_it_wrote_and_nobody_else_does(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        transaction.add_workspace(workspace())
        assert transaction.workspace("ws") == workspace()
        with catalog.reading() as reader:
            assert reader.workspaces() == []


def test_all_changes_of_a_workspace_are_written_in_one_statement(catalog: Catalog) -> None:
    add(catalog, workspace())
    updates: list[str] = []

    def see(*about: Any) -> None:
        if about[2].startswith("UPDATE workspaces"):
            updates.append(about[2])

    listen(catalog._engine, "before_cursor_execute", see)
    with catalog.transaction() as transaction:
        transaction.begin_operation("ws", operation())
        transaction.reserve_versions("ws", 4)
        after = transaction.update_workspace("ws", base="other")
    remove(catalog._engine, "before_cursor_execute", see)
    assert len(updates) == 1
    with catalog.reading() as reader:
        assert (
            reader.workspace("ws") == after == workspace(base="other", last_version=4, operation=operation())
        )


def test_a_change_that_is_not_written_yet_is_found_by_every_query(catalog: Catalog) -> None:
    add(catalog, workspace("a"), workspace("b"))
    with catalog.transaction() as transaction:
        for name in ("a", "b"):
            transaction.update_workspace(name, host="host-b")
        assert [each.id for each in transaction.workspaces(host="host-b")] == ["a", "b"]
        transaction.begin_operation("b", operation())
        assert [each.id for each in transaction.workspaces_with_operation(HOST)] == ["b"]


def test_a_value_that_cannot_be_kept_is_refused_at_once(catalog: Catalog) -> None:
    add(catalog, workspace())
    with pytest.raises(FailedPrecondition, match="nothing was written"), catalog.transaction() as transaction:
        transaction.update_workspace("ws", slot=1)
        with pytest.raises(InvalidArgument, match="no more than 255"):
            transaction.update_workspace("ws", base="x" * 256)
    with catalog.reading() as reader:
        assert reader.workspace("ws") == workspace()


def test_a_reader_sees_one_state_while_others_write(catalog: Catalog) -> None:
    add(catalog, workspace("a"))
    with catalog.reading() as reader:
        assert len(reader.workspaces()) == 1
        add(catalog, workspace("b"))
        assert len(reader.workspaces()) == 1
    with catalog.reading() as reader:
        assert len(reader.workspaces()) == 2


class TestAddWorkspace:
    def test_an_id_is_never_used_again(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        with catalog.transaction() as transaction:
            transaction.update_workspace("ws", state=WorkspaceState.DELETED)
        with pytest.raises(FailedPrecondition, match="'ws' was used before, since 2026-03-01 12:00"):
            add(catalog, workspace())

    def test_its_policy_must_be_known(self, catalog: Catalog) -> None:
        with pytest.raises(NotFound, match="no policy 'strict'"):
            add(catalog, workspace(policy="strict"))

    def test_a_slot_of_a_host_has_one_holder(self, catalog: Catalog) -> None:
        add(catalog, workspace("a", slot=3))
        with pytest.raises(FailedPrecondition, match="slot 3 of host 'host-a' is held"):
            add(catalog, workspace("b", slot=3))
        add(catalog, workspace("c", slot=3, host="host-b"))

    @pytest.mark.parametrize("field", ["owner", "host", "base", "current_snapshot", "autostart_schedule"])
    @pytest.mark.parametrize("text", ["a\0b", "\udc80"])
    def test_text_that_no_database_holds_is_refused(self, catalog: Catalog, field: str, text: str) -> None:
        with pytest.raises(InvalidArgument, match=r"zero byte|no Unicode"):
            add(catalog, workspace(**{field: text}))

    def test_a_name_has_at_most_255_characters(self, catalog: Catalog) -> None:
        add(catalog, workspace(owner="ü" * 255))
        with pytest.raises(InvalidArgument, match="256 characters"):
            add(catalog, workspace("b", owner="ü" * 256))

    def test_a_time_without_zone_is_refused(self, catalog: Catalog) -> None:
        with pytest.raises(InvalidArgument, match="no time zone"):
            add(catalog, workspace(paused_at=NOON.replace(tzinfo=None)))

    def test_a_value_of_the_wrong_type_is_a_type_error(self, catalog: Catalog) -> None:
        with pytest.raises(TypeError, match="text is wanted, not int"):
            add(catalog, workspace(base=3))


class TestUpdateWorkspace:
    def test_what_is_returned_is_what_is_kept(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        changes = {
            field.name: getattr(full_workspace(), field.name)
            for field in dataclasses.fields(full_workspace())
            if field.name not in {"spec", "created_at", "last_version", "operation"}
        }
        with catalog.transaction() as transaction:
            changed = transaction.update_workspace("ws", **changes)
        assert changed == dataclasses.replace(workspace(), **changes)
        with catalog.reading() as reader:
            assert reader.workspace("ws") == changed

    def test_no_change_changes_nothing(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        with catalog.transaction() as transaction:
            assert transaction.update_workspace("ws") == workspace()

    @pytest.mark.parametrize("field", ["id", "created_at", "last_version", "operation", "color"])
    def test_what_never_changes_is_a_type_error(self, catalog: Catalog, field: str) -> None:
        add(catalog, workspace())
        with pytest.raises(TypeError, match=field), catalog.transaction() as transaction:
            transaction.update_workspace("ws", **{field: None})

    def test_an_unknown_one_is_not_found(self, catalog: Catalog) -> None:
        with pytest.raises(NotFound), catalog.transaction() as transaction:
            transaction.update_workspace("nobody", base="x")

    def test_a_slot_that_another_holds_is_refused(self, catalog: Catalog) -> None:
        add(catalog, workspace("a", slot=3), workspace("b"))
        with pytest.raises(FailedPrecondition, match="slot 3"), catalog.transaction() as transaction:
            transaction.update_workspace("b", slot=3)
        with catalog.transaction() as transaction:
            transaction.update_workspace("a", slot=None)
            transaction.update_workspace("b", slot=3)

    def test_deleting_takes_versions_away_and_marks_snapshots(self, catalog: Catalog) -> None:
        add(catalog, workspace(), workspace("other"))
        with catalog.transaction() as transaction:
            for name, owner in (("a", "ws"), ("b", "ws"), ("c", "other")):
                transaction.put_snapshot(snapshot(name, owner))
                transaction.add_version(owner, name, NOON)
            transaction.add_event("ws", "workspace_create", {}, NOON)
            transaction.update_workspace("ws", state=WorkspaceState.DELETED)
        with catalog.reading() as reader:
            assert reader.versions("ws") == []
            assert reader.snapshots("ws") == []
            leaving = reader.snapshots("ws", statuses=[SnapshotStatus.DELETING])
            assert [record.name for record in leaving] == ["a", "b"]
            assert [version.number for version in reader.versions("other")] == [1]
            assert len(reader.events("ws")) == 1

    def test_a_deleted_one_stays_deleted(self, catalog: Catalog) -> None:
        add(catalog, workspace(state=WorkspaceState.DELETED, slot=1))
        with catalog.transaction() as transaction:
            transaction.update_workspace("ws", slot=None)
        with pytest.raises(FailedPrecondition, match="deleted"), catalog.transaction() as transaction:
            transaction.update_workspace("ws", state=WorkspaceState.STOPPED)


def test_a_forgotten_workspace_never_was(catalog: Catalog) -> None:
    add(catalog, workspace(), workspace("other"))
    with catalog.transaction() as transaction:
        for owner in ("ws", "other"):
            transaction.put_snapshot(snapshot(f"of-{owner}", owner))
            transaction.add_version(owner, f"of-{owner}", NOON)
            transaction.add_event(owner, "workspace_create", {}, NOON)
            transaction.add_run(owner, RunTransition.START, NOON, "user")
        transaction.forget_workspace("ws")
    with catalog.reading() as reader:
        assert [each.id for each in reader.workspaces(include_deleted=True)] == ["other"]
        assert [event.workspace_id for event in reader.events()] == ["other"]
        assert [version.number for version in reader.versions("other")] == [1]
        assert reader.runs("ws") == []
    add(catalog, workspace())


class TestOperations:
    def test_one_at_a_time(self, catalog: Catalog) -> None:
        add(catalog, workspace())
        with catalog.transaction() as transaction:
            begun = transaction.begin_operation("ws", operation("first"))
        assert begun.operation == operation("first")
        with (
            pytest.raises(
                FailedPrecondition, match="a rollback is under way on 'host-a' since 2026-03-01 12:00"
            ),
            catalog.transaction() as transaction,
        ):
            transaction.begin_operation("ws", operation("second"))
        with catalog.transaction() as transaction:
            assert transaction.end_operation("ws", "first").operation is None
        with catalog.reading() as reader:
            assert reader.workspace("ws").operation is None

    @pytest.mark.parametrize("under_way", [None, operation("another")])
    def test_only_its_token_ends_it(self, catalog: Catalog, under_way: None) -> None:
        add(catalog, workspace(operation=under_way))
        with (
            pytest.raises(FailedPrecondition, match="its lock was lost"),
            catalog.transaction() as transaction,
        ):
            transaction.end_operation("ws", "mine")
        with catalog.reading() as reader:
            assert reader.workspace("ws").operation == under_way

    def test_a_deleted_workspace_takes_none(self, catalog: Catalog) -> None:
        add(catalog, workspace(state=WorkspaceState.DELETED))
        with pytest.raises(FailedPrecondition, match="deleted"), catalog.transaction() as transaction:
            transaction.begin_operation("ws", operation())

    def test_those_of_a_host_are_listed(self, catalog: Catalog) -> None:
        add(
            catalog,
            workspace("a", operation=operation()),
            workspace("b"),
            workspace("c", host="host-b", operation=dataclasses.replace(operation(), host="host-b")),
        )
        with catalog.reading() as reader:
            assert [each.id for each in reader.workspaces_with_operation(HOST)] == ["a"]


class TestListing:
    @pytest.fixture
    def several(self, catalog: Catalog) -> Catalog:
        add(
            catalog,
            workspace("a", owner="eve"),
            workspace("b", host="host-b", owner="eve"),
            workspace("c", state=WorkspaceState.DELETED, owner="eve"),
            workspace("d", state=WorkspaceState.PAUSED),
        )
        return catalog

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({}, "abd"),
            ({"include_deleted": True}, "abcd"),
            ({"host": "host-b"}, "b"),
            ({"owner": "eve"}, "ab"),
            ({"owner": ""}, "d"),
            ({"state": WorkspaceState.PAUSED}, "d"),
            ({"state": WorkspaceState.DELETED}, "c"),
            ({"after": "a"}, "bd"),
            ({"limit": 2}, "ab"),
            ({"after": "b", "limit": 1, "include_deleted": True}, "c"),
            ({"host": "nowhere"}, ""),
        ],
    )
    def test_workspaces_are_listed_by_id(
        self, several: Catalog, filters: dict[str, object], expected: str
    ) -> None:
        with several.reading() as reader:
            found = reader.workspaces(**filters)  # type: ignore[arg-type]
        assert "".join(each.id for each in found) == expected

    def test_pages_show_each_once(self, catalog: Catalog) -> None:
        # In the order of the bytes on both databases: a language's own order would split pages otherwise.
        ids = sorted(["a-b", "aa", "a0", "b", "ab", "a", "a-", "zz-9"])
        add(catalog, *(workspace(each) for each in ids))
        found: list[str] = []
        with catalog.reading() as reader:
            while page := reader.workspaces(after=found[-1] if found else "", limit=3):
                found += [each.id for each in page]
        assert found == ids


def test_a_refused_change_fails_the_block_even_if_it_is_caught(catalog: Catalog) -> None:
    add(catalog, workspace("a", slot=1))
    with pytest.raises(FailedPrecondition, match="nothing was written"), catalog.transaction() as transaction:
        transaction.add_workspace(workspace("b"))
        with pytest.raises(InvalidArgument):
            transaction.update_workspace("a", owner="x" * 300)
    with catalog.reading() as reader:
        assert [each.id for each in reader.workspaces()] == ["a"]


def test_a_failure_that_is_found_before_the_database_can_be_caught(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        with pytest.raises(NotFound):
            transaction.workspace("ws")
        transaction.add_workspace(workspace())
    with catalog.reading() as reader:
        assert reader.workspace("ws") == workspace()


def test_the_policy_and_owner_may_be_new_in_the_same_transaction(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy("strict"))
        transaction.set_owner_status("eve", OwnerStatus.SUSPENDED)
        transaction.add_workspace(workspace(policy="strict", owner="eve", last_used_at=later(hours=1)))
    with catalog.reading() as reader:
        assert reader.owner_status("eve") is OwnerStatus.SUSPENDED


def test_the_id_of_a_deleted_workspace_is_refused_with_the_time_of_its_deletion(catalog: Catalog) -> None:
    add(catalog, workspace())
    with catalog.transaction() as transaction:
        run = transaction.add_run("ws", RunTransition.DELETE, NOON, "user")
        transaction.finish_run(run.id, RunStatus.SUCCEEDED, later(days=2))
        transaction.update_workspace("ws", state=WorkspaceState.DELETED)
    with pytest.raises(
        FailedPrecondition, match="until it was deleted at 2026-03-03 12:00 UTC: ids are never"
    ):
        add(catalog, workspace())


def test_a_transaction_reads_what_it_has_changed_of_a_workspace(catalog: Catalog) -> None:
    """What it keeps of locked rows is never behind what it wrote, whatever wrote it."""
    add(catalog, workspace(dormant_at=NOON, deleting_at=NOON))
    changes: list[Callable[[Transaction], object]] = [
        lambda tx: tx.begin_operation("ws", operation()),
        lambda tx: tx.end_operation("ws", "token"),
        lambda tx: tx.update_workspace("ws", base="debian"),
        lambda tx: tx.put_snapshot(snapshot()),
        lambda tx: tx.add_version("ws", "snap", NOON),
        lambda tx: tx.reserve_versions("ws", 7),
        lambda tx: tx.put_policy(Policy(delete_after_dormant=timedelta(days=1)), now=NOON),
        lambda tx: tx.begin_operation("ws", operation("again")),
        lambda tx: tx.end_operation("ws", "again", used_at=later(days=1)),
        lambda tx: tx.update_workspace("ws", state=WorkspaceState.DELETED),
    ]
    with catalog.transaction() as transaction:
        for change in changes:
            change(transaction)
            assert transaction.lock_workspace("ws") == transaction.workspace("ws")
        used = transaction.workspace("ws")
        assert (used.last_used_at, used.dormant_at, used.deleting_at) == (later(days=1), None, None)
    with catalog.transaction() as transaction:
        transaction.add_workspace(full_workspace())
        assert transaction.lock_workspace("full") == transaction.workspace("full")
        transaction.forget_workspace("full")
        with pytest.raises(NotFound):
            transaction.lock_workspace("full")


def test_a_snapshot_of_another_workspace_is_not_replaced(catalog: Catalog) -> None:
    add(catalog, workspace(), workspace("other"))
    with catalog.transaction() as transaction:
        transaction.put_snapshot(snapshot())
    with pytest.raises(FailedPrecondition, match="belongs to workspace 'ws'"):  # noqa: SIM117
        with catalog.transaction() as transaction:
            transaction.put_snapshot(snapshot(workspace_id="other"))
    with catalog.reading() as reader:
        assert reader.snapshot("snap") == snapshot()
