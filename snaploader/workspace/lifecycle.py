"""Stops, starts, parks and deletes workspaces as their policies say: one look at all that are due, each tick.

A transition is made under the workspace's lock, by the same operations that users call. It is two database
transactions and not one: the first decides again and says what is under way, the last makes the result
visible. Stopping, pausing or deleting can take minutes, and a transaction held open for so long would keep
everybody else from writing (SQLite has one writer). What keeps the decision true in between is the lock,
because nobody else changes the workspace while it is held. What is only written down, such as that a
workspace is dormant, is decided again in the transaction that writes it. A policy or an owner's status that
changes meanwhile counts from the next tick on.

A transition that failed leaves a failed run: as the rules say, autostop and autostart then wait until a later
run succeeds, and a delete for 24 hours. Dormancy is tried at each tick. A dormant workspace is no longer
dormant once its user starts, resumes or touches it.

A clock may be wrong. So the catalog keeps the latest ticks of each host, over restarts: what could not be
taken back waits while the latest one is the first, or is far from the one before, until the next one agrees.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from snaploader.errors import Cancelled, InvalidArgument
from snaploader.workspace.hooks import (
    CLOSE_TIMEOUT_S,
    NO_HOOKS,
    AuditRecord,
    HookDelivery,
    Hooks,
    Notification,
)
from snaploader.workspace.model import Run, RunStatus, RunTransition, WorkspaceState
from snaploader.workspace.policy import (
    Situation,
    StopAction,
    Ticks,
    Transition,
    deletion_time,
    is_irreversible,
)

if TYPE_CHECKING:
    from snaploader.workspace.catalog import Catalog, Reader
    from snaploader.workspace.manager import HeldWorkspace, WorkspaceManager
    from snaploader.workspace.metrics import Metrics


MAX_CONCURRENCY = 10
"""How many workspaces are worked on at once, unless told otherwise."""

Wait = Callable[[threading.Event, float], bool]
"""Waits for an event for so many seconds, and says whether it is set: `threading.Event.wait`."""

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

logger = logging.getLogger(__name__)


class Skip(StrEnum):
    """Why a workspace that was looked at was left alone."""

    LOCKED = "locked"
    """Somebody else works on it."""
    CHANGED = "changed"
    """Under its lock there was nothing to do any more."""
    STOPPING = "stopping"
    """The lifecycle, or the manager, is being stopped."""
    UNCONFIRMED = "unconfirmed"
    """It could not be taken back, and the clock may be wrong: it waits for a tick that confirms the time."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What one `run_once` did. Each workspace that was due is in one of the three mappings."""

    tick: datetime
    """It was decided by this time, cut to the minute."""
    transitions: Mapping[str, Transition]
    """TransitionResult, by workspace id."""
    errors: Mapping[str, str]
    """What failed, by workspace id."""
    skipped: Mapping[str, Skip]
    """Left alone, by workspace id."""
    elapsed_s: float


