"""Arguments that make no sense are refused before anything is done."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snaploader import FileCache, SnapshotKey, SnapshotKeySet, SnapshotLoader
from snaploader.errors import InvalidArgument, NotFound

KEY = SnapshotKey(ref="main")
KEYS = SnapshotKeySet(KEY, (), KEY)


@pytest.fixture
def cache(tmp_path):
    with FileCache(tmp_path / "cache") as cache:
        yield cache


@pytest.mark.parametrize("wrong", [float("nan"), -1, "5"])
def test_times_are_numbers_of_seconds(cache, tmp_path, wrong):
    with pytest.raises(InvalidArgument, match="max_stale_fallback_age_s"):
        SnapshotLoader(cache, max_stale_fallback_age_s=wrong)
    (tmp_path / "file").touch()
    with SnapshotLoader(cache) as loader:
        for call in (loader.get_snapshot, loader.explain):
            with pytest.raises(InvalidArgument, match="max_stale_fallback_age_s"):
                call(KEYS, max_stale_fallback_age_s=wrong)
        with pytest.raises(InvalidArgument, match="min_refresh_interval_s"):
            loader.cache_snapshot(KEY, files={"f": tmp_path / "file"}, min_refresh_interval_s=wrong)
        with pytest.raises(NotFound):
            loader.get_snapshot(KEYS)


def test_one_file_is_linked_by_several_saves_at_once(cache, tmp_path):
    base = tmp_path / "base"
    base.write_bytes(b"base image" * 1000)
    barrier = threading.Barrier(4, timeout=60)

    def save(number):
        barrier.wait()
        for turn in range(10):
            key = SnapshotKey(ref=f"{number}-{turn}")
            loader.cache_snapshot(key, files={"one": base, "two": base}, link_files=True)

    with SnapshotLoader(cache) as loader, ThreadPoolExecutor(4) as threads:
        list(threads.map(save, range(4)))


def test_no_line_of_the_log_can_be_forged(cache, tmp_path, caplog):
    (tmp_path / "file").touch()
    with SnapshotLoader(cache) as loader, caplog.at_level(logging.INFO, "snaploader"):
        loader.cache_snapshot(KEY, files={"f": tmp_path / "file"}, snapshot_id="one\ntwo")
        loader.get_snapshot(KEYS)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert not any("\n" in line for line in lines)
    assert all("of group ''" in line for line in lines)


@pytest.mark.parametrize("wrong", ["a\0b", "a\udfffb\ud800"])
@pytest.mark.parametrize("what", ["files", "chunked_files", "directories"])
def test_a_path_that_no_system_call_takes_is_refused(cache, tmp_path, what, wrong):
    with SnapshotLoader(cache) as loader, pytest.raises(InvalidArgument):
        loader.cache_snapshot(KEY, **{what: {"name": tmp_path / wrong}})
    assert cache.entries() == []
