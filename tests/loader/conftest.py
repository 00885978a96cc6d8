"""Fixtures: a server, and hosts that share it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import Host, HostFactory

from snaploader import FileCache, RemoteCache, SnapshotLoader
from snaploader.blobstore import RemoteStore
from snaploader.remote import RetryPolicy, Timeouts
from snaploader.testing import EmbeddedServer


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[HostFactory]:
    """Makes hosts: `make_host("a", server)`; without a server it works alone."""
    with contextlib.ExitStack() as stack:

        def make(
            name: str,
            server: EmbeddedServer | None = None,
            *,
            group: str = "",
            max_bytes: int = 1 << 30,
            retry: RetryPolicy | None = None,
            timeouts: Timeouts | None = None,
            remote: RemoteStore | None = None,
            **kwargs: Any,
        ) -> Host:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            cache = stack.enter_context(FileCache(folder / "cache", max_bytes=max_bytes, group_id=group))
            if server is not None:
                policy = retry or RetryPolicy(initial_delay_s=0.001, max_delay_s=0.01)
                remote = stack.enter_context(
                    RemoteCache(server.url, retry=policy, timeouts=timeouts or Timeouts())
                )
            loader = stack.enter_context(SnapshotLoader(cache, remote, **kwargs))
            return Host(loader, cache, remote, folder)

        yield make
