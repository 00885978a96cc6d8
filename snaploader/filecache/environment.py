"""What the parts of an open cache share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from snaploader.filecache.layout import Layout
from snaploader.filecache.ledger import Ledger
from snaploader.filecache.session import Session
from snaploader.filecache.statistics import Counters


@dataclass(frozen=True)
class Environment:
    """The parts' common ground, made once per open cache."""

    layout: Layout
    session: Session
    ledger: Ledger
    max_bytes: int
    checkpoint: Callable[[str], None]
    """Called with the name of each step after it was done; crash tests end the process in it."""
    counters: Counters = field(default_factory=Counters)
    now_ns: Callable[[], int] = time.time_ns
