"""Directories when something fails: nothing half, nothing wrong, nothing left."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from directory_states import fill, find, save_directory, saved, state_of
from loader_hosts import CONFIGURATION, Host, HostFactory

import cow.fileio
from snaploader import DigestFunction, DirectorySource, SnapshotKey
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from snaploader.files import remove_tree
from snaploader.formats.dirtree import ChunkedEntry, DirectoryTree, FileEntry, decode_directory_tree
from snaploader.formats.manifest import Manifest, pack_any
from snaploader.keys import local_manifest_key, snapshot_id_key
from snaploader.loader import scan, unpack
from snaploader.testing import EmbeddedServer


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return fill(tmp_path / "home")


@pytest.fixture(params=["new", "in place"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where to restore to: nothing yet, or an empty directory."""
    path = tmp_path / "target/parents/out" if request.param == "new" else tmp_path / "target"
    if request.param == "in place":
        path.mkdir()
    return path


def restore_fails(host: Host, snapshot: Any, target: Path, tmp_path: Path, error: type[Exception]) -> None:
    """Restoring raises `error` and leaves what was there before: nothing, or an empty directory."""
    was_there = target.exists()
    with pytest.raises(error):
        host.loader.restore_directory(snapshot, "home", target, index=tmp_path / "index")
    assert (tmp_path / "target").exists() == was_there
    if was_there:
        assert os.listdir(tmp_path / "target") == []
    assert not (tmp_path / "index").exists()


def failing(function: Callable[..., Any], call: int, error: OSError) -> Callable[..., Any]:
    """`function`, but the nth call of it raises."""
    lock = threading.Lock()
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        with lock:
            count += 1
            if count == call:
                raise error
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("blob", [0, 3, -1])
def test_a_fetch_that_fails_half_way_leaves_nothing(
    make_host: HostFactory, server: EmbeddedServer, home: Path, target: Path, tmp_path: Path, blob: int
) -> None:
    result = save_directory(make_host("a", server), home)
    other = make_host("b", server)
    snapshot = find(other, result)
    tree = snapshot.directories["home"]
    gone = sorted(set(tree.digests()))[blob]
    data = other.remote.read(gone) if other.remote else b""
    server.delete_blob(gone)
    restore_fails(other, snapshot, target, tmp_path, NotFound)
    assert other.remote is not None
    other.remote.write(gone, data)
    other.loader.restore_directory(snapshot, "home", target)
    assert state_of(target) == state_of(home)


