"""What the lifecycle goes by: what a workspace has of its own, and policies that the runtime can follow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from snaploader.errors import NotFound
from snaploader.workspace.catalog import Transaction
from snaploader.workspace.events import add_event
from snaploader.workspace.manager.operation import ALIVE, Services, check_state
from snaploader.workspace.model import Workspace
from snaploader.workspace.policy import Policy, check_scopes
from snaploader.workspace.schedule import parse_schedule

CHANGE = "workspace_change"


def change(
    services: Services,
    workspace_id: str,
    *,
    owner: str | None,
    policy: str | None,
    autostart_schedule: str | None,
) -> Workspace:
    """Check, change, record. See `WorkspaceManager.change`."""
    if autostart_schedule:
        parse_schedule(autostart_schedule)
    given = {"owner": owner, "policy": policy, "autostart_schedule": autostart_schedule}
    changes: Any = {name: value for name, value in given.items() if value is not None}
    with services.catalog.transaction() as tx:
        before = tx.lock_workspace(workspace_id)
        check_state(before, "change", ALIVE)
        if not changes:
            return before
        workspace = tx.update_workspace(workspace_id, now=services.clock(), **changes)
        if policy is not None and workspace.host == services.host:
            check_scopes(tx.policy(policy), services.runtime.scopes)
        was = {name: getattr(before, name) for name in changes}
        add_event(tx, workspace_id, CHANGE, {**changes, "before": was}, services.clock())
        return workspace


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
