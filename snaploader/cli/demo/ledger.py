"""What the demo writes down: the figures of each step, and each claim with its proof."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One step, in figures; None where a figure makes no sense."""

    step: str
    host: str
    touched_bytes: int | None
    """Read, written or hashed here."""
    fetched_bytes: int | None
    """Content that came from the server: chunks, trees and all."""
    uploaded_bytes: int | None
    """Content that went to the server."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim, and whether it held."""

    claim: str
    holds: bool
    evidence: str


@dataclass
class Measure:
    """Filled in by a step while it runs."""

    touched_bytes: int | None = None
    uploaded_bytes: int | None = None


class Ledger:
    """Rows and proofs, in the order they came."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.proofs: list[Proof] = []

    @contextlib.contextmanager
    def step(self, name: str, host: str = "-", fetched: Callable[[], int] | None = None) -> Iterator[Measure]:
        """Time the block and write it down.

        Args:
            fetched: Bytes the host has fetched so far.
        """
        measure = Measure()
        before = fetched() if fetched is not None else 0
        begin = time.monotonic()
        yield measure
        seconds = time.monotonic() - begin
        difference = fetched() - before if fetched is not None else None
        self.rows.append(Row(name, host, measure.touched_bytes, difference, measure.uploaded_bytes, seconds))

    def prove(self, claim: str, holds: bool, evidence: str) -> None:
        """Write a claim down, with what speaks for or against it."""
        self.proofs.append(Proof(claim, holds, evidence))

    @property
    def failed(self) -> list[str]:
        """The claims that did not hold."""
        return [proof.claim for proof in self.proofs if not proof.holds]
