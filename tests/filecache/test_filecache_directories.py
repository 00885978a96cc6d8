"""Tracked directories: shared, removed late, revived, evicted whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filecache_helpers import child, key, leftovers, put

from snaploader.errors import InvalidArgument, NotFound, ResourceExhausted
from snaploader.filecache import FileCache

HOLDER = """
import sys
from filecache_helpers import key
from snaploader.filecache import FileCache
cache = FileCache(sys.argv[1])
handle = cache.acquire_directory(key("d"))
print(handle.path, flush=True)
sys.stdin.readline()
"""


def make(path: Path, size: int = 5000) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(b"x" * size)
    (path / "link").symlink_to("/")
    return path


def tracked(root: Path) -> list[str]:
    return [path.parent.name for path in Path(root, "v1").glob("groups/*/trees/*/*/data")]


def test_directory_is_moved_in_and_found_after_reopening(tmp_path):
    root = tmp_path / "cache"
    with FileCache(root) as cache:
        assert cache.add_directory(key("d"), make(tmp_path / "d"))
        assert not (tmp_path / "d").exists()
    with FileCache(root) as cache:
        with cache.acquire_directory(key("d")) as handle:
            assert Path(handle.path, "sub", "file").read_bytes() == b"x" * 5000
        assert [entry.kind for entry in cache.entries()] == ["directory"]
        assert cache.statistics().total_bytes == cache.entries()[0].disk_bytes >= 8192
    assert leftovers(root) == []


def test_directory_of_a_known_key_stays_where_it_is(tmp_path):
    with FileCache(tmp_path / "cache") as cache:
        assert cache.add_directory(key("d"), make(tmp_path / "d"))
        make(tmp_path / "d", 1)
        assert not cache.add_directory(key("d"), tmp_path / "d")
        assert (tmp_path / "d" / "sub" / "file").exists()


def test_only_directories_are_tracked(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    with FileCache(tmp_path / "cache") as cache:
        for name in ("file", "link", "absent"):
            with pytest.raises((InvalidArgument, NotFound)):
                cache.add_directory(key("d"), tmp_path / name)
        with pytest.raises(InvalidArgument):
            cache.acquire_directory("../d")


def test_directory_in_use_is_removed_when_the_last_user_leaves(tmp_path):
    with FileCache(tmp_path / "cache") as cache, FileCache(tmp_path / "cache") as other:
        cache.add_directory(key("d"), make(tmp_path / "d"))
        first, second = cache.acquire_directory(key("d")), other.acquire_directory(key("d"))
        assert cache.remove_directory(key("d"))
        first.release()
        first.release()
        assert os.path.exists(second.path)
        second.release()
        assert not os.path.exists(second.path)
        with pytest.raises(NotFound):
            cache.acquire_directory(key("d"))
        assert not cache.remove_directory(key("d"))
        assert cache.statistics().total_bytes == 0


def test_removed_directory_is_revived_when_asked_for_in_time(tmp_path):
    with FileCache(tmp_path / "cache") as cache:
        cache.add_directory(key("d"), make(tmp_path / "d"))
        for revive in (
            lambda: cache.acquire_directory(key("d")).release(),
            lambda: cache.add_directory(key("d"), make(tmp_path / "d")),
        ):
            with cache.acquire_directory(key("d")) as handle:
                cache.remove_directory(key("d"))
                revive()
            assert os.path.exists(handle.path)


def test_directory_held_by_another_process_stays_until_that_is_killed(tmp_path):
    root = tmp_path / "cache"
    with FileCache(root) as cache:
        cache.add_directory(key("d"), make(tmp_path / "d"))
        with child(HOLDER, root) as holder:
            path = holder.stdout.readline().strip()
            cache.remove_directory(key("d"))
            cache.prune()
            assert os.path.exists(path)
            holder.kill()
            holder.wait()
            assert cache.prune() == 0
        assert not os.path.exists(path)
    assert leftovers(root) == []


def test_directories_are_evicted_whole_and_in_order_of_use(tmp_path):
    root = tmp_path / "cache"
    with FileCache(root, max_bytes=100_000) as cache:
        for name in ("a", "b", "c"):
            cache.add_directory(key(name), make(tmp_path / name, 10_000))
        cache.acquire_directory(key("a")).release()
        with cache.acquire_directory(key("b")):
            put(cache, 1, 50_000)
            assert set(tracked(root)) == {key("a")[2:], key("b")[2:]}
            put(cache, 2, 60_000)
            assert key("b")[2:] in tracked(root)
            with pytest.raises(ResourceExhausted):
                put(cache, 3, 99_000)
    assert leftovers(root) == []


def test_directory_bigger_than_the_cache_is_refused_and_stays(tmp_path):
    with FileCache(tmp_path / "cache", max_bytes=50_000) as cache:
        with pytest.raises(ResourceExhausted):
            cache.add_directory(key("d"), make(tmp_path / "d", 60_000))
        assert (tmp_path / "d" / "sub" / "file").exists()
        with pytest.raises(NotFound):
            cache.acquire_directory(key("d"))


def test_write_protected_directory_is_removed(tmp_path):
    root = tmp_path / "cache"
    with FileCache(root) as cache:
        path = make(tmp_path / "d")
        os.chmod(path / "sub" / "file", 0o400)
        os.chmod(path / "sub", 0o500)
        cache.add_directory(key("d"), path)
        cache.remove_directory(key("d"))
    with FileCache(root):
        pass
    assert leftovers(root) == []


def test_directory_from_another_file_system_is_copied(tmp_path, monkeypatch):
    real = os.stat

    class OtherDevice:
        st_dev = -1

        def __init__(self, status):
            self.status = status

        def __getattr__(self, name):
            return getattr(self.status, name)

    def on_other_device(path, **options):
        status = real(path, **options)
        return OtherDevice(status) if path == str(source) else status

    with FileCache(tmp_path / "cache") as cache:
        source = make(tmp_path / "d")
        monkeypatch.setattr(os, "stat", on_other_device)
        assert cache.add_directory(key("d"), source)
        monkeypatch.undo()
        assert not source.exists()
        with cache.acquire_directory(key("d")) as handle:
            assert Path(handle.path, "link").is_symlink()


def test_trash_of_a_dead_process_is_swept_at_the_next_start(tmp_path):
    with FileCache(tmp_path) as cache:
        trash = Path(cache.root, "v1", "trash")
    make(trash / "1-2.3")
    (trash / "file").write_bytes(b"")
    with FileCache(tmp_path):
        pass
    assert leftovers(tmp_path) == []
