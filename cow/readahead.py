"""Which chunks to ask for before they are read. Pure planning."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cow.chunks import LAZY, ChunkStates


@dataclass(frozen=True, slots=True)
class ReadaheadOptions:
    """How eagerly a store asks its source for chunks ahead of the reader.

    Reading in steps of one to `max_stride` chunks, forwards or backwards, starts it after `streak` equal
    steps. The window doubles from `min_chunks` up to `max_bytes`. When fewer than `poor_ratio` of the
    chunks asked for are read, it pauses for `pause` chunks, longer each time in a row.
    """

    max_bytes: int = 16 * 1024 * 1024
    min_chunks: int = 2
    streak: int = 2
    max_stride: int = 8
    poor_ratio: float = 0.4
    pause: int = 64

    def __post_init__(self) -> None:
        if self.max_bytes < 0 or self.pause < 0 or not 0 <= self.poor_ratio <= 1:
            raise ValueError(
                "max_bytes and pause must not be negative, and poor_ratio must be within 0 and 1"
            )
        if self.min_chunks < 1 or self.streak < 1 or self.max_stride < 1:
            raise ValueError("min_chunks, streak and max_stride must be at least 1")


DEFAULT_READAHEAD = ReadaheadOptions()
_JUDGED = 16
_MAX_PAUSES = 16


class ReadaheadPlanner:
    """Follows one reader through positions 0, 1, 2, … and plans what to ask for. Not thread-safe."""

    def __init__(self, options: ReadaheadOptions, chunk_size: int) -> None:
        self._options = options
        self._max_window = options.max_bytes // chunk_size
        self._window = 0
        self._last: int | None = None
        self._stride = 0
        self._streak = 0
        self._clock = 0
        self._asked: OrderedDict[int, int] = OrderedDict()
        """Positions asked for and not read yet, with the time they were asked for."""
        self._used = 0
        self._wasted = 0
        self._pauses = 0
        self._resume_at = 0
        self.issued = 0
        """How many positions were planned."""
        self.used = 0
        """How many of them were read afterwards."""

    def touched(self, position: int, count: int, skip: Callable[[int], bool]) -> list[int]:
        """Note the first read of `position`; returns what to ask for now, nearest first.

        `count` is the number of positions, `skip` tells which need not be asked for.
        """
        self._clock += 1
        hit = self._asked.pop(position, None) is not None
        if hit:
            self.used += 1
            self._used += 1
        self._follow(position, hit)
        self._judge()
        if self._streak < self._options.streak or self._clock < self._resume_at or not self._max_window:
            return []
        return self._plan(position, count, skip)

    def _follow(self, position: int, hit: bool) -> None:
        step = 0 if self._last is None else position - self._last
        if step and step == self._stride:
            self._streak += 1
        elif hit:
            # Several readers share a sequence: what was asked for may be read out of order.
            if (position - (self._last or 0)) * self._stride < 0:
                return
        else:
            near = 0 < abs(step) <= self._options.max_stride
            self._stride = step if near else 0
            self._streak = 1 if near else 0
            self._window = 0
        self._last = position

    def _judge(self) -> None:
        patience = 4 * self._max_window
        while self._asked:
            position, asked_at = next(iter(self._asked.items()))
            if self._clock - asked_at <= patience and len(self._asked) <= patience:
                break
            del self._asked[position]
            self._wasted += 1
        if self._used + self._wasted < _JUDGED:
            return
        if self._used < self._options.poor_ratio * (self._used + self._wasted):
            self._pauses = min(max(2 * self._pauses, 1), _MAX_PAUSES)
            self._resume_at = self._clock + self._pauses * self._options.pause
            self._window = 0
            self._asked.clear()
        else:
            self._pauses = 0
        self._used = self._wasted = 0

    def _plan(self, position: int, count: int, skip: Callable[[int], bool]) -> list[int]:
        # The window grows when half of it is used up, so that requests go out in batches, not one by one.
        ahead = 0
        if self._window:
            ahead = sum(1 for asked in self._asked if (asked - position) * self._stride > 0)
            if 2 * ahead > self._window:
                return []
        self._window = min(max(2 * self._window, self._options.min_chunks), self._max_window)
        plan: list[int] = []
        for step in range(1, self._window + 1):
            candidate = position + step * self._stride
            if not 0 <= candidate < count:
                break
            if candidate not in self._asked and not skip(candidate):
                plan.append(candidate)
        for candidate in plan:
            self._asked[candidate] = self._clock
        self.issued += len(plan)
        return plan


class StoreReadahead:
    """Plans for the readers of one store. Thread-safe.

    Positions are those among the chunks that were lazy at the first read, so a hole between two of them does
    not break a sequence.
    """

    def __init__(self, options: ReadaheadOptions | None, chunk_size: int) -> None:
        self._planner = ReadaheadPlanner(options, chunk_size) if options is not None else None
        self._lock = threading.Lock()
        self._lazy: npt.NDArray[np.int64] | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Chunks asked for ahead, and how many of them were read."""
        with self._lock:
            return (self._planner.issued, self._planner.used) if self._planner else (0, 0)

    def plan(self, index: int, states: ChunkStates) -> list[int]:
        """What to ask for now that a lazy chunk is about to be opened, nearest first."""
        if self._planner is None or states.is_touched(index):
            return []
        with self._lock:
            if self._lazy is None:
                self._lazy = np.flatnonzero(states.kind == LAZY)
            lazy = self._lazy
            position = int(np.searchsorted(lazy, index))
            if position == len(lazy) or lazy[position] != index:
                return []

            def skip(other: int) -> bool:
                return bool(states.touched[lazy[other]]) or states.kind[lazy[other]] != LAZY

            plan = self._planner.touched(position, len(lazy), skip)
        return [int(lazy[position]) for position in plan]
