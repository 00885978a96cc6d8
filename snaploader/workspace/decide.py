"""What the lifecycle does with a workspace, and when. Pure.

Each rule says from which tick on it holds, everything else staying as it is: none of them ends by time
passing alone. So `decide` and `earliest_due`, which the catalog's index is made of, cannot differ.

What counts as what:

- A run that is the latest and failed blocks autostop and autostart; a workspace without any run has none that
  failed, and its schedule counts from its creation.
- A paused workspace is not running: autostart resumes it, and dormancy only marks it.
- A schedule that cannot be read, such as one whose zone this host does not know, never starts anything.
- A deleted workspace is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import (
    OwnerStatus,
    Run,
    RunStatus,
    RunTransition,
    Scope,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.policy import Policy, StopAction
from snaploader.workspace.schedule import parse_schedule

ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
"""From when on a rule holds that waits for no time; there are no ticks before it."""

RETRY_DELETE_AFTER = timedelta(hours=24)
"""How long a failed delete is left alone."""

MAX_TICK_DISTANCE = timedelta(hours=25)
"""How far apart two ticks may be for the later one to confirm the time of the earlier one.

A lifecycle that is run once a day has ticks 25 hours apart on the day when clocks are put back.
"""

_RESOLUTION = timedelta(microseconds=1)


class Transition(StrEnum):
    """What the lifecycle can do, in the order in which the rules are asked."""

    AUTOSTOP = "autostop"
    """Stop or pause a running one, as the policy says: its deadline has come, or its owner is suspended."""
    AUTOSTART = "autostart"
    """Start a stopped one, or resume a paused one, by its schedule."""
    FAILED_STOP = "failed_stop"
    """Stop one whose start failed, which also lets the schedule start it again."""
    DORMANCY = "dormancy"
    """Mark one that was not used for long, and stop it if it runs."""
    DELETE = "delete"
    """Delete a dormant one."""


def decide(
    workspace: Workspace, run: Run | None, policy: Policy, owner: OwnerStatus, tick: datetime
) -> Transition | None:
    """What to do with `workspace` at `tick`, or None.

    Args:
        run: The latest run of the workspace.
        policy: Its policy.
        owner: Status of its owner.
        tick: Now, aware; not before 1970.
    """
    case = _Case(workspace, run, policy, owner)
    for transition, due_at in _RULES.items():
        due = due_at(case)
        if due is not None and tick >= due:
            return transition
    return None


def earliest_due(
    workspace: Workspace, run: Run | None, policy: Policy, owner: OwnerStatus
) -> datetime | None:
    """The first tick at which `decide` says something; at each later one it does too. None: never."""
    case = _Case(workspace, run, policy, owner)
    return min((due for due_at in _RULES.values() if (due := due_at(case)) is not None), default=None)


def is_irreversible(transition: Transition, policy: Policy) -> bool:
    """Whether nobody could take `transition` back, had the clock been wrong.

    A delete is. So is an autostop that pauses as `Data`, since what is outside the durable directories goes.
    To be stopped, started or marked dormant too early is a nuisance that the next use of the workspace ends.
    """
    if transition is Transition.AUTOSTOP:
        return policy.autostop_action is StopAction.PAUSE and policy.scopes.on_pause is Scope.DATA
    return transition is Transition.DELETE


class Ticks(NamedTuple):
    """The two latest different ticks of a host. What is irreversible is done only while they agree."""

    latest: datetime
    previous: datetime | None = None
    """None: the latest is the first."""

    def advanced(self, tick: datetime) -> Ticks:
        """The ticks once `tick` has come; the same one twice confirms nothing."""
        return self if tick == self.latest else Ticks(tick, self.latest)

    @property
    def agree(self) -> bool:
        """Whether the clock has neither jumped nor stood between the two, and not been set back."""
        return self.previous is not None and timedelta(0) < self.latest - self.previous <= MAX_TICK_DISTANCE


def deletion_time(
    dormant_at: datetime, announced: datetime | None, after: timedelta | None, now: datetime
) -> datetime | None:
    """When a dormant workspace is to be deleted, under a policy that holds for it from `now` on.

    Never before the time that was announced to its owner, and never sooner after it was marked than the
    policy says. Where nothing was announced, because it is being marked or its policy had no deletion before,
    it has the whole time from `now`. None: never, or beyond the calendar.

    Args:
        announced: The time that was set before, by a policy that has had a deletion up to now.
        after: The policy's `delete_after_dormant`.
    """
    if after is None:
        return None
    try:
        return now + after if announced is None else max(announced, dormant_at + after)
    except OverflowError:
        return None


class _Case(NamedTuple):
    workspace: Workspace
    run: Run | None
    policy: Policy
    owner: OwnerStatus

    @property
    def is_dormant(self) -> bool:
        return self.workspace.dormant_at is not None

    @property
    def has_failed(self) -> bool:
        return self.run is not None and self.run.status is RunStatus.FAILED

    def has_failed_to(self, transition: RunTransition) -> bool:
        return self.has_failed and self.run is not None and self.run.transition is transition


def _autostop(case: _Case) -> datetime | None:
    if case.workspace.state is not WorkspaceState.RUNNING or case.is_dormant or case.has_failed:
        return None
    if case.owner is OwnerStatus.SUSPENDED:
        return ALWAYS
    return None if case.run is None else case.run.deadline


def _autostart(case: _Case) -> datetime | None:
    workspace = case.workspace
    if case.owner is not OwnerStatus.ACTIVE or case.is_dormant or case.has_failed:
        return None
    if workspace.state not in {WorkspaceState.STOPPED, WorkspaceState.PAUSED}:
        return None
    if not case.policy.autostart_allowed or not workspace.autostart_schedule:
        return None
    try:
        schedule = parse_schedule(workspace.autostart_schedule)
    except InvalidArgument:
        return None
    return schedule.next_after(workspace.created_at if case.run is None else case.run.created_at)


def _failed_stop(case: _Case) -> datetime | None:
    if case.workspace.state is WorkspaceState.DELETED or case.policy.failure_ttl is None:
        return None
    if case.run is None or case.run.completed_at is None or not case.has_failed_to(RunTransition.START):
        return None
    return _past(case.run.completed_at, case.policy.failure_ttl)


def _dormancy(case: _Case) -> datetime | None:
    if case.workspace.state is WorkspaceState.DELETED or case.is_dormant:
        return None
    if case.policy.time_until_dormant is None:
        return None
    return _past(case.workspace.last_used_at, case.policy.time_until_dormant)


def _delete(case: _Case) -> datetime | None:
    workspace = case.workspace
    if workspace.state is WorkspaceState.DELETED or not case.is_dormant or workspace.deleting_at is None:
        return None
    if case.policy.delete_after_dormant is None:
        return None
    due = _past(workspace.deleting_at, timedelta(0))
    if due is None or case.run is None or not case.has_failed_to(RunTransition.DELETE):
        return due
    return max(due, (case.run.completed_at or case.run.created_at) + RETRY_DELETE_AFTER)


_RULES: dict[Transition, Callable[[_Case], datetime | None]] = {
    Transition.AUTOSTOP: _autostop,
    Transition.AUTOSTART: _autostart,
    Transition.FAILED_STOP: _failed_stop,
    Transition.DORMANCY: _dormancy,
    Transition.DELETE: _delete,
}
"""From which tick on each transition is due, None being never; the first that is due is made."""


def _past(moment: datetime, duration: timedelta) -> datetime | None:
    """The first instant that is more than `duration` later; None: beyond the calendar."""
    try:
        return moment + duration + _RESOLUTION
    except OverflowError:
        return None
