"""Processes of this host, told apart for ever: a pid alone is used again.

A process is known by its pid, the clock tick at which it began and the boot of the host, which never change.
psutil tells the time of its beginning instead, which moves when the host's clock is set; so what is needed of
/proc is read by the supervisor's functions, which cannot use psutil either.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self

from snaploader._environment import read_boot_id
from snaploader.workspace.runtime.supervisor import descendants, read_stat


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that ran on this host, or runs."""

    pid: int
    start_ticks: int
    """When it began, in clock ticks since the host started."""
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process that has this pid now, or None when there is none or it waits for its parent."""
        stat = read_stat(pid)
        if stat is None or stat.has_ended:
            return None
        return cls(pid, stat.start_ticks, read_boot_id())

    @classmethod
    def current(cls) -> Self:
        """This process."""
        identity = cls.of(os.getpid())
        assert identity is not None
        return identity

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self == ProcessIdentity.of(self.pid)

    def open_pidfd(self) -> int | None:
        """Open a descriptor that becomes readable when the process ends, pidfd_open(2); None when it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Checked after it was opened: from then on the descriptor means this process and no later one.
        if self.is_alive:
            return fd
        os.close(fd)
        return None

    def send(self, number: int) -> None:
        """Send the process a signal if it still runs."""
        fd = self.open_pidfd()
        if fd is None:
            return
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def wait_ended(processes: Iterable[ProcessIdentity], timeout_s: float) -> bool:
    """Wait until all processes have ended; returns whether they have in this time."""
    give_up_at = time.monotonic() + timeout_s
    with ExitStack() as opened:
        for fd in [fd for process in processes if (fd := process.open_pidfd()) is not None]:
            opened.callback(os.close, fd)
            left_s = max(0.0, give_up_at - time.monotonic())
            if not is_readable(fd, left_s):
                return False
    return True


def is_readable(fd: int, timeout_s: float) -> bool:
    """Wait until a descriptor is readable; returns whether it is in this time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1000)))


def kill_trees(roots: Iterable[ProcessIdentity], timeout_s: float) -> bool:
    """Kill processes and all below them; returns whether nothing is left in this time.

    The roots come last: as long as they live, what others orphan stays below them.
    """
    give_up_at = time.monotonic() + timeout_s
    roots = list(roots)
    while below := _below(roots):
        if not _kill(below, give_up_at):
            return False
    return _kill(roots, give_up_at)


def kill_marked(mark: bytes, timeout_s: float) -> tuple[bool, bool]:
    """Kill all processes that have `mark`, a variable "NAME=value", in the environment they began with.

    Returns whether there were any, and whether all ended in this time.
    """
    give_up_at = time.monotonic() + timeout_s
    found = False
    while marked := _marked(mark):
        found = True
        if not _kill(marked, give_up_at):
            return True, False
    return found, True


def _below(roots: list[ProcessIdentity]) -> list[ProcessIdentity]:
    alive = [root for root in roots if root.is_alive]
    pids = {pid for root in alive for pid in descendants(root.pid)} - {root.pid for root in alive}
    return [process for pid in pids if (process := ProcessIdentity.of(pid)) is not None]


def _kill(processes: list[ProcessIdentity], give_up_at: float) -> bool:
    for process in processes:
        process.send(signal.SIGKILL)
    return wait_ended(processes, max(0.0, give_up_at - time.monotonic()))


def _marked(mark: bytes) -> list[ProcessIdentity]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb", buffering=0) as file:
                has_mark = mark in file.read().split(b"\0")
        except OSError:  # ended, or another user's
            continue
        process = ProcessIdentity.of(int(name)) if has_mark else None
        if process is not None:
            found.append(process)
    return found
