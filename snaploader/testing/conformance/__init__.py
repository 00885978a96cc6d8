"""A conformance suite: what a Remote Execution API server must do to hold snapshots.

From pytest, against any server:

    import pytest
    from snaploader.testing import conformance

    @pytest.fixture(scope="module")
    def endpoint():
        with conformance.Endpoint("grpc://127.0.0.1:8980", instance_name="main") as endpoint:
            yield endpoint

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
    def test_server(check, endpoint):
        result = check.run(endpoint)
        if result.outcome is conformance.Outcome.SKIPPED:
            pytest.skip(result.detail)
        assert result.outcome is conformance.Outcome.PASSED, result.detail

From a program: `conformance.run(endpoint)` yields one `CheckResult` after the other and raises nothing.

Checks adapt to what the server states in its capabilities, use fresh random blobs (about 60 MiB in all,
left on the server), and do not depend on each other. They pass against the embedded server and all its
presets, buildbox-casd and BuildGrid.
"""

from __future__ import annotations

from collections.abc import Iterator

from snaploader.testing.conformance import checks as _checks
from snaploader.testing.conformance.endpoint import (
    Check,
    CheckFailed,
    CheckResult,
    CheckSkipped,
    Endpoint,
    Outcome,
)

CHECKS: tuple[Check, ...] = tuple(_checks.CHECKS)
"""Every check, in a sensible order."""


def run(endpoint: Endpoint, checks: tuple[Check, ...] = CHECKS) -> Iterator[CheckResult]:
    """Run checks one after the other. Nothing is raised; a server that is away fails every check."""
    for check in checks:
        yield check.run(endpoint)


__all__ = ["CHECKS", "Check", "CheckFailed", "CheckResult", "CheckSkipped", "Endpoint", "Outcome", "run"]
