"""Makes one transition of one workspace, whose lock is held.

What takes long (stopping, pausing, starting, deleting) is done by the manager's operations; the transaction
in which one begins reads and decides again, and calls it off when something else is to be done now. What is
only written down, such as that a workspace is dormant, is decided again in the transaction that writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from snaploader.workspace.decide import Situation, Transition, deletion_time
from snaploader.workspace.model import Run, RunStatus, RunTransition, WorkspaceState
from snaploader.workspace.policy import StopAction

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Catalog, Reader

DORMANT_EVENT = "dormancy_mark"
"""Type of the event of a workspace that was marked dormant; its payload says when it is to be deleted."""

STOP_EVENT = "workspace_stop"

RUN_OF = {
    Transition.AUTOSTOP: RunTransition.STOP,
    Transition.AUTOSTART: RunTransition.START,
    Transition.FAILED_STOP: RunTransition.STOP,
    Transition.DORMANCY: RunTransition.STOP,
    Transition.DELETE: RunTransition.DELETE,
}
"""What run each transition is, or would have been when it failed."""


class HeldWorkspace(Protocol):
    """A workspace whose lock is held, and what can be done to it. `reason` is kept with the run."""

    def settle(self) -> object:
        """Finish or take back what a process that died left in the middle."""

    def guarded(self, guard: Callable[[Reader], None]) -> HeldWorkspace:
        """The same, whose operations `guard` calls off by raising in the transaction that begins them."""

    def start(self, *, reason: str) -> object:
        """Start a stopped one."""

    def resume(self, *, reason: str) -> object:
        """Resume a paused one."""

    def stop(self, *, reason: str) -> object:
        """Stop a running one."""

    def pause(self, *, reason: str) -> object:
        """Pause a running one."""

    def delete(self, *, reason: str) -> object:
        """Delete one in any state."""


@dataclass(frozen=True, slots=True)
class TransitionResult:
    """A transition that was made, and what came of it."""

    transition: Transition
    state: WorkspaceState
    deleting_at: datetime | None = None


class TransitionMaker:
    """Makes transitions of workspaces whose locks are held. Thread-safe."""

    def __init__(self, catalog: Catalog, clock: Callable[[], datetime]) -> None:
        self._catalog = catalog
        self._clock = clock

    def make(
        self, held: HeldWorkspace, situation: Situation, transition: Transition, tick: datetime
    ) -> TransitionResult | None:
        """Make the transition that was decided. None: it was no longer to be made when it was about to begin.

        Raises whatever the manager and the catalog do.
        """
        workspace_id = situation.workspace.id

        def guard(reader: Reader) -> None:
            if Situation.read(reader, workspace_id).decide(tick) is not transition:
                raise _DecisionChanged

        try:
            return self._make(held.guarded(guard), situation, transition, tick)
        except _DecisionChanged:
            return None

    def _make(
        self, held: HeldWorkspace, situation: Situation, transition: Transition, tick: datetime
    ) -> TransitionResult | None:
        workspace_id, state = situation.workspace.id, situation.workspace.state
        match transition:
            case Transition.AUTOSTOP if situation.policy.autostop_action is StopAction.PAUSE:
                held.pause(reason=transition)
                return TransitionResult(transition, WorkspaceState.PAUSED)
            case Transition.AUTOSTOP:
                held.stop(reason=transition)
                return TransitionResult(transition, WorkspaceState.STOPPED)
            case Transition.AUTOSTART:
                (held.resume if state is WorkspaceState.PAUSED else held.start)(reason=transition)
                return TransitionResult(transition, WorkspaceState.RUNNING)
            case Transition.FAILED_STOP if state is WorkspaceState.RUNNING:
                held.stop(reason=transition)
                return TransitionResult(transition, WorkspaceState.STOPPED)
            case Transition.FAILED_STOP:
                return self._note_stopped(workspace_id, tick)
            case Transition.DORMANCY:
                if state is WorkspaceState.RUNNING:
                    held.stop(reason=transition)
                return self._mark_dormant(workspace_id, tick)
            case Transition.DELETE:
                held.delete(reason=transition)
                return TransitionResult(transition, WorkspaceState.DELETED)

    def note_failure(self, workspace_id: str, transition: Transition, before: Run | None, error: str) -> None:
        """Write down a failed run, unless the operation that failed has done so itself since `before`."""
        with self._catalog.transaction() as changes:
            changes.lock_workspace(workspace_id)
            latest = changes.latest_run(workspace_id)
            if latest is not None and latest.status is RunStatus.FAILED and latest != before:
                return
            now = self._clock()
            run = changes.add_run(workspace_id, RUN_OF[transition], now, transition)
            changes.finish_run(run.id, RunStatus.FAILED, now, error)

    def _note_stopped(self, workspace_id: str, tick: datetime) -> TransitionResult | None:
        """A start failed and left nothing running: a run that succeeded ends the failure."""
        with self._catalog.transaction() as changes:
            changes.lock_workspace(workspace_id)
            situation = Situation.read(changes, workspace_id)
            if situation.decide(tick) is not Transition.FAILED_STOP:
                return None
            now = self._clock()
            run = changes.add_run(workspace_id, RunTransition.STOP, now, Transition.FAILED_STOP)
            changes.finish_run(run.id, RunStatus.SUCCEEDED, now)
            changes.add_event(workspace_id, STOP_EVENT, {"reason": Transition.FAILED_STOP.value}, now)
            return TransitionResult(Transition.FAILED_STOP, situation.workspace.state)

    def _mark_dormant(self, workspace_id: str, tick: datetime) -> TransitionResult | None:
        with self._catalog.transaction() as changes:
            changes.lock_workspace(workspace_id)
            situation = Situation.read(changes, workspace_id)
            if situation.decide(tick) is not Transition.DORMANCY:
                return None
            deleting_at = deletion_time(tick, None, situation.policy.delete_after_dormant, tick)
            changes.update_workspace(workspace_id, dormant_at=tick, deleting_at=deleting_at)
            shown = None if deleting_at is None else deleting_at.isoformat()
            changes.add_event(workspace_id, DORMANT_EVENT, {"deleting_at": shown}, self._clock())
            return TransitionResult(Transition.DORMANCY, situation.workspace.state, deleting_at)


class _DecisionChanged(Exception):
    """Something else is to be done with the workspace now, or nothing."""
