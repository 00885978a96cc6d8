"""What a process holds: threads, descriptors, mapped files, children. Linux only."""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

GRACE_S = 60.0
"""How long something that ends by itself (a closed channel's socket, a thread on its way out) may take on a
busy machine."""
ALWAYS_OPEN = ("anon_inode:", "/dev/", "/proc/", "/sys/")
"""gRPC keeps event descriptors, the interpreter its random source; neither belongs to a test."""


@dataclass(frozen=True)
class Resources:
    """A snapshot of what this process holds."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[int, str]]
    mappings: frozenset[str]
    children: frozenset[int]

    @classmethod
    def now(cls, folder: str) -> Self:
        """What is held now. Only mappings of files below `folder` count: all others are libraries."""
        return cls(
            threads=frozenset(thread for thread in threading.enumerate() if not _is_spare(thread)),
            descriptors=frozenset(_descriptors()),
            mappings=frozenset(_mapped_files(folder)),
            children=frozenset(_children()),
        )

    def beyond(self, earlier: Self) -> list[str]:
        """What is held now and was not then, in words."""
        return [
            *(f"thread {thread.name}" for thread in self.threads - earlier.threads),
            *(
                f"descriptor {number} of {target}"
                for number, target in self.descriptors - earlier.descriptors
            ),
            *(f"mapping of {path}" for path in self.mappings - earlier.mappings),
            *(f"child process {pid}: {_command(pid)}" for pid in self.children - earlier.children),
        ]


def wait_for_none(leaks: Callable[[], list[str]]) -> list[str]:
    """The leaks that stay when everything had time to end. Costs nothing when there are none at once."""
    found = leaks()
    if not found:
        return found
    gc.collect()
    give_up_at = time.monotonic() + GRACE_S
    while (found := leaks()) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return found


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own descriptor, or one closed by another thread
            continue
        if not target.startswith(ALWAYS_OPEN):
            yield int(name), target


def _mapped_files(folder: str) -> Iterator[str]:
    prefix = folder + "/"
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            start = line.find(prefix)
            if start >= 0:
                yield line[start:].rstrip("\n")


def _children() -> Iterator[int]:
    helper = getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None)
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as children:
                pids = [int(pid) for pid in children.read().split()]
        except FileNotFoundError:  # the thread ended
            continue
        yield from (pid for pid in pids if pid != helper)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            return (
                command.read().replace(b"\0", b" ").decode(errors="replace").strip()
                or "ended, not waited for"
            )
    except FileNotFoundError:
        return "ended"


def _is_spare(thread: threading.Thread) -> bool:
    """Whether trio keeps an idle thread for its next call, as it does for ten seconds."""
    return thread.name.startswith("Trio thread ")