class LifecycleExecutor:
    """Makes the transitions that are due. Thread-safe; a context manager.

    Several may run side by side, on one host or on many: each workspace is worked on by one of them.

    Args:
        manager: A `WorkspaceManager`, which must outlive this.
        max_concurrency: How many workspaces are worked on at once.
        hooks: Whom to tell.
        metrics: Where to count.
        clock: Tells the time, aware.
        wait: How to wait between ticks.
    """

    def __init__(
        self,
        manager: WorkspaceManager,
        *,
        max_concurrency: int = MAX_CONCURRENCY,
        hooks: Hooks = NO_HOOKS,
        metrics: Metrics | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        wait: Wait = threading.Event.wait,
    ) -> None:
        if max_concurrency < 1:
            raise InvalidArgument(f"max_concurrency must be at least 1: it is {max_concurrency}")
        self._manager = manager
        self._max_concurrency = max_concurrency
        self._maker = TransitionMaker(manager.catalog, clock)
        self._metrics = metrics
        self._clock = clock
        self._wait = wait
        self._delivery = HookDelivery(hooks, on_failure=metrics.hook_failed if metrics else lambda: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until the hooks took what is left, at most `timeout_s`; whether they did.

        For when nothing runs any more.
        """
        return self._delivery.close(timeout_s)

    @property
    def hook_failures(self) -> int:
        """How many deliveries to hooks failed or were dropped so far."""
        return self._delivery.failures

    def run_once(self, tick: datetime | None = None, *, stop: threading.Event | None = None) -> Stats:
        """Look once at all workspaces of this host that are due.

        Those of one base come after one another, so that they find its chunks at hand. A workspace that fails
        is in `Stats.errors`, and changes nothing for the others. What could not be taken back, above all a
        delete, is made only when the tick is at most 25 hours after the one before it.

        Args:
            tick: By what time to decide, aware; now when None. It is cut to the minute.
            stop: When set, no further transition is begun; those under way are finished.

        Raises:
            Unavailable and the like: the catalog cannot be read.
        """
        started = time.monotonic()
        tick = (self._clock() if tick is None else tick).astimezone(UTC).replace(second=0, microsecond=0)
        with self._manager.catalog.transaction() as changes:
            ticks = changes.note_tick(self._manager.host, tick)
            due = changes.due(tick, host=self._manager.host)
        ids = [workspace_id for _, workspace_id in sorted((each.base, each.id) for each in due)]
        results = self._attend_all(ids, ticks, stop or threading.Event())
        if Skip.UNCONFIRMED in results.values():
            logger.warning(
                "the clock of host %r may be wrong: this tick is %s, and the one before %s. Nothing is "
                "deleted until another one confirms it",
                self._manager.host,
                ticks.latest,
                "is not known" if ticks.previous is None else f"was {ticks.previous}",
            )
        stats = _stats(tick, results, time.monotonic() - started)
        if self._metrics is not None:
            self._metrics.observe(stats.transitions.values(), len(stats.errors), stats.elapsed_s)
        return stats

    def run(self, stop: threading.Event, interval_s: float = 60.0) -> None:
        """Call `run_once` now and at each multiple of `interval_s` until `stop` is set.

        It returns when the transitions under way are finished. Calls never overlap; ticks that are missed
        because one took long are left out. A tick that fails as a whole, as when the database cannot be
        reached, is logged and counted, and the next one tries again.

        Raises:
            InvalidArgument: the interval is not above zero.
        """
        for tick in wall_clock_ticks(stop, interval_s, clock=self._clock, wait=self._wait):
            try:
                self.run_once(tick, stop=stop)
            except Exception:
                logger.exception("the lifecycle's tick of %s failed; the next one tries again", tick)
                if self._metrics is not None:
                    self._metrics.tick_failed()

    def _attend_all(self, ids: list[str], ticks: Ticks, stop: threading.Event) -> dict[str, _Result]:
        if not ids:
            return {}
        workers = min(self._max_concurrency, len(ids))
        with ThreadPoolExecutor(workers, thread_name_prefix="snaploader-lifecycle") as pool:
            futures = {each: pool.submit(self._attend, each, ticks, stop) for each in ids}
            try:
                return {each: future.result() for each, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _attend(self, workspace_id: str, ticks: Ticks, stop: threading.Event) -> _Result:
        """Deal with one workspace under its lock, and tell of it when that is released."""
        if stop.is_set():
            return Skip.STOPPING
        outcome = None
        try:
            with self._manager.try_hold(workspace_id) as held:
                if held is None:
                    return Skip.LOCKED
                outcome = self._attend_held(held, workspace_id, ticks)
        except Cancelled:
            return Skip.STOPPING if outcome is None else outcome.result
        except Exception as error:
            logger.warning("lifecycle of workspace %r failed", workspace_id, exc_info=True)
            if outcome is None:
                return _Failure.of(error)
        for record in outcome.records:
            self._delivery.send(record)
        return outcome.result

    def _attend_held(self, held: HeldWorkspace, workspace_id: str, ticks: Ticks) -> _Outcome:
        tick = ticks.latest
        situation = self._situation(workspace_id)
        if situation.workspace.operation is not None:
            held.settle()  # the lock proves that whoever was at it is gone
            situation = self._situation(workspace_id)
        transition = situation.decide(tick)
        if transition is None:
            return _Outcome(Skip.CHANGED)
        if is_irreversible(transition, situation.policy) and not ticks.agree:
            return _Outcome(Skip.UNCONFIRMED)
        try:
            made = self._maker.make(held, situation, transition, tick)
        except Cancelled:
            raise
        except Exception as error:
            logger.warning("%s of workspace %r failed", transition, workspace_id, exc_info=True)
            failure = _Failure.of(error)
            self._note_failure(workspace_id, transition, situation, failure)
            return _Outcome(failure, (self._audit(situation, transition, None, failure.text),))
        if made is None:
            return _Outcome(Skip.CHANGED)
        return _Outcome(
            transition, (self._notification(situation, made), self._audit(situation, transition, made))
        )

    def _situation(self, workspace_id: str) -> Situation:
        with self._manager.catalog.reading() as reader:
            return Situation.read(reader, workspace_id)

    def _note_failure(
        self, workspace_id: str, transition: Transition, situation: Situation, failure: _Failure
    ) -> None:
        try:
            self._maker.note_failure(workspace_id, transition, situation.run, failure.text)
        except Exception:
            logger.warning(
                "the failed %s of %r could not be written down", transition, workspace_id, exc_info=True
            )

    def _notification(self, situation: Situation, made: TransitionResult) -> Notification:
        workspace = situation.workspace
        return Notification(
            workspace.id, workspace.owner, made.transition, made.state, self._clock(), made.deleting_at
        )

    def _audit(
        self, situation: Situation, transition: Transition, made: TransitionResult | None, error: str = ""
    ) -> AuditRecord:
        workspace = situation.workspace
        return AuditRecord(
            workspace.id,
            workspace.owner,
            transition,
            workspace.host,
            state_before=workspace.state,
            state_after=None if made is None else made.state,
            created_at=self._clock(),
            error=error,
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(f"{type(error).__name__}: {error}")


_Result = Transition | Skip | _Failure


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a workspace, and whom to tell when its lock is released."""

    result: _Result
    records: tuple[Notification | AuditRecord, ...] = ()


def _stats(tick: datetime, results: Mapping[str, _Result], elapsed_s: float) -> Stats:
    return Stats(
        tick,
        MappingProxyType(
            {each: result for each, result in results.items() if isinstance(result, Transition)}
        ),
        MappingProxyType(
            {each: result.text for each, result in results.items() if isinstance(result, _Failure)}
        ),
        MappingProxyType({each: result for each, result in results.items() if isinstance(result, Skip)}),
        elapsed_s,
    )


def wall_clock_ticks(
    stop: threading.Event, interval_s: float, *, clock: Callable[[], datetime], wait: Wait
) -> Iterator[datetime]:
    """The time at once, then at each multiple of `interval_s` since 1970, until `stop` is set.

    The next tick is looked for when the one before was dealt with: two never overlap, those that were missed
    are left out, and delays do not add up. A clock that is set to another time gives a tick at once or within
    one interval.

    Raises:
        InvalidArgument: the interval is not above zero.
    """
    if not 0 < interval_s < float("inf"):
        raise InvalidArgument(f"the interval of ticks must be above 0 s: it is {interval_s!r}")
    last = None
    while not stop.is_set():
        now = clock()
        number = now.timestamp() // interval_s
        if number != last:  # else it was woken a little early
            last = number
            yield now
        left_s = interval_s - clock().timestamp() % interval_s
        if wait(stop, left_s):
            return


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
