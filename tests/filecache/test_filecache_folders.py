"""Folders of the owner alone, and what others may have put in them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filecache_helpers import HERE, blob, blob_file, key, leftovers, put, tracked_directory
from odd_entries import ODD_KINDS, make_odd

from snaploader import files
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from snaploader.filecache import FileCache
from snaploader.testing import EmbeddedServer
from snaploader.testing.storage import DiskStorage
from snaploader.workspace.records import PausedRecords

OTHER = 54321
"""A user id; no user needs to have it."""
WATCHDOG_S = 120
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")


def modes(root: Path) -> dict[str, set[int]]:
    """The permission bits of all folders and files below and with a root."""
    found: dict[str, set[int]] = {"folder": {stat.S_IMODE(root.stat().st_mode)}, "file": set()}
    for path in root.rglob("*"):
        found["folder" if path.is_dir() else "file"].add(stat.S_IMODE(path.stat().st_mode))
    return found


def fill(cache: FileCache) -> None:
    """Use everything that makes files."""
    put(cache, "blob")
    cache.put_ref(key("ref"), b"value")
    cache.pin("pin", [blob("blob")[0]])
    cache.find_missing([blob(f"{number}", 1)[0] for number in range(1024)] + [blob("blob")[0]])
    cache.prune(1 << 40)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_all_that_is_made_is_for_the_owner_alone_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with FileCache(tmp_path / "cache") as cache:
            fill(cache)
            with cache.lease([blob("blob")[0]]):
                found = modes(tmp_path / "cache")
    finally:
        os.umask(before)
    assert found == {"folder": {0o700}, "file": {0o600, 0o400}}


def test_group_that_shares_a_cache_may_use_all_of_it(tmp_path):
    before = os.umask(0o077)
    try:
        with FileCache(tmp_path / "cache", cache_mode=0o2770) as cache:
            fill(cache)
            found = modes(tmp_path / "cache" / "v1")
    finally:
        os.umask(before)
    assert found == {"folder": {0o2770}, "file": {0o660, 0o440}}


@pytest.mark.parametrize("mode", [0o600, 0o070, 0o720, 0o1777, 0o7777])
def test_mode_that_no_folder_can_be_used_with_is_refused(tmp_path, mode):
    with pytest.raises(InvalidArgument, match="cache_mode"):
        FileCache(tmp_path / "cache", cache_mode=mode)


def test_existing_root_loses_the_right_of_others_to_write_and_what_is_in_it_is_closed(tmp_path):
    root = tmp_path / "cache"
    with FileCache(root, cache_mode=0o777) as cache:
        put(cache, 1)
    root.chmod(0o775)
    with FileCache(root):
        pass
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "v1").stat().st_mode) == 0o700


INNER = ["v1", *(f"v1/{name}" for name in ("groups", "tmp", "trash", "leases", "usage", "quarantine"))]
INNER += ["v1/groups/_default", "v1/groups/_default/blobs"]


def test_a_folder_with_a_nul_in_its_name_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="NUL"):
        FileCache(tmp_path / "ca\0che")


@pytest.mark.parametrize("inner", ["", *INNER])
def test_folder_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path, inner):
    victim = tmp_path / "victim"
    (victim / "folder").mkdir(parents=True)
    (victim / "file").write_bytes(b"precious")
    link = tmp_path / "cache" / inner if inner else tmp_path / "cache"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(FailedPrecondition, match=r"symbolic link.*victim"):
        FileCache(tmp_path / "cache")
    assert sorted(path.name for path in victim.iterdir()) == ["file", "folder"]


def test_folder_above_the_root_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with FileCache(tmp_path / "link/cache") as cache:
        assert cache.read(put(cache, 1)) == blob(1)[1]


@needs_root
@pytest.mark.parametrize("inner", ["", *INNER])
@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_folder_of_another_user_is_refused(tmp_path, inner, mode):
    folder = tmp_path / "cache" / inner
    folder.mkdir(parents=True)
    os.chown(folder, OTHER, OTHER)
    with pytest.raises(PermissionDenied, match=f"belongs to user {OTHER}"):
        FileCache(tmp_path / "cache", cache_mode=mode)


@needs_root
@pytest.mark.parametrize("name", ["ledger", "uses.lock", "evict.lock", "state.lock"])
@pytest.mark.parametrize("how", ["link", "name", "owner"])
def test_file_that_is_written_in_place_is_nobody_elses(tmp_path, name, how):
    victim = tmp_path / "victim"
    victim.write_bytes(b"p" * 100)
    usage = tmp_path / "cache/v1/usage"
    usage.mkdir(parents=True)
    if how == "link":
        (usage / name).symlink_to(victim)
    else:
        os.link(victim, usage / name)
        if how == "owner":
            os.chown(victim, OTHER, OTHER)
    try:
        with FileCache(tmp_path / "cache") as cache:
            put(cache, 1)
    except PermissionDenied:
        assert how != "link"
    assert victim.read_bytes() == b"p" * 100
    assert stat.S_IMODE(victim.stat().st_mode) == 0o644


PLANT = """
import os, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
os.symlink(sys.argv[3], sys.argv[1])
"""


@needs_root
@pytest.mark.parametrize("what", ["cache", "server", "state"])
@pytest.mark.parametrize("inner", ["", "v1", "v1/trash", "v1/tmp", "paused"])
def test_link_that_another_user_planted_empties_nothing(tmp_path, what, inner):
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep/file").write_bytes(b"precious")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        root = Path(folder, "root")
        # -S and -I: this user may not be able to read the environment's packages.
        subprocess.run(
            [sys.executable, "-ISc", PLANT, f"{root}/{inner}".rstrip("/"), str(OTHER), str(victim)],
            check=True,
        )
        opens = {
            "cache": lambda: FileCache(root),
            "server": lambda: EmbeddedServer(root).start(),
            "state": lambda: PausedRecords(root / "paused"),
        }
        with pytest.raises((PermissionDenied, FailedPrecondition)):
            opens[what]()
    assert (victim / "deep/file").read_bytes() == b"precious"


def test_servers_folder_is_for_the_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0o000)
    try:
        storage = DiskStorage(tmp_path / "server")
        partition = storage.partition("")
        digest, data = blob(1)
        partition.put(digest, data)
        staged = partition.stage(blob(2)[0])
        staged.write(blob(2)[1])
        staged.commit()
        partition.put_result(f"sha256-{digest.hash}", b"result")
        storage.close()
    finally:
        os.umask(before)
    assert modes(tmp_path / "server") == {"folder": {0o700}, "file": {0o600, 0o400}}


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "socket"])
def test_odd_entries_in_the_servers_folder_count_as_absent(tmp_path, kind):
    storage = DiskStorage(tmp_path / "server")
    partition = storage.partition("")
    digest, result = blob(1)[0], f"sha256-{blob(1)[0].hash}"
    partition.put(*blob(1))
    partition.put_result(result, b"result")
    for path in list((tmp_path / "server/v1/instances").rglob("*")):
        if path.is_file():
            make_odd(path, kind)
    assert not partition.contains(digest)
    assert partition.open(digest) is None
    assert partition.get_result(result) is None
    storage.close()


PLACES = {
    "blob": "v1/groups/_default/blobs/sha256/{blob}",
    "ref": "v1/groups/_default/refs/{ref}",
    "shard": "v1/groups/_default/blobs/sha256/{shard}",
    "other group": "v1/groups/other",
    "pin": "v1/groups/_default/pins/pin",
    "directory": "v1/groups/_default/trees/{directory}",
    "lock of a directory": "v1/groups/_default/trees/{directory}/lock",
    "size of a directory": "v1/groups/_default/trees/{directory}/size",
    "state": "v1/state",
    "lease": "v1/leases/1-0000000000000000.1",
    "lock of a session": "v1/tmp/1-0000000000000000.lock",
    "staging": "v1/tmp/1-0000000000000000",
    "trash": "v1/trash/1-0000000000000000.1",
    "quarantine": "v1/quarantine/old",
    "ledger": "v1/usage/ledger",
    "journal": "v1/usage/journal",
    "uses": "v1/usage/uses",
    "lock of uses": "v1/usage/uses.lock",
    "lock of evictions": "v1/usage/evict.lock",
    "lock of the state": "v1/usage/state.lock",
}

WORK = """
import sys
from filecache_helpers import blob, key, put
from snaploader.errors import NotFound, DataLoss
from snaploader.filecache import FileCache

