"""Everything that can be done to workspaces. `WorkspaceManager` is the way in.

`manager` says what there is to do, and takes locks; `held_workspace` does it to a workspace whose lock is
held, on threads of its own. Each operation reads from top to bottom in one file: `create` (and fork),
`lifetime` (start, stop, pause, resume, delete), `versions` (and rollback), `commit`. What they share
is in `operation` (how one begins, is recorded and fails) and `snapshots` (records in the catalog, content in
the caches). `undo` takes back what failed or was left in the middle; `recovery` puts a whole host right.
"""

from snaploader.workspace.manager.commit import OrphanedUpload
from snaploader.workspace.manager.held_workspace import HeldWorkspace
from snaploader.workspace.manager.manager import WorkspaceManager
from snaploader.workspace.manager.recovery import Note, RecoverySummary

__all__ = ["HeldWorkspace", "Note", "OrphanedUpload", "RecoverySummary", "WorkspaceManager"]