def test_an_outage_half_way_leaves_nothing(
    make_host: HostFactory,
    server: EmbeddedServer,
    home: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = save_directory(make_host("a", server), home)
    other = make_host("b", server)
    snapshot = find(other, result)
    assert other.remote is not None
    real = other.remote.read_many

    def read_one(digests: Any, sink: Any) -> None:
        real(sorted(digests)[:1], sink)
        raise Unavailable("gone")

    monkeypatch.setattr(other.remote, "read_many", read_one)
    restore_fails(other, snapshot, target, tmp_path, Unavailable)


def test_blobs_that_are_gone_from_a_host_alone_are_not_found(
    make_host: HostFactory, home: Path, target: Path, tmp_path: Path
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    host.cache.remove(next(snapshot.directories["home"].blobs()))
    restore_fails(host, snapshot, target, tmp_path, NotFound)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_disk_that_is_full_leaves_nothing(
    make_host: HostFactory,
    home: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(cow.fileio.os, "pwrite", failing(os.pwrite, call, full))
        restore_fails(host, snapshot, target, tmp_path, ResourceExhausted)
    host.loader.restore_directory(snapshot, "home", target)
    assert state_of(target) == state_of(home)


@pytest.mark.parametrize("step", ["mkdir", "symlink", "fchmod", "utime", "rename"])
def test_any_step_that_fails_leaves_nothing(
    make_host: HostFactory,
    home: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    # The last call but one of a restore that succeeds, as most has been done by then.
    calls: list[int] = []
    real = getattr(os, step)
    with monkeypatch.context() as patch:
        patch.setattr(unpack.os, step, lambda *args, **options: (calls.append(1), real(*args, **options))[1])
        host.loader.restore_directory(snapshot, "home", tmp_path / "trial")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    patched = failing(real, max(1, len(calls) - 1), full)
    with monkeypatch.context() as patch:
        patch.setattr(unpack.os, step, patched)
        restore_fails(host, snapshot, target, tmp_path, ResourceExhausted)


def test_a_snapshot_that_fails_as_a_whole_leaves_no_directory(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    (tmp_path / "mine").write_bytes(b"mine")
    host.save(directories={"one": home, "two": home}, files={"mine": tmp_path / "mine"})
    snapshot = host.find()
    write_directory = unpack.SnapshotWriter.write_directory

    def fail_second(writer: unpack.SnapshotWriter, tree: Any, target: Path) -> None:
        if target.name == "two":
            raise ResourceExhausted("full")
        write_directory(writer, tree, target)

    monkeypatch.setattr(unpack.SnapshotWriter, "write_directory", fail_second)
    for attempt in (host.loader.restore_snapshot, host.loader.unpack_snapshot):
        with pytest.raises(ResourceExhausted):
            attempt(snapshot, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_appears_meanwhile_is_neither_overwritten_nor_removed(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    out = tmp_path / "out"
    out.mkdir()
    symlink = os.symlink

    def make_plain_too(*arguments: Any, **options: Any) -> None:
        (out / "plain").write_bytes(b"mine")
        symlink(*arguments, **options)

    monkeypatch.setattr(unpack.os, "symlink", make_plain_too)
    with pytest.raises(FailedPrecondition, match="plain"):
        host.loader.restore_directory(snapshot, "home", out)
    assert state_of(out, times=False).keys() == {".", "plain"}
    assert (out / "plain").read_bytes() == b"mine"


def test_what_others_put_into_a_folder_that_was_made_stays(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two directories are restored beside each other, and one of them fails."""
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))

    def fail_later(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        host.loader.restore_directory(snapshot, "home", tmp_path / "new/parent/other")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unpack.os, "symlink", fail_later)
    with pytest.raises(ResourceExhausted):
        host.loader.restore_directory(snapshot, "home", tmp_path / "new/parent/out")
    assert state_of(tmp_path / "new/parent/other") == state_of(home)
    assert os.listdir(tmp_path / "new/parent") == ["other"]


@pytest.mark.parametrize("call", [1, 3])
def test_a_full_disk_while_saving_publishes_nothing(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    host = make_host("a")
    real = host.cache.put_verified
    full = failing(real, call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        patch.setattr(host.cache, "put_verified", full)
        with pytest.raises(ResourceExhausted):
            save_directory(host, home, index=tmp_path / "index")
    assert host.cache.refs() == []
    assert not (tmp_path / "index").exists()
    save_directory(host, home, index=tmp_path / "index")


def test_a_disk_that_cannot_tell_its_holes_is_data_loss(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")

    def fail(*_: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cow.fileio.os, "lseek", fail)
    with pytest.raises(DataLoss, match="home/disk"):
        save_directory(host, home)


def test_a_full_disk_under_the_index_is_a_warning(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    index = tmp_path / "index"
    save_directory(host, home, index=index)
    before = index.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(scan.os, "replace", failing(os.replace, 1, full))
    result = save_directory(host, home, index=index)
    assert "No space left" in result.warnings[0]
    assert index.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "home", "index"]


@pytest.mark.parametrize("name", ["plain", "disk"])
def test_a_damaged_blob_is_fetched_again_or_is_data_loss(
    make_host: HostFactory, server: EmbeddedServer, home: Path, tmp_path: Path, name: str
) -> None:
    result = save_directory(make_host("a", server), home)
    first = find(make_host("a", server), result)
    entry = first.directories["home"][name]
    assert isinstance(entry, FileEntry | ChunkedEntry)
    digest = entry.digest if isinstance(entry, FileEntry) else entry.table.digests()[0]
    # A cache that another process damaged; each host looks at a blob at its first use.
    (path,) = (tmp_path / "a").rglob(digest.hash[2:])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"wrong")
    fresh = make_host("a", server)
    restored = fresh.loader.restore_directory(find(fresh, result), "home", tmp_path / "out")
    assert restored.fetched_blobs == 1
    assert state_of(tmp_path / "out") == state_of(home)


def publish(host: Host, tree: bytes, names: Iterable[str] = ("home",)) -> None:
    """A snapshot called hostile, whose directories have this tree, whatever is in it."""
    digest = Digest.of(tree, DigestFunction.BLAKE3)
    host.cache.write(digest, tree)
    directories = dict.fromkeys(names, digest)
    manifest = Manifest(pack_any(CONFIGURATION), DigestFunction.BLAKE3, directories=directories)
    key = snapshot_id_key(SnapshotKey(snapshot_id="hostile"))
    host.cache.put_ref(local_manifest_key("", key), manifest.serialize_local())


def test_a_tree_that_could_do_harm_is_never_restored(make_host: HostFactory) -> None:
    """A file whose way leads through a symbolic link to elsewhere: the same name twice."""
    host = make_host("a")
    tree = reapi.Tree()
    tree.root.symlinks.add(name="a", target="/tmp")
    child = reapi.Directory().SerializeToString()
    node = tree.root.directories.add(name="a")
    node.digest.hash, node.digest.size_bytes = DigestFunction.BLAKE3.hash(child), 0
    tree.children.add()
    publish(host, tree.SerializeToString())
    with pytest.raises(DataLoss, match="twice"):
        host.loader.get_snapshot_by_id("hostile")
    host.cache.delete_ref(host.cache.refs()[0])
    publish(host, b"no tree")
    with pytest.raises(DataLoss, match="damaged"):
        host.loader.get_snapshot_by_id("hostile")


def test_directories_with_too_much_in_them_together_are_refused(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    directories = {name: DirectorySource(home) for name in "abc"}
    result = host.loader.cache_snapshot(
        SnapshotKey(), directories=directories, vm_configuration=CONFIGURATION
    )
    trees = find(host, result).directories
    assert trees["a"] is trees["b"] is trees["c"]
    monkeypatch.setattr("snaploader.formats.dirtree.MAX_ENTRIES", 2 * len(trees["a"]))
    with pytest.raises(DataLoss, match=r"have more than .* together"):
        find(host, result)
    with pytest.raises(InvalidArgument, match=r"have more than .* together"):
        host.loader.cache_snapshot(SnapshotKey(), directories=directories, vm_configuration=CONFIGURATION)


def test_equal_directories_are_read_once(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest of some hundred kilobytes may name ten thousand, and one tree a million paths."""
    host = make_host("a")
    tree = host.cache.read(saved(save_directory(host, home)).digest)
    publish(host, tree, names=[str(number) for number in range(10)])
    sizes = []

    def decode(data: bytes, function: DigestFunction, **limits: int) -> DirectoryTree:
        sizes.append(len(data))
        return decode_directory_tree(data, function, **limits)

    monkeypatch.setattr("snaploader.loader.find.decode_directory_tree", decode)
    snapshot = host.loader.get_snapshot_by_id("hostile")
    assert (len(snapshot.directories), sizes) == (10, [len(tree)])
    distinct = [digest for digest in snapshot.digests() if digest.size_bytes == 100]
    assert len(distinct) == 1


def test_a_tree_that_is_gone_makes_the_snapshot_incomplete(make_host: HostFactory, home: Path) -> None:
    host = make_host("a")
    result = save_directory(host, home)
    host.cache.remove(saved(result).digest)
    with pytest.raises(NotFound, match="incomplete"):
        find(host, result)


def test_more_than_a_tree_can_hold_is_refused(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    monkeypatch.setattr("snaploader.loader.scan.MAX_ENTRIES", 5)
    with pytest.raises(InvalidArgument, match="more than 5 entries"):
        save_directory(host, home)
    monkeypatch.undo()
    monkeypatch.setattr("snaploader.loader.scan.MAX_DEPTH", 1)
    with pytest.raises(InvalidArgument, match="deeper than 1"):
        save_directory(host, home)
    assert host.cache.refs() == []


def test_directories_that_may_not_be_written_are_removed_too(tmp_path: Path) -> None:
    root = fill(tmp_path / "home")
    (root / "to-outside").symlink_to(tmp_path)
    (root / "no-entry").chmod(0o000)
    remove_tree(root)
    assert os.listdir(tmp_path) == []
    remove_tree(root)
