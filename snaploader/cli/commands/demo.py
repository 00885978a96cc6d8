"""`snaploader demo`."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import click

from snaploader.cli.demo.ledger import Ledger
from snaploader.cli.demo.story import play
from snaploader.cli.exits import CheckFailed
from snaploader.cli.options import Command, common, option
from snaploader.cli.session import Session
from snaploader.cli.values import Size, format_size, format_time
from snaploader.errors import translate_os_errors


@click.command(short_help="A snapshot's life on real input, with every claim checked.", cls=Command)
@option(
    "--size",
    scope="demo",
    type=Size(64 << 20),
    default="256MiB",
    show_default=True,
    help="Size of the image.",
)
@option(
    "--data",
    "data_bytes",
    scope="demo",
    type=Size(16 << 20),
    default="64MiB",
    show_default=True,
    help="About how many bytes of files go into it.",
)
@option(
    "--work-dir",
    scope="demo",
    type=click.Path(path_type=Path),
    help="Folder to work in.  [default: temporary]",
)
@common
def demo(session: Session, size: int, data_bytes: int, work_dir: Path | None) -> None:
    """Save a real disk image on one host, load it lazily on another, and prove every byte right.

    Makes an ext4 image from files of this machine, starts a server, and plays four hosts with a cache each.
    Needs e2fsprogs. Uses neither the local nor the remote cache that is configured.
    """
    output = session.output
    begin = time.monotonic()
    if work_dir is not None:
        with translate_os_errors(f"cannot use the folder {str(work_dir)!r}"):
            work_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="snaploader-demo-", dir=work_dir) as folder:
        play(Path(folder), size, data_bytes, ledger, output.talk)
    seconds = time.monotonic() - begin
    output.json(
        {
            "steps": [dataclasses.asdict(row) for row in ledger.rows],
            "proofs": [dataclasses.asdict(proof) for proof in ledger.proofs],
            "passed": not ledger.failed,
            "seconds": round(seconds, 6),
        }
    )
    output.table(
        ["step", "host", "touched>", "fetched>", "uploaded>", "time>"],
        [
            [
                row.step,
                row.host,
                _size(row.touched_bytes),
                _size(row.fetched_bytes),
                _size(row.uploaded_bytes),
                format_time(row.seconds),
            ]
            for row in ledger.rows
        ],
    )
    output.text()
    output.table(
        ["", "proof", "evidence"],
        [["ok" if proof.holds else "FAILED", proof.claim, proof.evidence] for proof in ledger.proofs],
    )
    if ledger.failed:
        raise CheckFailed(
            f"{len(ledger.failed)} of {len(ledger.proofs)} proofs failed: {'; '.join(ledger.failed)}"
        )
    output.text()
    output.text(f"all {len(ledger.proofs)} proofs hold; {format_time(seconds)} in all")


def _size(count: int | None) -> str:
    return "-" if count is None else format_size(count)
