"""Everything that can be done to workspaces. `WorkspaceManager` is the way in.

`manager` says what there is to do, and takes locks; `held_workspace` does it to a workspace whose lock is
held, on threads of its own. Each operation reads from top to bottom: in `lifetime` what makes, starts, stops,
pauses, resumes and deletes a workspace, in `versions` what takes versions and commits. What they share is in
`operation` (how one begins and is recorded) and `snapshots` (records in the catalog, content in the caches).
`undo` takes back what failed or was left in the middle; `recovery` puts a whole host right.
"""

from snaploader.workspace.manager.held_workspace import HeldWorkspace
from snaploader.workspace.manager.manager import WorkspaceManager
from snaploader.workspace.manager.recovery import Note, RecoverySummary
from snaploader.workspace.manager.versions import OrphanedUpload

__all__ = ["HeldWorkspace", "Note", "OrphanedUpload", "RecoverySummary", "WorkspaceManager"]
