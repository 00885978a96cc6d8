"""`snaploader serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from snaploader.cli.options import Command, common, option
from snaploader.cli.session import Session
from snaploader.cli.signals import stop_signal
from snaploader.cli.values import parse_address
from snaploader.errors import translate_os_errors
from snaploader.testing import PRESETS, EmbeddedServer, ServerOptions

_DRAIN_S = 5.0
"""What calls under way get to end after a signal."""


@click.command(short_help="Run a small REAPI cache server.", cls=Command)
@option(
    "--listen",
    scope="serve",
    default="127.0.0.1:8980",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@option(
    "--root",
    scope="serve",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keeps what is stored.  [default: memory]",
)
@option(
    "--like",
    scope="serve",
    type=click.Choice(sorted(PRESETS)),
    help="Behave as this server does, with its limits.",
)
@common
def serve(session: Session, listen: str, root: Path | None, like: str | None) -> None:
    """Run a small REAPI cache (CAS, ByteStream, ActionCache) until SIGINT or SIGTERM.

    For tests and demonstrations: it has no bound on what it keeps and lets everyone in. Its URL is printed
    when it is ready.
    """
    host, port = parse_address(listen)
    if root is not None:
        with translate_os_errors(f"cannot use the folder {str(root)!r}"):
            root.mkdir(parents=True, exist_ok=True)
    options = PRESETS[like]() if like is not None else ServerOptions()
    has_introspection = all(importlib.util.find_spec(name) for name in ("grpc_health", "grpc_reflection"))
    server = EmbeddedServer(root, options, host=host, port=port, introspection=has_introspection)
    with stop_signal() as stopped, server:
        session.output.text(server.url)
        session.output.json({"url": server.url, "port": server.port})
        session.output.flush()
        session.output.talk(f"serving {root or 'from memory'}; stop with Ctrl-C")
        stopped.wait()
        server.stop(_DRAIN_S)
    session.output.talk("stopped")
