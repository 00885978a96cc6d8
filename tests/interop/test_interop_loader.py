"""The main job against servers of other projects: saved on one host, loaded lazily on another."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from thirdparty import Server

from snaploader import (
    FileCache,
    NotFound,
    RemoteCache,
    SnapshotKeySet,
    SnapshotLoader,
    SnapshotTask,
    VMConfiguration,
)

pytestmark = pytest.mark.interop
CHUNK = 64 << 10
CONFIGURATION = VMConfiguration(cpu_count=2)
HostFactory = Callable[[str], SnapshotLoader]


@pytest.fixture
def make_host(server: Server, tmp_path: Path) -> Iterator[HostFactory]:
    """Makes loaders that share the server, each with an empty cache of its own."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> SnapshotLoader:
            cache = stack.enter_context(FileCache(tmp_path / name / "cache"))
            remote = stack.enter_context(RemoteCache(server.url))
            return stack.enter_context(SnapshotLoader(cache, remote))

        yield make


@pytest.fixture
def machine() -> str:
    """The configuration of a machine that no other test has, on a server that all tests share."""
    return uuid.uuid4().hex


def keys(host: SnapshotLoader, machine: str, branch: str) -> SnapshotKeySet:
    environment = {"GIT_BRANCH": branch, "GIT_REPO_DEFAULT_BRANCH": "main"}
    return host.snapshot_key_set(SnapshotTask.from_mapping({"OSFamily": "linux"}, environment), machine)


def make_image(path: Path, chunks: int = 40) -> bytes:
    """An image of random chunks, of which a quarter is holes, and a short last one."""
    content = np.random.default_rng(7).integers(0, 256, (chunks, CHUNK), np.uint8)
    content[::4] = 0
    image = content.tobytes() + b"the end"
    path.write_bytes(image)
    return image


def test_a_branch_falls_back_reads_writes_and_saves(
    make_host: HostFactory, machine: str, tmp_path: Path
) -> None:
    image = bytearray(make_image(tmp_path / "disk.img"))
    (tmp_path / "kernel").write_bytes(b"kernel" * 50_000)
    first = make_host("a")
    saved = first.cache_snapshot(
        keys(first, machine, "main").write_key,
        files={"kernel": tmp_path / "kernel"},
        chunked_files={"disk": tmp_path / "disk.img"},
        chunk_size=CHUNK,
        vm_configuration=CONFIGURATION,
    )
    assert saved.uploaded_bytes >= 30 * CHUNK

    second = make_host("b")
    branch = keys(second, machine, "feature")
    found = second.get_snapshot(branch)
    assert found.key.ref == "main"
    with second.unpack_snapshot(found, tmp_path / "b" / "out") as unpacked:
        assert unpacked.files["kernel"].read_bytes() == (tmp_path / "kernel").read_bytes()
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(5 * CHUNK + 11, 100) == image[5 * CHUNK + 11 : 5 * CHUNK + 111]
        for offset in (0, 7 * CHUNK - 3, len(image) - 5):
            disk.write_at(offset, b"saved")
            image[offset : offset + 5] = b"saved"
        again = second.cache_snapshot(
            branch.write_key,
            chunked_files={"disk": disk},
            chunk_size=CHUNK,
            vm_configuration=CONFIGURATION,
        )
        assert again.uploaded_bytes < 6 * CHUNK

    third = make_host("c")
    found = third.get_snapshot(keys(third, machine, "feature"))
    assert found.key.ref == "feature"
    with third.unpack_snapshot(found, tmp_path / "c" / "out") as unpacked:
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == image


def test_an_invalidated_machine_starts_afresh(make_host: HostFactory, machine: str, tmp_path: Path) -> None:
    make_image(tmp_path / "disk.img", chunks=4)
    host = make_host("a")
    key = keys(host, machine, "main").write_key
    host.cache_snapshot(
        key,
        chunked_files={"disk": tmp_path / "disk.img"},
        chunk_size=CHUNK,
        vm_configuration=CONFIGURATION,
    )
    assert host.get_snapshot(keys(host, machine, "main"))
    version = host.invalidate_snapshot(key)
    for other in (host, make_host("b")):
        fresh = keys(other, machine, "main")
        assert fresh.branch_key.version_id == version
        with pytest.raises(NotFound):
            other.get_snapshot(fresh)
