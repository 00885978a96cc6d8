"""What others are told of the transitions made: notifications for owners, audit records for operators.

Deliveries come after the transition is committed and its lock released, from a thread of their own: a hook
that raises or hangs neither undoes nor delays a transition. Each record is handed to each hook at most once,
in the order of sending; not at all when the process ends first, or when too many wait for a hook that hangs.
Whoever must not miss any reads the catalog's events, which are written with the transition itself.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.policy import Transition

MAX_WAITING = 10_000
"""Most records that wait for delivery; what comes on top is dropped, and counted as a failure."""

CLOSE_TIMEOUT_S = 10.0
"""How long closing waits for the deliveries that are left."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Notification:
    """A transition that was made, for the owner of the workspace."""

    workspace_id: str
    owner: str
    transition: Transition
    state: WorkspaceState
    """The state of the workspace after it."""
    created_at: datetime
    deleting_at: datetime | None = None
    """When a dormant one is to be deleted; None: it is not to be, or is not dormant."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """A transition that was tried, for the operator."""

    workspace_id: str
    owner: str
    transition: Transition
    host: str
    state_before: WorkspaceState
    state_after: WorkspaceState | None
    """The state after it; None when it is not known, because the transition failed."""
    created_at: datetime
    error: str = ""
    """Empty: it succeeded."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Whom to tell. They are called from one thread, one after the other."""

    notify: tuple[Callable[[Notification], None], ...] = ()
    audit: tuple[Callable[[AuditRecord], None], ...] = ()


NO_HOOKS = Hooks()
"""Nobody is told."""


class HookDelivery:
    """Hands records to hooks from a thread that starts with the first record. Thread-safe.

    Args:
        hooks: Whom to tell.
        on_failure: Called once for each record that a hook failed to take, or that was dropped.
    """

    def __init__(self, hooks: Hooks, *, on_failure: Callable[[], None] = lambda: None) -> None:
        self._hooks = hooks
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._waiting: deque[Notification | AuditRecord] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def send(self, record: Notification | AuditRecord) -> None:
        """Hand `record` to its hooks soon. Neither waits nor raises."""
        if not self._hooks_of(record):
            return
        with self._changed:
            is_taken = not self._is_closed and len(self._waiting) < MAX_WAITING and self._has_thread()
            if is_taken:
                self._waiting.append(record)
                self._changed.notify_all()
        if not is_taken:
            self._failed(record, "dropped: deliveries are closed, or too many wait for a hook that hangs")

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until everything sent is delivered, at most `timeout_s`; then deliver no more. Repeatable.

        Returns:
            Whether all was delivered. If not, a hook hangs; its thread ends with it, or with the process.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        if not thread.is_alive():
            return True
        with self._changed:
            dropped = list(self._waiting)
            self._waiting.clear()
        logger.warning("a lifecycle hook did not return within %s s", timeout_s)
        for record in dropped:
            self._failed(record, "dropped at closing, because a hook hangs")
        return False

    def _has_thread(self) -> bool:
        if self._thread is not None:
            return True
        # A daemon, so that a hook that hangs cannot keep the process from ending.
        thread = threading.Thread(target=self._run, name="snaploader-hooks", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False  # the system has no more threads to give
        self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                record = self._waiting.popleft()
            self._deliver(record)

    def _deliver(self, record: Notification | AuditRecord) -> None:
        for hook in self._hooks_of(record):
            try:
                hook(record)
            except BaseException as error:  # noqa: BLE001 - whatever a hook does, the next record is delivered
                self._failed(record, f"{type(error).__name__}: {error}", error)

    def _hooks_of(self, record: Notification | AuditRecord) -> tuple[Callable[..., None], ...]:
        return self._hooks.notify if isinstance(record, Notification) else self._hooks.audit

    def _failed(
        self, record: Notification | AuditRecord, why: str, error: BaseException | None = None
    ) -> None:
        kind, of = type(record).__name__, record.workspace_id
        logger.warning("%s of %s of %r: %s", kind, record.transition, of, why, exc_info=error)
        self._on_failure()
