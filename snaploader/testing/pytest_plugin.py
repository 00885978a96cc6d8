"""Fixtures for tests of what is built on this library; pytest finds them by itself where it is installed.

    def test_a_task_starts_from_its_branch(snaploader_loader, tmp_path):
        executor = Executor(snaploader_loader)
        ...

    def test_an_outage_is_told(snaploader_server, snaploader_remote_cache):
        snaploader_server.stop()
        ...

Each test has objects of its own, empty and closed after it. What `snaploader_loader` takes for its remote
store is a fixture, too: a test suite that defines `snaploader_remote_store` anew replaces it everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # pytest loads this module in every project of the environment: nothing is imported before it is used.
    from snaploader import FileCache, RemoteCache, RemoteStore, SnapshotLoader
    from snaploader.testing import EmbeddedServer, FakeCAS


@pytest.fixture
def snaploader_file_cache(tmp_path: Path) -> Iterator[FileCache]:
    """A `snaploader.FileCache` in a folder of the test's `tmp_path`."""
    from snaploader import FileCache

    with FileCache(tmp_path / "snaploader-file-cache") as cache:
        yield cache


@pytest.fixture
def snaploader_fake_cas() -> FakeCAS:
    """A `snaploader.testing.FakeCAS`: a remote store in memory, which counts what is asked of it."""
    from snaploader.testing import FakeCAS

    return FakeCAS()


@pytest.fixture
def snaploader_server() -> Iterator[EmbeddedServer]:
    """A `snaploader.testing.EmbeddedServer` on a free port of the loopback interface, in memory."""
    from snaploader.testing import EmbeddedServer

    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def snaploader_remote_cache(snaploader_server: EmbeddedServer) -> Iterator[RemoteCache]:
    """A `snaploader.RemoteCache` that speaks to `snaploader_server`."""
    from snaploader import RemoteCache

    with RemoteCache(snaploader_server.url) as cache:
        yield cache


@pytest.fixture
def snaploader_remote_store(snaploader_fake_cas: FakeCAS) -> RemoteStore:
    """The remote store of `snaploader_loader`: `snaploader_fake_cas`. To be replaced by whoever likes."""
    return snaploader_fake_cas


@pytest.fixture
def snaploader_loader(
    snaploader_file_cache: FileCache, snaploader_remote_store: RemoteStore
) -> Iterator[SnapshotLoader]:
    """A `snaploader.SnapshotLoader` over `snaploader_file_cache` and `snaploader_remote_store`."""
    from snaploader import SnapshotLoader

    with SnapshotLoader(snaploader_file_cache, snaploader_remote_store) as loader:
        yield loader
