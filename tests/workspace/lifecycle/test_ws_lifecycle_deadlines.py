"""Deadlines: set by a start, moved by people and by uses, bounded by the policy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from lifecycle_values import NOW, TICK_APART, run, workspace

from snaploader.errors import FailedPrecondition, InvalidArgument
from snaploader.workspace.deadlines import bumped_deadline, deadline_of_start, extended_deadline
from snaploader.workspace.model import MAX_TTL, check_ttl
from snaploader.workspace.policy import Policy

HOUR = timedelta(hours=1)
STARTED = NOW - 2 * HOUR

OF_START = {
    "nothing sets one": (None, Policy(), None),
    "the policy's": (None, Policy(autostop_after=8 * HOUR), 8 * HOUR),
    "the workspace's own": (3 * HOUR, Policy(), 3 * HOUR),
    "its own before the policy's, shorter": (3 * HOUR, Policy(autostop_after=8 * HOUR), 3 * HOUR),
    "its own before the policy's, longer": (9 * HOUR, Policy(autostop_after=8 * HOUR), 9 * HOUR),
    "bounded, its own": (9 * HOUR, Policy(max_ttl=4 * HOUR), 4 * HOUR),
    "bounded, the policy's": (None, Policy(autostop_after=8 * HOUR, max_ttl=4 * HOUR), 4 * HOUR),
    "within the bound": (3 * HOUR, Policy(max_ttl=4 * HOUR), 3 * HOUR),
    "the bound alone": (None, Policy(max_ttl=4 * HOUR), 4 * HOUR),
}


@pytest.mark.parametrize(("ttl", "policy", "expected"), OF_START.values(), ids=OF_START.keys())
def test_a_start_sets_the_deadline(ttl, policy, expected):
    deadline = deadline_of_start(workspace(ttl=ttl), policy, STARTED)
    assert deadline == (None if expected is None else STARTED + expected)


BUMPED = {
    "the policy has no bump": (NOW + HOUR, Policy(), NOW + HOUR),
    "no deadline": (None, Policy(activity_bump=HOUR), None),
    "sooner than the bump": (NOW + HOUR / 2, Policy(activity_bump=HOUR), NOW + HOUR),
    "later than the bump": (NOW + 3 * HOUR, Policy(activity_bump=HOUR), NOW + 3 * HOUR),
    "just to come": (NOW + TICK_APART, Policy(activity_bump=HOUR), NOW + HOUR),
    "it has passed": (NOW, Policy(activity_bump=HOUR), NOW),
    "bounded": (NOW + HOUR / 2, Policy(activity_bump=3 * HOUR, max_ttl=4 * HOUR), STARTED + 4 * HOUR),
    "already beyond a bound that came later": (
        NOW + 3 * HOUR,
        Policy(activity_bump=9 * HOUR, max_ttl=4 * HOUR),
        NOW + 3 * HOUR,
    ),
}


@pytest.mark.parametrize(("deadline", "policy", "expected"), BUMPED.values(), ids=BUMPED.keys())
def test_a_use_never_makes_a_deadline_earlier_nor_later_than_allowed(deadline, policy, expected):
    started = run(created_at=STARTED, deadline=deadline)
    assert bumped_deadline(started, policy, NOW) == expected


EXTENDED = {
    "by a while": (2 * HOUR, Policy(), NOW + 3 * HOUR),
    "until a time": (NOW + 5 * HOUR, Policy(), NOW + 5 * HOUR),
    "until a time of another zone": (
        datetime.fromisoformat("2026-05-11T20:00+02:00"),
        Policy(),
        datetime(2026, 5, 11, 18, tzinfo=UTC),
    ),
    "as far as the policy allows": (HOUR, Policy(max_ttl=4 * HOUR), NOW + 2 * HOUR),
    "as far as is possible": (NOW + MAX_TTL, Policy(), NOW + MAX_TTL),
}


@pytest.mark.parametrize(("until", "policy", "expected"), EXTENDED.values(), ids=EXTENDED.keys())
def test_a_deadline_is_moved_to_a_later_time(until, policy, expected):
    started = run(created_at=STARTED, deadline=NOW + HOUR)
    assert extended_deadline(started, policy, until, NOW) == expected


REFUSED = {
    "not later": (NOW + HOUR, Policy(), "later time"),
    "earlier": (-HOUR / 2, Policy(), "later time"),
    "later than the policy allows": (HOUR + TICK_APART, Policy(max_ttl=4 * HOUR), "maxTtlSeconds of policy"),
    "later than is possible": (NOW + MAX_TTL + TICK_APART, Policy(), "366 days"),
    "beyond the calendar": (timedelta.max, Policy(), "366 days"),
    "without a zone": (datetime(2027, 1, 1), Policy(), "no time zone"),
}


@pytest.mark.parametrize(("until", "policy", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_deadline_that_cannot_be_is_refused(until, policy, message):
    started = run(created_at=STARTED, deadline=NOW + HOUR)
    with pytest.raises(InvalidArgument, match=message):
        extended_deadline(started, policy, until, NOW)


def test_a_deadline_that_has_passed_is_moved_to_a_time_that_is_to_come():
    overdue = run(created_at=STARTED, deadline=NOW - HOUR)
    assert extended_deadline(overdue, Policy(), HOUR + TICK_APART, NOW) == NOW + TICK_APART
    with pytest.raises(InvalidArgument, match="to come"):
        extended_deadline(overdue, Policy(), HOUR, NOW)


@pytest.mark.parametrize("completed_at", [None, NOW])
def test_a_start_is_no_use_that_moves_its_deadline(completed_at):
    started = run(created_at=STARTED, completed_at=completed_at, deadline=NOW + HOUR / 2)
    assert bumped_deadline(started, Policy(activity_bump=HOUR), NOW) == NOW + HOUR / 2


def test_where_there_is_no_deadline_none_is_moved():
    with pytest.raises(FailedPrecondition, match="has no deadline"):
        extended_deadline(run(), Policy(), HOUR, NOW)


@pytest.mark.parametrize("ttl", [timedelta(0), -HOUR, MAX_TTL + TICK_APART])
def test_a_ttl_has_bounds(ttl):
    with pytest.raises(InvalidArgument, match="TTL"):
        check_ttl(ttl)
