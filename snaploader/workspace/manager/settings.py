"""What the lifecycle goes by: what a workspace has of its own, and policies that the runtime can follow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from snaploader.errors import FailedPrecondition, NotFound
from snaploader.workspace.catalog import Transaction
from snaploader.workspace.deadlines import extended_deadline
from snaploader.workspace.events import add_event
from snaploader.workspace.manager.operation import ALIVE, ENDING, Services, check_state
from snaploader.workspace.manager.templates import check_made_from_template
from snaploader.workspace.model import Workspace, WorkspaceState, check_ttl
from snaploader.workspace.policy import Policy, check_scopes
from snaploader.workspace.schedule import parse_schedule

CHANGE = "workspace_change"
EXTEND = "deadline_extend"


def change(
    services: Services,
    workspace_id: str,
    *,
    owner: str | None,
    policy: str | None,
    autostart_schedule: str | None,
    ttl: timedelta | None,
    automatic_updates: bool | None,
) -> Workspace:
    """Check, change, record. See `WorkspaceManager.change`."""
    if autostart_schedule:
        parse_schedule(autostart_schedule)
    given = {
        "owner": owner,
        "policy": policy,
        "autostart_schedule": autostart_schedule,
        "automatic_updates": automatic_updates,
    }
    changes: Any = {name: value for name, value in given.items() if value is not None}
    if ttl is not None:
        changes["ttl"] = check_ttl(ttl) if ttl else None
    with services.catalog.transaction() as tx:
        before = tx.lock_workspace(workspace_id)
        check_state(before, "change", ALIVE)
        if automatic_updates:
            check_made_from_template(before)
        if not changes:
            return before
        workspace = tx.update_workspace(workspace_id, now=services.clock(), **changes)
        if policy is not None and workspace.host == services.host:
            check_scopes(tx.policy(policy), services.runtime.scopes)
        made, was = (_plain(each, changes) for each in (workspace, before))
        add_event(tx, workspace_id, CHANGE, {**made, "before": was}, services.clock())
        return workspace


def _plain(workspace: Workspace, names: Collection[str]) -> dict[str, Any]:
    """Settings of a workspace as events spell them."""
    values = {name: getattr(workspace, name) for name in names if name != "ttl"}
    if "ttl" in names:
        values["ttl_s"] = None if workspace.ttl is None else workspace.ttl.total_seconds()
    return values


def put_policy(services: Services, policy: Policy) -> None:
    """See `WorkspaceManager.put_policy`."""
    with services.catalog.transaction() as tx:
        _put(services, tx, policy)


def change_policy(services: Services, name: str, values: Mapping[str, Any]) -> Policy:
    """See `WorkspaceManager.change_policy`."""
    with services.catalog.transaction() as tx:
        before: Mapping[str, Any] = {}
        with suppress(NotFound):
            before = tx.policy(name).to_mapping()
        merged = {field: value for field, value in {**before, **values}.items() if value is not None}
        policy = Policy.from_mapping(name, merged)
        _put(services, tx, policy)
        return policy


def _put(services: Services, tx: Transaction, policy: Policy) -> None:
    check_scopes(policy, services.runtime.scopes)
    tx.put_policy(policy, now=services.clock())


def extend(services: Services, workspace_id: str, until: datetime | timedelta) -> datetime:
    """Check, move, record. See `WorkspaceManager.extend`."""
    with services.catalog.transaction() as tx:
        workspace = tx.lock_workspace(workspace_id)
        check_state(workspace, "extension of a deadline", [WorkspaceState.RUNNING])
        operation = workspace.operation
        if operation is not None and operation.kind in ENDING:
            raise FailedPrecondition(
                f"workspace {workspace_id!r}: a {operation.kind} is under way: too late to move its deadline"
            )
        _, run, policy, _ = tx.situation(workspace_id)
        if run is None:
            raise FailedPrecondition(f"workspace {workspace_id!r} has no deadline: it was never started")
        now = services.clock()
        deadline = extended_deadline(run, policy, until, now)
        tx.set_deadline(run.id, deadline)
        tx.update_workspace(workspace_id, last_used_at=now, dormant_at=None, deleting_at=None)
        before = None if run.deadline is None else run.deadline.isoformat()
        about = {"deadline": deadline.isoformat(), "before": before, "run": run.id}
        add_event(tx, workspace_id, EXTEND, about, now)
        return deadline
