"""Saving a moment of a store that goes on being written."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cow_sources import MemorySource, pattern, read_chunk, wait_until

from cow import CheckpointConflict, COWStore, MappingBudget, OutOfBounds, TruncatedFile

CHUNK = 8192
COUNT = 8
SIZE = COUNT * CHUNK - 100
PATIENCE = 20


@pytest.fixture
def content():
    return bytearray(pattern(SIZE))


@pytest.fixture
def store(tmp_path, content):
    """Chunks 0 to 5 lazy; 6 and 7 holes."""
    content[6 * CHUNK :] = bytes(SIZE - 6 * CHUNK)
    with COWStore(
        tmp_path / "s",
        size=SIZE,
        chunk_size=CHUNK,
        chunks=range(6),
        source=MemorySource(bytes(content), CHUNK),
        budget=MappingBudget(3 * CHUNK),
        readahead=None,
    ) as store:
        yield store


def write(store, content, offset, data):
    store.write_at(offset, data)
    content[offset : offset + len(data)] = data


def all_of(checkpoint):
    buffer = bytearray(CHUNK)
    return b"".join(
        bytes(buffer[: checkpoint.readinto(index, buffer)]) for index in range(checkpoint.chunk_count)
    )


def test_a_checkpoint_is_a_moment_whatever_is_written_later(store, content):
    write(store, content, CHUNK + 5, b"before")
    write(store, content, 2 * CHUNK, pattern(CHUNK, 3))
    write(store, content, 6 * CHUNK + 1, b"in a hole")
    moment = bytes(content)
    with store.checkpoint() as checkpoint:
        assert checkpoint.size == SIZE
        assert checkpoint.chunk_size == CHUNK
        assert checkpoint.chunks.tolist() == [1, 2, 6]
        assert [index for index in range(COUNT) if checkpoint.is_hole(index)] == [7]
        for index in range(COUNT):
            write(store, content, index * CHUNK + 7, b"after")
        write(store, content, CHUNK, pattern(CHUNK, 9))
        write(store, content, 2 * CHUNK, bytes(CHUNK))
        store.resize(SIZE + CHUNK)
        assert all_of(checkpoint) == moment
        assert checkpoint.chunk_length(COUNT - 1) == CHUNK - 100
    assert store.read_at(0, SIZE) == content
    assert store.dirty_chunks.tolist() == list(range(COUNT))


def test_a_frozen_file_is_the_chunk_and_can_be_linked(store, content, tmp_path):
    write(store, content, CHUNK + 5, b"before")
    with store.checkpoint() as checkpoint:
        path = checkpoint.path(1)
        assert path is not None
        os.link(path, tmp_path / "cached")
        os.chmod(tmp_path / "cached", 0o444)
        saved = (tmp_path / "cached").read_bytes()
        assert saved == content[CHUNK : 2 * CHUNK]
        assert checkpoint.path(0) is None
        assert checkpoint.path(7) is None
        write(store, content, CHUNK, b"x")
        write(store, content, CHUNK, pattern(CHUNK, 5))
        assert os.path.exists(path)
    assert not os.path.exists(path)
    assert (tmp_path / "cached").read_bytes() == saved
    assert store.read_at(0, SIZE) == content


@pytest.mark.parametrize("how", ["commit", "release", "exit"])
def test_a_linked_file_never_changes_after_the_end_either(store, content, tmp_path, how):
    write(store, content, CHUNK + 5, b"before")
    with store.checkpoint() as checkpoint:
        os.link(checkpoint.path(1), tmp_path / "cached")
        if how == "commit":
            checkpoint.commit()
        elif how == "release":
            checkpoint.release()
    saved = (tmp_path / "cached").read_bytes()
    write(store, content, CHUNK, b"after")
    assert (tmp_path / "cached").read_bytes() == saved
    assert store.read_at(0, SIZE) == content


def test_after_a_commit_only_what_was_written_since_is_dirty(store, content):
    write(store, content, CHUNK, b"one")
    write(store, content, 2 * CHUNK, b"two")
    checkpoint = store.checkpoint()
    write(store, content, 2 * CHUNK + 5000, b"since")
    write(store, content, 3 * CHUNK, b"three")
    assert store.dirty_chunks.tolist() == [1, 2, 3]
    assert store.dirty_pages(2).tolist() == [True, True]
    checkpoint.commit()
    assert store.dirty_chunks.tolist() == [2, 3]
    assert store.dirty_pages(2).tolist() == [False, True]
    with store.checkpoint() as second:
        assert second.chunks.tolist() == [2, 3]
        second.commit()
    assert len(store.dirty_chunks) == 0
    with store.checkpoint() as third:
        assert len(third.chunks) == 0
        assert all_of(third) == content


def test_a_release_loses_nothing(store, content):
    write(store, content, CHUNK, b"one")
    with store.checkpoint():
        write(store, content, 2 * CHUNK, b"two")
    assert store.dirty_chunks.tolist() == [1, 2]
    assert store.dirty_pages(1).tolist() == [True, False]
    with store.checkpoint() as second:
        assert second.chunks.tolist() == [1, 2]
        assert all_of(second) == content


def test_files_that_a_commit_leaves_are_kept_as_clean_copies(store, content):
    write(store, content, CHUNK, b"one")
    with store.checkpoint() as checkpoint:
        checkpoint.commit(MemorySource(bytes(SIZE), CHUNK))
    assert read_chunk(store, 1) == content[CHUNK : 2 * CHUNK]
    assert os.listdir(store.data_dir) == ["1.0"]


def test_a_commit_replaces_the_source_for_lazy_chunks(store, content):
    write(store, content, CHUNK, b"one")
    source = MemorySource(bytes(content), CHUNK)
    with store.checkpoint() as checkpoint:
        checkpoint.commit(source)
    assert store.source is source
    assert read_chunk(store, 4) == content[4 * CHUNK : 5 * CHUNK]
    assert source.opens == {4: 1}


def test_a_converted_file_is_saved_as_a_whole_once(tmp_path, content):
    content[2 * CHUNK : 3 * CHUNK] = bytes(CHUNK)
    (tmp_path / "file").write_bytes(content)
    for copy in (True, False):
        with COWStore.from_file(tmp_path / "file", tmp_path / f"s{copy}", CHUNK, copy=copy) as store:
            with store.checkpoint() as checkpoint:
                expected = [0, 1, *([] if copy else [2]), 3, 4, 5, 6, 7]
                assert checkpoint.chunks.tolist() == expected
                assert (checkpoint.path(0) is not None) == copy
                assert all_of(checkpoint) == content
                checkpoint.commit()
            with store.checkpoint() as checkpoint:
                assert len(checkpoint.chunks) == 0
            store.write_at(5, b"x")
            with store.checkpoint() as checkpoint:
                assert checkpoint.chunks.tolist() == [0]
            assert store.read_at(6, SIZE - 6) == content[6:]


def test_one_checkpoint_at_a_time(store):
    with store.checkpoint() as checkpoint, pytest.raises(CheckpointConflict):
        store.checkpoint()
    for call in (
        lambda: checkpoint.readinto(0, bytearray(CHUNK)),
        lambda: checkpoint.path(0),
        lambda: checkpoint.is_hole(0),
        checkpoint.commit,
    ):
        with pytest.raises(CheckpointConflict):
            call()
    checkpoint.release()
    second = store.checkpoint()
    checkpoint.release()
    with pytest.raises(CheckpointConflict):
        checkpoint.commit()
    second.commit()
    with pytest.raises(CheckpointConflict):
        second.commit()


def test_checkpoint_arguments_are_checked(store):
    with store.checkpoint() as checkpoint:
        for index in (-1, COUNT):
            with pytest.raises(OutOfBounds):
                checkpoint.readinto(index, bytearray(CHUNK))
        with pytest.raises(ValueError, match="too small"):
            checkpoint.readinto(0, bytearray(CHUNK - 1))
        with pytest.raises(ValueError, match="read-only"):
            checkpoint.chunks[:] = 0


def test_a_frozen_file_cut_short_from_outside_is_an_error(store):
    store.write_at(0, b"x")
    with store.checkpoint() as checkpoint:
        os.truncate(checkpoint.path(0), 100)
        with pytest.raises(TruncatedFile):
            checkpoint.readinto(0, bytearray(CHUNK))


def test_a_commit_waits_for_readers_of_the_checkpoint(store):
    begun, release = threading.Event(), threading.Event()

    def wait(index):
        begun.set()
        assert release.wait(PATIENCE)

    store.source.before_open = wait
    checkpoint = store.checkpoint()
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(checkpoint.readinto, 0, bytearray(CHUNK))
        assert begun.wait(PATIENCE)
        ending = pool.submit(checkpoint.commit)
        wait_until(lambda: checkpoint._gate.closed)
        assert not ending.done()
        store.write_at(CHUNK * 7, b"writes go on")
        release.set()
        assert reading.result(PATIENCE) == CHUNK
        ending.result(PATIENCE)


def test_checkpoints_see_whole_writes_only(tmp_path):
    """Writers stamp two chunks in one call; every checkpoint must see both stamps alike."""
    with COWStore(tmp_path / "s", size=8 * CHUNK, chunk_size=CHUNK) as store:
        stop = threading.Event()

        def stamp(pair):
            number = 0
            while not stop.is_set():
                number += 1
                data = bytes([1 + number % 250]) * (2 * 4096)
                store.write_at(pair * 2 * CHUNK + CHUNK - 4096, data)

        threads = [threading.Thread(target=stamp, args=(pair,)) for pair in range(4)]
        for thread in threads:
            thread.start()
        try:
            buffers = [bytearray(CHUNK), bytearray(CHUNK)]
            for round_ in range(40):
                with store.checkpoint() as checkpoint:
                    for pair in range(4):
                        for half in (0, 1):
                            checkpoint.readinto(2 * pair + half, buffers[half])
                        assert len(set(buffers[0][-4096:]) | set(buffers[1][:4096])) == 1
                    if round_ % 2:
                        checkpoint.commit()
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
