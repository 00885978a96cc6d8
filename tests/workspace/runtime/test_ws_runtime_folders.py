"""What folders keep of a workspace: captures that read what changed, placements that stay inside, sources."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from runtime_harness import find, save, tree_of

from snaploader import Progress, SnapshotKey, SnapshotLoader, VMConfiguration
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from snaploader.loader import DirectorySource
from snaploader.workspace.model import Scope, Volume, WorkspaceSpec
from snaploader.workspace.runtime import ProcessRuntime, contents, folder as folders
from snaploader.workspace.runtime.contents import Layout
from snaploader.workspace.runtime.folder import locked
from snaploader.workspace.testing import FakeRuntime

ID = "ws"
DATA, LOGS = Volume("data", "/srv/data"), Volume("logs", "/srv/logs")
SPEC = WorkspaceSpec(ID, volumes=(DATA, LOGS))
BIG = 6 << 20
"""Above the size from which files are kept in chunks."""


def fill(root: Path) -> None:
    """One of everything that a folder may hold."""
    data = root / "srv/data"
    (data / "plain").write_bytes(b"content")
    (data / "program").write_bytes(b"#!/bin/sh\n")
    (data / "program").chmod(0o755)
    (data / "private").write_bytes(b"")
    (data / "private").chmod(0o600)
    (data / "empty").mkdir(0o700)
    (data / "link").symlink_to("/etc/passwd")
    (data / "dangling").symlink_to("nowhere/at/all")
    (data / "deep/er").mkdir(parents=True)
    (data / "deep/er/..config").write_bytes(b"x..y")
    with open(data / "big", "wb") as big:
        big.write(os.urandom(1 << 20))
        big.truncate(BIG)
    (root / "srv/logs/log").write_bytes(b"line\n")
    (root / "code").mkdir()
    (root / "code/main").write_bytes(b"main")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(10**18, 10**18 + 123456789), follow_symlinks=False)


def times_of(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.lstat().st_mtime_ns for path in root.rglob("*")}


def settle(folder: Path) -> None:
    """Let no file seem just written, which would have it read again to be sure."""
    from snaploader.loader.scan import GRANULARITY_NS

    newest = max(path.lstat().st_ctime_ns for path in [folder, *folder.rglob("*")])
    probe = folder.parent / "clock"
    while True:
        probe.touch()
        if probe.stat().st_mtime_ns > newest + 2 * GRANULARITY_NS:
            return


def read_bytes(saved: object) -> int:
    return sum(directory.read_bytes for directory in saved.directories)  # type: ignore[attr-defined]


def test_rollback_brings_back_exactly_what_was_there(fake: FakeRuntime, loader: SnapshotLoader) -> None:
    fake.create(SPEC)
    root = fake.root(ID)
    fill(root)
    before, times = tree_of(root), times_of(root)
    snapshot = find(loader, save(fake, loader, SPEC))
    (root / "srv/data/plain").write_bytes(b"changed")
    (root / "srv/data/program").chmod(0o644)
    (root / "srv/data/link").unlink()
    (root / "srv/data/empty").rmdir()
    (root / "code/new").write_bytes(b"new")
    fake.place(SPEC, loader, snapshot, token="t")
    assert tree_of(fake.root(ID)) == before
    assert times_of(fake.root(ID)) == times
    big = fake.root(ID) / "srv/data/big"
    assert big.stat().st_blocks * 512 < BIG


def test_only_what_changed_is_read_again(runtime: ProcessRuntime, loader: SnapshotLoader) -> None:
    runtime.create(SPEC)
    root = runtime.root(ID)
    fill(root)
    settle(root)
    first = save(runtime, loader, SPEC)
    assert read_bytes(first) > 1 << 20
    assert read_bytes(save(runtime, loader, SPEC)) == 0
    (root / "srv/data/plain").write_bytes(b"four")
    assert read_bytes(save(runtime, loader, SPEC)) == 4
    assert read_bytes(save(runtime, loader, SPEC, Scope.DATA)) <= 4


def test_nothing_is_read_again_after_a_placement(runtime: ProcessRuntime, loader: SnapshotLoader) -> None:
    runtime.create(SPEC)
    fill(runtime.root(ID))
    snapshot = find(loader, save(runtime, loader, SPEC))
    data = find(loader, save(runtime, loader, SPEC, Scope.DATA))
    runtime.place(SPEC, loader, snapshot, token="t")
    assert read_bytes(save(runtime, loader, SPEC)) == 0
    (runtime.root(ID) / "srv/logs/log").write_bytes(b"three")
    assert read_bytes(save(runtime, loader, SPEC)) == 5
    runtime.place(SPEC, loader, data, base=snapshot, token="u")
    assert read_bytes(save(runtime, loader, SPEC)) == 0


def test_volumes_are_trees_of_their_own(fake: FakeRuntime, loader: SnapshotLoader) -> None:
    fake.create(SPEC)
    fill(fake.root(ID))
    full = find(loader, save(fake, loader, SPEC))
    assert set(full.directories) == {"root", "volume.data", "volume.logs"}
    assert set(find(loader, save(fake, loader, SPEC, Scope.DATA)).directories) == {
        "volume.data",
        "volume.logs",
    }
    assert "plain" in full.directories["volume.data"]
    assert set(full.directories["root"]) == {"", "code", "code/main", "srv", "srv/data", "srv/logs"}


@pytest.mark.parametrize("what", ["link", "file", "link above"])
@pytest.mark.parametrize("scope", Scope)
def test_what_replaced_a_durable_directory_is_not_captured(
    what: str, scope: Scope, fake: FakeRuntime, tmp_path: Path
) -> None:
    fake.create(SPEC)
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    (outside / "data/secret").write_bytes(b"secret")
    srv = fake.root(ID) / "srv"
    if what == "link above":
        srv.rename(srv.with_name("elsewhere"))
        srv.symlink_to(outside)
    else:
        (srv / "data").rmdir()
        (srv / "data").symlink_to(outside / "data") if what == "link" else (srv / "data").write_bytes(b"")
    with pytest.raises(FailedPrecondition, match=r"'/srv/data' of volume 'data'"), fake.capture(SPEC, scope):
        pass
    assert sorted(path.name for path in outside.rglob("*")) == ["data", "secret"]


def test_a_root_that_is_no_folder_is_not_captured(fake: FakeRuntime, tmp_path: Path) -> None:
    spec = WorkspaceSpec(ID)
    fake.create(spec)
    root = fake.root(ID)
    root.rmdir()
    root.symlink_to(tmp_path)
    with pytest.raises(FailedPrecondition, match="no folder"), fake.capture(spec, Scope.FULL):
        pass


def test_a_durable_directory_that_is_gone_is_captured_empty(
    fake: FakeRuntime, loader: SnapshotLoader
) -> None:
    fake.create(SPEC)
    (fake.root(ID) / "srv/data").rmdir()
    snapshot = find(loader, save(fake, loader, SPEC, Scope.DATA))
    assert set(snapshot.directories["volume.data"]) == {""}


def hostile(loader: SnapshotLoader, folder: Path, name: str) -> str:
    """Id of a snapshot whose root has a symbolic link to `folder` in place of "srv" or "srv/data"."""
    root = folder.parent / "hostile"
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(folder)
    volume = folder.parent / "volume"
    volume.mkdir()
    (volume / "planted").write_bytes(b"planted")
    return loader.cache_snapshot(
        SnapshotKey(instance_name="tests"),
        directories={"root": DirectorySource(root), "volume.data": DirectorySource(volume)},
        vm_configuration=VMConfiguration(),
    ).snapshot_id


@pytest.mark.parametrize("name", ["srv", "srv/data"])
def test_placing_follows_no_link_out_of_the_root(
    name: str, fake: FakeRuntime, loader: SnapshotLoader, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    snapshot = loader.get_snapshot_by_id(hostile(loader, outside, name), instance_name="tests")
    fake.create(SPEC)
    (fake.root(ID) / "kept").touch()
    with pytest.raises(FailedPrecondition, match="symbolic link"):
        fake.place(SPEC, loader, snapshot, token="t")
    assert list(outside.iterdir()) == []
    assert (fake.root(ID) / "kept").exists()
    assert fake.status(ID).placed == ""
    assert fake.leftovers() == []


def test_links_elsewhere_in_a_snapshot_are_placed_as_links(
    fake: FakeRuntime, loader: SnapshotLoader, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    snapshot = loader.get_snapshot_by_id(hostile(loader, outside, "harmless"), instance_name="tests")
    fake.place(SPEC, loader, snapshot, token="t")
    assert (fake.root(ID) / "harmless").readlink() == outside
    assert list(outside.iterdir()) == []


def test_removing_follows_no_link(fake: FakeRuntime, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True, mode=0o755)
    (outside / "file").touch()
    fake.create(SPEC)
    (fake.root(ID) / "link").symlink_to(outside)
    fake.remove(ID)
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "folder"]
    assert (outside / "folder").stat().st_mode & 0o777 == 0o755


def test_write_protected_folders_are_removed(fake: FakeRuntime) -> None:
    fake.create(SPEC)
    locked_up = fake.root(ID) / "srv/data/locked"
    locked_up.mkdir()
    (locked_up / "file").touch()
    locked_up.chmod(0o000)
    fake.remove(ID)
    assert fake.leftovers() == []


def test_placing_tells_its_progress_and_can_be_ended_by_it(fake: FakeRuntime, loader: SnapshotLoader) -> None:
    fake.create(SPEC)
    fill(fake.root(ID))
    snapshot = find(loader, save(fake, loader, SPEC))
    seen: list[Progress] = []
    fake.place(SPEC, loader, snapshot, token="t", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes

    def refuse(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.place(SPEC, loader, snapshot, token="u", progress=refuse)
    assert fake.status(ID).placed == "t"
    assert fake.leftovers() == []


def test_a_workspace_begins_with_a_copy_of_its_source(fake: FakeRuntime, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "srv/data").mkdir(parents=True)
    (source / "srv/logs").mkdir()
    fill(source)
    fake.create(SPEC, source)
    assert tree_of(fake.root(ID)) == tree_of(source)
    assert times_of(fake.root(ID)) == times_of(source)
    (fake.root(ID) / "code/main").write_bytes(b"changed")
    assert (source / "code/main").read_bytes() == b"main"


@pytest.mark.parametrize("can_clone", [False, True])
def test_holes_of_a_source_stay_holes(
    fake: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_clone: bool
) -> None:
    def clone(source: int, _: int, length: int, target: int, __: int) -> bool:
        """As a disk that shares blocks; the rest of a copy must not spoil it."""
        assert length == 0
        os.ftruncate(target, os.fstat(source).st_size)
        os.pwrite(target, b"cloned", 0)
        return True

    monkeypatch.setattr(contents, "clone_range", clone if can_clone else lambda *_: False)
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as sparse:
        sparse.write(b"begin")
        sparse.seek(64 << 20)
        sparse.write(b"middle")
        sparse.truncate(128 << 20)
    fake.create(WorkspaceSpec(ID), source)
    copy = fake.root(ID) / "sparse"
    assert copy.stat().st_size == 128 << 20
    assert copy.stat().st_blocks <= (source / "sparse").stat().st_blocks
    with open(copy, "rb") as copied:
        assert copied.read(6) == (b"cloned" if can_clone else b"begin\0")
        copied.seek(64 << 20)
        assert copied.read(7) == (bytes(7) if can_clone else b"middle\0")


def test_a_disk_that_is_full_while_a_source_is_copied_is_told_as_such(
    fake: FakeRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"content")
    monkeypatch.setattr(contents, "copy_range", full)
    monkeypatch.setattr(contents, "clone_range", lambda *_: False)
    with pytest.raises(ResourceExhausted, match="No space left"):
        fake.create(WorkspaceSpec(ID), source)
    assert not fake.status(ID).exists
    assert fake.leftovers() == []


def test_a_source_may_have_any_names(fake: FakeRuntime, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / os.fsdecode(b"b\xff")).write_bytes(b"kept")
    fake.create(WorkspaceSpec(ID), source)
    assert (fake.root(ID) / "inner" / os.fsdecode(b"b\xff")).read_bytes() == b"kept"


def test_a_source_with_a_link_in_place_of_a_durable_directory_is_refused(
    fake: FakeRuntime, tmp_path: Path
) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    source.mkdir()
    outside.mkdir()
    (source / "srv").symlink_to(outside)
    with pytest.raises(InvalidArgument, match="'/srv/data'"):
        fake.create(SPEC, source)
    assert list(outside.iterdir()) == []
    assert not fake.status(ID).exists
    assert fake.leftovers() == []


def test_a_source_that_cannot_be_copied_is_refused(fake: FakeRuntime, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(NotFound):
        fake.create(SPEC, source)
    source.write_bytes(b"")
    with pytest.raises(InvalidArgument, match="no folder"):
        fake.create(SPEC, source)
    source.unlink()
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket"))
    with pytest.raises(InvalidArgument, match="socket"):
        fake.create(SPEC, source)
    (source / "socket").unlink()
    with pytest.raises(InvalidArgument, match="within"):
        fake.create(SPEC, tmp_path)
    assert not fake.status(ID).exists
    assert fake.leftovers() == []


def test_names_of_volumes_must_fit_into_a_snapshot(fake: FakeRuntime) -> None:
    fake.create(WorkspaceSpec("fits", volumes=(Volume("x" * 248, "/data"),)))
    with pytest.raises(InvalidArgument):
        fake.create(WorkspaceSpec("too-long", volumes=(Volume("x" * 249, "/data"),)))


def test_folders_are_for_their_owners_eyes(fake: FakeRuntime, tmp_path: Path) -> None:
    fake.create(SPEC)
    for folder in (tmp_path / "runtime", *(tmp_path / "runtime").iterdir(), fake.root(ID).parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_exchange_falls_back_to_two_renames(
    fake: FakeRuntime, loader: SnapshotLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.create(SPEC)
    (fake.root(ID) / "old").touch()
    snapshot = find(loader, save(fake, loader, SPEC))
    (fake.root(ID) / "new").touch()
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    fake.place(SPEC, loader, snapshot, token="t")
    assert (fake.root(ID) / "old").exists()
    assert not (fake.root(ID) / "new").exists()
    assert fake.leftovers() == []


def test_a_placement_cut_between_two_renames_is_undone_by_whoever_looks(
    fake: FakeRuntime, tmp_path: Path
) -> None:
    fake.create(SPEC)
    (fake.root(ID) / "mine").touch()
    layout = Layout(str(tmp_path / "runtime"))
    cut = layout.replaced(ID)
    for look in (
        lambda: fake.status(ID).exists,
        lambda: fake.workspaces() == [ID] and fake.root(ID).is_dir(),
        lambda: fake.sweep() == [f"{ID}.replaced"],
    ):
        os.rename(layout.folder(ID).path, cut)
        assert look()
        assert (fake.root(ID) / "mine").exists()
        assert fake.leftovers() == []


def test_sweep_leaves_what_others_work_on(fake: FakeRuntime, tmp_path: Path) -> None:
    layout = Layout(str(tmp_path / "runtime"))
    os.makedirs(f"{layout.workspaces}/{ID}.staging-1/root")
    os.makedirs(f"{layout.workspaces}/other.trash-1/root")
    with locked(layout.lock(ID)):
        assert fake.sweep() == ["other.trash-1"]
        assert fake.leftovers() == [f"{ID}.staging-1"]
    assert fake.sweep() == [f"{ID}.staging-1"]
    assert os.listdir(layout.locks) == []


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    has_it, entered = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        has_it.set()
        with locked(path):
            entered.set()

    with locked(path):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        assert has_it.wait(300)
        os.unlink(path)
    assert entered.wait(300)
    waiting.join()
    with locked(path, wait=False) as held:
        assert held is not None
        with locked(path, wait=False) as held_twice:
            assert held_twice is None


def test_the_log_stays_over_a_placement(runtime: ProcessRuntime, loader: SnapshotLoader) -> None:
    spec = WorkspaceSpec(ID, command=("sh", "-c", "echo said; exec sleep 1000"))
    runtime.create(spec)
    snapshot = find(loader, save(runtime, loader, spec))
    (runtime.root(ID).parent / "state/log").write_bytes(b"said\n")
    runtime.place(spec, loader, snapshot, token="t")
    assert runtime.log_tail(ID) == b"said\n"
    assert runtime.status(ID).started_at is None


def test_what_is_placed_is_flushed_when_durable(
    tmp_path: Path, loader: SnapshotLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    flush = folders.flush_file_system
    monkeypatch.setattr(folders, "flush_file_system", lambda path: (flushed.append(path), flush(path)))
    runtime = ProcessRuntime(tmp_path / "runtime", index_placed=False)
    runtime.create(SPEC)
    flushed.clear()
    snapshot = find(loader, save(runtime, loader, SPEC))
    runtime.place(SPEC, loader, snapshot, token="t")
    assert len(flushed) == 1
    assert ".staging-" in flushed[0]


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"token": "t"}', '{"token": "t", "boot_id": "b"}'])
def test_what_is_written_down_of_a_run_and_is_none_is_said_to_be_damaged(tmp_path: Path, text: str) -> None:
    runtime = ProcessRuntime(tmp_path / "runtime")
    runtime.create(SPEC)
    (runtime.root(ID).parent / "state" / "run.json").write_text(text)
    with pytest.raises(DataLoss, match=r"run\.json.*is damaged"):
        runtime.status(ID)


@pytest.mark.parametrize("text", ["[]", "7", '{"disk": 7}', '{"disk": {}}', "{"])
def test_attachments_that_are_none_are_said_to_be_damaged(tmp_path: Path, text: str) -> None:
    runtime = ProcessRuntime(tmp_path / "runtime")
    runtime.create(SPEC)
    (runtime.root(ID).parent / "state" / "attachments.json").write_text(text)
    with pytest.raises(DataLoss, match=r"attachments\.json.*is damaged"):
        runtime.attachments(ID)
