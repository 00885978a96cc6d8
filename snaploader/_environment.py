"""What this process takes from its host, in one value that tests replace.

Public constructors that need it have a private keyword for it, `_environment`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


def read_boot_id() -> str:
    """An id that changes with every boot of the machine; see random(4)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True)
class HostEnvironment:
    """The clock and the boot of the host, and a hook for crash tests. Immutable."""

    now_ns: Callable[[], int] = time.time_ns
    boot_id: Callable[[], str] = read_boot_id
    after_step: Callable[[str], object] = str
    """Called with the name of each step on disk after it was done; crash suites go by the names.

    The default, `str`, does nothing.
    """


HOST = HostEnvironment()
