"""Stops, starts, parks and deletes workspaces as their policies say: one look at all that are due, each tick.

A transition is made under the workspace's lock, by the same operations that users call. It is decided again
in the transaction that begins the operation or, where it is only written down, such as that a workspace is
dormant, in the one that writes it; after that the lock keeps the decision true. A policy or an owner's status
that changes meanwhile counts from the next tick on.

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from snaploader.errors import Cancelled, FailedPrecondition, InvalidArgument
from snaploader.workspace.events import add_event
from snaploader.workspace.model import STOP_EVENT, Run, RunStatus, RunTransition, Workspace, WorkspaceState
from snaploader.workspace.policy import (
    Situation,
    StopAction,
    Ticks,
    Transition,
    deletion_time,
    is_irreversible,
)
from snaploader.workspace.templates import TemplateUpdate

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from snaploader.workspace.catalog import Reader
    from snaploader.workspace.manager import HeldWorkspace, WorkspaceManager


MAX_CONCURRENCY = 10
"""How many workspaces are worked on at once, unless told otherwise."""

Wait = Callable[[threading.Event, float], bool]
"""Waits for an event for so many seconds, and says whether it is set: `threading.Event.wait`."""

DORMANT_EVENT = "dormancy_mark"
"""Type of the event of a workspace that was marked dormant; its payload says when it is to be deleted."""

MAX_WAITING = 10_000
"""Most records that wait for delivery; what comes on top is dropped, and counted as a failure."""

CLOSE_TIMEOUT_S = 10.0
"""How long closing waits for the deliveries that are left."""

BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histogram, from a tick with nothing to do to one that takes longer than a minute."""

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
    """Those that were made, by workspace id."""
    errors: Mapping[str, str]
    """What failed, by workspace id."""
    skipped: Mapping[str, Skip]
    """Left alone, by workspace id."""
    elapsed_s: float


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
    template_update: TemplateUpdate | None = None
    """The version of its template that the start took; None: the one it had."""


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
        self._metrics = metrics
        self._clock = clock
        self._wait = wait
        self._delivery = HookDelivery(hooks, on_failure=metrics.hook_failed if metrics else lambda: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Once nothing runs any more, wait for hooks to take what is left; whether they did in time."""
        return self._delivery.close(timeout_s)

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
        made = {each: result for each, result in results.items() if isinstance(result, Transition)}
        failed = {each: _text(result) for each, result in results.items() if isinstance(result, Exception)}
        skipped = {each: result for each, result in results.items() if isinstance(result, Skip)}
        took_s = time.monotonic() - started
        if self._metrics is not None:
            self._metrics.observe(made.values(), len(failed), took_s)
        return Stats(
            tick, MappingProxyType(made), MappingProxyType(failed), MappingProxyType(skipped), took_s
        )

    def run(
        self,
        stop: threading.Event,
        interval_s: float = 60.0,
        *,
        on_stats: Callable[[Stats], object] | None = None,
    ) -> None:
        """Call `run_once` now and at each multiple of `interval_s` until `stop` is set.

        It returns when the transitions under way are finished. Calls never overlap; ticks that are missed
        because one took long are left out. A tick that fails as a whole, as when the database cannot be
        reached, is logged and counted, and the next one tries again.

        Args:
            on_stats: Called on this thread with what each tick did, before the next one; not for a tick that
                failed as a whole. What it raises is logged, and changes nothing.

        Raises:
            InvalidArgument: the interval is not above zero.
        """
        for tick in wall_clock_ticks(stop, interval_s, clock=self._clock, wait=self._wait):
            try:
                stats = self.run_once(tick, stop=stop)
            except Exception:
                logger.exception("the lifecycle's tick of %s failed; the next one tries again", tick)
                if self._metrics is not None:
                    self._metrics.tick_failed()
                continue
            if on_stats is None:
                continue
            try:
                on_stats(stats)
            except Exception:
                logger.exception("whoever is told what the tick of %s did has failed", tick)

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
                return error
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

        def guard(reader: Reader) -> None:
            if reader.situation(workspace_id).decide(tick) is not transition:
                raise _DecisionChanged

        try:
            made = self._make(held.guarded(guard), situation, transition, tick)
        except _DecisionChanged:
            made = None
        except Cancelled:
            raise
        except Exception as error:
            logger.warning("%s of workspace %r failed", transition, workspace_id, exc_info=True)
            self._note_failure(workspace_id, transition, situation.run, _text(error))
            return _Outcome(error, (self._audit(situation.workspace, transition, None, _text(error)),))
        if made is None:
            return _Outcome(Skip.CHANGED)
        return _Outcome(transition, (made, self._audit(situation.workspace, transition, made.state)))

    def _situation(self, workspace_id: str) -> Situation:
        with self._manager.catalog.reading() as reader:
            return reader.situation(workspace_id)

    def _make(
        self, held: HeldWorkspace, situation: Situation, transition: Transition, tick: datetime
    ) -> Notification | None:
        """Make the transition that was decided. None: it was no longer to be made."""
        workspace, update = situation.workspace, None
        match transition:
            case Transition.AUTOSTOP if situation.policy.autostop_action is StopAction.PAUSE:
                held.pause(reason=transition)
                state = WorkspaceState.PAUSED
            case Transition.AUTOSTOP:
                state = held.stop(reason=transition).state
            case Transition.AUTOSTART:
                is_paused = workspace.state is WorkspaceState.PAUSED
                started = (held.resume if is_paused else held.start)(reason=transition)
                state, update = started.state, _update_of(workspace, started)
            case Transition.FAILED_STOP if workspace.state is WorkspaceState.RUNNING:
                state = held.stop(reason=transition).state
            case Transition.FAILED_STOP:
                return self._note(workspace.id, transition, tick)
            case Transition.DORMANCY:
                if workspace.state is WorkspaceState.RUNNING:
                    held.stop(reason=transition)
                return self._note(workspace.id, transition, tick)
            case Transition.DELETE:
                state = held.delete(reason=transition).state
        return Notification(
            workspace.id, workspace.owner, transition, state, self._clock(), template_update=update
        )

    def _note(self, workspace_id: str, transition: Transition, tick: datetime) -> Notification | None:
        """Write down all that is left to do: that it is dormant, or is stopped after a failed start."""
        with self._manager.catalog.transaction() as changes:
            changes.lock_workspace(workspace_id)
            situation = changes.situation(workspace_id)
            if situation.decide(tick) is not transition:
                return None
            now, workspace, deleting_at = self._clock(), situation.workspace, None
            if transition is Transition.DORMANCY:
                deleting_at = deletion_time(tick, None, situation.policy.delete_after_dormant, tick)
                changes.update_workspace(workspace_id, dormant_at=tick, deleting_at=deleting_at)
                shown = None if deleting_at is None else deleting_at.isoformat()
                about = {"deleting_at": shown, "policy": workspace.policy}
                add_event(changes, workspace_id, DORMANT_EVENT, about, now)
            else:
                # A run that succeeded ends the failure.
                run = changes.add_run(workspace_id, RUN_OF[transition], now, transition)
                changes.finish_run(run.id, RunStatus.SUCCEEDED, now)
                why = {"reason": transition.value, "run": run.id}
                add_event(changes, workspace_id, STOP_EVENT, why, now)
            return Notification(workspace_id, workspace.owner, transition, workspace.state, now, deleting_at)

    def _note_failure(
        self, workspace_id: str, transition: Transition, before: Run | None, error: str
    ) -> None:
        """Write down a failed run, unless the operation that failed has done so itself since `before`."""
        try:
            with self._manager.catalog.transaction() as changes:
                changes.lock_workspace(workspace_id)
                latest = changes.latest_run(workspace_id)
                if latest is not None and latest.status is RunStatus.FAILED and latest != before:
                    return
                now = self._clock()
                run = changes.add_run(workspace_id, RUN_OF[transition], now, transition)
                changes.finish_run(run.id, RunStatus.FAILED, now, error)
        except Exception:
            logger.warning(
                "the failed %s of %r could not be written down", transition, workspace_id, exc_info=True
            )

    def _audit(
        self, before: Workspace, transition: Transition, after: WorkspaceState | None, error: str = ""
    ) -> AuditRecord:
        return AuditRecord(
            before.id, before.owner, transition, before.host, before.state, after, self._clock(), error
        )


_Result = Transition | Skip | Exception


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a workspace, and whom to tell when its lock is released."""

    result: _Result
    records: tuple[Notification | AuditRecord, ...] = ()


class _DecisionChanged(Exception):
    """Something else is to be done with the workspace now, or nothing."""


def _update_of(before: Workspace, after: Workspace) -> TemplateUpdate | None:
    """The update to another version of its template that a start has made."""
    if before.template_version is None or after.template_version in {None, before.template_version}:
        return None
    return TemplateUpdate(after.base, before.template_version, after.template_version)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def wall_clock_ticks(
    stop: threading.Event, interval_s: float, *, clock: Callable[[], datetime], wait: Wait
) -> Iterator[datetime]:
    """The time at once, then at each multiple of `interval_s` since 1970, until `stop` is set.

    Those that come while one is dealt with are left out, and delays do not add up. A clock that is set to
    another time gives a tick at once or within one interval.
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


class HookDelivery:
    """Hands records to hooks from a thread that starts with the first record. Thread-safe.

    So a hook that raises or hangs neither undoes nor delays a transition. Each record is handed to each hook
    at most once, in the order of sending; not at all when the process ends first, or when too many wait for a
    hook that hangs. Whoever must not miss any reads the catalog's events, which are written with the
    transition.

    Args:
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


class Metrics:
    """Counts for Prometheus what the lifecycle does. Thread-safe.

    Needs the extra `metrics`, which is imported when one is made; docs/workspaces.md lists the metrics.

    Args:
        registry: Where the metrics are registered, such as `prometheus_client.REGISTRY`; once in each.

    Raises:
        FailedPrecondition: prometheus-client is not installed, or the registry has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        try:
            from prometheus_client import Counter, Histogram
        except ImportError as error:
            raise FailedPrecondition(
                "metrics need prometheus-client: pip install 'snaploader[metrics]'"
            ) from error
        try:
            self._duration = Histogram(
                "snaploader_lifecycle_run_duration_seconds",
                "Time of one look at all workspaces that are due, and their transitions.",
                buckets=BUCKETS_S,
                registry=registry,
            )
            self._transitions = Counter(
                "snaploader_lifecycle_transitions_total",
                "Transitions made.",
                ["transition"],
                registry=registry,
            )
            self._errors = Counter(
                "snaploader_lifecycle_errors_total",
                "Workspaces whose transition failed, and ticks that failed as a whole.",
                registry=registry,
            )
            self._hook_failures = Counter(
                "snaploader_lifecycle_hook_failures_total",
                "Deliveries to hooks that failed or were dropped.",
                registry=registry,
            )
        except ValueError as error:
            raise FailedPrecondition(
                "this registry has the metrics of the lifecycle already: make one Metrics, and share it"
            ) from error
        for transition in Transition:
            self._transitions.labels(transition.value)  # shown as zero from the start

    def observe(self, transitions: Iterable[Transition], errors: int, elapsed_s: float) -> None:
        """Count one `run_once`: the transitions made, how many failed, and its time in seconds."""
        self._duration.observe(elapsed_s)
        for transition in transitions:
            self._transitions.labels(transition.value).inc()
        self._errors.inc(errors)

    def tick_failed(self) -> None:
        """Count a tick that failed as a whole, as when the database cannot be reached."""
        self._errors.inc()

    def hook_failed(self) -> None:
        self._hook_failures.inc()
