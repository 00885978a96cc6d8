"""What loaders and caches do, for Prometheus.

Most of it is counted anyway, and read when Prometheus asks: the `statistics()` of file caches, remote caches
and stores. Only durations are collected as they arise, in histograms of our own, which cost a third of those
of prometheus-client: a fetch from a server nearby takes half a millisecond.
"""

from __future__ import annotations

import threading
import time
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from cow import COWError
from snaploader.errors import FailedPrecondition, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.loader import UnpackedSnapshot
from snaploader.remote import RemoteCache
from snaploader.telemetry import Observer, Operation, outcome

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from snaploader.testing import EmbeddedServer

BUCKETS_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
"""Upper bounds of the histograms, in seconds: from a chunk that is near to the save of a big machine."""

MAX_CLOSED = 64
"""Folders and servers whose counts are kept after their last cache was closed; the oldest are dropped."""


class Description(NamedTuple):
    """A metric."""

    kind: str
    """"counter", "gauge" or "histogram"."""
    help: str
    labels: tuple[str, ...] = ()


_FOLDER = ("folder",)
_SERVER = ("server", "instance")

METRICS: dict[str, Description] = {
    "snaploader_call_seconds": Description(
        "histogram", "Calls of loaders, by method and how they ended.", ("method", "outcome")
    ),
    "snaploader_lookup_seconds": Description(
        "histogram", "Looks for the snapshot of one key, here or remotely.", ("source", "outcome")
    ),
    "snaploader_save_stage_seconds": Description("histogram", "Stages of saves.", ("stage", "outcome")),
    "snaploader_save_stage_bytes_total": Description(
        "counter", "Bytes hashed (store) and sent (upload) by saves.", ("stage",)
    ),
    "snaploader_fetch_seconds": Description(
        "histogram", "Reads from behind the file cache, of one blob or of many.", ("mode", "outcome")
    ),
    "snaploader_fetched_blobs_total": Description(
        "counter", "Blobs brought from behind the file cache.", ("mode",)
    ),
    "snaploader_fetched_bytes_total": Description(
        "counter", "Bytes in the blobs brought from behind the file cache.", ("mode",)
    ),
    "snaploader_stall_seconds": Description("histogram", "Waits of readers for a chunk that is not at hand."),
    "snaploader_rpc_seconds": Description(
        "histogram", "Calls of servers; each attempt is one.", ("method", "outcome")
    ),
    "snaploader_read_chunks_total": Description(
        "counter", "Chunks of open stores read for the first time, by where they came from.", ("source",)
    ),
    "snaploader_read_bytes_total": Description(
        "counter", "Bytes in the chunks of open stores read for the first time.", ("source",)
    ),
    "snaploader_prefetch_issued_chunks_total": Description("counter", "Chunks asked for ahead of time."),
    "snaploader_prefetch_used_chunks_total": Description(
        "counter", "Chunks asked for ahead of time and read afterwards."
    ),
    "snaploader_copied_chunks_total": Description("counter", "Chunks copied because a part was written."),
    "snaploader_open_stores": Description("gauge", "Chunked files that are unpacked now."),
    "snaploader_mapped_bytes": Description("gauge", "Chunks of unpacked files that are mapped into memory."),
    "snaploader_dirty_bytes": Description(
        "gauge", "Chunks of unpacked files that were written and are not saved."
    ),
    "snaploader_file_cache_bytes": Description(
        "gauge", "Disk blocks of all entries of the file cache.", _FOLDER
    ),
    "snaploader_file_cache_max_bytes": Description(
        "gauge", "Most disk blocks that the file cache may take.", _FOLDER
    ),
    "snaploader_file_cache_pinned_bytes": Description(
        "gauge", "Content that pins keep in the file cache.", _FOLDER
    ),
    "snaploader_file_cache_hits_total": Description(
        "counter", "Blobs opened or read in the file cache.", _FOLDER
    ),
    "snaploader_file_cache_misses_total": Description(
        "counter", "Blobs asked for and absent in the file cache.", _FOLDER
    ),
    "snaploader_file_cache_added_blobs_total": Description(
        "counter", "Blobs added to the file cache.", _FOLDER
    ),
    "snaploader_file_cache_added_bytes_total": Description(
        "counter", "Bytes in the blobs added to the file cache.", _FOLDER
    ),
    "snaploader_file_cache_present_blobs_total": Description(
        "counter", "Blobs to be added that the file cache had already.", _FOLDER
    ),
    "snaploader_file_cache_quarantined_blobs_total": Description(
        "counter", "Blobs with wrong bytes, taken out of the file cache.", _FOLDER
    ),
    "snaploader_file_cache_evicted_entries_total": Description(
        "counter", "Entries evicted from the file cache.", _FOLDER
    ),
    "snaploader_file_cache_evicted_bytes_total": Description(
        "counter", "Disk blocks of the entries evicted from the file cache.", _FOLDER
    ),
    "snaploader_file_cache_scans_total": Description(
        "counter", "Scans of the whole folder of the file cache.", _FOLDER
    ),
    "snaploader_remote_read_blobs_total": Description(
        "counter", "Blobs fetched from the server and verified.", _SERVER
    ),
    "snaploader_remote_read_bytes_total": Description(
        "counter", "Bytes in the blobs fetched from the server.", _SERVER
    ),
    "snaploader_remote_received_bytes_total": Description(
        "counter", "Bytes received for the blobs fetched, perhaps compressed.", _SERVER
    ),
    "snaploader_remote_written_blobs_total": Description("counter", "Blobs uploaded to the server.", _SERVER),
    "snaploader_remote_written_bytes_total": Description(
        "counter", "Bytes in the blobs uploaded to the server.", _SERVER
    ),
    "snaploader_remote_sent_bytes_total": Description(
        "counter", "Bytes sent for the blobs uploaded, perhaps compressed.", _SERVER
    ),
    "snaploader_remote_retries_total": Description(
        "counter", "Attempts to call the server again after a passing failure.", _SERVER
    ),
    "snaploader_remote_corrupted_transfers_total": Description(
        "counter", "Transfers from the server whose bytes did not match.", _SERVER
    ),
    "snaploader_remote_in_flight_bytes": Description(
        "gauge", "Content of the blobs being read from or written to the server now.", _SERVER
    ),
}
"""All metrics, by name; docs/monitoring.md says what they are good for."""

