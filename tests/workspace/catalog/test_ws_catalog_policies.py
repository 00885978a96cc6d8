"""Policies and owners."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from catalog_data import HOST, NOON, add, later, workspace
from sqlalchemy import text

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.catalog import Catalog, Transaction
from snaploader.workspace.model import OwnerStatus, Scope, WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY, Policy, ScopePolicy, StopAction
from snaploader.workspace.schedule import Weekday

STRICT = Policy(
    "strict/Ü",
    ScopePolicy(Scope.FULL, Scope.DATA),
    autostop_after=timedelta(hours=8, microseconds=1),
    max_ttl=timedelta(hours=10),
    activity_bump=timedelta(minutes=30),
    autostop_action=StopAction.PAUSE,
    autostart_allowed=False,
    autostart_weekdays=frozenset({Weekday.SAT, Weekday.MON}),
    failure_ttl=timedelta(days=10_000),
    time_until_dormant=timedelta(days=30),
    delete_after_dormant=timedelta(microseconds=1),
)


def test_the_default_policy_exists_and_does_nothing(catalog: Catalog) -> None:
    with catalog.reading() as reader:
        assert reader.policy(DEFAULT_POLICY) == Policy()


def test_a_policy_comes_back_as_it_was_put(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        transaction.put_policy(STRICT)
        transaction.put_policy(Policy("a"))
    with catalog.reading() as reader:
        assert reader.policy(STRICT.name) == STRICT
        assert [policy.name for policy in reader.policies()] == ["a", DEFAULT_POLICY, STRICT.name]


def test_putting_it_again_replaces_it(catalog: Catalog) -> None:
    changed = Policy(DEFAULT_POLICY, failure_ttl=timedelta(seconds=1))
    with catalog.transaction() as transaction:
        transaction.put_policy(changed)
        assert transaction.policy(DEFAULT_POLICY) == changed
        transaction.put_policy(Policy())
    with catalog.reading() as reader:
        assert reader.policy(DEFAULT_POLICY) == Policy()


def test_a_duration_that_cannot_be_kept_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument, match="failureTtlSeconds"), catalog.transaction() as transaction:
        transaction.put_policy(Policy("long", failure_ttl=timedelta.max))


def test_an_unknown_policy_is_not_found(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        with pytest.raises(NotFound, match="no policy 'strict'"):
            transaction.policy("strict")
        with pytest.raises(NotFound, match="no policy 'strict'"):
            transaction.remove_policy("strict")


def test_a_policy_that_nobody_follows_can_be_removed(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        transaction.put_policy(STRICT)
        transaction.remove_policy(STRICT.name)
    with catalog.reading() as reader:
        assert [policy.name for policy in reader.policies()] == [DEFAULT_POLICY]


def test_the_default_policy_cannot_be_removed(catalog: Catalog) -> None:
    with pytest.raises(FailedPrecondition, match="exists always"), catalog.transaction() as transaction:
        transaction.remove_policy(DEFAULT_POLICY)


def test_a_policy_that_is_followed_cannot_be_removed(catalog: Catalog) -> None:
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy("strict"))
        transaction.add_workspace(workspace(policy="strict"))
    with (
        pytest.raises(FailedPrecondition, match="followed by workspace 'ws'"),
        catalog.transaction() as transaction,
    ):
        transaction.remove_policy("strict")
    with catalog.transaction() as transaction:
        transaction.update_workspace("ws", state=WorkspaceState.DELETED)
        transaction.remove_policy("strict")
    with catalog.reading() as reader:
        assert reader.workspace("ws").policy == DEFAULT_POLICY


def test_an_owner_is_active_until_suspended(catalog: Catalog) -> None:
    add(catalog, workspace(owner="eve"))
    with catalog.transaction() as transaction:
        assert transaction.owner_status("eve") is OwnerStatus.ACTIVE
        assert transaction.owner_status("nobody") is OwnerStatus.ACTIVE
        transaction.set_owner_status("eve", OwnerStatus.SUSPENDED)
    add(catalog, workspace("another", owner="eve"))  # keeps the status
    with catalog.transaction() as transaction:
        assert transaction.owner_status("eve") is OwnerStatus.SUSPENDED
        transaction.set_owner_status("eve", OwnerStatus.ACTIVE)
    with catalog.reading() as reader:
        assert reader.owner_status("eve") is OwnerStatus.ACTIVE


def test_a_dormant_owner_is_an_active_one_to_an_earlier_release(catalog: Catalog) -> None:
    def kept() -> str:
        with catalog._engine.connect() as connection:
            return str(connection.execute(text("SELECT status FROM owners")).scalar_one())

    def status() -> OwnerStatus:
        with catalog.reading() as reader:
            return reader.owner_status("eve")

    for _ in range(2):  # also when it is said again
        with catalog.transaction() as transaction:
            transaction.set_owner_status("eve", OwnerStatus.DORMANT)
            assert transaction.owner_status("eve") is OwnerStatus.DORMANT
    assert (kept(), status()) == ("active", OwnerStatus.DORMANT)
    with catalog._engine.begin() as connection:  # as an earlier release does
        connection.execute(text("UPDATE owners SET status = 'suspended'"))
    assert status() is OwnerStatus.SUSPENDED
    with catalog.transaction() as transaction:
        transaction.set_owner_status("eve", OwnerStatus.ACTIVE)
    assert (kept(), status()) == ("active", OwnerStatus.ACTIVE)


def test_nobody_cannot_be_suspended(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument, match="name the owner"), catalog.transaction() as transaction:
        transaction.set_owner_status("", OwnerStatus.SUSPENDED)


DAY = timedelta(days=1)


def _dormant(catalog: Catalog, after: timedelta | None) -> None:
    """A workspace `ws` that was marked dormant at noon, under policy `strict`."""
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy("strict", delete_after_dormant=after))
        deleting_at = None if after is None else NOON + after
        transaction.add_workspace(workspace(policy="strict", dormant_at=NOON, deleting_at=deleting_at))


def _deletion(catalog: Catalog) -> tuple[datetime | None, bool]:
    """When it is to be deleted, and whether the query for what is due finds it long after."""
    with catalog.reading() as reader:
        return reader.workspace("ws").deleting_at, bool(reader.due(later(days=999), host=HOST))


def _put(after: timedelta | None) -> Callable[[Transaction], object]:
    return lambda tx: tx.put_policy(Policy("strict", delete_after_dormant=after), now=later(days=100))


def _follow(after: timedelta | None) -> Callable[[Transaction], object]:
    def follow(tx: Transaction) -> None:
        tx.put_policy(Policy("other", delete_after_dormant=after))
        tx.update_workspace("ws", policy="other", now=later(days=100))

    return follow


@pytest.mark.parametrize("change", [_put, _follow], ids=["policy is changed", "another policy is followed"])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param(7 * DAY, None, None, id="gone"),
        pytest.param(7 * DAY, 30 * DAY, later(days=30), id="longer"),
        pytest.param(7 * DAY, DAY, later(days=7), id="shorter"),
        pytest.param(None, 7 * DAY, later(days=107), id="new"),
        pytest.param(None, None, None, id="none"),
        pytest.param(7 * DAY, 7 * DAY, later(days=7), id="same"),
    ],
)
def test_the_deletion_of_a_dormant_workspace_follows_its_policy(
    catalog: Catalog,
    change: Callable[[timedelta | None], Callable[[Transaction], object]],
    before: timedelta | None,
    after: timedelta | None,
    expected: datetime | None,
) -> None:
    _dormant(catalog, before)
    with catalog.transaction() as transaction:
        change(after)(transaction)
    assert _deletion(catalog) == (expected, expected is not None)


def test_a_deletion_that_was_taken_out_and_put_back_counts_from_then(catalog: Catalog) -> None:
    _dormant(catalog, 7 * DAY)
    for after in (None, 7 * DAY):
        with catalog.transaction() as transaction:
            _put(after)(transaction)
    assert _deletion(catalog) == (later(days=107), True)


def test_a_time_left_over_from_a_policy_without_deletion_is_no_deletion(catalog: Catalog) -> None:
    _dormant(catalog, None)
    with catalog.transaction() as transaction:
        transaction.update_workspace("ws", deleting_at=NOON)
    assert _deletion(catalog) == (NOON, False)
    with catalog.transaction() as transaction:
        _put(7 * DAY)(transaction)
    assert _deletion(catalog) == (later(days=107), True)


def test_a_changed_policy_leaves_those_alone_that_are_not_dormant(catalog: Catalog) -> None:
    add(catalog, workspace())
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy(delete_after_dormant=DAY))
    assert _deletion(catalog) == (None, False)
