"""A small executor and its tests, with the fixtures that come with the library: no server and no network.

    pytest examples/test_an_executor.py

The executor is what a real one begins with: it brings a task's disk back, runs the task on it, and saves it
for the next one. Its tests use `snaploader_loader`, a loader over an empty file cache and `FakeCAS`, a remote
store in memory that counts what is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cow import COWStore
from snaploader import (
    CallContext,
    Cancellation,
    Cancelled,
    FileCache,
    NotFound,
    RequestMetadata,
    SnapshotLoader,
    SnapshotTask,
)
from snaploader.testing import FakeCAS

DISK_BYTES = 1 << 20
CONFIGURATION = "0" * 64
"""In a real executor a hash of the kernel, the image and the sizes of the machine."""


class Executor:
    """Runs tasks on a disk that a branch inherits from its last task, or from its base branch."""

    def __init__(self, loader: SnapshotLoader, folder: Path) -> None:
        self._loader = loader
        self._folder = folder
        self._runs = 0

    def run(
        self, task: SnapshotTask, work: Callable[[COWStore], object], context: CallContext | None = None
    ) -> str:
        """Run `work` on the task's disk and save it; return the id of the snapshot it started from."""
        self._runs += 1
        folder = self._folder / str(self._runs)
        key_set = self._loader.snapshot_key_set(task, CONFIGURATION, context=context)
        try:
            snapshot = self._loader.get_snapshot(key_set, context=context)
        except NotFound:
            folder.mkdir()
            with COWStore(folder / "disk", size=DISK_BYTES) as disk:
                work(disk)
                self._loader.cache_snapshot(key_set.write_key, chunked_files={"disk": disk}, context=context)
            return ""
        with self._loader.unpack_snapshot(snapshot, folder, context=context) as unpacked:
            work(unpacked.chunked_files["disk"])
            self._loader.cache_snapshot(
                key_set.write_key, chunked_files=unpacked.chunked_files, context=context
            )
        return snapshot.key.ref


def on_branch(name: str) -> SnapshotTask:
    """A task on a branch whose base is main."""
    return SnapshotTask(environment={"GIT_BRANCH": name, "GIT_BASE_BRANCH": "main"})


def nothing(_disk: COWStore) -> None:
    """The work of a task that only wants its disk."""


@pytest.fixture
def executor(snaploader_loader: SnapshotLoader, tmp_path: Path) -> Executor:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Executor(snaploader_loader, folder)


def test_the_first_task_starts_with_an_empty_disk(executor: Executor) -> None:
    seen: list[bytes] = []
    assert executor.run(on_branch("main"), lambda disk: seen.append(disk.read_at(0, 4))) == ""
    assert seen == [bytes(4)]


def test_the_next_task_of_a_branch_finds_what_the_last_one_wrote(executor: Executor) -> None:
    seen: list[bytes] = []
    executor.run(on_branch("main"), lambda disk: disk.write_at(0, b"warm"))
    assert executor.run(on_branch("main"), lambda disk: seen.append(disk.read_at(0, 4))) == "main"
    assert seen == [b"warm"]


def test_a_new_branch_starts_from_its_base(executor: Executor) -> None:
    executor.run(on_branch("main"), nothing)
    assert executor.run(on_branch("feature"), nothing) == "main"
    assert executor.run(on_branch("feature"), nothing) == "feature"


def test_another_host_starts_from_the_remote_cache(
    executor: Executor, snaploader_fake_cas: FakeCAS, tmp_path: Path
) -> None:
    executor.run(on_branch("main"), lambda disk: disk.write_at(0, b"warm"))
    with FileCache(tmp_path / "elsewhere") as cache, SnapshotLoader(cache, snaploader_fake_cas) as loader:
        seen: list[bytes] = []
        other = Executor(loader, tmp_path / "runs" / "elsewhere")
        other.run(on_branch("main"), lambda disk: seen.append(disk.read_at(0, 4)))
    assert seen == [b"warm"]


def test_a_task_that_was_called_off_saves_nothing(executor: Executor, snaploader_fake_cas: FakeCAS) -> None:
    cancellation = Cancellation()
    context = CallContext(
        cancellation=cancellation, request_metadata=RequestMetadata(tool_name="executor", action_id="a1")
    )
    with pytest.raises(Cancelled):
        executor.run(on_branch("main"), lambda _: cancellation.cancel(), context)
    assert not snaploader_fake_cas.blobs
    assert executor.run(on_branch("main"), nothing) == ""
