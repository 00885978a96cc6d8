"""What goes over the wire and in which order, and what is kept, isolated and counted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, CONFIGURATION, HostFactory, image, task

from cow import COWStore
from snaploader import FileCache, RemoteCache, SnapshotLoader, SnapshotTask, keys
from snaploader.digest import Buffer, Digest
from snaploader.errors import NotFound, ResourceExhausted
from snaploader.testing import EmbeddedServer, ServerOptions

TIMEOUT_S = 300
UPLOADS = ("BatchUpdateBlobs", "Write")


def test_chunks_go_before_trees_and_trees_before_the_manifest(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    key_set = host.keys()
    for name in ("one", "two"):
        (host.folder / name).write_bytes(image(len(name) + ord(name[0])))
    (host.folder / "kernel").write_bytes(b"k" * (5 << 20))
    server.clear_log()
    host.save(
        files={"kernel": host.folder / "kernel"},
        chunked_files={name: host.folder / name for name in ("one", "two")},
        key=key_set.write_key,
    )
    manifest = host.loader.get_snapshot(key_set, "local-only").manifest
    trees = {digest.hash for digest in manifest.chunked_files.values()}
    order = []
    for call in server.requests:
        if call.method in UPLOADS:
            hashes = set(call.hashes)
            order += ["tree"] * bool(hashes & trees) + ["content"] * bool(hashes - trees)
        elif call.method == "UpdateActionResult":
            order.append("manifest")
    assert order == sorted(order, key=["content", "tree", "manifest"].index)
    assert set(order) == {"content", "tree", "manifest"}


def test_a_lookup_asks_the_server_once_and_for_each_absent_blob_once(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    shared, other = image(1), image(2)
    paths = {name: host.folder / name for name in ("one", "two", "three")}
    paths["one"].write_bytes(shared + shared)
    paths["two"].write_bytes(shared)
    paths["three"].write_bytes(other)
    host.save(chunked_files=paths)
    key_set = host.keys()
    tables = host.find().tables
    evicted = set(tables["one"].digests()) | set(list(tables["three"].digests())[::2])
    for digest in evicted:
        host.cache.remove(digest)
    server.clear_log()
    snapshot = host.loader.get_snapshot(key_set)
    (call,) = [call for call in server.requests if call.method == "FindMissingBlobs"]
    assert sorted(call.hashes) == sorted(digest.hash for digest in evicted)
    assert snapshot.absent == evicted


def test_a_lookup_is_a_use_of_all_it_finds(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(1), "main")
    host.save(image(2), "topic")
    found, other = host.find("main"), host.find("topic", default="")
    long_ago = time.time() - 7200
    for number, snapshot in enumerate((found, other)):
        for digest in [*snapshot.tables["disk"].digests(), *snapshot.manifest.chunked_files.values()]:
            os.utime(host.cache.path(digest), (long_ago + number, long_ago + number))
    host.find("main")
    used = {entry.key: entry.last_used_s for entry in host.cache.entries() if entry.kind == "blob"}
    for digest in [*found.tables["disk"].digests(), *found.manifest.chunked_files.values()]:
        assert used[digest.hash] > long_ago + 3600
    for digest in other.tables["disk"].digests():
        assert used[digest.hash] == pytest.approx(long_ago + 1, abs=2)


def test_a_remote_snapshot_that_lost_a_chunk_is_a_miss_also_when_the_server_does_not_look(
    make_host: HostFactory,
) -> None:
    with EmbeddedServer(options=ServerOptions(check_completeness=False)) as server:
        writer = make_host("a", server)
        writer.save(image(1), "main")
        writer.save(image(2), "topic")
        lost = writer.find("topic").tables["disk"].get(7)
        assert lost is not None
        server.delete_blob(lost)
        for policy in ("newest", "local-first"):
            reader = make_host(f"b-{policy}", server)
            snapshot = reader.find("topic", policy)
            assert snapshot.key.ref == "main"
            assert not snapshot.degraded
            assert "incomplete" in str(snapshot.failures[0].error)


def test_a_readonly_loader_leaves_damaged_refs_alone(make_host: HostFactory) -> None:
    host = make_host("a")
    key_set = host.keys()
    damage = b"\xff\xff damaged"
    names = [
        keys.local_manifest_key("", key_set.branch_key),
        keys.version_key(key_set.branch_key),
    ]
    for name in names:
        host.cache.put_ref(name, damage)
    reader = make_host("a", readonly=True)
    with pytest.raises(NotFound, match="damaged"):
        reader.loader.get_snapshot(key_set)
    reader.keys()
    assert [host.cache.get_ref(name) for name in names] == [damage, damage]
    with pytest.raises(NotFound):
        host.loader.get_snapshot(key_set)
    assert names[0] not in host.cache.refs()


def test_instances_are_isolated_across_restarts(tmp_path: Path) -> None:
    """Both by the keys' instance name and by that of the connection; here only one of them differs."""
    server = EmbeddedServer(storage=tmp_path / "server")

    @contextmanager
    def connect(host: str, connection: str) -> Iterator[SnapshotLoader]:
        with (
            FileCache(tmp_path / host) as cache,
            RemoteCache(server.url, instance_name=connection) as remote,
            SnapshotLoader(cache, remote) as loader,
        ):
            yield loader

    with server, connect("a", "one") as loader:
        (tmp_path / "disk").write_bytes(image(1))
        ours = loader.snapshot_key_set(task(instance_name="one"), "conf")
        loader.cache_snapshot(
            ours.write_key,
            chunked_files={"disk": tmp_path / "disk"},
            vm_configuration=CONFIGURATION,
            chunk_size=CHUNK,
        )
    other_key = replace(ours.branch_key, instance_name="two")
    others = replace(ours, branch_key=other_key, fallback_keys=(), write_key=other_key)
    for round_ in range(2):
        with server:
            for host in ("a", f"new-{round_}"):
                with connect(host, "one") as loader:
                    assert loader.get_snapshot(ours).tables["disk"].size == len(image(1))
                    with pytest.raises(NotFound):
                        loader.get_snapshot(others)
            with connect(f"elsewhere-{round_}", "two") as loader, pytest.raises(NotFound):
                loader.get_snapshot(ours)


