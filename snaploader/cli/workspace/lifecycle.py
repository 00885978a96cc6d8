"""`snaploader workspace lifecycle` and `recover`: what keeps workspaces in order by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from snaploader.cli.metrics import metrics_option, serving_metrics
from snaploader.cli.options import option, workspace_command
from snaploader.cli.output import CheckFailed, Output, record
from snaploader.cli.process import stop_signal
from snaploader.cli.resources import Workspaces
from snaploader.cli.values import DURATION, parse_time
from snaploader.errors import InvalidArgument

if TYPE_CHECKING:
    from snaploader.workspace import AuditRecord, LifecycleExecutor, RecoverySummary, Stats


@workspace_command("workspace lifecycle")
@option("--once", is_flag=True, help="Look at all workspaces once, and end.")
@option(
    "--tick",
    metavar="TIME",
    help="With --once: decide as of this time, ISO 8601, UTC if it names no zone.  [default: now]",
)
@option("--interval", type=DURATION, default="60s", help="Between two looks.")
@option(
    "--max-concurrency", type=click.IntRange(1), default=10, help="Workspaces that are worked on at once."
)
@metrics_option
def lifecycle(
    workspaces: Workspaces,
    once: bool,
    tick: str | None,
    interval: float,
    max_concurrency: int,
    metrics_listen: tuple[str, int] | None,
) -> None:
    """Stop, start, pause, mark and delete the workspaces of this host as their policies say.

    First recovers, as `recover` does, then works until SIGINT or SIGTERM; what is under way then is
    finished. Each transition is printed; with --json it is an object on a line of its own.
    """
    if tick is not None and not once:
        raise InvalidArgument("--tick goes with --once only")
    from snaploader.workspace.lifecycle import Hooks, LifecycleExecutor

    if once and metrics_listen is not None:
        raise InvalidArgument("--metrics-listen does not go with --once, which ends before anybody asks")
    if once:
        at = None if tick is None else parse_time(tick, "--tick")
        with LifecycleExecutor(workspaces.manager, max_concurrency=max_concurrency) as executor:
            _print_stats(workspaces.output, executor.run_once(at))
        return
    if interval <= 0:
        raise InvalidArgument("--interval must be above 0")
    output = workspaces.output
    with stop_signal() as stopped, serving_metrics(output, metrics_listen) as registry:
        metrics = None
        if registry is not None:
            from snaploader.metrics import PrometheusMetrics
            from snaploader.workspace.lifecycle import Metrics

            metrics = Metrics(registry)
            workspaces.caches.observer = PrometheusMetrics(registry)
        for line in summary_lines(workspaces.manager.recover()):
            output.talk(line)
        hooks = Hooks(audit=(functools.partial(_print_transition, output),))
        with (
            LifecycleExecutor(
                workspaces.manager, max_concurrency=max_concurrency, hooks=hooks, metrics=metrics
            ) as executor,
            _running(executor, interval, ended=stopped.wake),
        ):
            output.talk(f"looking every {interval:g} s; stop with Ctrl-C")
            stopped.wait()
    output.talk("stopped")


@contextlib.contextmanager
def _running(executor: LifecycleExecutor, interval_s: float, ended: Callable[[], None]) -> Iterator[None]:
    """Let it look again and again on a thread of its own while the block runs, and finish what it is at."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "snaploader-lifecycle") as pool:
        looking = pool.submit(executor.run, stop, interval_s)
        looking.add_done_callback(lambda _: ended())
        try:
            yield
        finally:
            stop.set()
    looking.result()


def _print_transition(output: Output, audit: AuditRecord) -> None:
    names = ("workspace_id", "owner", "transition", "state_before", "state_after", "created_at", "error")
    output.json_line(record(audit, *names))
    outcome = audit.error or f"{audit.state_before} → {audit.state_after}"
    output.text(f"{audit.created_at:%Y-%m-%d %H:%M:%S}  {audit.workspace_id}  {audit.transition}: {outcome}")
    output.flush()


def _print_stats(output: Output, stats: Stats) -> None:
    output.data(
        record(stats, "tick", "transitions", "errors", "skipped", "elapsed_s"),
        *(f"{name}  {transition}" for name, transition in stats.transitions.items()),
    )
    for name, why in stats.skipped.items():
        output.detail(f"{name} was left alone: {why}")
    for name, error in stats.errors.items():
        output.warn(f"{name}: {error}")


@workspace_command("workspace recover")
@option(
    "--rebind-state",
    is_flag=True,
    help="Go on with this state directory: the one that the catalog knows for this host is lost for good.",
)
@option(
    "--forget-remote",
    is_flag=True,
    help="Give up what a remote cache that is gone for good has of commits that failed or were deleted.",
)
def recover(workspaces: Workspaces, *, rebind_state: bool, forget_remote: bool) -> None:
    """Bring the catalog and what is on this host together again, after a crash or a restart.

    To be run before workspaces are used; `lifecycle` does it by itself. What somebody works on is left alone.
    What the catalog says is running is started again, also a command that had ended by itself.
    Ends with exit code 13 when something could not be put right.
    """
    summary = workspaces.manager.recover(rebind_state=rebind_state, forget_remote=forget_remote)
    workspaces.output.data(dataclasses.asdict(summary), *summary_lines(summary))
    if summary.problems:
        count = len(summary.problems)
        things = "1 thing" if count == 1 else f"{count} things"
        raise CheckFailed(f"{things} could not be put right")


def summary_lines(summary: RecoverySummary) -> list[str]:
    how = {True: "taken back, as the catalog had lost it", False: "whole"}
    lines = [f"paused    {each}: {how[each in summary.adopted]}" for each in summary.restored]
    lines += [f"repaired  {note.name}: {note.reason}" for note in summary.repaired]
    lines += [f"removed   {note.name}: {note.reason}" for note in summary.pruned]
    lines += [f"trashed   {note.name}: {note.reason}" for note in summary.trashed]
    lines += [f"left      {note.name}: {note.reason}" for note in summary.unknown]
    lines += [f"busy      {each}: somebody works on it" for each in summary.busy]
    lines += [f"problem   {note.name}: {note.reason}" for note in summary.problems]
    return lines or ["there was nothing to recover"]
