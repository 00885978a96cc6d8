"""The modules and functions of this project that one operation passes through, and what it asks of others.

    python -m benchmarks.paths [--list OPERATION] [--root DIR] [--against DIR] [--json] [--output FILE]

How far a reader must walk to follow one read, save or commit: each operation is done once to warm up and
once, on a host of its own, while the calls of all threads are counted. Modules are those of `snaploader` and
`cow` without the generated ones. The server runs in a process of its own, and none of its calls count. Also
counted, in further runs: calls to the server, SQL statements, and how a save's calls grow with the image.

`--root` measures another checkout, `--against` shows one beside this one; both use public names only. Where
there are threads, calls may differ by a few from run to run; `--list` shows which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cow
import snaploader
from snaploader import FileCache, RemoteCache, SnapshotLoader, SnapshotTask, VMConfiguration
from snaploader.testing import EmbeddedServer
from snaploader.workspace import Catalog, ProcessRuntime, Volume, WorkspaceManager

CHUNK = 4096
SMALL = 8
SIZES = (500, 4000)
CONFIGURATION = VMConfiguration(cpu_count=2, memory_bytes=1 << 30)
TASK = SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": "main"})
FOLDERS = tuple(os.path.dirname(os.path.abspath(str(each.__file__))) for each in (snaploader, cow))


class CallCounter:
    """Counts calls of functions of this project, in all threads that start after it was made."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        """By module and function, in the order of first use."""
        self._is_on = False
        threading.setprofile(self._see)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count while the block runs."""
        self._is_on = True
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._is_on = False

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        if not self._is_on or event != "call":
            return
        code = frame.f_code
        for folder in FOLDERS:
            if code.co_filename.startswith(folder + os.sep):
                name = os.path.relpath(code.co_filename, os.path.dirname(folder)).removesuffix(".py")
                if "_proto" not in name and code.co_name != "<module>":
                    self.calls[name.replace(os.sep, ".").removesuffix(".__init__"), code.co_qualname] += 1
                return

    def result(self) -> dict[str, Any]:
        """What was counted."""
        modules = list(dict.fromkeys(module for module, _ in self.calls))
        return {
            "modules": len(modules),
            "functions": len(self.calls),
            "calls": self.calls.total(),
            "path": [f"{module}:{function} × {count}" for (module, function), count in self.calls.items()],
        }


