"""Directories in snapshots: saved, found, restored."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest
from directory_states import BIG, OLD_NS, fill, find, save_directory, saved, set_time, state_of, write_sparse
from loader_hosts import CHUNK, CONFIGURATION, HostFactory, image

from snaploader import DirectorySource, SnapshotKey
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from snaploader.filecache import retention
from snaploader.formats.dirtree import (
    ChunkedEntry,
    DirectoryEntry,
    FileEntry,
    SymlinkEntry,
    child_directories,
)
from snaploader.loader import directory
from snaploader.testing import EmbeddedServer


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return fill(tmp_path / "home")


def test_what_was_saved_is_restored(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    before = state_of(home)
    snapshot = find(host, save_directory(host, home))
    result = host.loader.restore_directory(snapshot, "home", tmp_path / "new/parents/out")
    out = tmp_path / "new/parents/out"
    assert state_of(out) == before == state_of(home)
    assert result.directories == {"home": out}
    assert result.hole_bytes == 2 * CHUNK
    assert result.written_bytes == snapshot.directories["home"].size_bytes - 2 * CHUNK
    assert result.fetched_blobs == 0
    assert (out / "disk").stat().st_blocks * 512 <= 3 * CHUNK
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_directory_is_filled_in_place(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    host.loader.restore_directory(find(host, save_directory(host, home)), "home", out)
    assert state_of(out) == state_of(home)
    assert out.stat().st_ino == inode


@pytest.mark.parametrize("in_place", [True, False])
def test_another_host_fetches_what_it_lacks(
    make_host: HostFactory, server: EmbeddedServer, home: Path, tmp_path: Path, in_place: bool
) -> None:
    (home / "large").write_bytes(os.urandom(2 * CHUNK))
    set_time(home / "large", OLD_NS)
    set_time(home, OLD_NS)
    result = save_directory(make_host("a", server), home)
    other = make_host("b", server)
    out = tmp_path / "out"
    if in_place:
        out.mkdir()
    snapshot = find(other, result)
    restored = other.loader.restore_directory(snapshot, "home", out)
    assert state_of(out) == state_of(home)
    distinct = set(snapshot.directories["home"].digests())
    assert restored.fetched_blobs == len(distinct)
    assert restored.fetched_bytes == sum(digest.size_bytes for digest in distinct)
    # All of it is in the file cache now.
    again = other.loader.restore_directory(snapshot, "home", tmp_path / "again")
    assert again.fetched_blobs == 0


def test_big_blobs_are_streamed(make_host: HostFactory, server: EmbeddedServer, tmp_path: Path) -> None:
    """Files above 4 MiB that are kept whole, one of them twice."""
    home = tmp_path / "home"
    home.mkdir()
    content = os.urandom(5 << 20)
    (home / "one").write_bytes(content)
    (home / "two").write_bytes(content)
    (home / "two").chmod(0o640)
    result = save_directory(make_host("a", server), home, chunk_threshold_bytes=1 << 30)
    assert saved(result).stored_bytes == saved(result).deduplicated_bytes == 5 << 20
    other = make_host("b", server)
    restored = other.loader.restore_directory(find(other, result), "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)
    assert restored.fetched_blobs == 1


def test_all_of_a_snapshot_is_restored(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    disk, plain = tmp_path / "disk", tmp_path / "plain"
    disk.write_bytes(image(1))
    plain.write_bytes(b"plain")
    result = host.save(files={"plain": plain}, chunked_files={"disk": disk}, directories={"home": home})
    assert [one.name for one in result.files] == ["plain", "disk"]
    assert result.size_bytes == sum(one.size_bytes for one in (*result.files, *result.directories))
    assert result.hashed_bytes == sum(one.hashed_bytes for one in (*result.files, *result.directories))
    snapshot = host.find()
    assert list(snapshot.directories) == ["home"]
    restored = host.loader.restore_snapshot(snapshot, tmp_path / "out")
    assert state_of(tmp_path / "out/home") == state_of(home)
    assert (tmp_path / "out/disk").read_bytes() == image(1)
    assert restored.directories == {"home": tmp_path / "out/home"}
    with host.unpack(snapshot) as unpacked:
        assert state_of(unpacked.directories["home"]) == state_of(home)
        (unpacked.directories["home"] / "new").write_bytes(b"may be changed")


def test_only_some_of_a_snapshot(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    host.save(image(1), directories={"home": home, "other": home})
    part = host.find().only(["home"])
    assert part.manifest.names == ["home"]
    assert list(part.directories) == ["home"]
    assert not part.tables


@pytest.mark.parametrize("kind", ["file", "symlink", "full"])
def test_nothing_is_written_where_something_is(
    make_host: HostFactory, home: Path, tmp_path: Path, kind: str
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    folder = tmp_path / "there"
    folder.mkdir()
    out = folder / "home"
    if kind == "file":
        out.write_bytes(b"mine")
    elif kind == "symlink":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "mine").touch()
    before = state_of(folder)
    with pytest.raises(FailedPrecondition, match="home"):
        host.loader.restore_directory(snapshot, "home", out)
    for attempt in (host.loader.restore_snapshot, host.loader.unpack_snapshot):
        with pytest.raises(FailedPrecondition, match="home"):
            attempt(snapshot, folder)
    assert state_of(folder) == before


def test_a_directory_that_a_snapshot_lacks_is_not_found(
    make_host: HostFactory, home: Path, tmp_path: Path
) -> None:
    host = make_host("a")
    snapshot = find(host, save_directory(host, home))
    with pytest.raises(NotFound, match="'work'; it has 'home'"):
        host.loader.restore_directory(snapshot, "work", tmp_path / "out")


def test_the_tree_says_what_is_there(make_host: HostFactory, home: Path) -> None:
    host = make_host("a")
    result = save_directory(host, home)
    tree = find(host, result).directories["home"]
    assert tree["empty"] == DirectoryEntry(0o755, (home / "empty").stat().st_mtime_ns)
    assert tree["to-file"] == SymlinkEntry("plain", (home / "to-file").lstat().st_mtime_ns)
    assert isinstance(tree["disk"], ChunkedEntry)
    plain, twin = tree["plain"], tree["twin"]
    assert isinstance(plain, FileEntry)
    assert isinstance(twin, FileEntry)
    assert plain.digest == twin.digest
    one = saved(result)
    assert (one.files, one.directories, one.symlinks) == (7, 5, 4)
    assert one.size_bytes == tree.size_bytes
    # The twin was hashed and there already; it may be the other one of the two.
    assert one.deduplicated_bytes == 100
    assert one.stored_bytes + one.deduplicated_bytes == one.hashed_bytes == one.size_bytes - one.hole_bytes
    assert one.hole_bytes == 2 * CHUNK


def test_set_id_bits_are_never_kept(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    (home / "shared").mkdir(parents=True)
    (home / "shared").chmod(0o3775)
    (home / "su").touch()
    (home / "su").chmod(0o6755)
    host.loader.restore_directory(find(host, save_directory(host, home)), "home", tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out/shared").stat().st_mode) == 0o1775


def test_hard_links_become_files_of_their_own(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "one").write_bytes(b"same")
    os.link(home / "one", home / "two")
    host.loader.restore_directory(find(host, save_directory(host, home)), "home", tmp_path / "out")
    assert (tmp_path / "out/one").stat().st_nlink == 1
    assert state_of(tmp_path / "out") == state_of(home)


def test_symbolic_links_are_not_followed(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (home / "directory").symlink_to(outside)
    (home / "file").symlink_to(outside / "secret")
    (tmp_path / "alias").symlink_to(home)
    result = save_directory(host, tmp_path / "alias")
    assert saved(result).read_bytes == 0
    assert set(find(host, result).directories["home"]) == {"", "directory", "file"}


def test_sockets_and_fifos_are_skipped_and_named(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    os.mkfifo(home / "run/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "run/socket"))
    result = save_directory(host, home)
    assert saved(result).skipped == ("run/fifo", "run/socket")
    assert list(find(host, result).directories["home"]) == ["", "run"]


@pytest.mark.parametrize("threshold", [1, 1 << 20])
def test_names_and_targets_that_are_not_utf8_come_back(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path, threshold: int
) -> None:
    host, other = make_host("a", server), make_host("b", server)
    home, index = tmp_path / "home", tmp_path / "index"
    latin = os.fsdecode(b"caf\xe9")
    (home / latin / "inner").mkdir(parents=True)
    (home / latin / os.fsdecode(b"\xff\xfe")).write_bytes(b"content")
    (home / os.fsdecode(b"\xff\\xff")).write_bytes(b"one")
    (home / os.fsdecode(b"\\xff\xff")).write_bytes(b"two")
    (home / os.fsdecode(b"\xc3" * 255)).write_bytes(b"as long as names may be")
    (home / "link").symlink_to(os.fsdecode(b"caf\xe9/\xff\xfe"))
    (home / os.fsdecode(b"\xe9")).symlink_to("caf\u00e9")
    (home / "caf\u00e9").write_bytes(b"the same in UTF-8")
    before = state_of(home)
    for _ in range(2):
        result = save_directory(host, home, index=index, chunk_threshold_bytes=threshold)
        snapshot = other.loader.get_snapshot_by_id(result.snapshot_id)
        other.loader.restore_directory(snapshot, "home", tmp_path / f"out-{result.snapshot_id}")
        assert state_of(tmp_path / f"out-{result.snapshot_id}") == before
    assert latin in snapshot.directories["home"]


def test_excluded_directories_are_kept_empty(make_host: HostFactory, home: Path) -> None:
    host = make_host("a")
    (home / "etc-like").mkdir()
    (home / "etc-like/kept").touch()
    (home / "sticky" / os.fsdecode(b"\xff")).touch()
    exclude = ("etc", "sticky", "plain", "to-root", "not/there")
    result = save_directory(host, home, exclude=exclude)
    tree = find(host, result).directories["home"]
    assert isinstance(tree["etc"], DirectoryEntry)
    assert not [path for path in tree if path.startswith(("etc/", "sticky/"))]
    assert "etc-like/kept" in tree
    assert "plain" not in tree
    assert "to-root" not in tree


@pytest.mark.parametrize("path", ["/etc", "../x", "a//b", ".", "a/"])
def test_excluded_paths_are_relative_and_plain(path: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be excluded"):
        DirectorySource("/x", exclude=[path])


def test_sources_that_make_no_sense_are_refused(make_host: HostFactory, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="list of paths"):
        DirectorySource("/x", exclude="etc")
    with pytest.raises(InvalidArgument, match="not positive"):
        DirectorySource("/x", chunk_threshold_bytes=0)
    host = make_host("a")
    with pytest.raises(NotFound, match="nowhere"):
        save_directory(host, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="file"):
        save_directory(host, tmp_path / "file")
    with pytest.raises(InvalidArgument, match="choose one"):
        host.save(files={"x": tmp_path / "file"}, directories={"x": tmp_path})


def test_a_directory_that_holds_the_file_cache_is_refused_unless_that_is_excluded(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host("a")
    (tmp_path / "a/plain").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "a", tmp_path / "a/cache"):
        with pytest.raises(InvalidArgument, match=r"the file cache .* or exclude it"):
            save_directory(host, path)
    result = save_directory(host, tmp_path, exclude=["a/cache"])
    assert set(find(host, result).directories["home"]) == {"", "a", "a/cache", "a/plain"}


def test_files_from_the_threshold_on_are_kept_in_chunks(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    for size in (0, BIG - 1, BIG, BIG + 1):
        (home / str(size)).write_bytes(b"x" * size)
    tree = find(host, save_directory(host, home)).directories["home"]
    assert {path for path, entry in tree.items() if isinstance(entry, ChunkedEntry)} == {
        str(BIG),
        str(BIG + 1),
    }


def test_holes_are_not_read(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    write_sparse(home / "sparse", [None] * 100 + [b"x" * CHUNK] + [None] * 100)
    one = saved(save_directory(host, home))
    assert one.read_bytes == one.hashed_bytes == one.stored_bytes == CHUNK
    assert one.hole_bytes == 200 * CHUNK


def test_zeros_that_are_written_are_holes_too(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "zeros").write_bytes(bytes(4 * CHUNK))
    result = save_directory(host, home)
    assert (saved(result).hole_bytes, saved(result).hashed_bytes) == (4 * CHUNK, 0)
    assert saved(result).read_bytes == 4 * CHUNK


def test_of_a_big_file_that_changed_only_new_chunks_are_stored(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "disk").write_bytes(image(1))
    save_directory(host, home)
    with (home / "disk").open("r+b") as file:
        file.seek(5 * CHUNK)
        file.write(b"new")
    assert saved(save_directory(host, home)).stored_bytes == CHUNK


def test_a_chunk_is_shared_between_chunked_files_and_directories(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host("a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "disk").write_bytes(image(1))
    host.save(image(1))
    assert saved(save_directory(host, home)).stored_bytes == 0


def test_the_server_checks_every_blob_of_a_directory(
    make_host: HostFactory, server: EmbeddedServer, home: Path
) -> None:
    host = make_host("a", server)
    result = save_directory(host, home)
    tree = find(host, result).directories["home"]
    other = make_host("b", server)
    for digest in set(tree.digests()):
        data = host.cache.read(digest)
        server.delete_blob(digest)
        with pytest.raises(NotFound):
            find(other, result, "newest")
        assert host.remote is not None
        host.remote.write(digest, data)
    find(other, result, "newest")


def test_child_directories_are_blobs_of_the_server_too(
    make_host: HostFactory, server: EmbeddedServer, home: Path
) -> None:
    """Some servers ask for them. Locally the tree is enough."""
    host = make_host("a", server)
    tree = find(host, save_directory(host, home)).directories["home"]
    children = child_directories(tree)
    assert len(children) == 6
    assert host.remote is not None
    assert host.remote.find_missing(children) == set()
    assert host.cache.find_missing(children) == set(children)
    lost = next(iter(children))
    server.delete_blob(lost)
    save_directory(host, home)
    assert host.remote.read(lost) == children[lost]


# Keys without a branch, and pins


@pytest.mark.parametrize("instance", ["", "some"])
def test_a_key_without_a_branch_is_published_under_the_id_only(
    make_host: HostFactory, server: EmbeddedServer, home: Path, instance: str
) -> None:
    host = make_host("a", server)
    result = save_directory(host, home, key=SnapshotKey(instance_name=instance), snapshot_id="one")
    assert result.saved_remotely
    assert len(host.cache.refs()) == 1
    assert len(server.action_results()) == 1
    found = host.loader.get_snapshot_by_id("one", instance_name=instance)
    assert list(found.directories) == ["home"]


def test_an_id_that_is_taken_is_an_error_where_there_is_no_branch(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    save_directory(host, home, snapshot_id="one")
    with pytest.raises(FailedPrecondition, match="taken"):
        save_directory(host, home, snapshot_id="one")
    # Taken between the first look and the publication.
    monkeypatch.setattr(host.cache, "put_ref", lambda *_, **__: False)
    with pytest.raises(FailedPrecondition, match="taken"):
        save_directory(host, home, snapshot_id="two")


def test_a_pin_keeps_everything_of_the_snapshot(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    result = save_directory(host, home, pin="mine", files={"plain": home / "plain"})
    pin = host.cache.pinned("mine")
    assert set(pin.refs) == set(host.cache.refs())
    host.cache.prune(0)
    snapshot = find(host, result)
    host.loader.restore_directory(snapshot, "home", tmp_path / "out")
    assert state_of(tmp_path / "out") == state_of(home)
    host.cache.unpin("mine")
    host.cache.prune(0)
    with pytest.raises(NotFound):
        find(host, result)


def test_a_pin_stands_before_the_manifest_and_goes_when_publishing_fails(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    seen = []

    def fail(*_: object, **__: object) -> bool:
        seen.append(host.cache.pins())
        raise FailedPrecondition("no refs today")

    monkeypatch.setattr(host.cache, "put_ref", fail)
    with pytest.raises(FailedPrecondition, match="no refs today"):
        save_directory(host, home, pin="mine")
    assert seen == [["mine"]]
    assert host.cache.pins() == []
    host.cache.pin("mine", refs=["a" * 64])
    with pytest.raises(FailedPrecondition, match="no refs today"):
        save_directory(host, home, pin="mine")
    assert host.cache.pinned("mine").refs == ("a" * 64,)


@pytest.mark.parametrize("before", [(), ("a" * 64,)])
def test_a_pin_that_cannot_be_flushed_leaves_what_was_pinned(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, ...]
) -> None:
    host = make_host("a")
    if before:
        host.cache.pin("mine", refs=before)
    flush = retention.flush_folder
    calls = []

    def fail_once(path: str) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.EIO, "flaky disk")
        flush(path)

    monkeypatch.setattr(retention, "flush_folder", fail_once)
    with pytest.raises(DataLoss, match="cannot pin 'mine'"):
        save_directory(host, home, pin="mine")
    assert [host.cache.pinned(name).refs for name in host.cache.pins()] == ([before] if before else [])


def test_a_pin_that_cannot_be_put_back_does_not_hide_why_the_save_failed(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    host.cache.pin("mine", refs=["a" * 64])

    def fail(*_: object, **__: object) -> bool:
        monkeypatch.setattr(retention, "encode_pin", full_disk)
        raise FailedPrecondition("no refs today")

    def full_disk(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(host.cache, "put_ref", fail)
    with pytest.raises(FailedPrecondition, match="no refs today") as caught:
        save_directory(host, home, pin="mine")
    assert "'mine' before may not be so any more" in "".join(caught.value.__notes__)


# What does not hold still, or may not be read


def test_a_file_that_changes_while_it_is_read_is_an_error(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    read = directory.read_file

    def read_and_change(fd: int, size: int) -> bytes:
        data = read(fd, size)
        with (home / "plain").open("ab") as file:
            file.write(b"more")
        return data

    monkeypatch.setattr(directory, "read_file", read_and_change)
    with pytest.raises(FailedPrecondition, match="was changed while it was saved"):
        save_directory(host, home)
    assert host.cache.refs() == []


@pytest.mark.parametrize("change", ["grow", "remove", "replace", "link"])
def test_a_file_that_changes_before_it_is_read_is_an_error(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    host = make_host("a")
    scan = directory.Scan

    def scan_and_change(*arguments: object) -> object:
        found = scan(*arguments)  # type: ignore[arg-type]
        if change == "grow":
            with (home / "disk").open("ab") as file:
                file.write(b"more")
        else:
            (home / "disk").unlink()
        if change == "replace":
            (home / "disk").write_bytes(b"x" * BIG)
        if change == "link":
            (home / "disk").symlink_to(home / "plain")
        return found

    monkeypatch.setattr(directory, "Scan", scan_and_change)
    with pytest.raises(FailedPrecondition, match="disk' was changed"):
        save_directory(host, home)
    assert host.cache.refs() == []


def test_a_directory_that_is_exchanged_for_a_link_leads_nowhere(
    make_host: HostFactory, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another directory with the same names must not be read in its place."""
    host = make_host("a")
    scan = directory.Scan

    def scan_and_change(*arguments: object) -> object:
        found = scan(*arguments)  # type: ignore[arg-type]
        (home / "etc").rename(tmp_path / "etc")
        fill(tmp_path / "decoy", seed=1)
        (home / "etc").symlink_to(tmp_path / "decoy/etc")
        return found

    monkeypatch.setattr(directory, "Scan", scan_and_change)
    with pytest.raises(FailedPrecondition, match="was changed while it was saved"):
        save_directory(host, home)


