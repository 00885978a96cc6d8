"""Interrupts (Ctrl-C) at every step of a piece of work, one after the other."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, Self

import pytest


def _interrupt() -> None:
    raise KeyboardInterrupt


class Interrupter:
    """Raises KeyboardInterrupt at the nth step of this thread in these files where a signal could raise.

    Or does something else there (`act`).

    CPython looks for signals after calls, where functions start and where loops end, and nowhere else.
    """

    def __init__(self, at: int, *files: str | None, act: Callable[[], object] = _interrupt) -> None:
        self._left = at
        self._act = act
        self._files = files
        self._before: dict[FrameType, str] = {}
        self.fired = False

    def __enter__(self) -> Self:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event in {"call", "opcode"} and not self.fired:
            step = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if event == "call":
                is_looking = step == "RESUME"  # and not where an exception is thrown into a generator
            else:
                before = self._before.get(frame, "")
                self._before[frame] = step
                is_looking = before.startswith("CALL") or "JUMP_BACKWARD" in before
            if is_looking:
                self._left -= 1
                if not self._left:
                    self.fired = True
                    self._act()
        return self._trace


def interrupt_everywhere(work: Callable[[], object], *files: str | None) -> int:
    """Do `work` with an interrupt at each of its steps in turn, and again after each; how many there were.

    The test fails when it waits for ever.
    """
    steps = itertools.count(1)
    interrupted = 0

    def work_and_interrupt() -> None:
        nonlocal interrupted
        with Interrupter(-1, *files):
            work()  # Python 3.12 traces single steps of what was traced before only
        missed = 0
        while missed < 5:  # with other threads at work, the number of steps differs from time to time
            with Interrupter(next(steps), *files) as interrupter:
                try:
                    work()
                except KeyboardInterrupt:
                    assert interrupter.fired
            work()
            interrupted += interrupter.fired
            missed = 0 if interrupter.fired else missed + 1

    with ThreadPoolExecutor(1) as watched:
        try:
            watched.submit(work_and_interrupt).result(timeout=100)
        except TimeoutError:
            pytest.fail(f"work interrupted at step {next(steps) - 1} waits for ever")
    return interrupted
