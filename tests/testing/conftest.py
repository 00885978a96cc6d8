"""Servers that end with the test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from served import Serve, Served

from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions
from snaploader.testing.conformance import Endpoint


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test: `serve(*faults, storage=None, instance_name="", **options)`."""
    with contextlib.ExitStack() as stack:

        def start(
            *faults: Fault, storage: Any = None, headers: Any = (), instance_name: str = "", **options: Any
        ) -> Served:
            server = EmbeddedServer(storage, ServerOptions(**options), FaultScript(*faults))
            stack.enter_context(server)
            endpoint = Endpoint(server.url, headers=headers, instance_name=instance_name, timeout_s=20)
            return Served(server, stack.enter_context(endpoint))

        yield start
