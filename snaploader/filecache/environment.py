"""What the parts of an open cache share."""

from __future__ import annotations

from dataclasses import dataclass, field

from snaploader._environment import HostEnvironment
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
    host: HostEnvironment
    counters: Counters = field(default_factory=Counters)
