"""A pool of processes that all work on one snapshot: found once, sent to each, fetched as far as it is read.

    python examples/snapshot_pool.py

The parent finds the snapshot and sends it, pickled, to its workers. Each has a loader of its own on the same
cache folder, reads its share of a big file, and so fetches the chunks of that share only. The parent adds
the results up and compares them with the whole file.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from snaploader import FileCache, RemoteCache, Snapshot, SnapshotKey, SnapshotLoader
from snaploader.testing import EmbeddedServer

MIB = 1 << 20
SHARES = 8


@dataclass(frozen=True)
class Job:
    """One share of the work, as it goes to a worker."""

    snapshot: Snapshot
    server: str
    cache: Path
    offset: int
    size_bytes: int


def work(job: Job) -> tuple[int, str, int]:
    """Hash a part of the file; return its offset, its hash, and how many bytes were fetched for it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RemoteCache(job.server) as remote_cache,
        FileCache(job.cache) as file_cache,
        SnapshotLoader(file_cache, remote_cache) as loader,
        loader.unpack_snapshot(job.snapshot, folder) as unpacked,
    ):
        content = unpacked.chunked_files["big"].read_at(job.offset, job.size_bytes)
        return job.offset, blake3(content).hexdigest(), remote_cache.statistics().content_bytes_read


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, EmbeddedServer() as server:
        folder = Path(temporary)
        content = b"".join(blake3(bytes([i])).digest(MIB) for i in range(SHARES))
        (folder / "big").write_bytes(content)
        # Saved by one host, read by another.
        with (
            RemoteCache(server.url) as remote_cache,
            FileCache(folder / "cache of the saver") as file_cache,
            SnapshotLoader(file_cache, remote_cache) as loader,
        ):
            saved = loader.cache_snapshot(SnapshotKey(ref="main"), chunked_files={"big": folder / "big"})
        cache = folder / "cache"
        with (
            RemoteCache(server.url) as remote_cache,
            FileCache(cache) as file_cache,
            SnapshotLoader(file_cache, remote_cache) as loader,
        ):
            snapshot = loader.get_snapshot_by_id(saved.snapshot_id)
        jobs = [Job(snapshot, server.url, cache, i * MIB, MIB) for i in range(SHARES)]
        # Not forked: gRPC, like most that has threads, is not made for that.
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            results = pool.map(work, jobs, chunksize=1)
    for offset, found, _ in results:
        assert found == blake3(content[offset : offset + MIB]).hexdigest()
    fetched_bytes = sum(fetched for *_, fetched in results)
    print(f"hashed {len(results)} shares; fetched {fetched_bytes / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