digest, data = blob("a")
with FileCache(sys.argv[1]) as cache:
    for read in (lambda: cache.read(digest), lambda: cache.get_ref(key("ref")), lambda: cache.pinned("pin")):
        try:
            read()
        except (NotFound, DataLoss):
            pass
    cache.find_missing([digest])
    cache.find_missing([blob(f"{n}", 1)[0] for n in range(1023)] + [digest])
    cache.verify()
    cache.entries()
    cache.statistics()
    cache.put_verified(digest, data)
    assert cache.read(digest) == data
    cache.put_ref(key("ref"), b"new")
    assert cache.get_ref(key("ref")) == b"new"
    cache.pin("pin", [digest])
    with cache.lease([digest]):
        cache.prune()
        assert cache.read(digest) == data
    cache.unpin("pin")
    assert cache.prune() == 0
    cache.sync()
with FileCache(sys.argv[1], max_bytes=64 << 10) as cache:
    for number in range(30):
        put(cache, number)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD_KINDS)
def test_odd_entry_stops_nothing(tmp_path, kind):
    digest = blob("a")[0]
    names = {
        "blob": f"{digest.hash[:2]}/{digest.hash[2:]}",
        "shard": digest.hash[:2],
        **{name: f"{key(name)[:2]}/{key(name)[2:]}" for name in ("ref", "directory")},
    }
    running = {}
    for place, path in PLACES.items():
        if kind == "hollow" and place in ("shard", "directory", "other group"):
            continue
        root = tmp_path / place.replace(" ", "-")
        with FileCache(root) as cache:
            put(cache, "a")
            cache.put_ref(key("ref"), b"value")
            cache.pin("pin", [digest])
        tracked_directory(root, "directory")
        make_odd(root / path.format(**names), kind)
        running[place] = subprocess.run(
            [sys.executable, "-c", WORK, str(root)],
            capture_output=True,
            text=True,
            timeout=WATCHDOG_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )
    assert {place: done.stderr for place, done in running.items() if done.stdout != "done\n"} == {}


