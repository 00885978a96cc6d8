"""What every runtime must do, as checks that any implementation can be run through.

From pytest, with a `Harness` for the runtime at hand:

    import pytest
    from snaploader.workspace.testing import RUNTIME_CHECKS

    @pytest.mark.parametrize("check", RUNTIME_CHECKS, ids=str)
    def test_runtime(check, harness):
        check(harness)

A check returns when all is well, and raises AssertionError or what the runtime raised. Each makes workspaces
of its own, with new ids, and removes them; they do not depend on each other.
"""

from snaploader.workspace.testing.contract import attached, content, lifecycle
from snaploader.workspace.testing.contract.model import Harness, RuntimeCheck

RUNTIME_CHECKS: tuple[RuntimeCheck, ...] = (
    *lifecycle.check.checks,
    *content.check.checks,
    *attached.check.checks,
)
"""Every check, in a sensible order."""

__all__ = ["RUNTIME_CHECKS", "Harness", "RuntimeCheck"]
