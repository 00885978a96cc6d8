"""Peak memory and open files of the loader on big images, each step in a process of its own.

    python -m benchmarks.scale [--output benchmarks/results/scale.json]

Two images: 16 GiB of which 2 GiB are data, and one of 200,000 chunks with data. The limits of the
project (400 MiB of resident memory, 256 descriptors) are checked: the exit code is 1 when one is passed.
For time to the first read, images of 1, 4 and 16 GiB with the same share of data are opened, and the
time is shown beside that of parsing the tree alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import hosts, images
from snaploader.formats.chunktable import decode_tree, encode_tree
from snaploader.testing import EmbeddedServer

MIB = 1 << 20
GIB = 1 << 30
MAX_RSS_MIB = 400
MAX_FILES = 256


class Watch:
    """The most descriptors that this process had open, looked at every 5 ms."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, len(os.listdir("/proc/self/fd")))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.most


def peak_rss_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    raise RuntimeError("this kernel does not tell peak memory")


def step(arguments: argparse.Namespace) -> dict[str, Any]:
    """One step, in this process."""
    folder = Path(arguments.folder)
    start = time.perf_counter()
    figures: dict[str, Any] = {}
    with hosts.host(folder, arguments.url) as loader:
        keys = hosts.key_set(loader)
        if arguments.step == "save":
            result = loader.cache_snapshot(
                keys.write_key,
                chunked_files={"disk": arguments.image},
                vm_configuration=hosts.CONFIGURATION,
                chunk_size=arguments.chunk_size,
            )
            figures = {"chunks": result.files[0].chunks, "uploaded_mib": result.uploaded_bytes // MIB}
        else:
            key_time = time.perf_counter()
            snapshot = loader.get_snapshot(keys)
            got = time.perf_counter()
            with loader.unpack_snapshot(snapshot, folder / "out") as unpacked:
                disk = unpacked.chunked_files["disk"]
                index = int(snapshot.tables["disk"].indices[snapshot.tables["disk"].stored_count // 2])
                disk.read_at(index * disk.chunk_size, 4096)
                figures = {"get_snapshot_s": got - key_time, "unpack_and_read_s": time.perf_counter() - got}
                figures["first_read_s"] = time.perf_counter() - key_time
                if arguments.step == "walk":
                    for offset in range(0, disk.size, disk.chunk_size):
                        disk.read_at(offset, 1)
            tree = encode_tree(snapshot.tables["disk"])
            parse = time.perf_counter()
            decode_tree(tree, snapshot.manifest.digest_function)
            figures["parse_tree_s"] = time.perf_counter() - parse
            figures["chunks"] = snapshot.tables["disk"].stored_count
    return {**figures, "seconds": time.perf_counter() - start}


def in_child(**options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale"]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def measure(scratch: Path) -> list[dict[str, Any]]:
    rows = []

    def row(name: str, **options: Any) -> None:
        figures = {key: round(v, 4) if isinstance(v, float) else v for key, v in in_child(**options).items()}
        rows.append({"name": name, **figures})
        print(name, rows[-1], flush=True)

    cases = [
        ("1 GiB, 128 MiB data", GIB, GIB // 8, 512 << 10),
        ("4 GiB, 512 MiB data", 4 * GIB, GIB // 2, 512 << 10),
        ("16 GiB, 2 GiB data", 16 * GIB, 2 * GIB, 512 << 10),
        ("200,000 chunks of 4 KiB", 200_000 * 4096, 200_000 * 4096, 4096),
    ]
    for number, (name, size, data, chunk_size) in enumerate(cases):
        image = scratch / "disk.img"
        if chunk_size == 4096:
            with image.open("wb") as file:
                for _ in range(data // MIB + 1):
                    file.write(os.urandom(MIB))
                file.truncate(size)
        else:
            images.sparse(image, size, data)
        with EmbeddedServer(storage=scratch / f"server-{number}") as server:
            common = {"image": image, "chunk_size": chunk_size, "url": server.url}
            warm, cold = scratch / f"warm-{number}", scratch / f"cold-{number}"
            row(f"save, {name}", step="save", folder=warm, **common)
            row(f"first read, warm cache, {name}", step="read", folder=warm, **common)
            row(f"first read, empty cache, {name}", step="read", folder=cold, **common)
            if number >= 2:
                row(f"touch every chunk, warm cache, {name}", step="walk", folder=warm, **common)
        image.unlink()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--scratch", type=Path, default=None)
    for name in ("--step", "--folder", "--image", "--url"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--chunk-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        watch = Watch()
        figures = step(arguments)
        print(json.dumps({**figures, "peak_rss_mib": peak_rss_mib(), "open_files": watch.stop()}))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        rows = measure(Path(folder))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    over = [r for r in rows if r["peak_rss_mib"] > MAX_RSS_MIB or r["open_files"] > MAX_FILES]
    for bad in over:
        print(f"over the limit: {bad}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
