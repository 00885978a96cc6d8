"""Fixtures: hosts on the test's catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host, HostFactory, open_host

from snaploader.testing import FakeCAS
from snaploader.workspace.catalog import Catalog


@pytest.fixture
def remote() -> FakeCAS:
    """A remote cache that hosts share."""
    return FakeCAS()


@pytest.fixture
def make_host(tmp_path: Path, open_catalog: Callable[[], Catalog], remote: FakeCAS) -> Iterator[HostFactory]:
    """Makes hosts: `make_host()`, `make_host("host-b")`; the same name again is another process of it."""
    with ExitStack() as stack:

        def make(name: str = "host-a", *, is_remote: bool = True, **kwargs: Any) -> Host:
            return stack.enter_context(
                open_host(tmp_path / name, open_catalog(), remote if is_remote else None, host=name, **kwargs)
            )

        yield make


@pytest.fixture
def host(make_host: HostFactory) -> Host:
    """A host with a remote cache."""
    return make_host()
