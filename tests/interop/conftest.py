"""Servers of other projects, each started once per test run.

The group marks keep the tests of one server in one of xdist's workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from thirdparty import Server, buildgrid, casd


@pytest.fixture(scope="session")
def casd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """buildbox-casd."""
    with casd(tmp_path_factory.mktemp("casd")) as server:
        yield server


@pytest.fixture(scope="session")
def buildgrid_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """BuildGrid."""
    with buildgrid(tmp_path_factory.mktemp("buildgrid")) as server:
        yield server


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("casd_server", marks=pytest.mark.xdist_group("casd"), id="casd"),
        pytest.param("buildgrid_server", marks=pytest.mark.xdist_group("buildgrid"), id="buildgrid"),
    ],
)
def server(request: pytest.FixtureRequest) -> Server:
    """Each of the servers in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Server)
    return found
