"""Directories through servers of other projects: their Trees are taken, checked and served."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import Any

import pytest
from thirdparty import Server

from snaploader import (
    DirectorySource,
    FileCache,
    RemoteCache,
    SnapshotKey,
    SnapshotLoader,
    VMConfiguration,
)

pytestmark = pytest.mark.interop


def make_home(root: Path) -> Path:
    """A directory with files, one of them in chunks with a hole, links and an empty directory."""
    (root / "bin").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "bin/tool").write_bytes(b"#!/bin/sh\n")
    (root / "bin/tool").chmod(0o755)
    for number in range(50):
        (root / f"file-{number}").write_bytes(b"%d" % number * 100)
    with (root / "disk").open("wb") as file:
        file.write(os.urandom(70_000))
        file.truncate(200_000)
    (root / "link").symlink_to("bin/tool")
    os.utime(root / "bin", ns=(1, 1_600_000_000_123_456_789))
    return root


def state_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content, target)
    return found


def test_a_directory_comes_back_on_another_host(server: Server, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    source = DirectorySource(home, chunk_threshold_bytes=100_000)
    snapshot_id = uuid.uuid4().hex
    with (
        FileCache(tmp_path / "a") as cache,
        RemoteCache(server.url) as remote,
        SnapshotLoader(cache, remote) as loader,
    ):
        saved = loader.cache_snapshot(
            SnapshotKey(),
            directories={"home": source},
            vm_configuration=VMConfiguration(),
            snapshot_id=snapshot_id,
            chunk_size=4096,
        )
        assert saved.saved_remotely
    with (
        FileCache(tmp_path / "b") as cache,
        RemoteCache(server.url) as remote,
        SnapshotLoader(cache, remote) as loader,
    ):
        snapshot = loader.get_snapshot_by_id(snapshot_id)
        result = loader.restore_directory(snapshot, "home", tmp_path / "out")
    assert result.fetched_blobs > 50
    assert state_of(tmp_path / "out") == state_of(home)
