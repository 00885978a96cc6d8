"""What loaders and caches do, as spans of OpenTelemetry.

Each call of a loader is a span, with its lookups, stages, fetches and calls of servers below it. Threads that
work for a call work in its context, so a span that the embedder has current is the parent of them all. Calls
of servers carry the trace on to the server. Single chunks have no spans of their own: the call of the server
that fetches one has, and says as much.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from snaploader._version import __version__
from snaploader.context import Headers, checked_headers
from snaploader.errors import FailedPrecondition
from snaploader.telemetry import UNWATCHED, Observer, Operation, outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import Span, TracerProvider

CODES = {
    "ok": 0,
    "cancelled": 1,
    "unknown": 2,
    "invalid_argument": 3,
    "deadline_exceeded": 4,
    "not_found": 5,
    "permission_denied": 7,
    "resource_exhausted": 8,
    "failed_precondition": 9,
    "unimplemented": 12,
    "internal": 13,
    "unavailable": 14,
    "data_loss": 15,
    "unauthenticated": 16,
}
"""gRPC's number of each outcome."""


class OpenTelemetryTraces(Observer):
    """Spans of any number of loaders and caches: give it to each as its `observer`. Thread-safe.

    Needs the extra `otel`, which is OpenTelemetry's API; the SDK is the embedder's to choose and set up.

    Args:
        tracer_provider: Makes the tracer. `opentelemetry.trace.get_tracer_provider()` gives the global one,
            which is never taken unasked.
        propagator: Puts the context into the headers of requests to a server. Default: W3C's `traceparent`
            and `tracestate`; baggage stays here.

    Raises:
        FailedPrecondition: opentelemetry-api is not installed.
    """

    def __init__(
        self, tracer_provider: TracerProvider, *, propagator: TextMapPropagator | None = None
    ) -> None:
        try:
            from opentelemetry import context, trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise FailedPrecondition(
                "traces need opentelemetry-api: pip install 'snaploader[otel]'"
            ) from error
        self.trace = trace
        self.context = context
        self.propagator = propagator or TraceContextTextMapPropagator()
        self.tracer = tracer_provider.get_tracer("snaploader", __version__)

    def operation(self, name: str, /, **attributes: object) -> Operation:
        """Begin a span, unless it is of a chunk alone."""
        if name == "rpc":
            return _CallSpan(self, attributes)
        if name == "stall" or attributes.get("mode") == "one":
            return UNWATCHED
        return _Span(self, "snaploader." + name.removeprefix("loader."), _texts(attributes))

    def event(self, name: str, /, **attributes: object) -> None:
        """Add it to the span that is current."""
        self.trace.get_current_span().add_event(f"snaploader.{name}", _texts(attributes))


class _Span(Operation):
    """An operation as a span, which is current while it lasts."""

    __slots__ = ("_attributes", "_kind", "_name", "_span", "_token", "_traces")

    def __init__(self, traces: OpenTelemetryTraces, name: str, attributes: dict[str, Any]) -> None:
        self._traces = traces
        self._name = name
        self._attributes = attributes
        self._kind = traces.trace.SpanKind.INTERNAL
        self._token: Any = None

    def set(self, **attributes: object) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_texts(attributes))

    def __enter__(self) -> Self:
        self._span: Span = self._traces.tracer.start_span(
            self._name, kind=self._kind, attributes=self._attributes
        )
        self._token = self._traces.context.attach(self._context())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._traces.context.detach(self._token)
        self._end(error)

    def _context(self) -> Context:
        context: Context = self._traces.trace.set_span_in_context(self._span)
        return context

    def _end(self, error: BaseException | None) -> None:
        how = outcome(error)
        # That nothing is there is an answer of a lookup, and no error.
        if error is not None and (how, self._name) != ("not_found", "snaploader.lookup"):
            self._span.record_exception(error)
            self._fail(error)
        if error is not None:
            self._span.set_attribute("snaploader.outcome", how)
        self._span.end()

    def _fail(self, error: BaseException) -> None:
        self._span.set_status(self._traces.trace.StatusCode.ERROR, str(error))
        self._span.set_attribute("error.type", type(error).__qualname__)


class _CallSpan(_Span):
    """A call of a server, by the semantic conventions for RPC. Never current: streams are read by turns."""

    __slots__ = ()

    def __init__(self, traces: OpenTelemetryTraces, attributes: dict[str, Any]) -> None:
        service, _, method = attributes["path"].strip("/").partition("/")
        about = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "server.address": attributes["address"],
        }
        if attributes["port"]:
            about["server.port"] = attributes["port"]
        super().__init__(traces, f"{service}/{method}", about)
        self._kind = traces.trace.SpanKind.CLIENT

    def headers(self) -> Headers:
        carrier: dict[str, str] = {}
        self._traces.propagator.inject(carrier, self._context())
        return checked_headers(carrier)

    def __enter__(self) -> Self:
        self._span = self._traces.tracer.start_span(self._name, kind=self._kind, attributes=self._attributes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        how = outcome(error)
        self._span.set_attribute("rpc.grpc.status_code", CODES.get(how, CODES["unknown"]))
        if error is not None:
            self._fail(error)
        self._span.end()


def _texts(attributes: dict[str, object]) -> dict[str, Any]:
    """Attributes as OpenTelemetry takes them."""
    return {
        f"snaploader.{name}": value if isinstance(value, str | bool | int | float) else str(value)
        for name, value in attributes.items()
    }