@pytest.mark.parametrize("failing", ["plain", "chunked"])
def test_the_first_error_of_a_save_is_raised_after_all_has_stopped_and_nothing_is_published(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    host = make_host("a", server, workers=2)
    key = host.keys().write_key
    refs = host.cache.refs()
    (host.folder / "kernel").write_bytes(b"kernel" * 1000)
    other_under_way, failed = threading.Event(), threading.Event()
    ended: list[str] = []
    add_file, put_verified = host.cache.add_file, host.cache.put_verified

    def fail() -> None:
        assert other_under_way.wait(TIMEOUT_S)
        failed.set()
        raise ResourceExhausted("no space for it")

    def hold(what: str) -> None:
        other_under_way.set()
        assert failed.wait(TIMEOUT_S)
        ended.append(what)

    def add_file_or_not(*args: Any) -> Any:
        fail() if failing == "plain" else hold("plain")
        return add_file(*args)

    def put_verified_or_not(digest: Digest, data: Buffer) -> bool:
        fail() if failing == "chunked" else hold("chunked")
        return put_verified(digest, data)

    monkeypatch.setattr(host.cache, "add_file", add_file_or_not)
    monkeypatch.setattr(host.cache, "put_verified", put_verified_or_not)
    server.clear_log()
    with pytest.raises(ResourceExhausted, match="no space for it"):
        host.save(image(1), files={"kernel": host.folder / "kernel"}, key=key)
    assert ended == ["chunked" if failing == "plain" else "plain"]
    assert host.cache.refs() == refs
    assert server.calls("UpdateActionResult") == 0
    assert server.blobs() == []


def test_statistics_say_where_each_chunk_came_from(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(1, chunks=64, holes=(5, 6, 7), tail=0)
    make_host("a", server).save(content)
    host = make_host("b", server)
    snapshot = host.find()
    table = snapshot.tables["disk"]
    for index in range(32, 64):
        digest = table.get(index)
        assert digest is not None
        host.cache.write(digest, content[index * CHUNK : (index + 1) * CHUNK])
    with host.unpack(snapshot) as unpacked:
        disk = unpacked.chunked_files["disk"]
        for _ in range(2):
            for offset in range(0, len(content), CHUNK):
                disk.read_at(offset, CHUNK)
        origins = unpacked.statistics()["disk"].origins
    counts = {origin: (counted.chunks, counted.bytes) for origin, counted in origins.items()}
    assert counts == {
        "hole": (3, 3 * CHUNK),
        "file_cache": (32, 32 * CHUNK),
        "remote": (29, 29 * CHUNK),
    }
    assert 0 < origins["remote"].prefetched < 29
    assert origins["file_cache"].prefetched == 0


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o644, 0o755])
def test_modes_of_chunked_files_come_back(make_host: HostFactory, server: EmbeddedServer, mode: int) -> None:
    host, other = make_host("a", server), make_host("b", server)
    disk = host.folder / "disk"
    disk.write_bytes(image(1))
    disk.chmod(mode)
    host.save(chunked_files={"disk": disk})
    with host.unpack(host.find()) as unpacked:
        unpacked.chunked_files["disk"].write_at(0, b"changed")
        host.save(chunked_files=unpacked.chunked_files)
    old = os.umask(0o022)
    try:
        restored = other.loader.restore_snapshot(other.find(), other.folder / "out")
    finally:
        os.umask(old)
    assert mode_of(restored.files["disk"]) == mode | 0o200


