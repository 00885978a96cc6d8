"""Values that the catalog's tests are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from snaploader.workspace.catalog import Catalog
from snaploader.workspace.model import (
    Operation,
    OperationKind,
    Readiness,
    Resources,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOST = "host-a"


def later(**durations: float) -> datetime:
    """So long after noon."""
    return NOON + timedelta(**durations)


def workspace(workspace_id: str = "ws", **fields: Any) -> Workspace:
    """A running workspace of `HOST`."""
    values: dict[str, Any] = {
        "host": HOST,
        "state": WorkspaceState.RUNNING,
        "created_at": NOON,
        "last_used_at": NOON,
    }
    return Workspace(WorkspaceSpec(workspace_id), **{**values, **fields})


def full_workspace(workspace_id: str = "full") -> Workspace:
    """A workspace of which every field says something, also what needs care to be kept."""
    return Workspace(
        spec=WorkspaceSpec(
            workspace_id,
            command=("sh", "-c", 'echo "%s" ; exit', "ümlaut \udc80 \x00"),
            environment={"B": "2", "A": "1\n", "PATH": "/bin"},
            volumes=(Volume("data", "/var/data"), Volume("home", "/home/..config/x y\t")),
            readiness=Readiness("tcp", "127.0.0.1:80", interval_s=0.25, timeout_s=1.5),
            image="docker.io/library/debian:12",
            devices=("/dev/kvm", "vendor.com/gpu=0"),
            resources=Resources(2, 4 << 30),
            labels={"team": "Zoë's", "example.com/tier": ""},
        ),
        host=HOST,
        state=WorkspaceState.PAUSED,
        created_at=NOON.replace(microsecond=1),
        last_used_at=later(microseconds=999_999),
        owner="Zoë",
        base="debian-12",
        policy="default",
        autostart_schedule="CRON_TZ=Europe/Berlin 30 9 * * 1-5",
        ttl=timedelta(days=300, microseconds=1),
        template_version=2,
        automatic_updates=True,
        slot=7,
        current_snapshot="snap-1",
        base_snapshot="snap-0",
        last_version=41,
        paused_at=later(days=1),
        dormant_at=later(days=2),
        deleting_at=later(days=3),
        operation=operation(snapshot_name="snap-2", version=3),
    )


def operation(token: str = "token", **fields: Any) -> Operation:
    """A rollback that is under way."""
    return Operation(OperationKind.ROLLBACK, token, HOST, NOON, **fields)


def snapshot(name: str = "snap", workspace_id: str = "ws", **fields: Any) -> SnapshotRecord:
    """A complete snapshot."""
    values: dict[str, Any] = {
        "kind": SnapshotKind.VERSION,
        "scope": Scope.FULL,
        "source": SnapshotSource.MANUAL,
        "created_at": NOON,
    }
    return SnapshotRecord(name, workspace_id, f"workspaces/{workspace_id}/{name}", **{**values, **fields})


def add(catalog: Catalog, *workspaces: Workspace) -> None:
    """Add workspaces, in a transaction of their own."""
    with catalog.transaction() as transaction:
        for each in workspaces:
            transaction.add_workspace(each)


def add_version(catalog: Catalog, name: str, workspace_id: str = "ws") -> int:
    """Record a version as the manager does, in one transaction; its number."""
    with catalog.transaction() as transaction:
        transaction.put_snapshot(snapshot(name, workspace_id))
        version = transaction.add_version(workspace_id, name, NOON)
        transaction.add_event(workspace_id, "version_create", {"version": version.number}, NOON)
    return version.number
