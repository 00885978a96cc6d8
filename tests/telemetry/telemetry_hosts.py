"""A host whose loader and caches report to an observer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from snaploader import FileCache, RemoteCache, SnapshotLoader, SnapshotTask

CHUNK = 4096
TASK = SnapshotTask(task_id="task-1", invocation_id="invocation-1")


class Host(NamedTuple):
    """A host, its observer given to all three."""

    loader: SnapshotLoader
    cache: FileCache
    remote: RemoteCache
    folder: Path

    def save(self, content: bytes, **kwargs: Any) -> Any:
        path = self.folder / "disk.img"
        path.write_bytes(content)
        key = self.loader.snapshot_key_set(TASK, "conf").write_key
        return self.loader.cache_snapshot(key, chunked_files={"disk": path}, chunk_size=CHUNK, **kwargs)

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def find_newest(self) -> Any:
        return self.loader.get_snapshot(self.loader.snapshot_key_set(TASK, "conf"), "newest")

    def find(self) -> Any:
        return self.loader.get_snapshot(self.loader.snapshot_key_set(TASK, "conf"))


MakeHost = Callable[..., Host]
