"""Prometheus metrics of the lifecycle; needs the extra `metrics`, which is imported when `Metrics` is made.

snaploader_lifecycle_run_duration_seconds           histogram: one `run_once`
snaploader_lifecycle_transitions_total{transition}  counter: transitions made
snaploader_lifecycle_errors_total                   counter: workspaces whose transition failed, failed ticks
snaploader_lifecycle_hook_failures_total            counter: deliveries to hooks that failed or were dropped
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from snaploader.errors import FailedPrecondition
from snaploader.workspace.policy import Transition

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histogram, from a tick with nothing to do to one that takes longer than a minute."""


class Metrics:
    """Counts what the lifecycle does. Thread-safe.

    Args:
        registry: Where the metrics are registered, which can be done once; None: prometheus_client's default.

    Raises:
        FailedPrecondition: prometheus-client is not installed, or the registry has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Histogram
        except ImportError as error:
            raise FailedPrecondition(
                "metrics need prometheus-client: pip install 'snaploader[metrics]'"
            ) from error
        registry = REGISTRY if registry is None else registry
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
        """Count a delivery that failed or was dropped."""
        self._hook_failures.inc()
