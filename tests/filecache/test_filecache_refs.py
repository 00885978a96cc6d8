"""Refs: replaced whole, checked, kept apart."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filecache_helpers import blob, damage, disk_bytes_below, key, put

from snaploader.errors import InvalidArgument, NotFound
from snaploader.filecache import FileCache


def ref_file(cache: FileCache, name: str) -> Path:
    group = cache.group_id or "_default"
    return Path(cache.root, "v1", "groups", group, "refs", key(name)[:2], key(name)[2:])


def test_ref_survives_reopening_and_is_replaced(tmp_path):
    with FileCache(tmp_path) as cache:
        with pytest.raises(NotFound):
            cache.get_ref(key("a"))
        assert cache.put_ref(key("a"), b"one")
        assert cache.put_ref(key("a"), b"two")
        assert cache.put_ref(key("b"), b"")
    with FileCache(tmp_path) as cache:
        assert cache.get_ref(key("a")) == b"two"
        assert cache.get_ref(key("b")) == b""
        assert cache.refs() == sorted([key("a"), key("b")])
        assert cache.delete_ref(key("a"))
        assert not cache.delete_ref(key("a"))
        assert cache.refs() == [key("b")]


def test_ref_is_not_overwritten_unless_asked(tmp_path):
    with FileCache(tmp_path) as cache:
        assert cache.put_ref(key("a"), b"one", overwrite=False)
        assert not cache.put_ref(key("a"), b"two", overwrite=False)
        assert cache.get_ref(key("a")) == b"one"


def test_one_of_many_threads_sets_a_ref_that_is_not_overwritten(tmp_path):
    barrier = threading.Barrier(6)
    results = {}
    with FileCache(tmp_path) as cache:

        def work(number):
            barrier.wait(300)
            results[number] = cache.put_ref(key("a"), str(number).encode(), overwrite=False)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, won in results.items() if won]
        assert cache.get_ref(key("a")) == str(winner).encode()


@pytest.mark.parametrize("position", [0, 9, 45, -1])
def test_damaged_ref_is_absent_and_may_be_set_anew(tmp_path, position):
    with FileCache(tmp_path) as cache:
        cache.put_ref(key("a"), b"value" * 10)
        content = bytearray(ref_file(cache, "a").read_bytes())
        content[position] ^= 1
        damage(ref_file(cache, "a"), bytes(content))
        with pytest.raises(NotFound, match="damaged"):
            cache.get_ref(key("a"))
        assert not ref_file(cache, "a").exists()


@pytest.mark.parametrize("length", [0, 8, 40, 44])
def test_torn_ref_does_not_stand_in_the_way(tmp_path, length):
    with FileCache(tmp_path) as cache:
        cache.put_ref(key("a"), b"value")
        damage(ref_file(cache, "a"), ref_file(cache, "a").read_bytes()[:length])
        assert cache.put_ref(key("a"), b"new", overwrite=False)
        assert cache.get_ref(key("a")) == b"new"


@pytest.mark.parametrize("name", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "g" * 64])
def test_malformed_key_is_refused(tmp_path, name):
    with FileCache(tmp_path) as cache:
        for ask in (cache.get_ref, cache.delete_ref, lambda name: cache.put_ref(name, b"")):
            with pytest.raises(InvalidArgument):
                ask(name)


def test_refs_count_as_disk_blocks(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.put_ref(key("a"), b"x" * 10_000)
        cache.put_ref(key("a"), b"x" * 3)
        cache.put_ref(key("b"), b"x" * 10_000)
        put(cache, 1)
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)
        cache.delete_ref(key("b"))
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_groups_see_nothing_of_each_other_also_after_reopening(tmp_path):
    digest, data = blob(1)
    groups = ["", "a", "b-1.x@y", "default"]
    for group in groups:
        with FileCache(tmp_path, group_id=group) as cache:
            assert cache.find_missing([digest]) == {digest}
            assert cache.refs() == []
            assert cache.entries() == []
            cache.put_verified(digest, data)
            cache.put_ref(key("r"), group.encode())
    for group in groups:
        with FileCache(tmp_path, group_id=group) as cache:
            assert cache.get_ref(key("r")) == group.encode()
            assert len(cache.entries()) == 2
            cache.remove(digest)
            cache.delete_ref(key("r"))
            assert cache.entries() == []


@pytest.mark.parametrize("group", ["_default", "..", ".", "a/b", "a\0", "a" * 129, "-a", "a b", "é", "a\n"])
def test_malformed_group_is_refused(tmp_path, group):
    with pytest.raises(InvalidArgument):
        FileCache(tmp_path, group_id=group)
