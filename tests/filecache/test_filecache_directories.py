"""Tracked directories, which earlier releases kept: counted while they are used, then removed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from filecache_helpers import disk_bytes_below, leftovers, put, tracked_directory

from snaploader.filecache import FileCache

GROUPS = ("_default", "team-a")


def fill(root: Path) -> list[Path]:
    """A cache with a blob, and tracked directories in two groups that its ledger counts."""
    with FileCache(root) as cache:
        put(cache, 1)
        cache.prune(1 << 30)
        with cache._context.ledger.section() as section:
            for group in GROUPS:
                section.change(f"{group}/trees/aa/bb", 0, 12288)
    return [tracked_directory(root, "d", group) for group in GROUPS]


def test_they_are_counted_until_the_first_scan_and_then_swept(tmp_path):
    entries = fill(tmp_path)
    with FileCache(tmp_path) as cache:
        blobs = disk_bytes_below(tmp_path)
        assert cache.statistics().total_bytes == blobs + 2 * 12288
        assert [entry.kind for entry in cache.entries()] == ["blob"]
        assert cache.prune(1 << 30) == blobs
        assert not any(entry.exists() for entry in entries)
    assert leftovers(tmp_path) == []


def test_they_make_room_for_what_is_added(tmp_path):
    entries = fill(tmp_path)
    with FileCache(tmp_path, max_bytes=30_000) as cache:
        put(cache, 2)
        assert not any(entry.exists() for entry in entries)
        assert len(cache.entries()) == 2


def test_one_that_another_release_uses_is_counted_and_stays(tmp_path):
    used, unused = fill(tmp_path)
    with open(used / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with FileCache(tmp_path) as cache:
            assert cache.prune() == 12288
        assert (used / "data/sub/file").stat().st_size == 5000
        assert not unused.exists()
    with FileCache(tmp_path) as cache:
        assert cache.prune() == 0
    assert not used.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("missing", ["data", "size", "lock", "all"])
def test_one_that_is_not_whole_is_swept(tmp_path, missing):
    entry, _ = fill(tmp_path)
    for path in entry.iterdir():
        if missing in (path.name, "all"):
            path.rename(tmp_path / path.name)
    with FileCache(tmp_path) as cache:
        assert cache.prune() == 0
    assert not entry.exists()


def test_write_protected_one_is_swept(tmp_path):
    entry, _ = fill(tmp_path)
    os.chmod(entry / "data/sub/file", 0o400)
    os.chmod(entry / "data/sub", 0o500)
    with FileCache(tmp_path) as cache:
        cache.prune()
    assert not entry.exists()
    assert leftovers(tmp_path) == []


def test_nothing_is_removed_through_links(tmp_path):
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    entry, second = fill(tmp_path / "cache")
    shard = second.parent
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    (entry.parent / ("0" * 62)).symlink_to(other)
    with FileCache(tmp_path / "cache") as cache:
        cache.prune()
    assert (other / "data").exists()
    assert (tmp_path / shard.name / second.name / "lock").exists()


def test_trash_of_a_dead_process_is_swept_at_the_next_start(tmp_path):
    with FileCache(tmp_path) as cache:
        trash = Path(cache.root, "v1", "trash")
    (trash / "1-2.3/sub").mkdir(parents=True)
    (trash / "file").write_bytes(b"")
    with FileCache(tmp_path):
        pass
    assert leftovers(tmp_path) == []
