"""Metrics as the registry exposes them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from snaploader.errors import FailedPrecondition
from snaploader.workspace.lifecycle import Metrics
from snaploader.workspace.policy import Transition


def exposed(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample of the text that prometheus reads."""
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_run_shows_in_the_histogram_and_the_counters():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.observe([Transition.AUTOSTOP, Transition.AUTOSTOP, Transition.DELETE], 2, 0.07)
    metrics.observe([], 0, 100.0)
    metrics.tick_failed()
    metrics.hook_failed()
    samples = exposed(registry)
    assert samples["snaploader_lifecycle_run_duration_seconds_count"] == 2
    assert samples["snaploader_lifecycle_run_duration_seconds_sum"] == pytest.approx(100.07)
    assert samples['snaploader_lifecycle_run_duration_seconds_bucket{le="0.025"}'] == 0
    assert samples['snaploader_lifecycle_run_duration_seconds_bucket{le="0.1"}'] == 1
    assert samples['snaploader_lifecycle_transitions_total{transition="autostop"}'] == 2
    assert samples['snaploader_lifecycle_transitions_total{transition="delete"}'] == 1
    assert samples["snaploader_lifecycle_errors_total"] == 3
    assert samples["snaploader_lifecycle_hook_failures_total"] == 1


def test_every_kind_of_transition_is_shown_from_the_start():
    registry = CollectorRegistry()
    Metrics(registry)
    samples = exposed(registry)
    for transition in Transition:
        assert samples[f'snaploader_lifecycle_transitions_total{{transition="{transition}"}}'] == 0


def test_a_registry_that_has_the_metrics_refuses_them_with_what_to_do():
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(FailedPrecondition, match="share it"):
        Metrics(registry)


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'snaploader\[metrics\]'"):
        Metrics(CollectorRegistry())


def test_nothing_is_registered_where_nobody_said():
    with pytest.raises(TypeError, match="registry"):
        Metrics()


def test_prometheus_client_is_imported_only_when_metrics_are_made():
    program = (
        "import sys, snaploader.workspace.lifecycle as m\n"
        "assert 'prometheus_client' not in sys.modules\n"
        "import prometheus_client\n"
        "m.Metrics(prometheus_client.REGISTRY)\n"
        "assert b'snaploader_lifecycle_errors_total' in prometheus_client.generate_latest()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
