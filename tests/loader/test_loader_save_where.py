"""Where a save keeps blobs and manifests: each as the options say, and never nowhere."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from loader_hosts import CHUNK, Host, HostFactory, image, task

from cow import COWStore
from snaploader import (
    DirectorySource,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ReadSources,
    SnaploaderError,
)
from snaploader.testing import EmbeddedServer, Fault, FaultScript

CONTENT, BIG = image(1), image(2)
ONLY_HERE = ReadSources(remote_manifests=False, remote_chunks=False)
ONLY_THERE = ReadSources(local_manifests=False, local_chunks=False)


def state(host: Host) -> dict[str, object]:
    """A disk, a plain file and a directory with a small file, a big one and a link."""
    tree = host.folder / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "small").write_bytes(b"small")
    (tree / "big").write_bytes(BIG)
    if not (tree / "link").is_symlink():
        (tree / "link").symlink_to("small")
    plain = host.folder / "plain"
    if not plain.exists():
        plain.write_bytes(b"plain" * 100)
    disk = host.folder / "disk.img"
    disk.write_bytes(CONTENT)
    tree_source = DirectorySource(tree, chunk_threshold_bytes=CHUNK)
    return {"files": {"plain": plain}, "chunked_files": {"disk": disk}, "directories": {"tree": tree_source}}


def check_whole(host: Host, sources: ReadSources) -> None:
    snapshot = host.loader.get_snapshot(host.keys(), sources=sources)
    with host.unpack(snapshot) as unpacked:
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == CONTENT
        assert unpacked.files["plain"].stat().st_size == 500
        assert (unpacked.directories["tree"] / "big").read_bytes() == BIG
        assert (unpacked.directories["tree"] / "link").read_bytes() == b"small"


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("local_manifest", [True, False])
def test_each_part_is_kept_where_the_options_say(
    make_host: HostFactory, server: EmbeddedServer, remote: bool, local: bool, local_manifest: bool
) -> None:
    host = make_host("a", server)
    key_set = host.keys()
    options = {"remote": remote, "local": local, "local_manifest": local_manifest}
    if not remote and not (local and local_manifest):
        with pytest.raises(InvalidArgument, match="find the snapshot again"):
            host.save(key=key_set.write_key, **state(host), **options)
        assert host.blobs() == []
        return
    result = host.save(key=key_set.write_key, **state(host), **options)
    assert (result.saved_locally, result.saved_remotely, result.warnings) == (local_manifest, remote, ())
    assert bool(host.blobs()) is local
    if remote:
        check_whole(host, ONLY_THERE)
    if local_manifest:
        check_whole(host, ReadSources(remote_manifests=False, remote_chunks=remote))
    if local and local_manifest:
        check_whole(host, ONLY_HERE)
    if not local_manifest:
        with pytest.raises(NotFound, match="no local manifest"):
            host.loader.get_snapshot(key_set, "local-only")
    if not remote:
        with pytest.raises(NotFound, match="no remote manifest"):
            host.loader.get_snapshot(key_set, "remote-only")


def test_a_manifest_follows_the_blobs_unless_it_is_said(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    assert not host.save(CONTENT, local=False).saved_locally
    assert host.save(CONTENT, local=True).saved_locally


def test_a_store_is_saved_remotely_at_the_cost_of_what_was_written(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(CONTENT)
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(5, b"changed")
        before = host.blobs()
        result = host.save(chunked_files={"disk": disk}, local=False)
        assert (result.files[0].hashed_chunks, result.files[0].stored_bytes) == (1, 0)
        assert result.uploaded_blobs == 2
        assert host.blobs() == before
        # It counts as saved: nothing is left to be done, and what is read of it is right.
        again = host.save(chunked_files={"disk": disk}, local=False)
        assert (again.files[0].hashed_chunks, again.uploaded_blobs) == (0, 0)
        assert disk.read_at(0, 20) == CONTENT[:5] + b"changed" + CONTENT[12:20]
    assert make_host("c", server).load()[:12] == CONTENT[:5] + b"changed"


def test_chunks_that_only_this_host_has_are_sent_from_its_cache(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(CONTENT, remote=False)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(0, b"x")
        host.save(chunked_files={"disk": disk}, local=False)
    assert make_host("b", server).load() == b"x" + CONTENT[1:]


def test_a_remote_failure_leaves_nothing_here_and_the_store_unsaved(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        key_set = host.keys()
        path = host.folder / "disk.img"
        path.write_bytes(CONTENT)
        with COWStore.from_file(path, host.folder / "store", CHUNK) as disk:
            faults.add(Fault("FindMissingBlobs", status="PERMISSION_DENIED", times=1))
            where = {"local": False, "local_manifest": True}
            with pytest.raises(SnaploaderError) as caught:
                host.save(key=key_set.write_key, chunked_files={"disk": disk}, **where)
            assert not any("saved in the local" in note for note in getattr(caught.value, "__notes__", []))
            assert host.blobs() == []
            with pytest.raises(NotFound):
                host.loader.get_snapshot(key_set)
            (file,) = host.save(key=key_set.write_key, chunked_files={"disk": disk}, local=False).files
            assert file.hashed_chunks == file.chunks
        assert host.read(host.loader.get_snapshot(key_set)) == CONTENT


@pytest.mark.parametrize("options", [{"local": False}, {"local_manifest": False}], ids=str)
def test_where_the_policy_saves_nothing_remotely_nothing_is_done(
    make_host: HostFactory, server: EmbeddedServer, options: dict[str, bool]
) -> None:
    host = make_host("a", server)
    host.save(CONTENT, "topic")
    before = host.blobs()
    result = host.save(image(3), "topic", save_policy="first-non-default-ref", **options)
    assert (result.saved_locally, result.saved_remotely, result.files) == (False, False, ())
    assert "first-non-default-ref" in result.remote_skipped
    assert host.blobs() == before
    assert host.load("topic") == CONTENT


@pytest.mark.parametrize(
    "options",
    [
        {"local": False, "pin": "p", "remote": True},
        {"local_manifest": False, "pin": "p"},
        {"local": False, "remote": False},
    ],
    ids=str,
)
def test_what_would_not_be_found_or_kept_is_refused(
    make_host: HostFactory, server: EmbeddedServer, options: dict[str, object]
) -> None:
    with pytest.raises(InvalidArgument):
        make_host("a", server).save(CONTENT, **options)
    with pytest.raises(InvalidArgument):
        make_host("b").save(CONTENT, local=False)
    with pytest.raises(InvalidArgument):
        make_host("c", server, remote_readonly=True).save(CONTENT, local_manifest=False)
    own = make_host("d", server, share_snapshots=False)
    runners = own.loader.snapshot_key_set(task(), "conf", "runner")
    with pytest.raises(InvalidArgument):
        own.save(CONTENT, key=runners.write_key, local=False)


def test_a_file_that_changes_before_it_is_sent_is_an_error(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    key = host.keys().write_key
    path = host.folder / "plain"
    path.write_bytes(b"a" * 10_000)
    changed = threading.Event()

    def change(progress: object) -> None:
        if getattr(progress, "stage", "") == "store" and not changed.is_set():
            path.write_bytes(b"b" * 10_000)
            changed.set()

    with pytest.raises(SnaploaderError):
        host.save(key=key, files={"plain": path}, local=False, progress=change)
    assert changed.is_set()
    with pytest.raises(NotFound):
        host.find()


def test_a_plain_file_is_taken_by_link(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    path = host.folder / "plain"
    path.write_bytes(b"plain")
    path.chmod(0o755)
    result = host.save(files={"plain": path}, link_files=True)
    (blob,) = [one for one in host.blobs() if os.path.samefile(one, path)]
    assert result.files[0].stored_bytes == 5
    assert path.stat().st_mode & 0o222 == 0
    (file,) = host.find().manifest.files.values()
    assert (file.mode, file.is_executable) == (0o755, True)
    # The blob outlives the name it came from.
    path.unlink()
    assert blob.read_bytes() == b"plain"
    with make_host("b", server).unpack(host.find()) as unpacked:
        assert unpacked.files["plain"].read_bytes() == b"plain"


def test_a_file_that_cannot_be_linked_is_copied(
    make_host: HostFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "another file system")

    host = make_host("a")
    path = tmp_path / "plain"
    path.write_bytes(b"plain")
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b, **k: refuse() if a == str(path) else link(a, b, **k))
    host.save(files={"plain": path}, link_files=True)
    assert not any(os.path.samefile(one, path) for one in host.blobs())
    with host.unpack(host.find()) as unpacked:
        assert unpacked.files["plain"].read_bytes() == b"plain"


def test_what_is_no_plain_file_is_not_linked(make_host: HostFactory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for options in ({"link_files": True}, {"link_files": False}):
        with pytest.raises((InvalidArgument, FailedPrecondition)):
            make_host("a").save(files={"f": tmp_path / "fifo"}, **options)
