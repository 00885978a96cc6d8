"""Policies and owners."""

from __future__ import annotations

from datetime import timedelta

import pytest
from catalog_data import add, workspace

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.model import OwnerStatus, Scope, WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY, Policy, ScopePolicy, StopAction

STRICT = Policy(
    "strict/Ü",
    ScopePolicy(Scope.FULL, Scope.DATA),
    autostop_after=timedelta(hours=8, microseconds=1),
    autostop_action=StopAction.PAUSE,
    autostart_allowed=False,
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


def test_nobody_cannot_be_suspended(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument, match="name the owner"), catalog.transaction() as transaction:
        transaction.set_owner_status("", OwnerStatus.SUSPENDED)
