"""An operation whose process ended in the middle: it is finished, or taken back."""

from __future__ import annotations

import logging

from snaploader.errors import FailedPrecondition
from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.undo import undo
from snaploader.workspace.manager.work import Work
from snaploader.workspace.model import Operation, SnapshotStatus

RECOVERY = "recovery"
"""The reason of what nobody asked for."""

log = logging.getLogger(__name__)


def settle(services: Services, workspace_id: str) -> Operation | None:
    """Finish or take back what is under way on a workspace, whose lock proves that nobody is at it any more.

    Returns:
        What was under way; None: nothing was.

    Raises:
        NotFound: There is no such workspace.
        FailedPrecondition: It is under way on another host.
    """
    with services.catalog.reading() as reader:
        workspace = reader.workspace(workspace_id)
        operation = workspace.operation
        if operation is None:
            return None
        pending = reader.snapshots(workspace_id, statuses=[SnapshotStatus.PENDING])
    if operation.host != services.host:
        raise FailedPrecondition(
            f"workspace {workspace_id!r}: a {operation.kind} on host {operation.host!r} did not end: "
            "run recovery there"
        )
    log.warning("workspace %r: a %s did not end; it is put right", workspace_id, operation.kind)
    undo(Work(services, workspace, operation, pending=next(iter(pending), None), reason=RECOVERY))
    return operation