def test_a_directory_that_changes_meanwhile_is_an_error(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    read = directory.read_file

    def read_and_change(fd: int, size: int) -> bytes:
        (home / "etc/new").touch()
        return read(fd, size)

    monkeypatch.setattr(directory, "read_file", read_and_change)
    with pytest.raises(FailedPrecondition, match=r"etc.*was changed while it was saved"):
        save_directory(host, home)


@pytest.mark.parametrize("name", ["etc", "plain", "disk"])
def test_what_may_not_be_read_is_named(
    make_host: HostFactory, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    host = make_host("a")
    real = os.open

    def refuse(path: object, *arguments: object, **options: object) -> int:
        if path == name and "dir_fd" in options:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionDenied, match=f"home/{name}"):
        save_directory(host, home)


def test_few_files_are_open_at_a_time(make_host: HostFactory, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for number in range(50):
        (home / f"big-{number}").write_bytes(bytes([number + 1]) * BIG)
        (home / f"small-{number}").write_bytes(bytes([number]))
    host = make_host("a", workers=2)
    before = len(os.listdir("/proc/self/fd"))
    most = 0

    def look(_: object) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))

    save_directory(host, home, progress=look)
    assert most - before < 20


def test_progress_ends_with_everything(make_host: HostFactory, home: Path, tmp_path: Path) -> None:
    host = make_host("a")
    stages: dict[str, tuple[int, int]] = {}

    def note(progress: object) -> None:
        stages[progress.stage] = (progress.done_bytes, progress.total_bytes)  # type: ignore[attr-defined]

    result = save_directory(host, home, progress=note)
    size = saved(result).size_bytes
    assert stages.pop("store") == (size, size)
    host.loader.restore_directory(find(host, result), "home", tmp_path / "out", progress=note)
    written = size - 2 * CHUNK
    assert stages == {"write": (written, written)}


def test_a_snapshot_of_another_configuration_still_names_its_branch(
    make_host: HostFactory, home: Path
) -> None:
    """A key with anything but an instance in it is a branch, also where its ref is empty."""
    host = make_host("a")
    key = SnapshotKey(configuration_hash="conf")
    host.loader.cache_snapshot(key, directories={"home": home}, vm_configuration=CONFIGURATION)
    assert len(host.cache.refs()) == 2
