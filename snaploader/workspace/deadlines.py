"""Deadlines: when a workspace that was started is to be stopped, and how that time moves. Pure.

A start sets the deadline, by the TTL of the workspace or its policy. After that a deadline only ever becomes
later: because somebody moves it, or because the workspace is used. No policy, TTL or use that changes
afterwards counts for what runs already. `maxTtlSeconds` of the policy bounds all of it, from the start on.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from snaploader.errors import FailedPrecondition, InvalidArgument
from snaploader.workspace.model import MAX_TTL, Run, Workspace
from snaploader.workspace.policy import Policy


def deadline_of_start(workspace: Workspace, policy: Policy, started_at: datetime) -> datetime | None:
    """The deadline of a workspace that was started then; None: it may run for ever.

    It comes after the TTL of the workspace, else after the `autostop_after` of the policy; in either case
    after the `max_ttl` of the policy at the latest.
    """
    ttl = policy.autostop_after if workspace.ttl is None else workspace.ttl
    given = [each for each in (ttl, policy.max_ttl) if each is not None]
    return started_at + min(given) if given else None


def bumped_deadline(run: Run, policy: Policy, used_at: datetime) -> datetime | None:
    """The deadline of a run whose workspace is used: never earlier than before.

    A run without a deadline gets none, and one whose deadline has passed keeps it. The start itself, or what
    came before it, is no use that moves the deadline which the start has set.
    """
    if run.deadline is None or policy.activity_bump is None or run.deadline <= used_at:
        return run.deadline
    if run.completed_at is None or used_at <= run.completed_at:
        return run.deadline
    return max(run.deadline, _bounded(used_at + policy.activity_bump, run, policy))


def extended_deadline(run: Run, policy: Policy, until: datetime | timedelta, now: datetime) -> datetime:
    """The deadline of a run that somebody moves.

    Args:
        until: The new one, aware; or by how much the present one is moved.

    Raises:
        InvalidArgument: the new one is not later than the present one, has passed at `now`, or is later than
            the `max_ttl` of the policy, or a year from `now`, allows.
        FailedPrecondition: the run has no deadline.
    """
    if run.deadline is None:
        raise FailedPrecondition(
            f"workspace {run.workspace_id!r} has no deadline: it runs until somebody stops it"
        )
    if isinstance(until, timedelta):
        try:
            until = run.deadline + until
        except OverflowError:
            until = datetime.max.replace(tzinfo=UTC)
    if until.tzinfo is None:
        raise InvalidArgument(f"time {until} has no time zone: use aware ones")
    refused = (
        f"the deadline of workspace {run.workspace_id!r}, {_shown(run.deadline)}, cannot be moved to "
        f"{_shown(until)}"
    )
    if until <= max(run.deadline, now):
        raise InvalidArgument(f"{refused}: name a later time, which is to come")
    latest = _bounded(now + MAX_TTL, run, policy)
    if until > latest:
        raise InvalidArgument(
            f"{refused}: the latest is {_shown(latest)}, because of maxTtlSeconds of policy {policy.name!r}, "
            f"or because that is {MAX_TTL.days} days away"
        )
    return until


def _bounded(deadline: datetime, run: Run, policy: Policy) -> datetime:
    """The deadline, or the latest one that the policy allows."""
    if policy.max_ttl is None:
        return deadline
    return min(deadline, (run.completed_at or run.created_at) + policy.max_ttl)


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
