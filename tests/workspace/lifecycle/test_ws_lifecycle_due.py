"""`earliest_due`, which the catalog indexes, and the decision against the rules as they are written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import example, given, strategies as st
from lifecycle_values import CREATED, NOW, TICK_APART, run, workspace

from snaploader.workspace.model import OwnerStatus, Run, RunStatus, RunTransition, Workspace, WorkspaceState
from snaploader.workspace.policy import Policy, Situation, StopAction, Transition
from snaploader.workspace.schedule import Schedule, Weekday

# Few distinct times, so that they often meet exactly.
STEP = timedelta(hours=6)
moments = st.integers(-40, 40).map(lambda steps: NOW + steps * STEP) | st.datetimes(
    datetime(1971, 1, 1), datetime(2190, 1, 1), timezones=st.just(UTC)
)
durations = st.none() | st.integers(1, 20).map(lambda steps: steps * STEP) | st.timedeltas(TICK_APART)
schedules = st.sampled_from(
    ["", "0 6 * * *", "30 9 * * 1-5", "CRON_TZ=Europe/Berlin 30 2 * * *", "*/20 * * * *", "not a schedule"]
)
workspaces = st.builds(
    workspace,
    st.sampled_from(WorkspaceState),
    last_used_at=moments,
    autostart_schedule=schedules,
    dormant_at=st.none() | moments,
    deleting_at=st.none() | moments,
)
runs = st.none() | st.builds(
    run,
    st.sampled_from(RunTransition),
    st.sampled_from(RunStatus),
    created_at=moments,
    completed_at=st.none() | moments,
    deadline=st.none() | moments,
)
policies = st.builds(
    Policy,
    autostop_after=durations,
    autostop_action=st.sampled_from(StopAction),
    autostart_allowed=st.booleans(),
    autostart_weekdays=st.none() | st.frozensets(st.sampled_from(Weekday), min_size=1),
    failure_ttl=durations,
    time_until_dormant=durations,
    delete_after_dormant=durations,
)
owners = st.sampled_from(OwnerStatus)


@given(workspaces, runs, policies, owners, moments)
def test_nothing_is_decided_before_the_earliest_due_time_and_something_at_each_tick_from_it_on(
    workspace, run, policy, owner, tick
):
    due = Situation(workspace, run, policy, owner).earliest_due()
    if due is None:
        assert Situation(workspace, run, policy, owner).decide(tick) is None
        return
    assert (Situation(workspace, run, policy, owner).decide(tick) is not None) == (tick >= due)
    assert Situation(workspace, run, policy, owner).decide(due) is not None
    assert Situation(workspace, run, policy, owner).decide(due - TICK_APART) is None or due.year == 1970


def as_written(
    workspace: Workspace, run: Run | None, policy: Policy, owner: OwnerStatus, tick: datetime
) -> Transition | None:
    """The rules in the words of their description, one after the other."""
    if workspace.state is WorkspaceState.DELETED:
        return None
    running = workspace.state is WorkspaceState.RUNNING
    dormant = workspace.dormant_at is not None
    failed = run is not None and run.status is RunStatus.FAILED
    deadline_reached = run is not None and run.deadline is not None and tick >= run.deadline
    if running and not dormant and not failed and (owner is OwnerStatus.SUSPENDED or deadline_reached):
        return Transition.AUTOSTOP
    schedule = workspace.autostart_schedule
    if (
        owner is OwnerStatus.ACTIVE
        and not running
        and not dormant
        and not failed
        and policy.autostart_allowed
        and schedule not in {"", "not a schedule"}
        and (
            start := Schedule.parse(schedule).next_allowed_after(
                run.created_at if run else CREATED, policy.autostart_weekdays
            )
        )
        is not None
        and tick >= start
    ):
        return Transition.AUTOSTART
    if (
        policy.failure_ttl is not None
        and run is not None
        and failed
        and run.transition is RunTransition.START
        and run.completed_at is not None
        and tick - run.completed_at > policy.failure_ttl
    ):
        return Transition.FAILED_STOP
    until_dormant = policy.time_until_dormant
    if not dormant and until_dormant is not None and tick - workspace.last_used_at > until_dormant:
        return Transition.DORMANCY
    still_deletes = policy.delete_after_dormant is not None
    if dormant and still_deletes and workspace.deleting_at is not None and tick > workspace.deleting_at:
        if run is not None and failed and run.transition is RunTransition.DELETE:
            ended = run.completed_at or run.created_at
            return Transition.DELETE if tick - ended >= timedelta(hours=24) else None
        return Transition.DELETE
    return None


@given(workspaces, runs, policies, owners, moments)
@example(workspace(), run(deadline=NOW), Policy(), OwnerStatus.ACTIVE, NOW)
def test_the_decision_is_that_of_the_rules_as_they_are_written(workspace, run, policy, owner, tick):
    expected = as_written(workspace, run, policy, owner, tick)
    assert Situation(workspace, run, policy, owner).decide(tick) is expected
