"""`snaploader serve`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click

from snaploader.cli.options import Command, common, option
from snaploader.cli.session import Session
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.testing import PRESETS, EmbeddedServer, ServerOptions


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
    with _stop_signal() as stop, EmbeddedServer(root, options=options, host=host, port=port) as server:
        session.output.text(server.url)
        session.output.json({"url": server.url, "port": server.port})
        session.output.flush()
        session.output.talk(f"serving {root or 'from memory'}; stop with Ctrl-C")
        stop.wait()
    session.output.talk("stopped")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port, from HOST:PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"--listen {text[:80]!r} is not HOST:PORT, such as 127.0.0.1:8980")
    return host.removeprefix("[").removesuffix("]"), int(port)


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while the block runs."""
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
