"""A catalog of which some blocks fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from snaploader.errors import Unavailable
from snaploader.workspace.catalog import Catalog, Reader, Transaction


class FaultyCatalog:
    """Some blocks fail: before anything was done, or after all was, as when the connection is lost."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.disarm()

    def disarm(self) -> None:
        """Let none fail."""
        self._failing = range(0)
        self._is_after = False
        self._blocks = 0
        self._writes_left = -1
        self._then_failing = 0

    def arm(self, first: int, times: int, *, is_after: bool) -> None:
        """Let some of the next blocks fail.

        Args:
            first: How many pass.
            is_after: Whether they do their work first.
        """
        self.disarm()
        self._failing, self._is_after = range(first, first + times), is_after

    def lose_answer(self, write: int, *, then_failing: int = 0) -> None:
        """Let a transaction be made and fail, and further blocks fail before anything is done.

        Args:
            write: Which, from 1.
            then_failing: How many blocks fail after it.
        """
        self.disarm()
        self._writes_left, self._then_failing = write, then_failing

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A block of changes."""
        is_failing = self._is_failing()
        self._writes_left -= 1
        is_lost = self._writes_left == 0
        if is_failing and not self._is_after:
            raise Unavailable("the catalog is set to fail")
        with self._catalog.transaction() as tx:
            yield tx
        if is_lost:
            self._blocks, self._failing, self._is_after = 0, range(self._then_failing), False
        if is_failing or is_lost:
            raise Unavailable("the catalog is set to fail, after the block")

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """A block that reads."""
        if self._is_failing():
            raise Unavailable("the catalog is set to fail")
        with self._catalog.reading() as reader:
            yield reader

    def _is_failing(self) -> bool:
        self._blocks += 1
        return self._blocks - 1 in self._failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._catalog, name)
