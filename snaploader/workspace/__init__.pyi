from snaploader.workspace.catalog import Catalog as Catalog
from snaploader.workspace.check import Finding as Finding, FindingKind as FindingKind
from snaploader.workspace.host import SlotPool as SlotPool
from snaploader.workspace.lifecycle import (
    AuditRecord as AuditRecord,
    Hooks as Hooks,
    LifecycleExecutor as LifecycleExecutor,
    Metrics as Metrics,
    Notification as Notification,
    Stats as Stats,
)
from snaploader.workspace.manager import (
    HeldWorkspace as HeldWorkspace,
    Note as Note,
    OrphanedUpload as OrphanedUpload,
    RecoverySummary as RecoverySummary,
    WorkspaceManager as WorkspaceManager,
)
from snaploader.workspace.model import (
    Event as Event,
    Operation as Operation,
    OperationKind as OperationKind,
    OwnerStatus as OwnerStatus,
    Readiness as Readiness,
    Resources as Resources,
    Run as Run,
    RunStatus as RunStatus,
    RunTransition as RunTransition,
    Scope as Scope,
    SnapshotInfo as SnapshotInfo,
    SnapshotKind as SnapshotKind,
    SnapshotRecord as SnapshotRecord,
    SnapshotResult as SnapshotResult,
    SnapshotSource as SnapshotSource,
    SnapshotStatus as SnapshotStatus,
    Version as Version,
    Volume as Volume,
    Workspace as Workspace,
    WorkspaceSpec as WorkspaceSpec,
    WorkspaceState as WorkspaceState,
)
from snaploader.workspace.policy import (
    DEFAULT_POLICY as DEFAULT_POLICY,
    Policy as Policy,
    ScopePolicy as ScopePolicy,
    Situation as Situation,
    StopAction as StopAction,
    Transition as Transition,
)
from snaploader.workspace.runtime import (
    Attachment as Attachment,
    Capture as Capture,
    ProbedWorkspace as ProbedWorkspace,
    ProcessRuntime as ProcessRuntime,
    ReadinessProbe as ReadinessProbe,
    Runtime as Runtime,
    RuntimeStatus as RuntimeStatus,
    StopOutcome as StopOutcome,
)
from snaploader.workspace.schedule import Schedule as Schedule, Weekday as Weekday
from snaploader.workspace.sizes import HostSizes as HostSizes, WorkspaceSize as WorkspaceSize
from snaploader.workspace.templates import (
    Template as Template,
    TemplateUpdate as TemplateUpdate,
    TemplateVersion as TemplateVersion,
)