def test_odd_entry_in_the_place_of_a_blob_is_kept_for_a_look(tmp_path):
    with FileCache(tmp_path / "cache") as cache:
        digest = put(cache, 1)
        make_odd(blob_file(cache, digest), "folder")
        with pytest.raises(NotFound, match="is a folder"):
            cache.read(digest)
        assert put(cache, 1) == digest
    (kept,) = (tmp_path / "cache/v1/quarantine").iterdir()
    assert (kept / "inside").read_bytes() == b"x"


@pytest.mark.parametrize("step", ["open", "write", "rename"])
@pytest.mark.parametrize("what", ["lease", "ref", "pin"])
def test_full_disk_leaves_nothing_of_what_was_to_be_made(tmp_path, monkeypatch, step, what):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FileCache(tmp_path / "cache") as cache:
        digest = put(cache, 1)
        before = sorted((tmp_path / "cache").rglob("*"))
        calls = {
            "lease": lambda: cache.lease([digest], hashes=[np.zeros((1000, 32), np.uint8)]),
            "ref": lambda: cache.put_ref(key("ref"), b"value"),
            "pin": lambda: cache.pin("pin", [digest]),
        }
        opened, renamed = os.open, os.rename

        def full_when_made(path, flags, *rest, **options):
            return (
                full()
                if flags & os.O_CREAT and "/tmp/" in str(path)
                else opened(path, flags, *rest, **options)
            )

        def full_unless_removed(source, target, **options):
            return renamed(source, target, **options) if "/trash/" in str(target) else full()

        if step == "open":
            monkeypatch.setattr(os, "open", full_when_made)
        elif step == "write":
            monkeypatch.setattr(files, "write_all", full)
        else:
            monkeypatch.setattr(os, "rename", full_unless_removed)
        with pytest.raises(ResourceExhausted):
            calls[what]()
        monkeypatch.undo()
        after = sorted(
            path for path in (tmp_path / "cache").rglob("*") if path not in before and not path.is_dir()
        )
        assert [path for path in after if "trash" not in path.parts] == []
        calls[what]()
    assert leftovers(tmp_path / "cache") == []
