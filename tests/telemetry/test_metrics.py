"""Metrics tell what happened: by source, by stage, by outcome; and let go of what was closed."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from telemetry_hosts import CHUNK, MakeHost

from snaploader import FileCache, NotFound, PrometheusMetrics, RemoteCache, SnapshotTask
from snaploader.errors import FailedPrecondition
from snaploader.metrics import BUCKETS_S, METRICS, SERVER_METRICS, Histogram, ServerMetrics
from snaploader.testing import EmbeddedServer, Fault

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "monitoring.md"
CONTENT = b"a" * CHUNK + bytes(CHUNK) + b"b" * CHUNK + b"c" * 100


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PrometheusMetrics:
    return PrometheusMetrics(registry)


def test_what_is_exported_is_what_the_page_documents(
    registry: CollectorRegistry, metrics: PrometheusMetrics
) -> None:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    documented = set(re.findall(r"^\| `(snaploader_\w+)`", PAGE.read_text(), re.MULTILINE))
    assert documented - set(SERVER_METRICS) == exported == set(METRICS)


def test_the_page_names_the_labels_of_each_metric() -> None:
    rows = dict(re.findall(r"^\| `(snaploader_\w+)` \|([^|]*)\|", PAGE.read_text(), re.MULTILINE))
    for name, metric in (METRICS | SERVER_METRICS).items():
        assert re.findall(r"`(\w+)`", rows[name]) == list(metric.labels), name


def test_names_follow_the_conventions() -> None:
    for name, metric in (METRICS | SERVER_METRICS).items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert name.endswith("_seconds") == (metric.kind == "histogram"), name


def test_a_help_text_stands_alone() -> None:
    texts = {name: metric.help for name, metric in (METRICS | SERVER_METRICS).items()}
    assert [
        name for name, text in texts.items() if re.search(r"\b(their|those|these|them)\b", text.lower())
    ] == []


def test_a_save_and_a_load_elsewhere_are_counted_by_stage_and_source(
    registry: CollectorRegistry, metrics: PrometheusMetrics, make_host: MakeHost
) -> None:
    make_host("a", metrics).save(CONTENT)
    host = make_host("b", metrics)
    with host.loader.unpack_snapshot(host.find(), host.folder / "out") as unpacked:
        assert unpacked.chunked_files["disk"].read_at(0, len(CONTENT)) == CONTENT
        assert registry.get_sample_value("snaploader_open_stores") == 1
        assert registry.get_sample_value("snaploader_read_chunks_total", {"source": "remote"}) == 3
    value = registry.get_sample_value
    assert value("snaploader_open_stores") == 0
    assert value("snaploader_read_chunks_total", {"source": "remote"}) == 3  # also when it is closed
    assert value("snaploader_read_bytes_total", {"source": "hole"}) == CHUNK
    hashed = value("snaploader_save_stage_bytes_total", {"stage": "store"})
    assert hashed == len(CONTENT) - CHUNK
    sent = value("snaploader_save_stage_bytes_total", {"stage": "upload"})
    server = {"server": host.remote.url, "instance": ""}
    assert sent == value("snaploader_remote_written_bytes_total", server)
    for stage in ("store", "publish", "upload", "publish_remotely"):
        labels = {"stage": stage, "outcome": "ok"}
        assert value("snaploader_save_stage_seconds_count", labels) == 1, stage
    assert value("snaploader_lookup_seconds_count", {"source": "local", "outcome": "not_found"}) == 1
    assert value("snaploader_lookup_seconds_count", {"source": "remote", "outcome": "ok"}) == 1
    assert value("snaploader_call_seconds_count", {"method": "get_snapshot", "outcome": "ok"}) == 1
    assert value("snaploader_stall_seconds_count") >= 1
    assert value("snaploader_fetched_bytes_total", {"mode": "one"}) > 0
    assert value("snaploader_rpc_seconds_count", {"method": "FindMissingBlobs", "outcome": "ok"}) >= 1
    misses = [value("snaploader_file_cache_misses_total", {"folder": host.cache.root})]
    assert misses == [host.cache.statistics().misses]
    assert value("snaploader_remote_in_flight_bytes", server) == 0


def test_what_is_on_its_way_is_in_flight(
    registry: CollectorRegistry, metrics: PrometheusMetrics, make_host: MakeHost, server: EmbeddedServer
) -> None:
    digest = server.put_blob(b"x" * 5000, make_host("a").remote.digest_function)
    remote = make_host("b", metrics).remote
    labels = {"server": remote.url, "instance": ""}
    seen = []

    def look(_: object) -> None:
        seen.append(registry.get_sample_value("snaploader_remote_in_flight_bytes", labels))

    remote.read_to(digest, look)
    assert seen
    assert set(seen) == {5000}


def test_errors_are_outcomes(
    registry: CollectorRegistry, metrics: PrometheusMetrics, make_host: MakeHost
) -> None:
    host = make_host("a", metrics)
    with pytest.raises(NotFound):
        host.find()
    labels = {"method": "get_snapshot", "outcome": "not_found"}
    assert registry.get_sample_value("snaploader_call_seconds_count", labels) == 1
    labels = {"method": "GetActionResult", "outcome": "not_found"}
    assert registry.get_sample_value("snaploader_rpc_seconds_count", labels) >= 1


def test_retries_are_counted(
    registry: CollectorRegistry, metrics: PrometheusMetrics, make_host: MakeHost, server: EmbeddedServer
) -> None:
    host = make_host("a", metrics)
    server.faults.add(Fault("GetActionResult", status="UNAVAILABLE", times=2))
    host.loader.snapshot_key_set(SnapshotTask(), "conf")
    labels = {"server": host.remote.url, "instance": ""}
    assert registry.get_sample_value("snaploader_remote_retries_total", labels) == 2


def test_counts_of_closed_caches_stay_and_their_sizes_go(
    registry: CollectorRegistry, metrics: PrometheusMetrics, tmp_path: Path
) -> None:
    labels = {"folder": str(tmp_path / "cache")}
    for hits in (1, 2):
        with FileCache(tmp_path / "cache", max_bytes=1 << 20, observer=metrics) as cache:
            digest, _ = cache.add_file(_file(tmp_path))
            cache.read(digest)
            assert registry.get_sample_value("snaploader_file_cache_max_bytes", labels) == 1 << 20
        assert registry.get_sample_value("snaploader_file_cache_hits_total", labels) == hits
        assert registry.get_sample_value("snaploader_file_cache_max_bytes", labels) is None


def test_two_caches_on_a_folder_add_their_hits_and_not_its_size(
    registry: CollectorRegistry, metrics: PrometheusMetrics, tmp_path: Path
) -> None:
    labels = {"folder": str(tmp_path / "cache")}
    with (
        FileCache(tmp_path / "cache", max_bytes=1 << 20, observer=metrics) as first,
        FileCache(tmp_path / "cache", max_bytes=1 << 20, observer=metrics) as second,
    ):
        digest, _ = first.add_file(_file(tmp_path))
        first.read(digest)
        second.read(digest)
        assert registry.get_sample_value("snaploader_file_cache_hits_total", labels) == 2
        assert registry.get_sample_value("snaploader_file_cache_max_bytes", labels) == 1 << 20


def test_a_cache_that_is_closed_is_let_go_of(metrics: PrometheusMetrics, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", observer=metrics)
    gone = weakref.ref(cache)
    cache.close()
    del cache
    gc.collect()
    assert gone() is None


def test_a_cache_that_nobody_closes_is_not_kept(
    registry: CollectorRegistry, metrics: PrometheusMetrics
) -> None:
    remote = RemoteCache("grpc://127.0.0.1:1", observer=metrics)  # it has not connected
    labels = {"server": remote.url, "instance": ""}
    assert registry.get_sample_value("snaploader_remote_in_flight_bytes", labels) == 0
    gone = weakref.ref(remote)
    del remote
    gc.collect()
    assert gone() is None
    assert registry.get_sample_value("snaploader_remote_in_flight_bytes", labels) is None
    assert registry.get_sample_value("snaploader_remote_retries_total", labels) == 0


def test_evictions_are_counted(
    registry: CollectorRegistry, metrics: PrometheusMetrics, tmp_path: Path
) -> None:
    with FileCache(tmp_path / "cache", max_bytes=64 << 10, observer=metrics) as cache:
        for number in range(20):
            cache.add_file(_file(tmp_path, bytes([number]) * 8192))
        labels = {"folder": cache.root}
        assert registry.get_sample_value("snaploader_file_cache_evicted_entries_total", labels) >= 10
        assert registry.get_sample_value("snaploader_file_cache_evicted_bytes_total", labels) >= 10 * 8192
        assert registry.get_sample_value("snaploader_file_cache_bytes", labels) <= 64 << 10


def test_a_registry_takes_them_once(registry: CollectorRegistry, metrics: PrometheusMetrics) -> None:
    with pytest.raises(FailedPrecondition, match="already"):
        PrometheusMetrics(registry)
    metrics.close()
    metrics.close()
    PrometheusMetrics(registry)


def test_a_server_counts_what_it_is_asked(
    registry: CollectorRegistry, make_host: MakeHost, server: EmbeddedServer
) -> None:
    ServerMetrics(registry, server)
    make_host("a").save(CONTENT)
    for method in ("FindMissingBlobs", "UpdateActionResult"):
        labels = {"method": method}
        assert registry.get_sample_value("snaploader_server_calls_total", labels) == server.calls(method)
        received = registry.get_sample_value("snaploader_server_received_bytes_total", labels)
        assert received == server.received_bytes(method) > 0


def test_buckets_count_what_is_at_most_their_bound() -> None:
    histogram = Histogram()
    for seconds in (BUCKETS_S[0], BUCKETS_S[1], 1e9):
        histogram.observe(seconds)
    buckets, total = histogram.snapshot()
    assert buckets[:3] == [("0.0005", 1), ("0.001", 2), ("0.0025", 2)]
    assert buckets[-2:] == [("300.0", 2), ("+Inf", 3)]
    assert total == pytest.approx(1e9)


def _file(folder: Path, content: bytes = b"content") -> Path:
    path = folder / "file"
    path.write_bytes(content)
    return path