_KNOWN: dict[str, tuple[str, ...]] = {
    "snaploader_save_stage_bytes_total": ("store", "upload"),
    "snaploader_fetched_blobs_total": ("one", "many", "stream"),
    "snaploader_fetched_bytes_total": ("one", "many", "stream"),
    "snaploader_read_chunks_total": ("hole", "local_file", "file_cache", "remote"),
    "snaploader_read_bytes_total": ("hole", "local_file", "file_cache", "remote"),
}
"""Shown as zero from the start, so that the first increase is one."""

_BIGGEST = tuple(f"snaploader_file_cache_{name}" for name in ("bytes", "max_bytes", "pinned_bytes"))
"""Gauges of a folder: what several caches on it say is the same, and not to be added."""

Labels: TypeAlias = tuple[str, ...]
Sample: TypeAlias = "tuple[str, Labels]"
"""Names a number: the metric and the values of its labels."""
Samples: TypeAlias = "dict[Sample, float]"


class PrometheusMetrics(Observer):
    """Metrics of any number of loaders and caches: give it to each as its `observer`. Thread-safe.

    Needs the extra `metrics`. A cache or unpacked snapshot that is closed is let go of, and what it counted
    stays in the sums. In a forked child make another one, with a registry of its own.

    Args:
        registry: Where the metrics are registered, which can be done once. None is registered by itself:
            `prometheus_client.REGISTRY` is the one that most programs serve.

    Raises:
        FailedPrecondition: prometheus-client is not installed, or the registry has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise FailedPrecondition(
                "metrics need prometheus-client: pip install 'snaploader[metrics]'"
            ) from error
        self._families = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        self.registry: CollectorRegistry | None = registry
        """None when closed."""
        self._lock = threading.Lock()
        self._counts: Samples = {(name, (each,)): 0.0 for name, known in _KNOWN.items() for each in known}
        self._histograms: dict[Sample, Histogram] = {("snaploader_stall_seconds", ()): Histogram()}
        self._watched: dict[object, _Watched] = {}
        self._ended: OrderedDict[Labels, Samples] = OrderedDict()
        """What closed parts have counted, by the labels that they have."""
        try:
            registry.register(self)
        except ValueError as error:
            raise FailedPrecondition(
                "this registry has the metrics of snaploader already: make one PrometheusMetrics, and "
                "give it to all loaders and caches"
            ) from error

    def close(self) -> None:
        """Take the metrics out of the registry. Idempotent. What is watched may go on."""
        with self._lock:
            registry, self.registry = self.registry, None
        if registry is not None:
            registry.unregister(self)

    def operation(self, name: str, /, **attributes: object) -> Operation:
        """Time an operation, and count what it moves."""
        return _Timed(self, name, attributes)

    def watch(self, part: object, /) -> Callable[[], None]:
        """Read what a part counts whenever Prometheus asks."""
        labels, read = _reader(part)
        if read is None:
            return super().watch(part)
        name = object()
        watched = _Watched(weakref.ref(part), labels, read)
        with self._lock:
            self._watched[name] = watched

        def end() -> None:
            watched.read()
            with self._lock:
                if self._watched.pop(name, None) is not None:
                    self._keep(watched)

        return end

    def describe(self) -> Iterator[Metric]:
        """The metrics without their values, as prometheus-client wants to know them at registration."""
        return (self._family(name) for name in METRICS)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now. Costs a pass over the tables of each open store."""
        with self._lock:
            watched = dict(self._watched)
        for each in watched.values():
            each.read()
        with self._lock:
            for name, each in watched.items():
                if each.part() is None and self._watched.pop(name, None) is not None:
                    self._keep(each)
            values: Samples = {("snaploader_open_stores", ()): 0.0}
            latest = (each.latest for each in self._watched.values())
            for samples in (self._counts, *self._ended.values(), *latest):
                _add(values, samples)
            histograms = list(self._histograms.items())
        families = {name: self._family(name) for name in METRICS}
        for (name, labels), value in values.items():
            families[name].add_metric(labels, value)
        for (name, labels), histogram in histograms:
            families[name].add_metric(labels, *histogram.snapshot())
        yield from families.values()

    def _family(self, name: str) -> Any:
        kind, text, labels = METRICS[name]
        return self._families[kind](name, text, labels=labels)

    def _keep(self, ended: _Watched) -> None:
        """Add the counts of a part that is gone to those of its like. The lock is held."""
        counted = {each: n for each, n in ended.latest.items() if METRICS[each[0]].kind == "counter"}
        if not ended.labels:
            _add(self._counts, counted)
            return
        _add(self._ended.setdefault(ended.labels, {}), counted)
        self._ended.move_to_end(ended.labels)
        if len(self._ended) > MAX_CLOSED:
            self._ended.popitem(last=False)

    def _record(self, name: str, attributes: dict[str, Any], how: str, seconds: float) -> None:
        """Take in an operation that ended."""
        match name.partition("."):
            case "loader", _, method:
                self._observe("snaploader_call_seconds", (method, how), seconds)
            case "save", _, stage:
                self._observe("snaploader_save_stage_seconds", (stage, how), seconds)
                if "bytes" in attributes:
                    self._count("snaploader_save_stage_bytes_total", (stage,), attributes["bytes"])
            case "lookup", _, _:
                self._observe("snaploader_lookup_seconds", (str(attributes["source"]), how), seconds)
            case "fetch", _, _:
                mode = attributes["mode"]
                self._observe("snaploader_fetch_seconds", (mode, how), seconds)
                if how == "ok" or mode == "many":
                    self._count("snaploader_fetched_blobs_total", (mode,), attributes["blobs"])
                    self._count("snaploader_fetched_bytes_total", (mode,), attributes["bytes"])
            case "stall", _, _:
                self._observe("snaploader_stall_seconds", (), seconds)
            case "rpc", _, _:
                method = attributes["path"].rpartition("/")[2]
                self._observe("snaploader_rpc_seconds", (method, how), seconds)

    def _observe(self, name: str, labels: Labels, seconds: float) -> None:
        histogram = self._histograms.get((name, labels))
        if histogram is None:
            histogram = self._histograms.setdefault((name, labels), Histogram())
        histogram.observe(seconds)

    def _count(self, name: str, labels: Labels, amount: float) -> None:
        with self._lock:
            _add(self._counts, {(name, labels): amount})


