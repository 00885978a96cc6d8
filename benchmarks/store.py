"""What reads and writes of a copy-on-write store cost, beside the same system calls on a plain file.

    python -m benchmarks.store [--mib 2048] [--json FILE] [--against CHECKOUT] [--scratch DIR]

Processor time of this process, everything in the page cache, one thread. A store's chunks are files of
512 KiB that a `ChunkSource` opens; its budget is the default of a process that may open 1,024 files. Each
figure is the median of several rounds, and its floor, `os.pread` or `os.pwrite` of as many bytes at the same
offsets of one plain file, is measured between them: read the ratios. Beside reads stands the resident memory
of the process, some 60 MiB of which are Python's and numpy's.

`--against` runs this script on the package `cow` of another checkout as well, in a process of its own, and
prints both. It goes by the public interface only, so that an older one can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import NamedTuple

import numpy as np

import cow
from benchmarks.floors import MIB, median, timed
from cow import COWStore, MappingBudget, OpenedChunk

CHUNK = 512 << 10
PAGE = 4096
ROUNDS = 5
READ_MIB = (64, 128, 256, 512, 1024, 2048)
WRITTEN_CHUNKS = (50, 200, 1000)
MAX_OPEN_FILES = 1024


class Row(NamedTuple):
    """One figure: microseconds of processor time for each operation, and for its floor."""

    name: str
    us: float
    floor_us: float
    resident_mib: int | None = None
    """Resident memory of the whole process afterwards, for reads."""

    @property
    def ratio(self) -> float:
        """How many times the floor."""
        return self.us / self.floor_us


class Files:
    """A `ChunkSource` over a folder with a file for each chunk."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.fspath(folder)

    def open_chunk(self, index: int) -> OpenedChunk:
        return OpenedChunk(os.open(f"{self.folder}/{index}", os.O_RDONLY | os.O_CLOEXEC), "files")

    def prefetch(self, indices: Sequence[int]) -> None:
        pass


def compare(name: str, operations: int, work: Callable[[], object], floor: Callable[[], object]) -> Row:
    """Measure `work` and `floor`, each of which does `operations` operations, in turns."""
    spent = [(timed(work)[0], timed(floor)[0]) for _ in range(ROUNDS)]
    ours, floors = (median(list(costs)).cpu_s / operations * 1e6 for costs in zip(*spent, strict=True))
    return Row(name, ours, floors)


def resident_mib() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE // MIB