def test_a_chunked_file_whose_mode_nobody_recorded_is_private(make_host: HostFactory) -> None:
    host = make_host("a")
    with COWStore(host.folder / "store", size=2 * CHUNK, chunk_size=CHUNK) as store:
        store.write_at(0, b"secret")
        host.save(chunked_files={"disk": store})
    restored = host.loader.restore_snapshot(host.find(), host.folder / "out")
    assert mode_of(restored.files["disk"]) == 0o600


@pytest.mark.parametrize("mode", [0o400, 0o444, 0o500, 0o555, 0o600, 0o644, 0o664, 0o700, 0o755])
def test_file_modes_come_back(make_host: HostFactory, server: EmbeddedServer, mode: int) -> None:
    writer = make_host("a", server)
    (writer.folder / "file").write_bytes(b"content")
    (writer.folder / "file").chmod(mode)
    writer.save(files={"file": writer.folder / "file"})
    for host in (writer, make_host("b", server)):
        with host.unpack(host.find()) as unpacked:
            assert mode_of(unpacked.files["file"]) == mode & 0o555
        with host.unpack(host.find(), writable_files=True) as unpacked:
            assert mode_of(unpacked.files["file"]) == mode | 0o200
        restored = host.loader.restore_snapshot(host.find(), host.folder / "full").files["file"]
        assert mode_of(restored) == mode | 0o200
        # What is shared with the cache was not touched by any of it.
        assert {mode_of(path) for path in host.blobs()} == {0o400}


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_task_that_wants_no_universal_fallback_gets_and_updates_none(make_host: HostFactory) -> None:
    loader = make_host("a", universal_ref=True).loader

    def keys_of(branch: str, wish: str | None) -> keys.SnapshotKeySet:
        platform = {"OSFamily": "linux"}
        if wish is not None:
            platform["snapshot-universal-fallback"] = wish
        return loader.snapshot_key_set(SnapshotTask.from_mapping(platform, {"GIT_BRANCH": branch}), "conf")

    def save(key_set: keys.SnapshotKeySet) -> None:
        make_host("a", universal_ref=True).save(image(1), key=key_set.write_key, key_set=key_set)

    assert any(map(keys.is_universal, keys_of("topic", None)))
    without = keys_of("topic", "false")
    assert not any(map(keys.is_universal, without))
    universal = keys_of("other", None).fallback_keys[-1]
    cache = make_host("a").cache
    save(without)
    assert keys.local_manifest_key("", universal) not in cache.refs()
    save(keys_of("topic", None))
    assert keys.local_manifest_key("", universal) in cache.refs()