SERVER_METRICS: dict[str, Description] = {
    "snaploader_server_calls_total": Description(
        "counter", "Calls of a server in this process.", ("method",)
    ),
    "snaploader_server_received_bytes_total": Description("counter", "Messages of ended calls.", ("method",)),
    "snaploader_server_sent_bytes_total": Description("counter", "Answers of ended calls.", ("method",)),
}


class ServerMetrics:
    """Metrics of a `snaploader.testing.EmbeddedServer`, as `snaploader serve` has them. Thread-safe.

    Args:
        registry: Where they are registered; one server can be in it.
        server: Whose calls are counted, those since it was made. It may be stopped.
    """

    def __init__(self, registry: CollectorRegistry, server: EmbeddedServer) -> None:
        self._server = server
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        from prometheus_client.core import CounterMetricFamily

        log = self._server.call_log
        sums = {method: log.sums(method) for method in log.methods()}
        for column, (name, (_, text, labels)) in enumerate(SERVER_METRICS.items()):
            family = CounterMetricFamily(name, text, labels=labels)
            for method, numbers in sums.items():
                family.add_metric([method], numbers[column])
            yield family


class _Timed(Operation):
    """An operation between its beginning and its end."""

    __slots__ = ("_attributes", "_began", "_metrics", "_name")

    def __init__(self, metrics: PrometheusMetrics, name: str, attributes: dict[str, Any]) -> None:
        self._metrics = metrics
        self._name = name
        self._attributes = attributes

    def set(self, **attributes: object) -> None:
        self._attributes.update(attributes)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        self._metrics._record(self._name, self._attributes, outcome(error), seconds)


