"""Long-lived sandboxes whose state is kept as snapshots: versions, rollback, pause, commit, fork, lifecycle.

    with (
        FileCache("/var/cache/snaploader") as file_cache,
        SnapshotLoader(file_cache) as loader,
        Catalog.open("/var/lib/snaploader/catalog.db") as catalog,
        ProcessRuntime("/var/lib/snaploader/runtime") as runtime,
        WorkspaceManager(catalog, loader, file_cache, runtime, "/var/lib/snaploader") as manager,
    ):
        manager.recover()
        workspace = manager.create(command=["my-agent"], volumes=[Volume("home", "/home/agent")])
        version = manager.create_version(workspace.id)
        manager.rollback(workspace.id, version.version)

docs/workspaces.md says what each operation does. Needs the extra `workspace`; `snaploader.workspace.testing`
has a runtime without processes. Everything here stands on `snaploader.loader`, which knows nothing of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snaploader.workspace.catalog import (
        Catalog,
    )
    from snaploader.workspace.check import (
        Finding,
        FindingKind,
    )
    from snaploader.workspace.decide import (
        Transition,
    )
    from snaploader.workspace.hooks import (
        AuditRecord,
        Hooks,
        Notification,
    )
    from snaploader.workspace.lifecycle import (
        LifecycleExecutor,
        Stats,
    )
    from snaploader.workspace.manager import (
        HeldWorkspace,
        Note,
        OrphanedUpload,
        RecoverySummary,
        WorkspaceManager,
    )
    from snaploader.workspace.metrics import (
        Metrics,
    )
    from snaploader.workspace.model import (
        Event,
        Operation,
        OperationKind,
        OwnerStatus,
        Readiness,
        Run,
        RunStatus,
        RunTransition,
        Scope,
        SnapshotInfo,
        SnapshotKind,
        SnapshotRecord,
        SnapshotResult,
        SnapshotSource,
        SnapshotStatus,
        Version,
        Volume,
        Workspace,
        WorkspaceSpec,
        WorkspaceState,
    )
    from snaploader.workspace.policy import (
        DEFAULT_POLICY,
        Policy,
        ScopePolicy,
        StopAction,
    )
    from snaploader.workspace.runtime import (
        Attachment,
        Capture,
        ProbedWorkspace,
        ProcessRuntime,
        ReadinessProbe,
        Runtime,
        RuntimeStatus,
        StopOutcome,
    )
    from snaploader.workspace.schedule import (
        Schedule,
    )
    from snaploader.workspace.sizes import (
        HostSizes,
        WorkspaceSize,
    )
    from snaploader.workspace.slots import (
        SlotPool,
    )

__all__ = [
    "DEFAULT_POLICY",
    "Attachment",
    "AuditRecord",
    "Capture",
    "Catalog",
    "Event",
    "Finding",
    "FindingKind",
    "HeldWorkspace",
    "Hooks",
    "HostSizes",
    "LifecycleExecutor",
    "Metrics",
    "Note",
    "Notification",
    "Operation",
    "OperationKind",
    "OrphanedUpload",
    "OwnerStatus",
    "Policy",
    "ProbedWorkspace",
    "ProcessRuntime",
    "Readiness",
    "ReadinessProbe",
    "RecoverySummary",
    "Run",
    "RunStatus",
    "RunTransition",
    "Runtime",
    "RuntimeStatus",
    "Schedule",
    "Scope",
    "ScopePolicy",
    "SlotPool",
    "SnapshotInfo",
    "SnapshotKind",
    "SnapshotRecord",
    "SnapshotResult",
    "SnapshotSource",
    "SnapshotStatus",
    "Stats",
    "StopAction",
    "StopOutcome",
    "Transition",
    "Version",
    "Volume",
    "Workspace",
    "WorkspaceManager",
    "WorkspaceSize",
    "WorkspaceSpec",
    "WorkspaceState",
]

_NAMES = {
    "catalog": ["Catalog"],
    "check": ["Finding", "FindingKind"],
    "decide": ["Transition"],
    "hooks": ["AuditRecord", "Hooks", "Notification"],
    "lifecycle": ["LifecycleExecutor", "Stats"],
    "manager": ["HeldWorkspace", "Note", "OrphanedUpload", "RecoverySummary", "WorkspaceManager"],
    "metrics": ["Metrics"],
    "model": [
        "Event",
        "Operation",
        "OperationKind",
        "OwnerStatus",
        "Readiness",
        "Run",
        "RunStatus",
        "RunTransition",
        "Scope",
        "SnapshotInfo",
        "SnapshotKind",
        "SnapshotRecord",
        "SnapshotResult",
        "SnapshotSource",
        "SnapshotStatus",
        "Version",
        "Volume",
        "Workspace",
        "WorkspaceSpec",
        "WorkspaceState",
    ],
    "policy": ["DEFAULT_POLICY", "Policy", "ScopePolicy", "StopAction"],
    "runtime": [
        "Attachment",
        "Capture",
        "ProbedWorkspace",
        "ProcessRuntime",
        "ReadinessProbe",
        "Runtime",
        "RuntimeStatus",
        "StopOutcome",
    ],
    "schedule": ["Schedule"],
    "sizes": ["HostSizes", "WorkspaceSize"],
    "slots": ["SlotPool"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # A module is imported when it is asked for: policies and schedules need no database, and its library
    # takes a fifth of a second that a command about something else should not pay.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"alembic", "cronsim", "sqlalchemy"}:
            raise ModuleNotFoundError(
                f"{__name__}.{name} needs {error.name}: install snaploader[workspace]", name=error.name
            ) from error
        raise


def __dir__() -> list[str]:
    return __all__
