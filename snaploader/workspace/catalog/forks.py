"""What keeps databases whole when the process forks.

SQLite notes the locks of its files per process, in memory that a child inherits although it does not
inherit the locks. A child that opens a file which its parent had open at that moment works without them, and
what it commits can be lost ("How To Corrupt An SQLite Database File", section 2.6). So there must be no
connection at all when a fork is made: a fork waits for the blocks that are open in other threads, and all
idle connections are closed before it. Connections to PostgreSQL stay, and the child leaves them alone.

Programs that are started with `subprocess` are no matter: no code of this process runs in their child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_PATIENCE_S = 30.0
"""How long a fork waits for open blocks. Nothing holds a database for longer without being wrong."""


class Forkable(Protocol):
    """Something whose connections a child of a fork must not use."""

    def close_idle_connections(self) -> None:
        """Close what can be opened again, before a fork."""

    def forget_connections(self) -> None:
        """Begin anew, in the child."""


class OpenBlocks:
    """Counts blocks that are open, each thread's own too."""

    def __init__(self, own: int = 0) -> None:
        self._changed = threading.Condition()
        self._own = threading.local()
        self._own.count = own
        self._count = own
        self._is_forking = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """A block. It waits for a fork that another thread makes, unless it lies within another block."""
        own = self.own
        with self._changed:
            if own == 0:
                self._changed.wait_for(lambda: not self._is_forking)
            self._count += 1
        self._own.count = own + 1
        try:
            yield
        finally:
            self._own.count = own
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    @property
    def own(self) -> int:
        """How many this thread has open."""
        count: int = getattr(self._own, "count", 0)
        return count

    def wait_for_none(self, timeout_s: float) -> None:
        """Wait until no other thread has a block open."""
        with self._changed:
            self._changed.wait_for(lambda: self._count <= self.own, timeout_s)

    def begin_fork(self) -> None:
        """Let no other thread open a block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._is_forking = True

    def end_fork(self) -> None:
        """Let blocks be opened again."""
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


class ForkGate:
    """Keeps forks and blocks that use connections apart, in one process."""

    def __init__(self) -> None:
        self._members: weakref.WeakSet[Forkable] = weakref.WeakSet()
        self._blocks = OpenBlocks()

    def add(self, member: Forkable) -> None:
        """Tell `member` of forks for as long as it lives."""
        self._members.add(member)

    def passed(self) -> AbstractContextManager[None]:
        """A block during which other threads do not fork."""
        return self._blocks.one()

    def before_fork(self) -> None:
        """Wait for open blocks, keep new ones from being opened, and close idle connections."""
        self._blocks.begin_fork()
        self._blocks.wait_for_none(_PATIENCE_S)
        for member in list(self._members):
            member.close_idle_connections()

    def after_fork_in_parent(self) -> None:
        """Let blocks be opened again."""
        self._blocks.end_fork()

    def after_fork_in_child(self) -> None:
        """Begin anew, with the blocks of the one thread that is left."""
        self._blocks = OpenBlocks(self._blocks.own)
        for member in list(self._members):
            member.forget_connections()


fork_gate = ForkGate()
"""The gate of this process."""

os.register_at_fork(
    before=fork_gate.before_fork,
    after_in_parent=fork_gate.after_fork_in_parent,
    after_in_child=fork_gate.after_fork_in_child,
)
