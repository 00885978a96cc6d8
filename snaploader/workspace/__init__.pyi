from snaploader.workspace.catalog import Catalog as Catalog
from snaploader.workspace.check import (
    Finding as Finding,
)
from snaploader.workspace.check import (
    FindingKind as FindingKind,
)
from snaploader.workspace.decide import Schedule as Schedule
from snaploader.workspace.decide import Transition as Transition
from snaploader.workspace.hooks import (
    AuditRecord as AuditRecord,
)
from snaploader.workspace.hooks import (
    Hooks as Hooks,
)
from snaploader.workspace.hooks import (
    Notification as Notification,
)
from snaploader.workspace.lifecycle import (
    LifecycleExecutor as LifecycleExecutor,
)
from snaploader.workspace.lifecycle import (
    Stats as Stats,
)
from snaploader.workspace.manager import (
    HeldWorkspace as HeldWorkspace,
)
from snaploader.workspace.manager import (
    Note as Note,
)
from snaploader.workspace.manager import (
    OrphanedUpload as OrphanedUpload,
)
from snaploader.workspace.manager import (
    RecoverySummary as RecoverySummary,
)
from snaploader.workspace.manager import (
    WorkspaceManager as WorkspaceManager,
)
from snaploader.workspace.metrics import Metrics as Metrics
from snaploader.workspace.model import (
    Event as Event,
)
from snaploader.workspace.model import (
    Operation as Operation,
)
from snaploader.workspace.model import (
    OperationKind as OperationKind,
)
from snaploader.workspace.model import (
    OwnerStatus as OwnerStatus,
)
from snaploader.workspace.model import (
    Readiness as Readiness,
)
from snaploader.workspace.model import (
    Run as Run,
)
from snaploader.workspace.model import (
    RunStatus as RunStatus,
)
from snaploader.workspace.model import (
    RunTransition as RunTransition,
)
from snaploader.workspace.model import (
    Scope as Scope,
)
from snaploader.workspace.model import (
    SnapshotInfo as SnapshotInfo,
)
from snaploader.workspace.model import (
    SnapshotKind as SnapshotKind,
)
from snaploader.workspace.model import (
    SnapshotRecord as SnapshotRecord,
)
from snaploader.workspace.model import (
    SnapshotResult as SnapshotResult,
)
from snaploader.workspace.model import (
    SnapshotSource as SnapshotSource,
)
from snaploader.workspace.model import (
    SnapshotStatus as SnapshotStatus,
)
from snaploader.workspace.model import (
    Version as Version,
)
from snaploader.workspace.model import (
    Volume as Volume,
)
from snaploader.workspace.model import (
    Workspace as Workspace,
)
from snaploader.workspace.model import (
    WorkspaceSpec as WorkspaceSpec,
)
from snaploader.workspace.model import (
    WorkspaceState as WorkspaceState,
)
from snaploader.workspace.policy import (
    DEFAULT_POLICY as DEFAULT_POLICY,
)
from snaploader.workspace.policy import (
    Policy as Policy,
)
from snaploader.workspace.policy import (
    ScopePolicy as ScopePolicy,
)
from snaploader.workspace.policy import (
    StopAction as StopAction,
)
from snaploader.workspace.runtime import (
    Attachment as Attachment,
)
from snaploader.workspace.runtime import (
    Capture as Capture,
)
from snaploader.workspace.runtime import (
    ProbedWorkspace as ProbedWorkspace,
)
from snaploader.workspace.runtime import (
    ProcessRuntime as ProcessRuntime,
)
from snaploader.workspace.runtime import (
    ReadinessProbe as ReadinessProbe,
)
from snaploader.workspace.runtime import (
    Runtime as Runtime,
)
from snaploader.workspace.runtime import (
    RuntimeStatus as RuntimeStatus,
)
from snaploader.workspace.runtime import (
    StopOutcome as StopOutcome,
)
from snaploader.workspace.sizes import (
    HostSizes as HostSizes,
)
from snaploader.workspace.sizes import (
    WorkspaceSize as WorkspaceSize,
)
from snaploader.workspace.slots import SlotPool as SlotPool
