"""Policies of workspaces, and what the lifecycle does by them, and when. Pure.

Each rule says from which tick on it holds, everything else staying as it is: none of them ends by time
passing alone. So `Situation.decide` and `Situation.earliest_due`, which the catalog's index is made of,
cannot differ. What counts as what:

- A run that is the latest and failed blocks autostop and autostart; a workspace without any run has none that
  failed, and its schedule counts from its creation.
- A paused workspace is not running: autostart resumes it, and dormancy only marks it.
- A schedule that cannot be read, such as one whose zone this host does not know, never starts anything.
- A dormant owner's workspaces are not started, and those that run go on until their deadline; all else is as
  with an active owner.
- A deleted workspace is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

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
from snaploader.workspace.schedule import Weekday, parse_schedule, parse_weekdays, weekdays_text

DEFAULT_POLICY = "default"
"""The policy of workspaces that name none. It exists always; until it is changed it does nothing."""


class StopAction(StrEnum):
    """What an autostop does."""

    STOP = "stop"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class ScopePolicy:
    """What snapshots hold.

    Raises:
        InvalidArgument: a commit would hold what a pause does not.
    """

    on_pause: Scope = Scope.FULL
    on_commit: Scope | None = None
    """None: what `on_pause` is."""

    def __post_init__(self) -> None:
        if not self.on_pause.includes(self.commit_scope):
            raise InvalidArgument(
                f"onCommit is {self.commit_scope} and onPause is {self.on_pause}: a commit cannot hold more "
                "than a pause does. Set onPause to Full, or onCommit to Data"
            )

    @property
    def commit_scope(self) -> Scope:
        return self.on_pause if self.on_commit is None else self.on_commit


@dataclass(frozen=True, slots=True)
class Policy:
    """A named policy. Durations must be above zero; None switches the rule off.

    Raises:
        InvalidArgument: a value is out of bounds.
    """

    name: str = DEFAULT_POLICY
    scopes: ScopePolicy = ScopePolicy()
    autostop_after: timedelta | None = None
    """A started workspace gets a deadline this much later, unless it has a TTL of its own."""
    autostop_action: StopAction = StopAction.STOP
    autostart_allowed: bool = True
    failure_ttl: timedelta | None = None
    """A workspace whose start failed is stopped this much later."""
    time_until_dormant: timedelta | None = None
    """A workspace that was not used for longer is stopped and marked dormant."""
    delete_after_dormant: timedelta | None = None
    """A dormant workspace is deleted this much after it was marked."""
    max_ttl: timedelta | None = None
    """No deadline is later than this much after the start, whatever sets it."""
    activity_bump: timedelta | None = None
    """A use of a running workspace moves its deadline to this much later at least."""
    autostart_weekdays: frozenset[Weekday] | None = None
    """The days on which schedules start workspaces, in the zone of each schedule; None: all."""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 200:
            raise InvalidArgument("a policy needs a name of 1 to 200 characters")
        for spelled, (name, _) in _FIELDS.items():
            value = getattr(self, name, None)
            if isinstance(value, timedelta) and value <= timedelta(0):
                raise InvalidArgument(f"{spelled} of policy {self.name!r} must be above 0 s")
        if self.autostart_weekdays is not None and not self.autostart_weekdays:
            raise InvalidArgument(
                f"autostartWeekdays of policy {self.name!r} names no day: say autostartAllowed=false instead"
            )

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any]) -> Policy:
        """A policy from plain values as the user spells them, such as `{"onPause": "Full"}`.

        InvalidArgument names a field that is unknown, or whose value is not one, as it was given.
        """
        unknown = values.keys() - _FIELDS.keys()
        if unknown:
            raise InvalidArgument(
                f"policy {name!r} has unknown field {min(unknown)!r}: the fields are {', '.join(_FIELDS)}"
            )
        given: dict[str, Any] = {}
        for spelled, (field_name, read) in _FIELDS.items():
            if values.get(spelled) is None:
                continue
            try:
                given[field_name] = read(values[spelled])
            except InvalidArgument as error:
                raise InvalidArgument(f"{spelled}: {error.message}") from error
        scopes = ScopePolicy(given.pop("on_pause", Scope.FULL), given.pop("on_commit", None))
        return cls(name, scopes, **given)

    def to_mapping(self) -> dict[str, Any]:
        """The values that `from_mapping` takes; rules that are off are left out."""
        values = {}
        for spelled, (field_name, _) in _FIELDS.items():
            value = getattr(self if hasattr(self, field_name) else self.scopes, field_name)
            if isinstance(value, timedelta):
                value = value.total_seconds()
            if isinstance(value, frozenset):
                value = weekdays_text(value)
            if value is not None:
                values[spelled] = value.value if isinstance(value, StrEnum) else value
        return values


def check_scopes(policy: Policy, capturable: Collection[Scope]) -> None:
    """InvalidArgument when a runtime cannot capture what the policy asks for; names the field as users do."""
    for field_name, scope in (("onPause", policy.scopes.on_pause), ("onCommit", policy.scopes.commit_scope)):
        if scope not in capturable:
            possible = " or ".join(sorted(capturable))
            raise InvalidArgument(
                f"policy {policy.name!r}: {field_name} is {scope}, which the runtime of this host cannot "
                f"capture: set {field_name} to {possible}"
            )


def _duration(value: Any) -> timedelta:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e10:
        raise InvalidArgument(f"{value!r} is no number of seconds above 0")
    return timedelta(seconds=value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{value!r} is neither true nor false")
    return value


def _action(value: Any) -> StopAction:
    try:
        return StopAction(value)
    except ValueError:
        raise InvalidArgument(f"{value!r} is neither stop nor pause") from None


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "onPause": ("on_pause", Scope.parse),
    "onCommit": ("on_commit", Scope.parse),
    "autostopAfterSeconds": ("autostop_after", _duration),
    "maxTtlSeconds": ("max_ttl", _duration),
    "activityBumpSeconds": ("activity_bump", _duration),
    "autostopAction": ("autostop_action", _action),
    "autostartAllowed": ("autostart_allowed", _flag),
    "autostartWeekdays": ("autostart_weekdays", parse_weekdays),
    "failureTtlSeconds": ("failure_ttl", _duration),
    "timeUntilDormantSeconds": ("time_until_dormant", _duration),
    "deleteAfterDormantSeconds": ("delete_after_dormant", _duration),
}
"""As the user spells them: the attribute of a policy or its scopes, and what reads a plain value."""


ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
"""The due time of a rule that waits for no time; there are no ticks before it."""

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


class Situation(NamedTuple):
    """Everything that the lifecycle decides by."""

    workspace: Workspace
    run: Run | None
    """The latest one."""
    policy: Policy
    owner: OwnerStatus

    def decide(self, tick: datetime) -> Transition | None:
        """What to do with the workspace at `tick`, which is aware and not before 1970; None: nothing."""
        for transition, due_at in _RULES.items():
            due = due_at(self)
            if due is not None and tick >= due:
                return transition
        return None

    def earliest_due(self) -> datetime | None:
        """The first tick at which `decide` says something; at each later one it does too. None: never."""
        return min((due for due_at in _RULES.values() if (due := due_at(self)) is not None), default=None)

    def next_start(self, now: datetime) -> datetime | None:
        """When the schedule starts the workspace next, everything else staying as it is; None: never.

        A time that has come is that of the next tick. For a running one it is the first time of the schedule
        after its deadline; or after `now`, where it has none, or passed it.
        """
        if self.workspace.state is not WorkspaceState.RUNNING:
            return _autostart(self)
        deadline = None if self.run is None else self.run.deadline
        return _scheduled(self, now if deadline is None else max(now, deadline))

    @property
    def deadline(self) -> datetime | None:
        """When the workspace, which runs, is to be stopped; None: never, or it does not run."""
        is_running = self.workspace.state is WorkspaceState.RUNNING
        return self.run.deadline if is_running and self.run is not None else None

    @property
    def is_dormant(self) -> bool:
        return self.workspace.dormant_at is not None

    @property
    def failed_run(self) -> Run | None:
        """The latest run, if that failed."""
        return self.run if self.run is not None and self.run.status is RunStatus.FAILED else None


def _autostop(situation: Situation) -> datetime | None:
    is_running = situation.workspace.state is WorkspaceState.RUNNING
    if not is_running or situation.is_dormant or situation.failed_run is not None:
        return None
    if situation.owner is OwnerStatus.SUSPENDED:
        return ALWAYS
    return None if situation.run is None else situation.run.deadline


def _autostart(situation: Situation) -> datetime | None:
    workspace, run = situation.workspace, situation.run
    if workspace.state not in {WorkspaceState.STOPPED, WorkspaceState.PAUSED}:
        return None
    return _scheduled(situation, workspace.created_at if run is None else run.created_at)


def _scheduled(situation: Situation, since: datetime) -> datetime | None:
    """The first time after `since` at which the schedule would start a workspace that does not run."""
    workspace, policy = situation.workspace, situation.policy
    if situation.owner is not OwnerStatus.ACTIVE or situation.is_dormant or situation.failed_run is not None:
        return None
    if not policy.autostart_allowed or not workspace.autostart_schedule:
        return None
    try:
        schedule = parse_schedule(workspace.autostart_schedule)
    except InvalidArgument:
        return None
    return schedule.next_allowed_after(since, policy.autostart_weekdays)


def _failed_stop(situation: Situation) -> datetime | None:
    run, failure_ttl = situation.failed_run, situation.policy.failure_ttl
    if situation.workspace.state is WorkspaceState.DELETED or run is None or failure_ttl is None:
        return None
    if run.transition is not RunTransition.START or run.completed_at is None:
        return None
    return _past(run.completed_at, failure_ttl)


def _dormancy(situation: Situation) -> datetime | None:
    if situation.workspace.state is WorkspaceState.DELETED or situation.is_dormant:
        return None
    if situation.policy.time_until_dormant is None:
        return None
    return _past(situation.workspace.last_used_at, situation.policy.time_until_dormant)


def _delete(situation: Situation) -> datetime | None:
    workspace = situation.workspace
    if workspace.state is WorkspaceState.DELETED or not situation.is_dormant or workspace.deleting_at is None:
        return None
    if situation.policy.delete_after_dormant is None:
        return None
    due, run = _past(workspace.deleting_at, timedelta(0)), situation.failed_run
    if due is None or run is None or run.transition is not RunTransition.DELETE:
        return due
    return max(due, (run.completed_at or run.created_at) + RETRY_DELETE_AFTER)


_RULES: dict[Transition, Callable[[Situation], datetime | None]] = {
    Transition.AUTOSTOP: _autostop,
    Transition.AUTOSTART: _autostart,
    Transition.FAILED_STOP: _failed_stop,
    Transition.DORMANCY: _dormancy,
    Transition.DELETE: _delete,
}
"""Each transition with the rule that says from which tick on it is due; the first that is due is made."""


def _past(moment: datetime, duration: timedelta) -> datetime | None:
    """The first instant that is more than `duration` later; None: beyond the calendar."""
    try:
        return moment + duration + _RESOLUTION
    except OverflowError:
        return None
