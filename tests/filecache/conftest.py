"""Tests use entries faster than the file cache tells uses apart."""

from __future__ import annotations

import pytest

from snaploader.filecache import layout


@pytest.fixture(autouse=True)
def exact_times_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use counts, however soon after the last; processes that a test starts go by the second."""
    monkeypatch.setattr(layout, "GRANULARITY_NS", 0)
