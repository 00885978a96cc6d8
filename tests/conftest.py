"""What all tests share: the same examples in every run, and nothing left behind by any test."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from leaks import Resources, wait_for_none

# A run tells the same each time, on a busy machine too. `make test` has few examples of what is tested with
# many by `make test-all`; `--hypothesis-profile=explore` looks for more.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("repeatable"), max_examples=25)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Let interrupts arrive: what a shell starts in the background ignores them, and so do its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare collections what lives as long as the run: thousands of tests, and what they import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves something behind; one marked `may_leak` is not checked.

    It is set up after the fixtures of wider scope and before those of the test, and torn down in reverse, so
    servers shared by many tests are no leaks and all that the test's own fixtures close is closed by then.
    """
    if request.node.get_closest_marker("may_leak"):
        yield
        return
    folder = str(tmp_path_factory.getbasetemp())
    before = Resources.now(folder)
    yield
    leaked = wait_for_none(lambda: Resources.now(folder).beyond(before))
    if leaked:
        pytest.fail("left behind: " + "; ".join(leaked), pytrace=False)
