"""`snaploader serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from snaploader.cli.metrics import metrics_option, serving_metrics
from snaploader.cli.options import command, option
from snaploader.cli.process import load_grpc, stop_signal
from snaploader.cli.resources import Caches
from snaploader.cli.values import ADDRESS

LIKE = ("bazel-remote", "buildbarn", "buildgrid", "casd", "nativelink")
"""The names of `snaploader.testing.PRESETS`, spelt out because importing that takes long."""

_DRAIN_S = 5.0
"""What calls under way get to end after a signal."""


@command("serve")
@option(
    "--listen",
    type=ADDRESS,
    default="127.0.0.1:8980",
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@option(
    "--root", type=click.Path(path_type=Path), metavar="DIR", help="Keeps what is stored.  [default: memory]"
)
@option("--like", type=click.Choice(LIKE), help="Behave as this server does, with its limits.")
@metrics_option
def serve(
    caches: Caches,
    listen: tuple[str, int],
    root: Path | None,
    like: str | None,
    metrics_listen: tuple[str, int] | None,
) -> None:
    """Run a small REAPI cache (CAS, ByteStream, ActionCache) until SIGINT or SIGTERM.

    For tests and demonstrations: it has no bound on what it keeps and lets everyone in. Its URL is printed
    when it is ready.
    """
    host, port = listen
    load_grpc()
    from snaploader.testing import PRESETS, EmbeddedServer, ServerOptions

    options = PRESETS[like]() if like is not None else ServerOptions()
    has_introspection = all(importlib.util.find_spec(name) for name in ("grpc_health", "grpc_reflection"))
    server = EmbeddedServer(root, options, host=host, port=port, introspection=has_introspection)
    with stop_signal() as stopped, server, serving_metrics(caches.output, metrics_listen) as registry:
        if registry is not None:
            from snaploader.metrics import ServerMetrics

            ServerMetrics(registry, server)
        caches.output.text(server.url)
        caches.output.data({"url": server.url, "port": server.port})
        caches.output.flush()
        caches.output.talk(f"serving {root or 'from memory'}; stop with Ctrl-C")
        stopped.wait()
        server.stop(_DRAIN_S)
    caches.output.talk("stopped")
