"""What a recovery found and did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from snaploader.errors import SnaploaderError


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was found, and what was done about it."""

    name: str
    """A workspace's id, or the name of what was found."""
    reason: str


@dataclass(frozen=True, slots=True)
class RecoverySummary:
    """What one `recover` did, each in the order in which it was done."""

    restored: tuple[str, ...] = ()
    """Ids of the workspaces that are paused: whole, with their slots."""
    adopted: tuple[str, ...] = ()
    """Those among them that the catalog had lost."""
    repaired: tuple[Note, ...] = ()
    """Workspaces with an operation that had been interrupted, or that did not run as they should."""
    pruned: tuple[Note, ...] = ()
    """Leftovers that were removed."""
    trashed: tuple[Note, ...] = ()
    """Records of paused workspaces that were renamed aside; the next start removes them."""
    unknown: tuple[Note, ...] = ()
    """What lies among the records of paused workspaces and is none: it was left alone."""
    busy: tuple[str, ...] = ()
    """Ids of workspaces that somebody else is working on: they were left alone."""
    problems: tuple[Note, ...] = ()
    """What could not be put right. The next recovery tries again."""


@dataclass(slots=True)
class Findings:
    """The summary while it is made. For one thread."""

    restored: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    repaired: list[Note] = field(default_factory=list)
    pruned: list[Note] = field(default_factory=list)
    trashed: list[Note] = field(default_factory=list)
    unknown: list[Note] = field(default_factory=list)
    busy: dict[str, None] = field(default_factory=dict)
    problems: list[Note] = field(default_factory=list)

    @contextmanager
    def guarding(self, name: str, log: Callable[..., None]) -> Iterator[None]:
        """Let nothing that goes wrong with one thing stop the others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a recovery never raises
            log("recovery of %r failed", name, exc_info=True)
            text = error.message if isinstance(error, SnaploaderError) else repr(error)
            self.problems.append(Note(name, text))

    def summary(self) -> RecoverySummary:
        """What it came to."""
        return RecoverySummary(
            tuple(self.restored),
            tuple(self.adopted),
            tuple(self.repaired),
            tuple(self.pruned),
            tuple(self.trashed),
            tuple(self.unknown),
            tuple(self.busy),
            tuple(self.problems),
        )
