"""The manager of workspaces: everything that can be done to them. `WorkspaceManager` is the way in."""

from snaploader.workspace.manager.commits import OrphanedUpload
from snaploader.workspace.manager.held import HeldWorkspace
from snaploader.workspace.manager.manager import WorkspaceManager
from snaploader.workspace.manager.summary import Note, RecoverySummary

__all__ = ["HeldWorkspace", "Note", "OrphanedUpload", "RecoverySummary", "WorkspaceManager"]
