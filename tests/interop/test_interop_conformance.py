"""The conformance suite against servers of other projects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from thirdparty import Server

from snaploader.testing import conformance

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def endpoint(server: Server) -> Iterator[conformance.Endpoint]:
    with conformance.Endpoint(server.url) as endpoint:
        assert endpoint.capabilities.HasField("cache_capabilities")  # connected before the first test
        yield endpoint


@pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
def test_server(check: conformance.Check, endpoint: conformance.Endpoint) -> None:
    result = check.run(endpoint)
    if result.outcome is conformance.Outcome.SKIPPED:
        pytest.skip(result.detail)
    assert result.outcome is conformance.Outcome.PASSED, result.detail
