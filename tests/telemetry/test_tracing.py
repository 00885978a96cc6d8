"""Spans tell of each call, from the key set to the upload, and servers join the trace."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from telemetry_hosts import CHUNK, MakeHost

from snaploader import (
    CallContext,
    Digest,
    NotFound,
    OpenTelemetryTraces,
    RequestMetadata,
    SnaploaderError,
    SnapshotTask,
)
from snaploader.testing import EmbeddedServer, Fault

CONTENT = b"a" * CHUNK + bytes(CHUNK) + b"b" * 100


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def traces(provider: TracerProvider) -> OpenTelemetryTraces:
    return OpenTelemetryTraces(provider)


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    """The latest span of a name."""
    return [span for span in exporter.get_finished_spans() if span.name == name][-1]


def ancestors(exporter: InMemorySpanExporter, span: ReadableSpan) -> list[str]:
    """Names of the spans above one, the nearest first."""
    by_id = {each.context.span_id: each for each in exporter.get_finished_spans()}
    names = []
    while span.parent is not None and span.parent.span_id in by_id:
        span = by_id[span.parent.span_id]
        names.append(span.name)
    return names


def test_spans_lead_from_the_key_set_to_the_upload(
    exporter: InMemorySpanExporter,
    provider: TracerProvider,
    traces: OpenTelemetryTraces,
    make_host: MakeHost,
) -> None:
    host = make_host("a", traces)
    with provider.get_tracer("executor").start_as_current_span("run task"):
        result = host.save(CONTENT)
        snapshot = host.find()
        with host.loader.unpack_snapshot(snapshot, host.folder / "out"):
            pass
        host.loader.restore_snapshot(snapshot, host.folder / "whole")
    names = [span.name for span in exporter.get_finished_spans()]
    for name in ("snapshot_key_set", "cache_snapshot", "get_snapshot", "unpack_snapshot", "restore_snapshot"):
        assert ancestors(exporter, named(exporter, f"snaploader.{name}")) == ["run task"], names
    for stage in ("store", "publish", "upload", "publish_remotely"):
        span = named(exporter, f"snaploader.save.{stage}")
        assert ancestors(exporter, span) == ["snaploader.cache_snapshot", "run task"]
    uploads = named(exporter, "build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs")
    assert ancestors(exporter, uploads)[0] == "snaploader.save.upload"  # from a thread of the pool, too
    save = named(exporter, "snaploader.cache_snapshot").attributes
    assert save is not None
    assert save["snaploader.snapshot_id"] == result.snapshot_id
    assert save["snaploader.saved_remotely"] is True
    key_set = named(exporter, "snaploader.snapshot_key_set")
    assert key_set.attributes is not None
    assert key_set.attributes["snaploader.task_id"] == "task-1"
    assert key_set.attributes["snaploader.invocation_id"] == "invocation-1"


def test_a_call_of_a_server_follows_the_conventions_and_carries_the_trace(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces, make_host: MakeHost, server: EmbeddedServer
) -> None:
    host = make_host("a", traces)
    host.loader.snapshot_key_set(SnapshotTask(), "conf")
    span = named(exporter, "build.bazel.remote.execution.v2.Capabilities/GetCapabilities")
    assert span.kind is SpanKind.CLIENT
    assert span.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "build.bazel.remote.execution.v2.Capabilities",
        "rpc.method": "GetCapabilities",
        "rpc.grpc.status_code": 0,
        "server.address": "127.0.0.1",
        "server.port": server.port,
    }
    by_id = {f"{each.context.span_id:016x}": each for each in exporter.get_finished_spans()}
    for call in server.requests:
        version, trace_id, span_id, flags = dict(call.metadata)["traceparent"].split("-")
        assert (version, int(flags, 16) & 1) == ("00", 1)  # sampled
        assert by_id[span_id].name.endswith(f"/{call.method}")
        assert f"{by_id[span_id].context.trace_id:032x}" == trace_id


def test_every_streamed_call_has_its_span(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces, make_host: MakeHost
) -> None:
    host = make_host("a", traces)
    data = bytes(range(256)) * (32 << 10)
    digest = Digest.of(data, host.remote.digest_function)
    host.remote.write(digest, data)
    assert host.remote.read(digest) == data
    for method in ("Write", "Read"):
        span = named(exporter, f"google.bytestream.ByteStream/{method}")
        assert span.attributes is not None
        assert span.attributes["rpc.grpc.status_code"] == 0


def test_who_asks_is_told_and_no_secret(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces, make_host: MakeHost
) -> None:
    context = CallContext(
        group_id="team",
        request_metadata=RequestMetadata(action_id="action-1", tool_invocation_id="build-1"),
        headers={"authorization": "Bearer hunter2"},
    )
    host = make_host("a", traces)
    with context.use(), pytest.raises(NotFound):
        host.find()
    attributes = named(exporter, "snaploader.get_snapshot").attributes
    assert attributes is not None
    assert attributes["snaploader.action_id"] == "action-1"
    assert attributes["snaploader.invocation_id"] == "build-1"
    assert attributes["snaploader.group_id"] == "team"
    assert not any("hunter2" in span.to_json() for span in exporter.get_finished_spans())


def test_an_error_is_recorded_and_an_absent_manifest_is_none(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces, make_host: MakeHost
) -> None:
    host = make_host("a", traces)
    with pytest.raises(NotFound):
        host.find()
    call = named(exporter, "snaploader.get_snapshot")
    assert call.status.status_code is StatusCode.ERROR
    assert [event.name for event in call.events] == ["exception"]
    lookup = named(exporter, "snaploader.lookup")
    assert lookup.status.status_code is StatusCode.UNSET
    assert lookup.attributes is not None
    assert lookup.attributes["snaploader.outcome"] == "not_found"
    rpc = named(exporter, "build.bazel.remote.execution.v2.ActionCache/GetActionResult")
    assert rpc.attributes is not None
    assert rpc.attributes["rpc.grpc.status_code"] == 5


def test_each_attempt_is_a_span_and_each_retry_an_event(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces, make_host: MakeHost, server: EmbeddedServer
) -> None:
    host = make_host("a", traces)
    host.remote.capabilities()
    server.faults.add(Fault("GetActionResult", status="UNAVAILABLE", times=1))
    host.loader.snapshot_key_set(SnapshotTask(), "conf")
    call = named(exporter, "snaploader.snapshot_key_set")
    assert [event.name for event in call.events] == ["snaploader.retry"]
    below = [s for s in exporter.get_finished_spans() if s.name.endswith("/GetActionResult")]
    codes = [span.attributes["rpc.grpc.status_code"] for span in below if span.attributes]
    assert codes[0] == 14


def test_the_global_provider_is_not_taken_unasked(make_host: MakeHost, server: EmbeddedServer) -> None:
    make_host("a").loader.snapshot_key_set(SnapshotTask(), "conf")
    assert not any("traceparent" in dict(call.metadata) for call in server.requests)
    traces = OpenTelemetryTraces(trace.get_tracer_provider())  # nobody set one up: the API's own does nothing
    make_host("b", traces).loader.snapshot_key_set(SnapshotTask(), "conf")
    assert not any("traceparent" in dict(call.metadata) for call in server.requests)


def test_what_is_current_before_a_call_is_current_after_it(
    provider: TracerProvider, traces: OpenTelemetryTraces, make_host: MakeHost
) -> None:
    host = make_host("a", traces)
    with provider.get_tracer("executor").start_as_current_span("run task") as span:
        with pytest.raises(NotFound):
            host.find()
        assert trace.get_current_span() is span


def test_an_error_of_an_embedders_own_ends_a_span_as_unknown(
    exporter: InMemorySpanExporter, traces: OpenTelemetryTraces
) -> None:
    class Own(SnaploaderError):
        pass

    with pytest.raises(Own), traces.operation("rpc", path="/a.B/C", address="host", port=1):
        raise Own("x")
    assert (named(exporter, "a.B/C").attributes or {})["rpc.grpc.status_code"] == 2
