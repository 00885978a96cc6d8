"""A value made by the first who needs it, shared by all who ask meanwhile, kept once it was made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Keeps the first success of `make`. A failure reaches those who waited; the next caller tries again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._future: Future[T] | None = None

    def get(self) -> T:
        """The value, made now if need be."""
        with self._lock:
            future = self._future
            is_maker = future is None
            if future is None:
                future = self._future = Future()
        if not is_maker:
            return future.result()
        try:
            value = self._make()
        except BaseException as error:
            with self._lock:
                self._future = None
            future.set_exception(error)
            raise
        future.set_result(value)
        return value
