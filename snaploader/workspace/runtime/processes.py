"""Processes of this host, told apart for ever: a pid alone is used again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from snaploader.filecache.durability import read_boot_id

_STATE, _START_TIME = 0, 19
"""Fields of /proc/<pid>/stat behind the name, see proc_pid_stat(5)."""
_ENDED = frozenset({"Z", "X", "x"})


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that ran on this host, or runs."""

    pid: int
    start_ticks: int
    """When it began, in clock ticks since the host started."""
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this pid now; None when there is none, or only what it leaves its parent."""
        fields = _read_stat(pid)
        if fields is None or fields[_STATE] in _ENDED:
            return None
        return cls(pid, int(fields[_START_TIME]), read_boot_id())

    @classmethod
    def current(cls) -> Self:
        """This process."""
        identity = cls.of(os.getpid())
        assert identity is not None
        return identity

    @property
    def is_alive(self) -> bool:
        """Whether it runs still."""
        return self == ProcessIdentity.of(self.pid)

    def open(self) -> int | None:
        """A descriptor of the process, readable when it has ended (pidfd_open(2)); None when it has."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Checked after it was opened: from then on the descriptor means this process and no later one.
        if self.is_alive:
            return fd
        os.close(fd)
        return None


def _read_stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return data.rpartition(b")")[2].decode().split()