def offsets(size: int, count: int) -> list[int]:
    """Random page-aligned offsets."""
    pages = np.random.default_rng(1).integers(0, size // PAGE, count)
    return [int(page) * PAGE for page in pages]


@contextmanager
def lazy_store(scratch: Path, size: int) -> Iterator[COWStore]:
    chunks = size // CHUNK
    with COWStore(
        scratch / "store",
        size=size,
        chunk_size=CHUNK,
        chunks=range(chunks),
        source=Files(scratch / "chunks"),
        budget=MappingBudget(),
    ) as store:
        yield store


def random_reads(scratch: Path, plain: int, size: int, count: int) -> Iterator[Row]:
    """Warm: every page has been read before."""
    places = offsets(size, count)
    buffer = bytearray(PAGE)
    with lazy_store(scratch, size) as store:

        def read() -> None:
            for offset in places:
                store.read_at(offset, PAGE)

        def readinto() -> None:
            for offset in places:
                store.readinto_at(offset, buffer)

        def floor() -> None:
            for offset in places:
                os.pread(plain, PAGE, offset)

        for offset in range(0, size, CHUNK):
            store.read_at(offset, CHUNK)
        where = f"random 4 KiB over {size // MIB} MiB"
        most = resident_mib()
        read()
        floor()
        for row in (
            compare(f"read_at, {where}", count, read, floor),
            compare(f"readinto_at, {where}", count, readinto, floor),
        ):
            most = max(most, resident_mib())
            yield row._replace(resident_mib=most)


def random_writes(scratch: Path, chunks: int, count: int) -> Iterator[Row]:
    """Into chunks and pages that were written before."""
    size = chunks * CHUNK
    places = offsets(size, count)
    data = os.urandom(PAGE)
    plain = os.open(scratch / "written", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.ftruncate(plain, size)
        with COWStore(scratch / "store", size=size, chunk_size=CHUNK, budget=MappingBudget()) as store:

            def write() -> None:
                for offset in places:
                    store.write_at(offset, data)

            def floor() -> None:
                for offset in places:
                    os.pwrite(plain, data, offset)

            write()
            floor()
            yield compare(f"write_at, random 4 KiB over {chunks} chunks", count, write, floor)
    finally:
        os.close(plain)


def sequential_reads(scratch: Path, plain: int, size: int) -> Iterator[Row]:
    """Of 1 MiB each, by a store that has them mapped, and by one that has just been opened."""
    places = range(0, size, MIB)

    def floor() -> None:
        for offset in places:
            os.pread(plain, MIB, offset)

    def read(store: COWStore) -> None:
        for offset in places:
            store.read_at(offset, MIB)

    def first_touch() -> None:
        with lazy_store(scratch, size) as store:
            read(store)

    floor()
    with lazy_store(scratch, size) as store:
        read(store)
        yield compare("read_at, sequential 1 MiB, warm", len(places), lambda: read(store), floor)
    yield compare("read_at, sequential 1 MiB, first touch", len(places), first_touch, floor)


def make_files(scratch: Path, size: int) -> None:
    """The same content as one plain file and as a file for each chunk."""
    (scratch / "chunks").mkdir()
    with (scratch / "plain").open("wb") as plain:
        for index in range(size // CHUNK):
            content = np.random.default_rng(index).bytes(CHUNK)
            plain.write(content)
            (scratch / "chunks" / str(index)).write_bytes(content)


def measure(scratch: Path, size: int, count: int) -> Iterator[Row]:
    """All figures, on stores of up to `size` bytes, `count` operations a round."""
    make_files(scratch, size)
    plain = os.open(scratch / "plain", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mib in READ_MIB:
            if mib * MIB <= size:
                yield from random_reads(scratch, plain, mib * MIB, count)
        yield from sequential_reads(scratch, plain, min(256 * MIB, size))
    finally:
        os.close(plain)
    for chunks in WRITTEN_CHUNKS:
        yield from random_writes(scratch, chunks, count)


def measure_other(checkout: Path, arguments: argparse.Namespace) -> list[Row]:
    """The figures of the package `cow` in another checkout."""
    own = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = Path(folder) / "rows.json"
        # -P: the folder of this script holds a module `cow` too, this one.
        command = [sys.executable, "-P", __file__, "--json", str(result), "--quiet"]
        command += ["--mib", str(arguments.mib), "--count", str(arguments.count)]
        if arguments.scratch:
            command += ["--scratch", arguments.scratch]
        path = os.pathsep.join(map(str, (checkout.resolve(), own)))
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
        report = json.loads(result.read_text())
    if not Path(report["package"]).is_relative_to(checkout.resolve()):
        raise RuntimeError(f"{checkout} has no package cow: {report['package']} was measured")
    return [Row(row["name"], row["us"], row["floor_us"], row["resident_mib"]) for row in report["rows"]]


def shown(row: Row) -> str:
    """A row for people, without its name."""
    memory = f"{row.resident_mib:5} MiB" if row.resident_mib is not None else " " * 9
    return f"{row.us:8.2f} µs  floor {row.floor_us:7.2f}  × {row.ratio:5.2f} {memory}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--mib", type=int, default=READ_MIB[-1], help="of the biggest store (default 2048)")
    parser.add_argument("--count", type=int, default=20_000, help="operations a round (default 20000)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--against", metavar="CHECKOUT", type=Path, help="measure another checkout as well")
    parser.add_argument("--scratch", help="where to make about twice as many bytes of files")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    arguments = parser.parse_args(argv)
    _, hard = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (MAX_OPEN_FILES, hard))
    earlier = measure_other(arguments.against, arguments) if arguments.against else None
    scratch = Path(tempfile.mkdtemp(prefix="cow-benchmark-", dir=arguments.scratch))
    rows: list[Row] = []
    try:
        for row in measure(scratch, arguments.mib * MIB // CHUNK * CHUNK, arguments.count):
            rows.append(row)
            if arguments.quiet:
                continue
            line = f"{row.name:44} {shown(row)}"
            if earlier is not None:
                line += f"   before {shown(next(other for other in earlier if other.name == row.name))}"
            print(line, flush=True)
    finally:
        shutil.rmtree(scratch)
    if arguments.json:
        report = {
            "package": os.path.abspath(cow.__file__),
            "rows": [{**row._asdict(), "ratio": round(row.ratio, 3)} for row in rows],
        }
        if earlier is not None:
            report["before"] = [{**row._asdict(), "ratio": round(row.ratio, 3)} for row in earlier]
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
