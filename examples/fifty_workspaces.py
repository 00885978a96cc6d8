"""Fifty workspaces of one base: parked, revived, and what they cost together.

    python examples/fifty_workspaces.py

Makes a workspace with some content, commits it to a small server on this machine, forks it fifty times,
changes a little in each, pauses all of them and resumes all, each until its readiness check says so.
Everything lies in a temporary folder, and nothing is left behind.

Needs `pip install 'snaploader[workspace]'`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from snaploader import FileCache, RemoteCache, SnapshotLoader
from snaploader.testing import EmbeddedServer
from snaploader.workspace import Catalog, Policy, ProcessRuntime, Readiness, Volume, WorkspaceManager
from snaploader.workspace.sizes import measure

MIB = 1 << 20
BASE_FILES = 16
AT_ONCE = 4
NOTES_BYTES = 16 << 10
"""What each fork has that no other has."""

COMMAND = ["/bin/sh", "-c", "cp data/notes read-so-far && exec sleep infinity"]
READY = Readiness("command", "cmp -s data/notes read-so-far", interval_s=0.01)
"""A workspace is ready when its command has read its notes."""

PARKED = Policy.from_mapping("parked", {"onPause": "Data"})
"""Pausing a fork keeps its durable directory; everything else comes back from its base."""


def main() -> None:
    """Run the whole story, and print what it took."""
    parser = argparse.ArgumentParser(description="Park and revive many workspaces of one base.")
    parser.add_argument("--workspaces", type=int, default=50)
    parser.add_argument("--base-mib", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fifty-workspaces-") as name, host(Path(name)) as parts:
        story(*parts, Path(name, "content"), arguments.workspaces, arguments.base_mib * MIB)


@contextmanager
def host(folder: Path) -> Iterator[tuple[WorkspaceManager, ProcessRuntime, FileCache]]:
    """A host with a server, caches, a catalog and a runtime in `folder`; what runs is stopped at the end."""
    with (
        EmbeddedServer() as server,
        FileCache(folder / "cache") as file_cache,
        RemoteCache(server.url) as remote_cache,
        SnapshotLoader(file_cache, remote_cache) as loader,
        Catalog.open(folder / "catalog.sqlite") as catalog,
        ProcessRuntime(folder / "runtime") as runtime,
        WorkspaceManager(catalog, loader, file_cache, runtime, folder) as manager,
    ):
        try:
            yield manager, runtime, file_cache
        finally:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(runtime.stop, runtime.workspaces()))


def story(
    manager: WorkspaceManager,
    runtime: ProcessRuntime,
    file_cache: FileCache,
    content: Path,
    count: int,
    base_bytes: int,
) -> None:
    """Make the base and its forks, park and revive them."""
    write_base(content, base_bytes)
    with manager.catalog.transaction() as transaction:
        transaction.put_policy(PARKED)
    manager.create(
        "base", command=COMMAND, volumes=[Volume("data", "/data")], readiness=READY, source=content
    )
    began = time.perf_counter()
    commit = manager.commit("base", "golden")
    told = f"{mib(base_bytes)} in {BASE_FILES} files, committed in {time.perf_counter() - began:.2f} s"
    print(f"base      {told}, {mib(commit.uploaded_bytes)} uploaded")

    ids = [f"fork-{number}" for number in range(1, count + 1)]
    each(ids, "forked", lambda workspace_id: manager.fork("base", workspace_id, policy=PARKED.name))
    notes = {workspace_id: os.urandom(NOTES_BYTES) for workspace_id in ids}
    for workspace_id, text in notes.items():
        (runtime.root(workspace_id) / "data/notes").write_bytes(text)

    each(ids, "parked", manager.pause)
    tell_costs(file_cache, ids)

    each(ids, "revived", manager.resume)
    for workspace_id, text in notes.items():
        if (runtime.root(workspace_id) / "read-so-far").read_bytes() != text:
            raise SystemExit(f"{workspace_id} came back without its notes")
    print(f"checked   each of the {count} is ready, and has read its own {NOTES_BYTES >> 10} KiB again")


def write_base(folder: Path, size_bytes: int) -> None:
    """Content as a template has it: here, files of random bytes."""
    (folder / "data").mkdir(parents=True)
    (folder / "data/notes").write_text("none yet\n")
    for number in range(BASE_FILES):
        (folder / f"library-{number}.bin").write_bytes(os.urandom(size_bytes // BASE_FILES))


def each(ids: Sequence[str], what: str, act: Callable[[str], object]) -> None:
    """Do something to every workspace, some at once, and print how long it took."""

    def timed(workspace_id: str) -> float:
        began = time.perf_counter()
        act(workspace_id)
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        times_s = list(pool.map(timed, ids))
    median, longest = statistics.median(times_s) * 1000, max(times_s) * 1000
    print(
        f"{what:<8}  {len(ids)} workspaces in {time.perf_counter() - began:.1f} s, {AT_ONCE} at once: "
        f"{median:.0f} ms each (median), {longest:.0f} ms at most"
    )


def tell_costs(file_cache: FileCache, ids: Sequence[str]) -> None:
    """Print what the workspaces take in the file cache, together and alone."""
    sizes = measure(file_cache)
    one = sizes.workspaces[ids[0]]
    alone = sum(sizes.workspaces[workspace_id].total_bytes for workspace_id in ids)
    print(f"one fork  {one.exclusive_bytes / 1024:.1f} KiB exclusive, {mib(one.shared_bytes)} shared")
    times = alone / sizes.stored_bytes
    print(
        f"together  {mib(sizes.stored_bytes)} with the base; {len(ids)} copies: {mib(alone)}, {times:.0f} x"
    )


def mib(size_bytes: int) -> str:
    """Bytes in MiB."""
    return f"{size_bytes / MIB:.1f} MiB"


if __name__ == "__main__":
    main()
