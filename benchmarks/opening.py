"""What it costs a fresh process to open a snapshot and to read the first 4 KiB of a chunked file of it.

    python -m benchmarks.opening [--chunks 4096] [--rounds 9] [--json FILE] [--against CHECKOUT]

Each figure is the median over processes, each of which imports snaploader, opens a warm file cache and a
loader, finds the snapshot, unpacks it and reads. Import and opening are told apart, and the latter on the
clock too. Beside it stands a stat(2) of each chunk's file, which is how one would look for them one by one.

`--against` measures another checkout in turns with this one, by its public names only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

CHUNK = 4096
FIGURES = ("import_cpu_ms", "open_cpu_ms", "open_wall_ms", "stat_each_cpu_ms")


def save(folder: Path, chunks: int) -> None:
    """Save a disk whose chunks all differ."""
    from snaploader import FileCache, SnapshotLoader, SnapshotTask, VMConfiguration

    disk = folder / "disk.img"
    with disk.open("wb") as file:
        for _ in range(chunks):
            file.write(os.urandom(CHUNK))
    task = SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": "main"})
    with FileCache(folder / "cache") as cache, SnapshotLoader(cache) as loader:
        loader.cache_snapshot(
            loader.snapshot_key_set(task, "opening").write_key,
            chunked_files={"disk": disk},
            vm_configuration=VMConfiguration(cpu_count=1, memory_bytes=1 << 30),
            chunk_size=CHUNK,
        )


def open_once(folder: Path) -> dict[str, float]:
    """The figures of this process."""
    started = time.process_time()
    from snaploader import FileCache, SnapshotLoader, SnapshotTask

    imported, imported_wall = time.process_time(), time.perf_counter()
    task = SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": "main"})
    with FileCache(folder / "cache") as cache, SnapshotLoader(cache) as loader:
        snapshot = loader.get_snapshot(loader.snapshot_key_set(task, "opening"))
        with loader.unpack_snapshot(snapshot, folder / f"out-{os.getpid()}") as unpacked:
            unpacked.chunked_files["disk"].read_at(CHUNK, CHUNK)
            opened, opened_wall = time.process_time(), time.perf_counter()
    files = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder / "cache")
        for name in names
        if len(name) == 62
    ]
    listed = time.process_time()
    for file in files:
        os.stat(file)
    stats = time.process_time() - listed
    figures = (imported - started, opened - imported, opened_wall - imported_wall, stats)
    return dict(zip(FIGURES, (1e3 * figure for figure in figures), strict=True))


def in_process(checkout: Path, *arguments: str) -> str:
    """Run a step of this script on the package of a checkout."""
    return subprocess.run(
        # -P: not the modules beside this script.
        [sys.executable, "-P", __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    ).stdout.decode()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.opening", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--chunks", type=int, default=4096, help="chunks of the snapshot (default 4096)")
    parser.add_argument("--rounds", type=int, default=9, help="processes that are measured (default 9)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--against", metavar="CHECKOUT", type=Path, help="measure another checkout as well")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.save:
        save(arguments.save, arguments.chunks)
        return
    if arguments.open:
        print(json.dumps(open_once(arguments.open)))
        return
    checkouts = {"this": Path(__file__).resolve().parent.parent}
    if arguments.against:
        checkouts["before"] = arguments.against.resolve()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkout in checkouts.items():
            (Path(scratch) / name).mkdir()
            in_process(checkout, "--chunks", str(arguments.chunks), "--save", f"{scratch}/{name}")
        for _ in range(arguments.rounds):
            for name, checkout in checkouts.items():
                measured[name].append(json.loads(in_process(checkout, "--open", f"{scratch}/{name}")))
    report: dict[str, dict[str, float]] = {
        name: {figure: round(statistics.median(each[figure] for each in rounds), 1) for figure in FIGURES}
        for name, rounds in measured.items()
    }
    for name, figures in report.items():
        print(f"{name:8}" + "".join(f"{figure:>18} {value:7.1f}" for figure, value in figures.items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"chunks": arguments.chunks, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