class Histogram:
    """Counts of durations by size. Thread-safe."""

    __slots__ = ("_counts", "_lock", "_sum")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        bucket = bisect_left(BUCKETS_S, seconds)
        with self._lock:
            self._counts[bucket] += 1
            self._sum += seconds

    def snapshot(self) -> tuple[list[tuple[str, float]], float]:
        """The upper bounds, as text, with how many durations are below each; and the sum of all."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets: list[tuple[str, float]] = []
        below = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), counts, strict=True):
            below += count
            buckets.append((bound, below))
        return buckets, total


@dataclass(eq=False)
class _Watched:
    """A part whose counts are read."""

    part: Callable[[], object | None]
    labels: Labels
    read_part: Callable[[Any, Labels], Samples]
    latest: Samples = field(default_factory=dict)
    """What it said last."""

    def read(self) -> None:
        """Ask it, unless it is gone, or closed by another thread just now."""
        part = self.part()
        if part is None:
            return
        try:
            self.latest = self.read_part(part, self.labels)
        except (SnaploaderError, COWError):
            return


def _reader(part: object) -> tuple[Labels, Callable[[Any, Labels], Samples] | None]:
    """The values of the labels that a part has, and what reads its counts; None for what has none."""
    match part:
        case FileCache():
            return (part.root,), _read_file_cache
        case RemoteCache():
            return (part.url, part.instance_name), _read_remote_cache
        case UnpackedSnapshot():
            return (), _read_stores
    return (), None


def _read_file_cache(cache: FileCache, labels: Labels) -> Samples:
    found = cache.statistics()
    values: dict[str, float | None] = {
        "bytes": found.total_bytes,
        "max_bytes": found.max_bytes,
        "pinned_bytes": found.pinned_bytes,
        "hits_total": found.hits,
        "misses_total": found.misses,
        "added_blobs_total": found.added_blobs,
        "added_bytes_total": found.added_bytes,
        "present_blobs_total": found.present_blobs,
        "quarantined_blobs_total": found.quarantined_blobs,
        "evicted_entries_total": found.evicted_entries,
        "evicted_bytes_total": found.evicted_bytes,
        "scans_total": found.scans,
    }
    return {(f"snaploader_file_cache_{name}", labels): n for name, n in values.items() if n is not None}


def _read_remote_cache(cache: RemoteCache, labels: Labels) -> Samples:
    found = cache.statistics()
    values = {
        "read_blobs_total": found.blobs_read,
        "read_bytes_total": found.content_bytes_read,
        "received_bytes_total": found.wire_bytes_read,
        "written_blobs_total": found.blobs_written,
        "written_bytes_total": found.content_bytes_written,
        "sent_bytes_total": found.wire_bytes_written,
        "retries_total": found.retries,
        "corrupted_transfers_total": found.corrupted,
        "in_flight_bytes": found.in_flight_bytes,
    }
    return {(f"snaploader_remote_{name}", labels): float(n) for name, n in values.items()}


def _read_stores(unpacked: UnpackedSnapshot, _: Labels) -> Samples:
    samples: Samples = {}
    for found in unpacked.statistics().values():
        values = {
            "prefetch_issued_chunks_total": found.prefetch_issued,
            "prefetch_used_chunks_total": found.prefetch_used,
            "copied_chunks_total": found.copies_on_write,
            "open_stores": 1,
            "mapped_bytes": found.mapped_bytes,
            "dirty_bytes": found.dirty_bytes,
        }
        stands: Samples = {(f"snaploader_{name}", ()): float(n) for name, n in values.items()}
        for source, origin in found.origins.items():
            stands["snaploader_read_chunks_total", (source,)] = origin.chunks
            stands["snaploader_read_bytes_total", (source,)] = origin.bytes
        _add(samples, stands)
    return samples


def _add(to: Samples, samples: Samples) -> None:
    """Add numbers to those of the same name and labels."""
    for sample, value in samples.items():
        before = to.get(sample, 0.0)
        to[sample] = max(before, value) if sample[0] in _BIGGEST else before + value
