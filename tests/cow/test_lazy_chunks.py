"""Chunks from a source: fetched once, checked, replaced by writes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cow_sources import MemorySource, open_files, pattern, read_chunk, wait_until

from cow import COWStore, MappingBudget, OpenedChunk, TruncatedFile

CHUNK = 8192
CONTENT = pattern(4 * CHUNK + 300)
PATIENCE = 20


def open_store(folder, source, budget=None):
    return COWStore(
        folder,
        size=len(CONTENT),
        chunk_size=CHUNK,
        chunks=range(5),
        source=source,
        readahead=None,
        budget=budget or MappingBudget(),
    )


@pytest.fixture
def source():
    return MemorySource(CONTENT, CHUNK)


@pytest.fixture
def store(tmp_path, source):
    with open_store(tmp_path / "s", source) as store:
        yield store


def test_nothing_is_fetched_before_it_is_touched(store, source):
    assert not source.opens
    assert store.read_at(CHUNK + 5, 10) == CONTENT[CHUNK + 5 : CHUNK + 15]
    assert source.opens == {1: 1}
    store.view(CHUNK, CHUNK)
    read_chunk(store, 1)
    assert source.opens == {1: 1}
    statistics = store.statistics()
    assert (statistics.lazy_chunks, statistics.lazy_bytes) == (5, len(CONTENT))
    assert (statistics.source_opens, statistics.origins["remote"].bytes) == (1, CHUNK)


def test_a_write_to_a_part_copies_the_chunk(store, source):
    store.write_at(CHUNK + 5, b"new")
    assert source.opens == {1: 1}
    assert read_chunk(store, 1) == CONTENT[CHUNK : CHUNK + 5] + b"new" + CONTENT[CHUNK + 8 : 2 * CHUNK]
    statistics = store.statistics()
    assert (statistics.copies_on_write, statistics.copied_bytes) == (1, CHUNK)
    assert (statistics.lazy_chunks, statistics.private_chunks, statistics.dirty_chunks) == (4, 1, 1)


def test_a_write_over_whole_chunks_fetches_only_the_edges(store, source):
    data = pattern(2 * CHUNK + 200, 7)
    store.write_at(CHUNK - 100, data)
    assert source.opens == {0: 1, 3: 1}
    assert store.read_at(0, len(CONTENT)) == CONTENT[: CHUNK - 100] + data + CONTENT[3 * CHUNK + 100 :]
    store.write_at(4 * CHUNK, b"e" * 300)
    assert 4 in source.opens


def test_a_whole_short_last_chunk_is_not_fetched_when_written(tmp_path, source):
    with open_store(tmp_path / "t", source) as store:
        store.write_at(4 * CHUNK, b"e" * 300)
        assert not source.opens


@pytest.mark.parametrize("error", [LookupError("gone"), OSError(5, "bad disk")])
def test_a_sources_error_reaches_the_reader_unchanged_and_passes(store, source, error):
    def fail(index):
        raise error

    source.before_open = fail
    before = open_files()
    for call in (
        lambda: store.read_at(0, 10),
        lambda: store.view(0, 10),
        lambda: store.readinto_at(0, bytearray(2 * CHUNK)),
        lambda: store.write_at(5, b"x"),
        lambda: store.write_at(CHUNK - 5, b"x" * CHUNK),
        lambda: store.resize(10 * CHUNK),
    ):
        with pytest.raises(type(error)) as raised:
            call()
        assert raised.value is error
    assert open_files() == before
    assert os.listdir(store.data_dir) == []
    assert len(store.dirty_chunks) == 0
    source.before_open = lambda index: None
    assert store.read_at(0, len(CONTENT)) == CONTENT


def test_a_chunk_file_that_is_too_short_is_an_error_not_a_crash(store, source):
    source.content = CONTENT[: CHUNK + 100]
    before = open_files()
    for _ in range(2):
        with pytest.raises(TruncatedFile, match="chunk 1 "):
            store.read_at(CHUNK, 10)
    with pytest.raises(TruncatedFile, match="chunk 1 "):
        store.write_at(CHUNK + 10, b"x")
    assert open_files() == before
    assert store.read_at(0, CHUNK) == CONTENT[:CHUNK]


def test_a_chunk_file_may_be_longer_than_the_last_chunk(tmp_path):
    source = MemorySource(CONTENT + b"behind the end", CHUNK)
    with open_store(tmp_path / "s", source) as store:
        assert read_chunk(store, 4) == CONTENT[4 * CHUNK :]
        store.resize(len(CONTENT) + 50)
        assert read_chunk(store, 4) == CONTENT[4 * CHUNK :] + bytes(50)


def test_many_readers_of_a_chunk_cause_one_fetch(store, source):
    release = threading.Event()
    begun = threading.Event()

    def wait(index):
        begun.set()
        assert release.wait(PATIENCE)

    source.before_open = wait
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(read_chunk, store, 2) for _ in range(8)]
        assert begun.wait(PATIENCE)
        wait_until(lambda: store._reader._flights._flights[2].waiters == 7)
        release.set()
        assert {read.result(PATIENCE) for read in reads} == {CONTENT[2 * CHUNK : 3 * CHUNK]}
    assert source.opens == {2: 1}
    assert store.statistics().mapped_bytes == CHUNK


def test_a_failed_fetch_fails_all_who_wait_and_the_next_one_tries_again(store, source):
    release = threading.Event()

    def fail(index):
        assert release.wait(PATIENCE)
        raise LookupError("gone")

    source.before_open = fail
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read_chunk, store, 2) for _ in range(4)]
        flights = store._reader._flights._flights
        wait_until(lambda: list(flights) == [2] and flights[2].waiters == 3)
        release.set()
        for read in reads:
            with pytest.raises(LookupError):
                read.result(PATIENCE)
    source.before_open = lambda index: None
    assert read_chunk(store, 2) == CONTENT[2 * CHUNK : 3 * CHUNK]
    assert source.opens == {2: 2}


def test_when_the_fetching_thread_is_interrupted_a_waiter_takes_over(store, source):
    release = threading.Event()
    first = threading.Event()

    def interrupt(index):
        if not first.is_set():
            first.set()
            assert release.wait(PATIENCE)
            raise KeyboardInterrupt

    source.before_open = interrupt
    outcome: list[object] = []

    def lead():
        try:
            read_chunk(store, 2)
        except BaseException as error:
            outcome.append(error)

    leader = threading.Thread(target=lead)
    leader.start()
    assert first.wait(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(read_chunk, store, 2)
        wait_until(lambda: store._reader._flights._flights[2].waiters == 1)
        release.set()
        assert follower.result(PATIENCE) == CONTENT[2 * CHUNK : 3 * CHUNK]
    leader.join(PATIENCE)
    assert isinstance(outcome[0], KeyboardInterrupt)
    assert source.opens == {2: 2}


def test_a_slow_chunk_holds_up_nobody_else(store, source):
    """While one chunk is being fetched: other reads, all writes, checkpoints, whole writes of that chunk."""
    release = threading.Event()
    begun = threading.Event()

    def wait(index):
        if index == 2:
            begun.set()
            assert release.wait(PATIENCE)

    source.before_open = wait
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read_chunk, store, 2)
        writer = pool.submit(store.write_at, 2 * CHUNK + 1, b"part")
        assert begun.wait(PATIENCE)
        assert read_chunk(store, 1) == CONTENT[CHUNK : 2 * CHUNK]
        store.write_at(CHUNK + 1, b"x")
        with store.checkpoint() as checkpoint:
            assert checkpoint.chunks.tolist() == [1]
        store.write_at(0, b"w" * CHUNK)
        store.write_at(2 * CHUNK, b"w" * CHUNK)
        assert read_chunk(store, 2)[4096:] == b"w" * 4096
        assert not reader.done()
        release.set()
        assert reader.result(PATIENCE) == CONTENT[2 * CHUNK : 3 * CHUNK]
        writer.result(PATIENCE)
    assert read_chunk(store, 2) == b"wpart" + b"w" * (CHUNK - 5)


def test_what_a_late_fetch_brings_does_not_hide_a_write(store, source):
    """A write replaces the chunk while it is fetched: the fetched mapping is never used for later reads."""
    source.before_open = lambda index: store.write_at(2 * CHUNK, b"w" * CHUNK) if index == 2 else None
    assert read_chunk(store, 2) == CONTENT[2 * CHUNK : 3 * CHUNK]
    assert read_chunk(store, 2) == b"w" * CHUNK
    assert store.statistics().mapped_bytes == CHUNK


def test_the_store_closes_every_descriptor_it_is_given(tmp_path, source):
    before = open_files()
    budget = MappingBudget()
    with open_store(tmp_path / "s", source, budget) as store:
        for _ in range(3):
            store.read_at(0, len(CONTENT))
            budget.trim()
        with store.checkpoint() as checkpoint:
            checkpoint.readinto(0, bytearray(CHUNK))
        store.export(tmp_path / "out")
        assert open_files() == before + 1
    assert open_files() == before


def test_origins_tell_where_chunks_came_from(tmp_path):
    class Mixed(MemorySource):
        def open_chunk(self, index):
            fd, _, _ = super().open_chunk(index)
            return OpenedChunk(fd, "remote" if index % 2 else "file_cache", index == 3)

    with open_store(tmp_path / "s", Mixed(CONTENT, CHUNK), MappingBudget(0)) as store:
        store.write_at(0, b"n" * CHUNK)
        store.read_at(0, len(CONTENT))
        store.read_at(0, len(CONTENT))
        statistics = store.statistics()
    assert {name: (o.chunks, o.bytes, o.prefetched) for name, o in statistics.origins.items()} == {
        "remote": (2, 2 * CHUNK, 1),
        "file_cache": (2, CHUNK + 300, 0),
    }
    assert statistics.source_opens == 8
