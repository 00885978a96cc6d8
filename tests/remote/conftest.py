"""Fixtures: clients of embedded servers, with retries that do not wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from remote_data import QUICK, MakeRemote, MakeServer

from snaploader.remote import RemoteCache
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """Starts servers: `make_server(Fault(…), …, **fields of ServerOptions)`."""
    with contextlib.ExitStack() as stack:

        def make(*faults: Fault, options: ServerOptions | None = None, tls: Any = None, **fields: Any) -> Any:
            options = options or ServerOptions(**fields)
            return stack.enter_context(EmbeddedServer(options=options, faults=FaultScript(*faults), tls=tls))

        yield make


@pytest.fixture
def make_remote() -> Iterator[MakeRemote]:
    """Makes clients, closed after the test: `make_remote(server, **arguments of RemoteCache)`."""
    with contextlib.ExitStack() as stack:

        def make(server: EmbeddedServer | str, **arguments: Any) -> RemoteCache:
            url = server if isinstance(server, str) else server.url
            return stack.enter_context(RemoteCache(url, **{"retry": QUICK, **arguments}))

        yield make
