"""What the loader is for: state saved on one host is there on another, whatever happens to it there."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from loader_hosts import CHUNK, CONFIGURATION, HostFactory, image

from snaploader import FileCache
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
)
from snaploader.testing import EmbeddedServer


def test_three_rounds_of_unpack_write_and_save(make_host: HostFactory, server: EmbeddedServer) -> None:
    random_writes = random.Random(5)
    expected = bytearray(image(1))
    make_host("a", server).save(bytes(expected))
    for round_ in range(3):
        host = make_host(f"host-{round_}", server)
        with host.unpack(host.find()) as unpacked:
            disk = unpacked.chunked_files["disk"]
            for _ in range(10):
                data = random_writes.randbytes(random_writes.randrange(1, 3 * CHUNK))
                offset = random_writes.randrange(len(expected) - len(data))
                disk.write_at(offset, data)
                expected[offset : offset + len(data)] = data
            assert disk.read_at(0, disk.size) == expected
            host.save(chunked_files={"disk": disk})
            assert disk.read_at(0, disk.size) == expected
        assert make_host(f"reader-{round_}", server).load() == expected


def test_rounds_on_one_host_without_a_server(make_host: HostFactory) -> None:
    host = make_host("alone")
    expected = bytearray(image(2))
    host.save(bytes(expected))
    for round_ in range(3):
        with host.unpack(host.find()) as unpacked:
            disk = unpacked.chunked_files["disk"]
            assert disk.read_at(0, disk.size) == expected
            disk.write_at(round_ * CHUNK + 7, b"changed")
            expected[round_ * CHUNK + 7 : round_ * CHUNK + 14] = b"changed"
            host.save(chunked_files={"disk": disk})
    assert host.load() == expected


def test_two_unpacks_do_not_see_each_others_writes(make_host: HostFactory) -> None:
    host = make_host("a")
    content = image(3)
    host.save(content)
    snapshot = host.find()
    with host.unpack(snapshot) as one, host.unpack(snapshot) as two:
        one.chunked_files["disk"].write_at(10, b"ONE")
        two.chunked_files["disk"].write_at(10, b"TWO")
        assert one.chunked_files["disk"].read_at(10, 3) == b"ONE"
        assert two.chunked_files["disk"].read_at(10, 3) == b"TWO"
    assert host.load() == content


def test_plain_files_come_back_with_their_content_and_mode(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    (tmp_path / "kernel").write_bytes(b"kernel" * 1000)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "init").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "init").chmod(0o755)
    names = ("kernel", "empty", "init")
    host.save(files={name: tmp_path / name for name in names})
    with host.unpack(host.find()) as unpacked:
        for name in names:
            assert unpacked.files[name].read_bytes() == (tmp_path / name).read_bytes()
        assert os.access(unpacked.files["init"], os.X_OK)
        assert unpacked.files["kernel"].stat().st_mode & 0o222 == 0


def test_writable_plain_files_are_copies(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    (tmp_path / "state").write_bytes(b"before")
    host.save(files={"state": tmp_path / "state"})
    with host.unpack(host.find(), writable_files=True) as unpacked:
        unpacked.files["state"].write_bytes(b"after!")
    with host.unpack(host.find()) as unpacked:
        assert unpacked.files["state"].read_bytes() == b"before"


def test_every_second_local_file_gone_still_loads_from_remote(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path
) -> None:
    host = make_host("a", server)
    content = image(4)
    (tmp_path / "disk").write_bytes(content)
    (tmp_path / "kernel").write_bytes(b"k" * 9000)
    host.save(files={"kernel": tmp_path / "kernel"}, chunked_files={"disk": tmp_path / "disk"})
    for path in host.blobs()[::2]:
        path.unlink()
    with host.unpack(host.find()) as unpacked:
        assert unpacked.files["kernel"].read_bytes() == b"k" * 9000
        assert unpacked.chunked_files["disk"].read_at(0, len(content)) == content


def test_an_evicted_tree_comes_from_remote(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    content = image(5)
    host.save(content)
    chunks = set(host.chunk_files())
    for path in host.blobs():
        if path not in chunks:
            path.unlink()
    assert host.load() == content


def test_all_local_loads_with_the_server_gone(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    content = image(6)
    host.save(content)
    keys = host.keys()
    server.stop()
    assert host.read(host.loader.get_snapshot(keys)) == content


def test_a_lost_chunk_without_a_server_is_a_clean_miss(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(7))
    host.chunk_files()[0].unlink()
    with pytest.raises(NotFound, match="incomplete"):
        host.find()


def test_a_lost_chunk_on_the_server_too_is_a_clean_miss(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(8))
    reader = make_host("b", server)
    digest = next(d for d in server.blobs() if d.size_bytes == CHUNK)
    server.delete_blob(digest)
    with pytest.raises(NotFound):
        reader.find()


def test_nothing_is_fetched_before_it_is_touched(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(9)
    make_host("a", server).save(content)
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        assert host.chunk_files() == []
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(5 * CHUNK + 1, 10) == content[5 * CHUNK + 1 : 5 * CHUNK + 11]
        assert disk.read_at(2 * CHUNK, CHUNK) == bytes(CHUNK)
        origins = disk.statistics().origins
    assert origins["remote"].chunks == 1


def test_restore_writes_all_files_with_holes(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(10, chunks=64, holes=tuple(range(8, 56)))
    make_host("a", server).save(content)
    host = make_host("b", server)
    result = host.loader.restore_snapshot(host.find(), host.folder / "full")
    path = result.files["disk"]
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 <= 18 * CHUNK
    assert result.hole_bytes == 48 * CHUNK
    assert result.fetched_bytes == len(content) - 48 * CHUNK
    again = host.loader.restore_snapshot(host.find(), host.folder / "again")
    assert again.fetched_bytes == 0
    assert again.files["disk"].read_bytes() == content


def test_an_output_folder_with_a_nul_in_its_name_is_refused(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    host.save(image(1))
    for call in (host.loader.unpack_snapshot, host.loader.restore_snapshot):
        with pytest.raises(InvalidArgument, match="NUL"):
            call(host.find(), tmp_path / "o\0ut")


def test_an_occupied_output_folder_is_left_alone(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(11))
    output = host.folder / "occupied"
    output.mkdir()
    (output / "disk").write_bytes(b"mine")
    for method in (host.loader.restore_snapshot, host.loader.unpack_snapshot):
        with pytest.raises(FailedPrecondition, match="exists already"):
            method(host.find(), output)
    assert [p.name for p in output.iterdir()] == ["disk"]
    assert (output / "disk").read_bytes() == b"mine"


def test_a_failed_unpack_leaves_nothing(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    (tmp_path / "one").write_bytes(b"1" * 5000)
    (tmp_path / "two").write_bytes(b"2" * 5000)
    host.save(files={name: tmp_path / name for name in ("one", "two")})
    snapshot = host.find()
    host.cache.remove(snapshot.manifest.files["two"].digest)
    output = host.folder / "output"
    for method in (host.loader.unpack_snapshot, host.loader.restore_snapshot):
        with pytest.raises(NotFound):
            method(snapshot, output)
        assert not output.exists()
    output.mkdir()
    with pytest.raises(NotFound):
        host.loader.unpack_snapshot(snapshot, output)
    assert list(output.iterdir()) == []


def test_closing_an_unpacked_snapshot_leaves_only_plain_files(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    (tmp_path / "plain").write_bytes(b"plain")
    host.save(image(12), files={"plain": tmp_path / "plain"})
    with host.unpack(host.find()) as unpacked:
        unpacked.chunked_files["disk"].write_at(0, b"x")
        folder = unpacked.files["plain"].parent
    assert [p.name for p in folder.iterdir()] == ["plain"]
    unpacked.close()


def test_a_grown_store_is_saved_at_its_new_size(make_host: HostFactory, server: EmbeddedServer) -> None:
    content = image(13)
    make_host("a", server).save(content)
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.resize(len(content) + 5 * CHUNK)
        disk.write_at(disk.size - 3, b"end")
        host.save(chunked_files={"disk": disk})
    assert make_host("c", server).load() == content + bytes(5 * CHUNK - 3) + b"end"


def test_an_empty_file_and_an_all_zero_file_round_trip(make_host: HostFactory) -> None:
    host = make_host("a")
    for content in (b"", bytes(3 * CHUNK + 5)):
        host.save(content)
        assert host.load() == content
    assert host.chunk_files() == []


def test_vm_configuration_and_metadata_come_back(make_host: HostFactory, server: EmbeddedServer) -> None:
    make_host("a", server).save(image(14))
    manifest = make_host("b", server).find().manifest
    assert manifest.vm_configuration.value == CONFIGURATION.SerializeToString()
    # What the loader says of a snapshot is there in any case.
    assert manifest.vm_metadata.type_url.endswith("VMMetadata")


def test_restore_keeps_holes_smaller_than_a_chunk(make_host: HostFactory, server: EmbeddedServer) -> None:
    """Pages of zeros are holes again, from the cache and from the server."""
    host = make_host("a", server)
    path = host.folder / "dots"
    with path.open("wb") as file:
        file.truncate((1 << 20) + 77)
        for offset in range(0, 1 << 20, 128 << 10):
            os.pwrite(file.fileno(), b"x", offset)
        os.pwrite(file.fileno(), b"end", (1 << 20) + 70)
    key = host.keys().write_key
    host.loader.cache_snapshot(
        key, chunked_files={"disk": path}, vm_configuration=CONFIGURATION, chunk_size=256 << 10
    )
    for reader in (host, make_host("b", server)):
        restored = reader.loader.restore_snapshot(reader.find(), reader.folder / "full").files["disk"]
        assert restored.read_bytes() == path.read_bytes()
        assert restored.stat().st_blocks <= path.stat().st_blocks


def test_folders_that_cannot_be_are_no_missing_snapshot(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(15))
    for method in (host.loader.unpack_snapshot, host.loader.restore_snapshot):
        with pytest.raises(FailedPrecondition, match="/proc/nope"):
            method(host.find(), "/proc/nope/out")
    with pytest.raises(FailedPrecondition, match="/proc/nope"):
        FileCache("/proc/nope/cache")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, ResourceExhausted), (errno.EMFILE, ResourceExhausted), (errno.EIO, DataLoss)],
)
def test_errors_of_the_operating_system_have_a_kind_and_leave_nothing(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[SnaploaderError]
) -> None:
    host = make_host("a")
    host.save(image(1), files={"plain": host.folder / "to-save.img"})

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("snaploader.loader.unpack.COWStore", fail)
    with pytest.raises(kind) as caught:
        host.loader.unpack_snapshot(host.find(), host.folder / "out")
    assert isinstance(caught.value.__cause__, OSError)
    assert not (host.folder / "out").exists()


_FEW_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from loader_hosts import CONFIGURATION
from snaploader import FileCache, SnapshotKey, SnapshotLoader
from snaploader.errors import ResourceExhausted

folder = Path(sys.argv[1])
(folder / "disk").write_bytes(os.urandom(1 << 20))
(folder / "home/a/b/c/d/e/f/g/h").mkdir(parents=True)
(folder / "home/a/b/c/d/e/f/g/h/file").write_bytes(b"x" * 100_000)
(folder / "home/a/file").write_bytes(b"y")
with FileCache(folder / "cache") as cache, SnapshotLoader(cache) as loader:
    result = loader.cache_snapshot(
        SnapshotKey(ref="main"),
        chunked_files={f"disk-{number}": folder / "disk" for number in range(8)},
        directories={"home": folder / "home", "other": folder / "home"},
        vm_configuration=CONFIGURATION,
    )
    snapshot = loader.get_snapshot_by_id(result.snapshot_id)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    outcomes = []
    for count in range(40):
        output = folder / f"output-{count}"
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + count, hard))
        try:
            loader.unpack_snapshot(snapshot, output).close()
        except ResourceExhausted:
            outcomes.append("failed")
        else:
            outcomes.append("whole")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if outcomes[-1] == "failed":
            assert not output.exists(), (count, [*output.rglob("*")])
assert outcomes == sorted(outcomes) and len(set(outcomes)) == 2, outcomes
"""


def test_an_unpack_that_gets_too_few_descriptors_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    script = [sys.executable, "-c", _FEW_DESCRIPTORS, str(tmp_path)]
    subprocess.run(script, env=environment, check=True, timeout=60)
