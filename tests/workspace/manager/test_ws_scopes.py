"""Scopes and policies: what a commit may hold of what a pause holds, in the words of who wrote the policy."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Scope, SnapshotSource
from snaploader.workspace.policy import Policy, ScopePolicy, StopAction

FULL, DATA = Scope.FULL, Scope.DATA


def test_on_pause_is_full_unless_it_is_said_otherwise() -> None:
    assert Policy().scopes.on_pause is FULL
    assert Policy.from_mapping("p", {}).scopes.on_pause is FULL


@pytest.mark.parametrize("on_pause", list(Scope))
def test_on_commit_is_what_on_pause_is_unless_it_is_said_otherwise(on_pause: Scope) -> None:
    assert ScopePolicy(on_pause).commit_scope is on_pause
    assert Policy.from_mapping("p", {"onPause": on_pause.value}).scopes.commit_scope is on_pause


@pytest.mark.parametrize(("on_pause", "on_commit"), [(FULL, FULL), (FULL, DATA), (DATA, DATA)])
def test_a_commit_may_hold_what_a_pause_holds_or_less(on_pause: Scope, on_commit: Scope) -> None:
    assert ScopePolicy(on_pause, on_commit).commit_scope is on_commit


@pytest.mark.parametrize(
    "values", [{"onPause": "Data", "onCommit": "Full"}, {"onPause": "data", "onCommit": "full"}]
)
def test_full_under_data_is_an_error_that_names_the_fields_as_the_user_spells_them(
    values: dict[str, str],
) -> None:
    with pytest.raises(InvalidArgument) as failure:
        Policy.from_mapping("p", values)
    text = str(failure.value)
    assert "onCommit is Full and onPause is Data" in text
    assert "on_commit" not in text
    assert "on_pause" not in text
    with pytest.raises(InvalidArgument, match="onCommit is Full and onPause is Data"):
        ScopePolicy(DATA, FULL)


@pytest.mark.parametrize("text", ["Full", "full", "FULL"])
def test_scopes_are_read_in_any_case(text: str) -> None:
    assert Scope.parse(text) is FULL


@pytest.mark.parametrize("text", ["", "Half", None, 3])
def test_what_is_no_scope_is_refused(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="use Full or Data"):
        Scope.parse(text)


def test_full_includes_both_and_data_only_itself() -> None:
    assert [FULL.includes(DATA), FULL.includes(FULL), DATA.includes(DATA), DATA.includes(FULL)] == [
        True,
        True,
        True,
        False,
    ]


def test_an_empty_source_means_manual() -> None:
    assert SnapshotSource.parse("") is SnapshotSource.MANUAL
    assert SnapshotSource.parse(" \t ") is SnapshotSource.MANUAL
    assert SnapshotSource.parse(" pre_exec\n") is SnapshotSource.PRE_EXEC


def test_other_words_are_a_source_without_the_white_space_around_them() -> None:
    assert SnapshotSource.parse("  nightly backup ") == "nightly backup"
    assert SnapshotSource.parse("x" * 200 + " ") == "x" * 200


@pytest.mark.parametrize("text", ["x" * 201, "two\nlines", "\0", "\udc80", None, 5])
def test_a_source_that_is_too_long_or_not_printable_is_refused(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="no source of a snapshot: use up to 200 printable"):
        SnapshotSource.parse(text)


EVERYTHING = {
    "onPause": "Full",
    "onCommit": "Data",
    "autostopAfterSeconds": 3600.0,
    "autostopAction": "pause",
    "autostartAllowed": False,
    "failureTtlSeconds": 0.5,
    "timeUntilDormantSeconds": 86400.0,
    "deleteAfterDormantSeconds": 1.5,
}


def test_a_policy_is_read_and_spelled_the_same() -> None:
    policy = Policy.from_mapping("p", EVERYTHING)
    assert policy.to_mapping() == EVERYTHING
    assert policy.autostop_after == timedelta(hours=1)
    assert policy.autostop_action is StopAction.PAUSE
    assert Policy.from_mapping("p", policy.to_mapping()) == policy


def test_rules_that_are_off_are_left_out() -> None:
    assert Policy().to_mapping() == {"onPause": "Full", "autostopAction": "stop", "autostartAllowed": True}
    assert Policy.from_mapping("default", {"failureTtlSeconds": None}) == Policy()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"onpause": "Full"}, "onpause"),
        ({"onPause": "Half"}, "onPause"),
        ({"onCommit": 1}, "onCommit"),
        ({"autostopAfterSeconds": 0}, "autostopAfterSeconds"),
        ({"autostopAfterSeconds": -1}, "autostopAfterSeconds"),
        ({"autostopAfterSeconds": True}, "autostopAfterSeconds"),
        ({"autostopAfterSeconds": "1"}, "autostopAfterSeconds"),
        ({"failureTtlSeconds": float("nan")}, "failureTtlSeconds"),
        ({"failureTtlSeconds": 1e11}, "failureTtlSeconds"),
        ({"autostopAction": "explode"}, "autostopAction"),
        ({"autostartAllowed": "yes"}, "autostartAllowed"),
    ],
)
def test_a_wrong_field_is_named_as_it_was_given(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        Policy.from_mapping("p", values)


def test_durations_must_be_above_zero() -> None:
    with pytest.raises(InvalidArgument, match="timeUntilDormantSeconds of policy 'p' must be above 0"):
        Policy("p", time_until_dormant=timedelta(0))


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_policy_needs_a_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        Policy(name)
