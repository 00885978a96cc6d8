"""Fixtures: a server, and a host whose loader and caches report to an observer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from telemetry_hosts import Host, MakeHost

from snaploader import FileCache, Observer, RemoteCache, RetryPolicy, SnapshotLoader
from snaploader.testing import EmbeddedServer


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture
def make_host(tmp_path: Path, server: EmbeddedServer) -> Iterator[MakeHost]:
    """Makes hosts on the server: `make_host("a", observer)`."""
    with contextlib.ExitStack() as stack:

        def make(name: str, observer: Observer | None = None) -> Host:
            folder = tmp_path / name
            folder.mkdir()
            cache = stack.enter_context(FileCache(folder / "cache", observer=observer))
            retry = RetryPolicy(initial_delay_s=0.001, max_delay_s=0.01)
            remote = stack.enter_context(RemoteCache(server.url, retry=retry, observer=observer))
            loader = stack.enter_context(SnapshotLoader(cache, remote, observer=observer))
            return Host(loader, cache, remote, folder)

        yield make