@contextlib.contextmanager
def server_process() -> Iterator[str]:
    """The URL of an embedded server in a process of its own."""
    code = (
        "import sys; from snaploader.testing import EmbeddedServer\n"
        "with EmbeddedServer() as server: print(server.url, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@contextlib.contextmanager
def host(folder: Path, url: str) -> Iterator[tuple[SnapshotLoader, FileCache]]:
    """A loader with a file cache and a remote cache; one worker, so that runs are more alike."""
    with (
        FileCache(folder / "cache") as cache,
        RemoteCache(url) as remote,
        SnapshotLoader(cache, remote, workers=1) as loader,
    ):
        yield loader, cache


Block = Callable[[], contextlib.AbstractContextManager[None]]


def saved(loader: SnapshotLoader, folder: Path, chunks: int) -> None:
    """Save a disk whose chunks all differ."""
    disk = folder / "disk.img"
    disk.write_bytes(b"".join(number.to_bytes(8, "big") * (CHUNK // 8) for number in range(1, chunks + 1)))
    key = loader.snapshot_key_set(TASK, "paths").write_key
    loader.cache_snapshot(key, chunked_files={"disk": disk}, vm_configuration=CONFIGURATION, chunk_size=CHUNK)


def read(folder: Path, url: str, block: Block, *, is_warm: bool) -> None:
    """Read 100 bytes of a chunk that only the server has, or that was read before."""
    with host(folder / "other", url) as (loader, _):
        saved(loader, folder, SMALL)
    with host(folder, url) as (loader, _):
        snapshot = loader.get_snapshot(loader.snapshot_key_set(TASK, "paths"))
        with loader.unpack_snapshot(snapshot, folder / "out") as unpacked:
            disk = unpacked.chunked_files["disk"]
            if is_warm:
                disk.read_at(5 * CHUNK, 100)
            with block():
                disk.read_at(5 * CHUNK, 100)


def save(folder: Path, url: str, block: Block, *, chunks: int = SMALL) -> None:
    """Save a store again after one of its chunks was written, here and to the server."""
    with host(folder, url) as (loader, _):
        saved(loader, folder, chunks)
        keys = loader.snapshot_key_set(TASK, "paths")
        with loader.unpack_snapshot(loader.get_snapshot(keys), folder / "out") as unpacked:
            disk = unpacked.chunked_files["disk"]
            disk.write_at(2 * CHUNK, b"changed")
            with block():
                loader.cache_snapshot(
                    keys.write_key, chunked_files={"disk": disk}, vm_configuration=CONFIGURATION
                )


def first_save(folder: Path, url: str, block: Block) -> None:
    """Save a small disk for the first time, as the first thing that a host does."""
    with host(folder, url) as (loader, _), block():
        saved(loader, folder, SMALL)


def commit(folder: Path, url: str, block: Block) -> None:
    """Commit a stopped workspace of two files."""
    with (
        host(folder, url) as (loader, cache),
        Catalog.open(folder / "catalog.sqlite") as catalog,
        ProcessRuntime(folder / "runtime") as runtime,
        WorkspaceManager(catalog, loader, cache, runtime, folder / "state", host="paths") as manager,
    ):
        manager.create("one", volumes=[Volume("data", "/data")], start=False)
        for name in ("data/file", "rest"):
            (runtime.root("one") / name).write_text(name * 100)
        with block():
            manager.commit("one")


def warm_read(folder: Path, url: str, block: Block) -> None:
    """As `read`, of a chunk that is mapped."""
    read(folder, url, block, is_warm=True)


def cold_read(folder: Path, url: str, block: Block) -> None:
    """As `read`, of a chunk that only the server has."""
    read(folder, url, block, is_warm=False)


OPERATIONS: dict[str, Callable[[Path, str, Block], None]] = {
    "cold read": cold_read,
    "warm read": warm_read,
    "save of one dirty chunk": save,
    "commit of two files": commit,
}


def path_of(operation: Callable[[Path, str, Block], None]) -> dict[str, Any]:
    """Do an operation twice, and count the calls of the second time."""
    with tempfile.TemporaryDirectory() as name:
        for folder in (Path(name, "first"), Path(name, "second")):
            folder.mkdir()
            # A server of its own each: nothing is there yet.
            with server_process() as url:
                path = CallCounter()
                try:
                    operation(folder, url, path.counted)
                finally:
                    threading.setprofile(None)  # type: ignore[arg-type]
    return path.result()


def asked(operation: Callable[[Path, str, Block], None]) -> tuple[dict[str, int], int]:
    """Calls to the server, by method, and SQL statements of an operation."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    statements: list[str] = []
    is_on = False

    def see(*arguments: Any) -> None:
        if is_on:
            statements.append(arguments[2])

    calls: Counter[str] = Counter()
    event.listen(Engine, "before_cursor_execute", see)
    try:
        with tempfile.TemporaryDirectory() as name, EmbeddedServer() as server:

            @contextlib.contextmanager
            def block() -> Iterator[None]:
                nonlocal is_on
                before, is_on = len(server.requests), True
                yield
                is_on = False
                calls.update(request.method for request in server.requests[before:])

            operation(Path(name), server.url, block)
    finally:
        event.remove(Engine, "before_cursor_execute", see)
    return dict(calls), len(statements)


def measure() -> dict[str, Any]:
    """All figures of the checkout that is imported here."""
    figures: dict[str, Any] = {name: path_of(operation) for name, operation in OPERATIONS.items()}
    commit_calls, statements = asked(commit)
    counts: dict[str, Any] = {
        "server calls of a small first save": sum(asked(first_save)[0].values()),
        "server calls of a save of one dirty chunk": sum(asked(save)[0].values()),
        "server calls of a commit": sum(commit_calls.values()),
        "SQL statements of a commit": statements,
    }
    for chunks in SIZES:
        found = path_of(lambda folder, url, block, n=chunks: save(folder, url, block, chunks=n))  # type: ignore[misc]
        counts[f"calls of a save of one dirty chunk of {chunks:,}"] = found["calls"]
    return {
        "folder": os.path.dirname(FOLDERS[0]),
        "version": snaploader.__version__,
        "python": sys.version.split()[0],
        "paths": figures,
        "counts": counts,
    }


def measured_in(root: Path) -> dict[str, Any]:
    """All figures of another checkout."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--json"],
        env={**os.environ, "PYTHONPATH": str(root.resolve())},
        cwd=root,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if found["folder"] != str(root.resolve()):
        raise SystemExit(f"{root} is no checkout: what was measured is in {found['folder']}")
    return found


def show(columns: dict[str, dict[str, Any]]) -> None:
    """Print a table with a column for each checkout."""
    first = next(iter(columns.values()))
    print(f"{'':48}" + "".join(f"{name:>28}" for name in columns))
    for name in first["paths"]:
        cells = [each["paths"][name] for each in columns.values()]
        texts = [f"{cell['modules']} modules, {cell['calls']:,} calls" for cell in cells]
        print(f"{name:48}" + "".join(f"{text:>28}" for text in texts))
    for name in first["counts"]:
        print(f"{name:48}" + "".join(f"{each['counts'][name]:>28,}" for each in columns.values()))


def main(argv: list[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--root", type=Path, help="measure this checkout instead")
    parser.add_argument("--against", type=Path, help="show this checkout beside it")
    parser.add_argument(
        "--list", choices=OPERATIONS, help="the functions of one operation, in order of first use"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all functions")
    parser.add_argument("--output", type=Path, help="write the JSON to this file")
    arguments = parser.parse_args(argv)
    found = measured_in(arguments.root) if arguments.root else measure()
    columns = {"this" if arguments.root is None else str(arguments.root): found}
    if arguments.against:
        columns[f"{arguments.against}"] = measured_in(arguments.against)
    if arguments.output:
        kept = {name: value for name, value in found.items() if name != "folder"}
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found if arguments.against is None else columns, indent=1))
    elif arguments.list:
        print("\n".join(found["paths"][arguments.list]["path"]))
    else:
        show(columns)


if __name__ == "__main__":
    main()
