"""`snaploader demo`: one snapshot's life, on real input, with every claim checked."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from snaploader.cli.options import command, option
from snaploader.cli.output import CheckFailed
from snaploader.cli.process import load_grpc
from snaploader.cli.resources import Caches
from snaploader.cli.values import Size, format_time
from snaploader.errors import translate_os_errors


@command("demo")
@option("--size", type=Size(64 << 20), default="256MiB", help="Size of the image.")
@option(
    "--data",
    "data_bytes",
    type=Size(16 << 20),
    default="64MiB",
    help="About how many bytes of files go into it.",
)
@option("--work-dir", type=click.Path(path_type=Path), help="Folder to work in.  [default: temporary]")
def demo(caches: Caches, size: int, data_bytes: int, work_dir: Path | None) -> None:
    """Save a real disk image on one host, load it lazily on another, and prove every byte right.

    Makes an ext4 image from files of this machine, starts a server, and plays four hosts with a cache each.
    Needs e2fsprogs. Uses neither the local nor the remote cache that is configured.
    """
    load_grpc()
    from snaploader.cli.demo_story import play

    output = caches.output
    begin = time.monotonic()
    if work_dir is not None:
        with translate_os_errors(f"cannot use the folder {str(work_dir)!r}"):
            work_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="snaploader-demo-", dir=work_dir) as folder:
        play(Path(folder), size, data_bytes, ledger, output.talk)
    seconds = time.monotonic() - begin
    output.data(
        {
            "steps": [dataclasses.asdict(row) for row in ledger.rows],
            "proofs": [dataclasses.asdict(proof) for proof in ledger.proofs],
            "passed": not ledger.failed,
            "seconds": round(seconds, 6),
        }
    )
    output.table(
        {
            "step": "step",
            "host": "host",
            "touched>": "touched_bytes",
            "fetched>": "fetched_bytes",
            "uploaded>": "uploaded_bytes",
            "time>": lambda row: format_time(row.seconds),
        },
        ledger.rows,
    )
    output.text()
    output.table(
        {"": lambda proof: "ok" if proof.holds else "FAILED", "proof": "claim", "evidence": "evidence"},
        ledger.proofs,
    )
    if ledger.failed:
        raise CheckFailed(
            f"{len(ledger.failed)} of {len(ledger.proofs)} proofs failed: {'; '.join(ledger.failed)}"
        )
    output.text()
    output.text(f"all {len(ledger.proofs)} proofs hold; {format_time(seconds)} in all")


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
