"""Hosts that share a server, each with a file cache of its own; and state for them to save."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snaploader import FileCache, RemoteCache, SnapshotLoader, SnapshotTask, VMConfiguration, VMMetadata
from snaploader.keys import SnapshotKeySet
from snaploader.loader.results import SaveResult, Snapshot

CHUNK = 4096
CONFIGURATION = VMConfiguration(cpu_count=2, memory_bytes=1 << 30)


def image(seed: int, chunks: int = 16, holes: tuple[int, ...] = (2, 3, 9), tail: int = 100) -> bytes:
    """A disk image: random chunks, some of zeros, and a short last one."""
    data = bytearray(np.random.default_rng(seed).integers(1, 256, chunks * CHUNK + tail, np.uint8).tobytes())
    for hole in holes:
        data[hole * CHUNK : (hole + 1) * CHUNK] = bytes(CHUNK)
    return bytes(data)


def task(branch: str = "main", base: str = "", default: str = "main", **kwargs: Any) -> SnapshotTask:
    """A task of a branch."""
    environment = {"GIT_BRANCH": branch, "GIT_BASE_BRANCH": base, "GIT_REPO_DEFAULT_BRANCH": default}
    return SnapshotTask.from_mapping({"OSFamily": "linux"}, environment, **kwargs)


def metadata(completed_s: float) -> VMMetadata:
    """Metadata of a snapshot whose task ended then."""
    message = VMMetadata()
    message.last_executed_task.completed_timestamp.FromSeconds(int(completed_s))
    return message


@dataclass
class Host:
    """One host: a cache folder, a loader, and shorthands."""

    loader: SnapshotLoader
    cache: FileCache
    remote: RemoteCache | None
    folder: Path

    def keys(self, branch: str = "main", **kwargs: Any) -> SnapshotKeySet:
        return self.loader.snapshot_key_set(task(branch, **kwargs), "conf")

    def save(self, content: bytes | None = None, branch: str = "main", **kwargs: Any) -> SaveResult:
        """Save `content` as the chunked file disk."""
        if content is not None:
            path = self.folder / "to-save.img"
            path.write_bytes(content)
            kwargs.setdefault("chunked_files", {"disk": path})
        key = kwargs.pop("key", None) or self.keys(branch).write_key
        kwargs.setdefault("vm_configuration", CONFIGURATION)
        return self.loader.cache_snapshot(key, chunk_size=CHUNK, **kwargs)

    def find(self, branch: str = "main", policy: str = "local-first", **kwargs: Any) -> Snapshot:
        return self.loader.get_snapshot(self.keys(branch, **kwargs), policy)

    def load(self, branch: str = "main", policy: str = "local-first", **kwargs: Any) -> bytes:
        """The whole disk of the best snapshot."""
        return self.read(self.find(branch, policy, **kwargs))

    def read(self, snapshot: Snapshot) -> bytes:
        with self.unpack(snapshot) as unpacked:
            disk = unpacked.chunked_files["disk"]
            return disk.read_at(0, disk.size)

    def unpack(self, snapshot: Snapshot, **kwargs: Any) -> Any:
        return self.loader.unpack_snapshot(snapshot, self.folder / f"out-{uuid.uuid4()}", **kwargs)

    def blobs(self) -> list[Path]:
        """The files of all cached blobs."""
        return sorted(p for p in Path(self.cache.root).rglob("*") if p.is_file() and "/blobs/" in str(p))

    def chunk_files(self) -> list[Path]:
        """Those that are whole chunks, and not trees."""
        return [path for path in self.blobs() if path.stat().st_size in (CHUNK, 100)]


HostFactory = Callable[..., Host]
