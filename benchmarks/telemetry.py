"""What metrics and traces cost: a share of the processor time of the work that they tell of.

    python -m benchmarks.telemetry [--size-mib 32] [--rounds 9] [--output benchmarks/results/telemetry.json]

A host saves a disk of random chunks, uploading it; another one with an empty cache loads it from the server,
which runs in another process, chunk by chunk; then it looks for the snapshot a number of times. All that this
tells an observer is written down, and told once more to each observer by itself: that time, divided by the
time of the work without an observer, is the share. A figure is the least of all rounds: what else goes on at
a machine only adds to it. On a busy one, two runs of the work itself differ by more than all this costs.

Traces go to an exporter that drops them, behind the SDK's own batches.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks import hosts
from snaploader import (
    FileCache,
    Observer,
    Observers,
    OpenTelemetryTraces,
    Operation,
    PrometheusMetrics,
    RemoteCache,
    SnapshotLoader,
)
from snaploader.telemetry import NOBODY

CHUNK = 512 << 10
LOOKS = 50
STEPS = ("save", "load", "look")

Told = list[tuple[str, dict[str, object], dict[str, object]]]
"""Operations: their names, and what was told of them at first and later."""


class Dropped(SpanExporter):
    """Takes spans, and does nothing with them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        return SpanExportResult.SUCCESS


class Recorder(Observer):
    """Writes operations down."""

    def __init__(self) -> None:
        self.told: Told = []

    def operation(self, name: str, /, **attributes: object) -> Operation:
        later: dict[str, object] = {}
        self.told.append((name, attributes, later))
        return Recorded(later)


class Recorded(Operation):
    def __init__(self, later: dict[str, object]) -> None:
        self._later = later

    def set(self, **attributes: object) -> None:
        self._later.update(attributes)


def tell(observer: Observer, told: Told) -> None:
    """Tell an observer of operations, as if they took no time."""
    for name, attributes, later in told:
        with observer.operation(name, **attributes) as operation:
            if name == "rpc":
                operation.headers()
            if later:
                operation.set(**later)


@contextmanager
def observers() -> Iterator[dict[str, Observer]]:
    """The observers to compare."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Dropped()))
    metrics, traces = PrometheusMetrics(CollectorRegistry()), OpenTelemetryTraces(provider)
    try:
        yield {"off": NOBODY, "metrics": metrics, "traces": traces, "both": Observers(metrics, traces)}
    finally:
        provider.shutdown()


@contextmanager
def open_host(folder: Path, url: str, observer: Observer | None) -> Iterator[SnapshotLoader]:
    with (
        FileCache(folder, observer=observer) as cache,
        RemoteCache(url, observer=observer) as remote,
        SnapshotLoader(cache, remote, observer=observer) as loader,
    ):
        yield loader


def work(
    folder: Path, url: str, recorder: Recorder | None, content: bytes
) -> tuple[dict[str, float], dict[str, Told]]:
    """By step, seconds of processor time, of all threads, and what the recorder was told."""
    times, told = {}, {}

    def step(name: str, do: Callable[[], object]) -> None:
        if recorder is not None:
            recorder.told = []
        began = time.process_time()
        do()
        times[name] = time.process_time() - began
        told[name] = [] if recorder is None else recorder.told

    disk = folder / "disk.img"
    disk.write_bytes(content)
    with open_host(folder / "saver", url, recorder) as loader:
        key = hosts.key_set(loader).write_key
        step("save", lambda: loader.cache_snapshot(key, chunked_files={"disk": disk}, chunk_size=CHUNK))
    with open_host(folder / "reader", url, recorder) as loader:

        def load() -> None:
            snapshot = loader.get_snapshot(hosts.key_set(loader), "newest")
            with loader.unpack_snapshot(snapshot, folder / "out") as unpacked:
                store = unpacked.chunked_files["disk"]
                for at in range(0, store.size, CHUNK):
                    store.read_at(at, 4096)

        step("load", load)
        step("look", lambda: [loader.get_snapshot(hosts.key_set(loader)) for _ in range(LOOKS)])
    return times, told


def least_cpu_s(do: Callable[[], object], rounds: int) -> float:
    figures = []
    for _ in range(rounds):
        began = time.process_time()
        do()
        figures.append(time.process_time() - began)
    return min(figures)


def measure(size_mib: int, rounds: int) -> dict[str, Any]:
    with hosts.embedded() as url, observers() as listening, tempfile.TemporaryDirectory() as scratch:

        def one(name: str, recorder: Recorder | None) -> tuple[dict[str, float], dict[str, Told]]:
            folder = Path(scratch, name)
            folder.mkdir()
            return work(folder, url, recorder, os.urandom(size_mib << 20))

        _, told = one("recorded", Recorder())
        times = [one(str(number), None)[0] for number in range(rounds)]
        least = {step: min(each[step] for each in times) for step in STEPS}
        shares = {
            name: {
                step: round(least_cpu_s(partial(tell, observer, told[step]), 20 * rounds) / least[step], 4)
                for step in STEPS
            }
            for name, observer in listening.items()
        }
        metrics = listening["metrics"]
        assert isinstance(metrics, PrometheusMetrics)
        assert metrics.registry is not None
        collecting_s = least_cpu_s(partial(generate_latest, metrics.registry), rounds)
    return {
        "size_mib": size_mib,
        "rounds": rounds,
        "operations": {step: len(told[step]) for step in STEPS},
        "work_cpu_s": {step: round(figure, 4) for step, figure in least.items()},
        "shares": shares,
        "collect_cpu_ms": round(1e3 * collecting_s, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    report = json.dumps(measure(options.size_mib, options.rounds), indent=2)
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
