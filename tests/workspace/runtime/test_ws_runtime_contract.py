"""Both runtimes do what every runtime must do."""

from __future__ import annotations

import pytest
from runtime_harness import FolderHarness

from snaploader.workspace.runtime import ProcessRuntime, Runtime
from snaploader.workspace.testing import RUNTIME_CHECKS, FakeRuntime, Harness, RuntimeCheck


@pytest.mark.parametrize("check", RUNTIME_CHECKS, ids=str)
def test_contract(check: RuntimeCheck, harness: FolderHarness) -> None:
    check(harness)
    assert harness.runtime.workspaces() == []
    assert harness.runtime.sweep() == []


def test_both_runtimes_and_the_harness_fit_their_protocols(harness: FolderHarness) -> None:
    fits: Harness = harness
    assert isinstance(fits.runtime, Runtime)
    assert isinstance(fits.runtime, FakeRuntime | ProcessRuntime)


def test_every_check_says_what_it_checks() -> None:
    assert len({check.name for check in RUNTIME_CHECKS}) == len(RUNTIME_CHECKS)
    assert all(check.description for check in RUNTIME_CHECKS)
