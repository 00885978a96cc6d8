"""A host of the demo: a loader over an empty cache of its own, and the remote cache that all share."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cow import COWStore
from snaploader._proto.snaploader_pb2 import VMConfiguration
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKeySet
from snaploader.loader.loader import SnapshotLoader
from snaploader.loader.results import SaveResult
from snaploader.remote import RemoteCache
from snaploader.task import SnapshotTask

DISK = "disk.img"
"""The name of the image in every snapshot."""

CONFIGURATION = "demo"


@dataclass(frozen=True, slots=True)
class Host:
    """See the module."""

    name: str
    loader: SnapshotLoader
    remote: RemoteCache

    def fetched_bytes(self) -> int:
        """Content that came from the server so far."""
        return self.remote.statistics().content_bytes_read

    def key_set(self, branch: str) -> SnapshotKeySet:
        """The keys of a task on `branch`, in a repository whose default branch is main."""
        task = SnapshotTask(environment={"GIT_BRANCH": branch, "GIT_REPO_DEFAULT_BRANCH": "main"})
        return self.loader.snapshot_key_set(task, CONFIGURATION)

    def save(self, branch: str, disk: COWStore | str | os.PathLike[str]) -> SaveResult:
        """Save an image as the snapshot of `branch`."""
        key_set = self.key_set(branch)
        assert key_set.write_key is not None
        return self.loader.cache_snapshot(
            key_set.write_key,
            chunked_files={DISK: disk},
            vm_configuration=VMConfiguration(cpu_count=2),
            key_set=key_set,
            default_ref="main",
        )


@contextlib.contextmanager
def open_host(name: str, folder: Path, url: str) -> Iterator[Host]:
    """A host with an empty cache in `folder`, which is gone after the block."""
    with (
        FileCache(folder) as file_cache,
        RemoteCache(url) as remote,
        SnapshotLoader(file_cache, remote) as loader,
    ):
        yield Host(name, loader, remote)
    shutil.rmtree(folder, ignore_errors=True)
