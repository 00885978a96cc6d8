"""The decision: both sides of each time limit, each condition switched off alone, the order of the rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from lifecycle_values import CREATED, NOW, TICK_APART, run, workspace

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import OwnerStatus, Run, RunStatus, RunTransition, Workspace, WorkspaceState
from snaploader.workspace.policy import (
    RETRY_DELETE_AFTER,
    Policy,
    Situation,
    StopAction,
    Transition,
    deletion_time,
)
from snaploader.workspace.schedule import parse_weekdays

RUNNING, STOPPED, PAUSED, DELETED = (
    WorkspaceState.RUNNING,
    WorkspaceState.STOPPED,
    WorkspaceState.PAUSED,
    WorkspaceState.DELETED,
)
DAILY_AT_NOON = "0 12 * * *"
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Case:
    workspace: Workspace = field(default_factory=workspace)
    run: Run | None = field(default_factory=run)
    policy: Policy = field(default_factory=Policy)
    owner: OwnerStatus = OwnerStatus.ACTIVE
    tick: datetime = NOW

    def decision(self) -> Transition | None:
        return Situation(self.workspace, self.run, self.policy, self.owner).decide(self.tick)

    def but(self, **changes: Any) -> Case:
        """Names of changes begin with the part they are of: `run_status`, `policy_failure_ttl`; or `tick`."""
        parts: dict[str, dict[str, Any]] = {"workspace": {}, "run": {}, "policy": {}}
        own = {}
        for name, value in changes.items():
            part, _, attribute = name.partition("_")
            if attribute:
                parts[part][attribute] = value
            else:
                own[name] = value
        changed = {part: replace(getattr(self, part), **values) for part, values in parts.items() if values}
        return replace(self, **{**changed, **own})


AUTOSTOP = Case(workspace(RUNNING), run(deadline=NOW))
SUSPENDED = Case(workspace(RUNNING), run(), owner=OwnerStatus.SUSPENDED)
AUTOSTART = Case(
    workspace(STOPPED, autostart_schedule=DAILY_AT_NOON),
    run(RunTransition.STOP, created_at=NOW - timedelta(hours=20)),
)
FAILED_STOP = Case(
    workspace(RUNNING),
    run(status=RunStatus.FAILED, completed_at=NOW - HOUR - TICK_APART),
    Policy(failure_ttl=HOUR),
)
DORMANCY = Case(
    workspace(STOPPED, last_used_at=NOW - HOUR - TICK_APART), run(), Policy(time_until_dormant=HOUR)
)
DELETE = Case(
    workspace(STOPPED, dormant_at=NOW - HOUR, deleting_at=NOW - TICK_APART),
    policy=Policy(delete_after_dormant=HOUR),
)
FAILED_DELETE = DELETE.but(
    run=run(
        RunTransition.DELETE,
        RunStatus.FAILED,
        created_at=NOW - timedelta(days=3),
        completed_at=NOW - RETRY_DELETE_AFTER,
    )
)

DUE = {
    "autostop at the deadline": (AUTOSTOP, Transition.AUTOSTOP),
    "autostop of a suspended owner's": (SUSPENDED, Transition.AUTOSTOP),
    "autostop of a dormant owner's at the deadline": (
        AUTOSTOP.but(owner=OwnerStatus.DORMANT),
        Transition.AUTOSTOP,
    ),
    "autostart at the schedule's time": (AUTOSTART, Transition.AUTOSTART),
    "autostart on an allowed day": (
        AUTOSTART.but(policy_autostart_weekdays=parse_weekdays("mon")),
        Transition.AUTOSTART,
    ),
    "autostart on the first allowed day after others": (
        AUTOSTART.but(
            run_created_at=NOW - timedelta(days=5), policy_autostart_weekdays=parse_weekdays("mon,wed")
        ),
        Transition.AUTOSTART,
    ),
    "stop after a failed start": (FAILED_STOP, Transition.FAILED_STOP),
    "dormancy": (DORMANCY, Transition.DORMANCY),
    "delete of a dormant one": (DELETE, Transition.DELETE),
    "delete again a day after it failed": (FAILED_DELETE, Transition.DELETE),
}


@pytest.mark.parametrize(("case", "expected"), DUE.values(), ids=DUE.keys())
def test_each_transition_is_due_from_its_time_on_and_not_one_microsecond_earlier(case, expected):
    assert case.decision() is expected
    assert replace(case, tick=NOW + timedelta(days=400)).decision() is expected
    if case.owner is not OwnerStatus.SUSPENDED:
        assert replace(case, tick=NOW - TICK_APART).decision() is None
        assert Situation(case.workspace, case.run, case.policy, case.owner).earliest_due() == NOW


def test_exactly_at_a_limit_a_deadline_has_come_and_a_duration_has_not_passed():
    at_limit = {
        Transition.AUTOSTOP: AUTOSTOP.but(run_deadline=NOW),
        Transition.AUTOSTART: AUTOSTART,
        Transition.FAILED_STOP: FAILED_STOP.but(run_completed_at=NOW - HOUR),
        Transition.DORMANCY: DORMANCY.but(workspace_last_used_at=NOW - HOUR),
        Transition.DELETE: DELETE.but(workspace_deleting_at=NOW),
    }
    assert {case.decision() for case in at_limit.values()} == {
        Transition.AUTOSTOP,
        Transition.AUTOSTART,
        None,
    }
    for transition in (Transition.FAILED_STOP, Transition.DORMANCY, Transition.DELETE):
        assert at_limit[transition].decision() is None
        assert at_limit[transition].but(tick=NOW + TICK_APART).decision() is transition


DAY = timedelta(days=1)
DORMANT_AT = NOW - 3 * DAY
DELETION_TIMES = {
    "never announced, and none in the policy": (None, None, None),
    "in the policy from now on": (None, 7 * DAY, NOW + 7 * DAY),
    "gone from the policy": (DORMANT_AT + 7 * DAY, None, None),
    "unchanged": (DORMANT_AT + 7 * DAY, 7 * DAY, DORMANT_AT + 7 * DAY),
    "longer": (DORMANT_AT + 7 * DAY, 30 * DAY, DORMANT_AT + 30 * DAY),
    "shorter: not before it was announced": (DORMANT_AT + 7 * DAY, DAY, DORMANT_AT + 7 * DAY),
    "a little longer than what was put back": (NOW + 7 * DAY, 8 * DAY, NOW + 7 * DAY),
    "beyond the calendar": (None, timedelta.max, None),
    "longer, beyond the calendar": (DORMANT_AT + 7 * DAY, timedelta.max, None),
}


@pytest.mark.parametrize(
    ("announced", "after", "expected"), DELETION_TIMES.values(), ids=DELETION_TIMES.keys()
)
def test_a_changed_policy_never_brings_a_deletion_forward(announced, after, expected):
    assert deletion_time(DORMANT_AT, announced, after, NOW) == expected


def test_a_failed_delete_is_tried_again_after_24_hours():
    assert timedelta(hours=24) == RETRY_DELETE_AFTER
    assert FAILED_DELETE.but(run_completed_at=NOW - timedelta(hours=24)).decision() is Transition.DELETE
    assert FAILED_DELETE.but(run_completed_at=NOW - timedelta(hours=24) + TICK_APART).decision() is None


NOT_DUE = {
    # autostop: running, not dormant, last run did not fail, a deadline is set
    "stopped has no deadline": AUTOSTOP.but(workspace_state=STOPPED),
    "paused has no deadline": AUTOSTOP.but(workspace_state=PAUSED),
    "deleted has no deadline": AUTOSTOP.but(workspace_state=DELETED),
    "dormant is not autostopped": AUTOSTOP.but(workspace_dormant_at=NOW),
    "failed is not autostopped": AUTOSTOP.but(run_status=RunStatus.FAILED),
    "no deadline": AUTOSTOP.but(run_deadline=None),
    "no run, no deadline": AUTOSTOP.but(run=None),
    # the same, because the owner is suspended
    "suspended, stopped": SUSPENDED.but(workspace_state=STOPPED),
    "suspended, paused": SUSPENDED.but(workspace_state=PAUSED),
    "suspended, deleted": SUSPENDED.but(workspace_state=DELETED),
    "suspended, dormant": SUSPENDED.but(workspace_dormant_at=NOW),
    "suspended, failed": SUSPENDED.but(run_status=RunStatus.FAILED),
    "not suspended": SUSPENDED.but(owner=OwnerStatus.ACTIVE),
    "dormant owners are not suspended": SUSPENDED.but(owner=OwnerStatus.DORMANT),
    # autostart: owner active, stopped, not dormant, last run did not fail, allowed, set
    "owner of autostart is suspended": AUTOSTART.but(owner=OwnerStatus.SUSPENDED),
    "owner of autostart is dormant": AUTOSTART.but(owner=OwnerStatus.DORMANT),
    "the day is not allowed": AUTOSTART.but(policy_autostart_weekdays=parse_weekdays("tue-sun")),
    "no day of the schedule is allowed": AUTOSTART.but(
        workspace_autostart_schedule="0 12 * * SAT", policy_autostart_weekdays=parse_weekdays("mon-fri")
    ),
    "autostart, deleted": AUTOSTART.but(workspace_state=DELETED),
    "autostart, running": AUTOSTART.but(workspace_state=RUNNING),
    "autostart, dormant": AUTOSTART.but(workspace_dormant_at=NOW),
    "autostart, last run failed": AUTOSTART.but(run_status=RunStatus.FAILED),
    "autostart is not allowed": AUTOSTART.but(policy_autostart_allowed=False),
    "no schedule": AUTOSTART.but(workspace_autostart_schedule=""),
    "schedule that cannot be read": AUTOSTART.but(
        workspace_autostart_schedule="CRON_TZ=Mars/Base 0 12 * * *"
    ),
    "schedule's next time is tomorrow": AUTOSTART.but(run_created_at=NOW),
    # failed-stop: TTL set, the start failed
    "no failure TTL": FAILED_STOP.but(policy_failure_ttl=None),
    "start did not fail": FAILED_STOP.but(run_status=RunStatus.SUCCEEDED),
    "start is under way": FAILED_STOP.but(run_status=RunStatus.RUNNING),
    "a stop failed": FAILED_STOP.but(run_transition=RunTransition.STOP),
    "a delete failed": FAILED_STOP.but(run_transition=RunTransition.DELETE),
    "no run failed": FAILED_STOP.but(run=None),
    "failed and not completed": FAILED_STOP.but(run_completed_at=None),
    "failed and deleted": FAILED_STOP.but(workspace_state=DELETED),
    # dormancy: time-until-dormant set, not used for longer
    "never dormant": DORMANCY.but(policy_time_until_dormant=None),
    "used": DORMANCY.but(workspace_last_used_at=NOW),
    "dormant already": DORMANCY.but(workspace_dormant_at=NOW - timedelta(days=1)),
    "unused and deleted": DORMANCY.but(workspace_state=DELETED),
    # delete: dormant, deleting_at passed, the policy still has a time until then
    "the policy deletes nothing any more": DELETE.but(policy_delete_after_dormant=None),
    "not dormant": DELETE.but(workspace_dormant_at=None),
    "dormant for ever": DELETE.but(workspace_deleting_at=None),
    "deleting_at is to come": DELETE.but(workspace_deleting_at=NOW + HOUR),
    "deleted already": DELETE.but(workspace_state=DELETED),
    "delete failed just now": FAILED_DELETE.but(run_completed_at=NOW),
    "delete failed and was not completed": FAILED_DELETE.but(run_completed_at=None, run_created_at=NOW),
}


@pytest.mark.parametrize("case", NOT_DUE.values(), ids=NOT_DUE.keys())
def test_each_condition_that_does_not_hold_alone_prevents_the_transition(case):
    assert case.decision() is None
    due = Situation(case.workspace, case.run, case.policy, case.owner).earliest_due()
    assert due is None or due > NOW


@pytest.mark.parametrize("state", [RUNNING, STOPPED, PAUSED])
def test_failed_stop_dormancy_and_delete_hold_in_every_state_but_deleted(state):
    assert FAILED_STOP.but(workspace_state=state).decision() is Transition.FAILED_STOP
    assert DORMANCY.but(workspace_state=state).decision() is Transition.DORMANCY
    assert DELETE.but(workspace_state=state).decision() is Transition.DELETE


def test_a_paused_one_is_started_by_its_schedule_like_a_stopped_one():
    assert AUTOSTART.but(workspace_state=PAUSED).decision() is Transition.AUTOSTART


def test_without_any_run_nothing_has_failed_and_the_schedule_counts_from_the_creation():
    never_run = AUTOSTART.but(run=None)
    assert CREATED.time() == NOW.time()  # the schedule's time itself, which is not after it
    next_day = CREATED + timedelta(days=1)
    assert never_run.but(tick=next_day).decision() is Transition.AUTOSTART
    assert never_run.but(tick=next_day - TICK_APART).decision() is None
    assert SUSPENDED.but(run=None).decision() is Transition.AUTOSTOP
    assert DORMANCY.but(run=None).decision() is Transition.DORMANCY
    assert DELETE.but(run=None).decision() is Transition.DELETE


def test_the_schedule_counts_from_the_creation_of_the_last_run_and_not_from_its_end():
    long_stop = AUTOSTART.but(run_created_at=NOW - TICK_APART, run_completed_at=NOW + 3 * HOUR)
    assert long_stop.decision() is Transition.AUTOSTART
    assert long_stop.but(run_created_at=NOW).decision() is None


def test_a_run_under_way_has_not_failed():
    assert AUTOSTOP.but(run_status=RunStatus.RUNNING).decision() is Transition.AUTOSTOP
    assert AUTOSTART.but(run_status=RunStatus.RUNNING).decision() is Transition.AUTOSTART


def test_a_failed_delete_does_not_wait_when_another_run_came_after_it():
    assert FAILED_DELETE.but(run=run(RunTransition.STOP, RunStatus.FAILED)).decision() is Transition.DELETE
    succeeded = FAILED_DELETE.but(run_status=RunStatus.SUCCEEDED, run_completed_at=NOW)
    assert succeeded.decision() is Transition.DELETE


def test_a_failed_delete_waits_for_deleting_at_as_well():
    later = NOW + timedelta(days=9)
    case = FAILED_DELETE.but(workspace_deleting_at=later)
    assert case.decision() is None
    assert case.but(tick=later + TICK_APART).decision() is Transition.DELETE


@pytest.mark.parametrize("action", StopAction)
def test_the_action_of_an_autostop_does_not_change_when_it_is_due(action):
    assert AUTOSTOP.but(policy_autostop_action=action).decision() is Transition.AUTOSTOP


def test_a_duration_beyond_the_calendar_never_passes():
    assert DORMANCY.but(policy_time_until_dormant=timedelta.max).decision() is None
    assert FAILED_STOP.but(policy_failure_ttl=timedelta.max).decision() is None


UNUSED = {"workspace_last_used_at": NOW - 2 * HOUR, "policy_time_until_dormant": HOUR}
CONFLICTS = {
    "autostop before dormancy": (AUTOSTOP.but(**UNUSED), Transition.AUTOSTOP),
    "suspension before dormancy": (SUSPENDED.but(**UNUSED), Transition.AUTOSTOP),
    "autostart before dormancy": (AUTOSTART.but(**UNUSED), Transition.AUTOSTART),
    "failed-stop before dormancy": (FAILED_STOP.but(**UNUSED), Transition.FAILED_STOP),
    "dormancy of a failed one whose TTL is not over": (
        FAILED_STOP.but(**UNUSED, run_completed_at=NOW),
        Transition.DORMANCY,
    ),
    "failed-stop before delete": (
        FAILED_STOP.but(workspace_dormant_at=NOW - HOUR, workspace_deleting_at=NOW - HOUR),
        Transition.FAILED_STOP,
    ),
    "delete of a dormant owner's": (DELETE.but(owner=OwnerStatus.DORMANT), Transition.DELETE),
    "dormancy of a dormant owner's": (DORMANCY.but(owner=OwnerStatus.DORMANT), Transition.DORMANCY),
    "delete of a suspended owner's": (DELETE.but(owner=OwnerStatus.SUSPENDED), Transition.DELETE),
    "delete of a dormant one with a deadline": (
        DELETE.but(workspace_state=RUNNING, run_deadline=NOW),
        Transition.DELETE,
    ),
    "delete of a dormant one with a schedule": (
        DELETE.but(workspace_autostart_schedule=DAILY_AT_NOON, run_created_at=NOW - timedelta(days=2)),
        Transition.DELETE,
    ),
}


@pytest.mark.parametrize(("case", "expected"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_of_several_transitions_the_first_in_order_is_made(case, expected):
    assert case.decision() is expected


def test_the_order_is_autostop_autostart_failed_stop_dormancy_delete():
    assert [transition.value for transition in Transition] == [
        "autostop",
        "autostart",
        "failed_stop",
        "dormancy",
        "delete",
    ]


def test_a_policy_without_any_day_to_start_on_is_refused():
    with pytest.raises(InvalidArgument, match=r"autostartWeekdays .* autostartAllowed=false"):
        Policy(autostart_weekdays=frozenset())


NEXT_STARTS = {
    "stopped: what the lifecycle does": (AUTOSTART, NOW),
    "paused": (AUTOSTART.but(workspace_state=PAUSED), NOW),
    "deleted": (AUTOSTART.but(workspace_state=DELETED), None),
    "running, no deadline: after now": (AUTOSTART.but(workspace_state=RUNNING), NOW + timedelta(days=1)),
    "running, its deadline has passed": (
        AUTOSTART.but(workspace_state=RUNNING, run_deadline=NOW - HOUR),
        NOW + timedelta(days=1),
    ),
    "running: after its deadline": (
        AUTOSTART.but(workspace_state=RUNNING, run_deadline=NOW + timedelta(days=1)),
        NOW + timedelta(days=2),
    ),
    "running, on an allowed day": (
        AUTOSTART.but(workspace_state=RUNNING, policy_autostart_weekdays=parse_weekdays("fri")),
        NOW + timedelta(days=4),
    ),
    "running, no schedule": (AUTOSTOP, None),
    "running, not allowed": (
        AUTOSTART.but(workspace_state=RUNNING, policy_autostart_allowed=False),
        None,
    ),
    "running, of a dormant owner": (
        AUTOSTART.but(workspace_state=RUNNING, owner=OwnerStatus.DORMANT),
        None,
    ),
}


@pytest.mark.parametrize(("case", "expected"), NEXT_STARTS.values(), ids=NEXT_STARTS.keys())
def test_the_next_start_is_the_schedules_first_allowed_time_at_which_it_does_not_run(case, expected):
    assert Situation(case.workspace, case.run, case.policy, case.owner).next_start(NOW) == expected


def test_only_what_runs_has_a_deadline():
    def deadline(case):
        return Situation(case.workspace, case.run, case.policy, case.owner).deadline

    assert deadline(AUTOSTOP) == NOW
    assert deadline(AUTOSTOP.but(workspace_state=STOPPED)) is None
    assert deadline(AUTOSTOP.but(run=None)) is None
