"""Disks and memory files beside the folder: who has them open, and what a snapshot holds of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_harness import find, save

from cow import COWStore
from snaploader import SnapshotLoader
from snaploader._environment import HostEnvironment
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.model import Scope, WorkspaceSpec
from snaploader.workspace.testing import FakeRuntime

ID = "ws"
SPEC = WorkspaceSpec(ID)
CHUNK = 64 << 10


@pytest.fixture
def store(tmp_path: Path) -> Iterator[COWStore]:
    """A disk of three chunks, of which the first has data."""
    with COWStore(tmp_path / "store", size=3 * CHUNK, chunk_size=CHUNK) as store:
        store.write_at(0, b"d" * CHUNK)
        yield store


@pytest.fixture
def created(fake: FakeRuntime) -> FakeRuntime:
    fake.create(SPEC)
    return fake


def attached_store(runtime: FakeRuntime, name: str) -> COWStore:
    store = runtime.attachments(ID)[name]
    assert isinstance(store, COWStore)
    return store


def test_a_path_is_captured_in_chunks_and_comes_back_as_a_store(
    created: FakeRuntime, loader: SnapshotLoader, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"x" * (3 << 20))
    created.attach(ID, "disk", disk)
    assert created.attachments(ID) == {"disk": disk}
    snapshot = find(loader, save(created, loader, SPEC))
    created.place(SPEC, loader, snapshot, token="t")
    assert attached_store(created, "disk").read_at(3 * (1 << 20) - 1, 1) == b"x"
    assert disk.stat().st_size == 3 << 20


def test_every_process_can_capture_a_path(
    created: FakeRuntime, loader: SnapshotLoader, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"x" * 10)
    FakeRuntime(tmp_path / "runtime").attach(ID, "disk", disk)
    assert set(find(loader, save(created, loader, SPEC)).manifest.chunked_files) == {"disk"}


@pytest.mark.parametrize("kind", ["folder", "link", "fifo", "nothing"])
def test_only_regular_files_can_be_attached(kind: str, created: FakeRuntime, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InvalidArgument, match="'disk'"):
        created.attach(ID, "disk", path)
    assert created.attachments(ID) == {}


def test_a_path_that_became_something_else_is_not_captured(created: FakeRuntime, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    created.attach(ID, "disk", path)
    path.unlink()
    with pytest.raises(FailedPrecondition, match="'disk'"), created.capture(SPEC, Scope.FULL):
        pass
    path.symlink_to("/etc/passwd")
    with pytest.raises(FailedPrecondition, match="regular file"), created.capture(SPEC, Scope.FULL):
        pass


def test_a_store_that_its_owner_closed_is_not_left_out(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore
) -> None:
    created.attach(ID, "disk", store)
    store.close()
    assert created.attachments(ID) == {}
    with pytest.raises(FailedPrecondition, match="was closed"):
        save(created, loader, SPEC)


def test_stores_from_a_snapshot_go_with_the_runtime(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore, tmp_path: Path
) -> None:
    created.attach(ID, "disk", store)
    (tmp_path / "memory").write_bytes(b"m" * 99)
    created.attach(ID, "memory", tmp_path / "memory")
    created.place(SPEC, loader, find(loader, save(created, loader, SPEC)), token="t")
    disk, memory = attached_store(created, "disk"), attached_store(created, "memory")
    disk.write_at(CHUNK, b"written")
    assert memory.read_at(0, 99) == b"m" * 99
    assert len(os.listdir(tmp_path / "runtime/stores")) == 1
    created.close()
    assert disk.closed
    assert memory.closed
    assert os.listdir(tmp_path / "runtime/stores") == []
    created.close()


def test_a_detached_store_from_a_snapshot_is_closed_and_others_stay(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore, tmp_path: Path
) -> None:
    created.attach(ID, "disk", store)
    (tmp_path / "memory").write_bytes(b"m" * 99)
    created.attach(ID, "memory", tmp_path / "memory")
    created.place(SPEC, loader, find(loader, save(created, loader, SPEC)), token="t")
    disk, memory = attached_store(created, "disk"), attached_store(created, "memory")
    created.detach(ID, "disk")
    assert disk.closed
    assert memory.read_at(0, 1) == b"m"
    assert set(created.attachments(ID)) == {"memory"}
    created.remove(ID)
    assert memory.closed
    assert os.listdir(tmp_path / "runtime/stores") == []


def test_a_placement_that_fails_keeps_the_stores(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore, tmp_path: Path
) -> None:
    created.attach(ID, "disk", store)
    snapshot = find(loader, save(created, loader, SPEC))
    created.place(SPEC, loader, snapshot, token="t")
    disk = attached_store(created, "disk")

    class Full(Exception):
        pass

    def fail(step: str) -> None:
        if step == "place.built":
            raise Full

    created._host = HostEnvironment(after_step=fail)
    with pytest.raises(Full):
        created.place(SPEC, loader, snapshot, token="u")
    assert attached_store(created, "disk") is disk
    assert disk.read_at(0, 1) == b"d"
    assert len(os.listdir(tmp_path / "runtime/stores")) == 1


def test_a_data_snapshot_takes_the_disks_of_its_base(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore
) -> None:
    data = find(loader, save(created, loader, SPEC, Scope.DATA))
    created.attach(ID, "disk", store)
    base = find(loader, save(created, loader, SPEC))
    created.place(SPEC, loader, data, base=base, token="t")
    assert attached_store(created, "disk").read_at(0, 1) == b"d"
    created.place(SPEC, loader, data, token="u")
    assert created.attachments(ID) == {}


def test_a_placement_elsewhere_makes_the_stores_here_useless(
    created: FakeRuntime, loader: SnapshotLoader, store: COWStore, tmp_path: Path
) -> None:
    created.attach(ID, "disk", store)
    snapshot = find(loader, save(created, loader, SPEC))
    other = FakeRuntime(tmp_path / "runtime")
    other.place(SPEC, loader, snapshot, token="t")
    assert created.attachments(ID) == {}
    with pytest.raises(FailedPrecondition, match="'disk'"):
        save(created, loader, SPEC)
    other.close()


SCRIPT = """
import sys
from cow import COWStore
from snaploader.workspace.testing import FakeRuntime
folder = sys.argv[1]
runtime = FakeRuntime(folder + "/runtime")
runtime.attach("ws", "disk", COWStore(folder + "/lost", size=65536))
"""


@pytest.mark.slow
def test_a_store_that_went_with_its_process_is_told(
    created: FakeRuntime, loader: SnapshotLoader, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], check=True, timeout=300)
    with pytest.raises(FailedPrecondition, match="went with the process that had it"):
        save(created, loader, SPEC)
    created.detach(ID, "disk")
    save(created, loader, SPEC)


def test_written_chunks_of_dead_processes_are_swept(created: FakeRuntime, tmp_path: Path) -> None:
    left = tmp_path / "runtime/stores" / f"{ID}.{2**22 + 1}-77-0123"
    left.mkdir()
    (left / "0.0").touch()
    assert created.sweep() == [left.name]
    assert not left.exists()


def test_attachments_need_a_workspace(fake: FakeRuntime, store: COWStore) -> None:
    with pytest.raises(NotFound):
        fake.attach(ID, "disk", store)
    with pytest.raises(NotFound):
        fake.attachments(ID)


def test_a_damaged_list_of_attachments_is_data_loss(created: FakeRuntime) -> None:
    (created.root(ID).parent / "state/attachments.json").write_bytes(b"{")
    with pytest.raises(DataLoss, match="is damaged"):
        created.attachments(ID)
