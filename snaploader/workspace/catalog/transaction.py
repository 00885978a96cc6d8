"""Writing the catalog: each block of changes becomes true at once, or not at all."""

from __future__ import annotations

from snaploader.workspace.catalog.history_changes import HistoryWriter
from snaploader.workspace.catalog.policy_changes import PolicyWriter
from snaploader.workspace.catalog.workspace_changes import WorkspaceWriter


class Transaction(WorkspaceWriter, HistoryWriter, PolicyWriter):
    """Changes to the catalog. Made by `Catalog.transaction`; for one thread, inside its block.

    It reads what it wrote. Before it changes anything of a workspace, it locks that workspace's row, so what
    it read of it under the lock holds until the end. Every method may raise what `Catalog.transaction` names.
    When the database refuses a change, the whole block fails, also if the error is caught within it.
    """
