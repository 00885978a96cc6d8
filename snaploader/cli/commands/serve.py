"""`snaploader serve`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from snaploader.cli.options import Command, common, option
from snaploader.cli.session import Session
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.testing import PRESETS, EmbeddedServer, ServerOptions

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    with _stop_signal() as wait, EmbeddedServer(root, options=options, host=host, port=port) as server:
        session.output.text(server.url)
        session.output.json({"url": server.url, "port": server.port})
        session.output.flush()
        session.output.talk(f"serving {root or 'from memory'}; stop with Ctrl-C")
        wait()
    session.output.talk("stopped")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port, from HOST:PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"--listen {text[:80]!r} is not HOST:PORT, such as 127.0.0.1:8980")
    return host.removeprefix("[").removesuffix("]"), int(port)


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], None]]:
    """A function that waits until SIGINT or SIGTERM has arrived since the block began.

    They come through a pipe that the interpreter itself writes to. A Python handler could not wake the main
    thread safely, because it runs in that thread, which may hold the lock it would need.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    old_descriptor = signal.set_wakeup_fd(writing)

    def wait() -> None:
        while os.read(reading, 1)[0] not in STOP_SIGNALS:
            pass

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
