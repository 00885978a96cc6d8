"""What all operations of a manager work with, in one value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from snaploader._environment import HostEnvironment
from snaploader.workspace.manager.content import SnapshotContent
from snaploader.workspace.records import PausedRecords
from snaploader.workspace.runtime.protocol import Runtime
from snaploader.workspace.slots import SlotPool

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Catalog, Reader


def utc_now() -> datetime:
    """The time, as the catalog keeps it."""
    return datetime.now(UTC)


def no_guard(reader: Reader) -> None:
    """Operations begin without further conditions."""


@dataclass(frozen=True, slots=True)
class Services:
    """Immutable, and made of what is thread-safe."""

    catalog: Catalog
    runtime: Runtime
    content: SnapshotContent
    records: PausedRecords
    slots: SlotPool
    host: str
    clock: Callable[[], datetime]
    environment: HostEnvironment
    stop_timeout_s: float
    closing: threading.Event
    """Set when the manager closes: nothing waits for readiness any more."""
    guard: Callable[[Reader], None] = no_guard
    """Called in the transaction that begins an operation; what it raises calls the operation off."""

    def has_traces_of(self, workspace_id: str) -> bool:
        """Whether this host has files of a workspace, or a record of it as paused, whole or not."""
        return self.records.exists(workspace_id) or self.runtime.status(workspace_id).exists
