"""What the cache drops, damages or cannot take while a snapshot is in use."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, HostFactory, image
from test_loader_faults import flip_a_bit

from snaploader.digest import Buffer, Digest
from snaploader.errors import NotFound, translate_os_errors
from snaploader.filecache.blobs import BlobWriter
from snaploader.loader.results import ManifestSource
from snaploader.testing import EmbeddedServer


def test_chunks_that_only_this_host_has_stay_readable_while_the_cache_fills_up(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    content = image(1, holes=())
    host = make_host("a", server, max_bytes=60 * CHUNK)
    key_set = host.keys()
    host.save(content, key=key_set.write_key, remote=False)
    snapshot = host.loader.get_snapshot(key_set)
    assert snapshot.source is ManifestSource.LOCAL

    def fill_up() -> None:
        for round_ in range(5):
            host.save(image(100 + round_), "other", remote=False)

    with host.unpack(snapshot) as unpacked:
        fill_up()
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == content
    fill_up()
    assert host.cache.find_missing(set(snapshot.tables["disk"].digests()))


def test_an_unpack_of_what_was_evicted_since_leaves_nothing(make_host: HostFactory) -> None:
    host = make_host("a")
    (host.folder / "kernel").write_bytes(b"kernel")
    host.save(image(1), files={"kernel": host.folder / "kernel"})
    snapshot = host.find(policy="local-only")
    lost = snapshot.tables["disk"].get(4)
    assert lost is not None
    host.cache.remove(lost)
    (host.folder / "o").mkdir()
    for call in (host.loader.unpack_snapshot, host.loader.restore_snapshot):
        for output in (host.folder / "o/p/q", host.folder / "x/y"):
            with pytest.raises(NotFound, match=lost.hash):
                call(snapshot, output)
    assert list((host.folder / "o").iterdir()) == []
    assert not (host.folder / "x").exists()
    assert host.cache.prune(0) == 0


def test_a_restore_holds_what_it_is_about_to_write(make_host: HostFactory) -> None:
    host = make_host("a")
    content = image(1)
    host.save(content)
    snapshot = host.find()
    kept: list[int] = []
    result = host.loader.restore_snapshot(
        snapshot, host.folder / "full", progress=lambda _: kept.append(host.cache.prune(0))
    )
    assert result.files["disk"].read_bytes() == content
    assert min(kept) >= len(content) - 3 * CHUNK
    assert host.cache.prune(0) == 0


@pytest.mark.parametrize("has_server", [True, False])
def test_a_plain_file_that_is_evicted_before_it_is_placed_is_fetched_again(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, has_server: bool
) -> None:
    host = make_host("a", server if has_server else None)
    (host.folder / "kernel").write_bytes(b"kernel" * 1000)
    host.save(files={"kernel": host.folder / "kernel"})
    snapshot = host.find()
    materialize = host.cache.materialize
    attempts = []

    def evict_and_materialize(digest: Digest, *args: Any, **kwargs: Any) -> None:
        attempts.append(digest)
        if len(attempts) == 1:
            host.cache.remove(digest)
        materialize(digest, *args, **kwargs)

    monkeypatch.setattr(host.cache, "materialize", evict_and_materialize)
    if not has_server:
        with pytest.raises(NotFound):
            host.loader.unpack_snapshot(snapshot, host.folder / "out")
        assert not (host.folder / "out").exists()
        return
    with host.unpack(snapshot) as unpacked:
        assert unpacked.files["kernel"].read_bytes() == b"kernel" * 1000
    assert len(attempts) == 2


def test_a_plain_file_bigger_than_the_cache_loads_and_restores(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path
) -> None:
    big = bytes(range(256)) * 1024
    (tmp_path / "big").write_bytes(big)
    (tmp_path / "big").chmod(0o755)
    make_host("a", server).save(files={"big": tmp_path / "big"})
    host = make_host("b", server, max_bytes=len(big) // 4)
    with host.unpack(host.find()) as unpacked:
        assert unpacked.files["big"].read_bytes() == big
        assert unpacked.files["big"].stat().st_mode & 0o777 == 0o555
    with host.unpack(host.find(), writable_files=True) as unpacked:
        unpacked.files["big"].write_bytes(b"mine")
    result = host.loader.restore_snapshot(host.find(), host.folder / "full")
    assert result.files["big"].read_bytes() == big
    assert result.files["big"].stat().st_mode & 0o777 == 0o755
    assert result.fetched_bytes == len(big)
    assert host.blobs() == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_chunk_that_the_cache_fails_to_take_is_served_from_memory(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content = image(3, chunks=40)
    make_host("a", server).save(content)
    host = make_host("b", server)
    snapshot = host.find()

    def fail(digest: Digest, _: Buffer) -> Any:
        with translate_os_errors(f"cannot add blob {digest}"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(host.cache, "put_verified", fail)
    assert host.read(snapshot) == content
    restored = host.loader.restore_snapshot(snapshot, host.folder / "full")
    assert restored.files["disk"].read_bytes() == content
    assert host.chunk_files() == []


@pytest.mark.parametrize("step", ["writer", "write", "commit"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_a_plain_file_that_the_cache_fails_to_take_is_placed_all_the_same(
    make_host: HostFactory,
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    step: str,
    code: int,
) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel" * 5000)
    make_host("a", server).save(files={"kernel": tmp_path / "kernel"})
    host = make_host("b", server)
    snapshot = host.find()

    def fail(*_: object, **__: object) -> Any:
        with translate_os_errors("cannot write the blob"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(host.cache if step == "writer" else BlobWriter, step, fail)
    with host.unpack(snapshot) as unpacked:
        assert unpacked.files["kernel"].read_bytes() == b"kernel" * 5000


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_manifests_and_versions_that_the_cache_fails_to_take_fail_no_load(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make_host("a", server).save(image(1))
    host = make_host("b", server)

    def fail(*_: object, **__: object) -> Any:
        with translate_os_errors("cannot write the ref"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(host.cache, "put_ref", fail)
    assert host.load() == image(1)


def test_a_rotten_blob_is_replaced_by_a_save_of_good_bytes(make_host: HostFactory, tmp_path: Path) -> None:
    content = image(1)
    (tmp_path / "kernel").write_bytes(b"kernel" * 100)
    files = {"kernel": tmp_path / "kernel"}
    make_host("a").save(content, files=files)
    host = make_host("a")
    for path in host.blobs():
        flip_a_bit(path)
    host.save(content, files=files)
    reader = make_host("a")
    with reader.unpack(reader.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == content
        assert unpacked.files["kernel"].read_bytes() == b"kernel" * 100


def test_a_rotten_blob_is_replaced_by_a_save_of_a_store(make_host: HostFactory) -> None:
    content = image(1)
    host = make_host("a")
    host.save(content)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(0, content)
        host.cache.prune(0)
        other = make_host("a")
        for path in other.chunk_files():
            flip_a_bit(path)
        other.save(chunked_files={"disk": disk})
    assert make_host("a").load() == content
