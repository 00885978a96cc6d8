"""The option --metrics-listen, and what Prometheus finds there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from snaploader.cli.options import option
from snaploader.cli.output import Output
from snaploader.cli.values import ADDRESS
from snaploader.errors import Unavailable

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

metrics_option = option(
    "--metrics-listen",
    type=ADDRESS,
    metavar="HOST:PORT",
    help="Serve metrics to Prometheus there; port 0 takes a free one.",
)


@contextlib.contextmanager
def serving_metrics(output: Output, address: tuple[str, int] | None) -> Iterator[CollectorRegistry | None]:
    """A registry whose metrics are served while the block runs; None when they are not asked for.

    It has those of the process itself, too. Unavailable when the address cannot be listened on.
    """
    if address is None:
        yield None
        return
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    host, port = address
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise Unavailable(f"--metrics-listen: cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        output.talk(f"metrics on http://{host}:{server.server_port}/metrics")
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
