"""Reading, writing, growing, closing: one store, one thread."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from cow_sources import MemorySource, open_files, pattern, read_chunk

from cow import COWStore, MappingBudget, OutOfBounds, StoreClosed, StoreInUse, TruncatedFile

CHUNK = 8192
PATIENCE = 60
SIZE = 5 * CHUNK + 100


@pytest.fixture
def store(tmp_path):
    with COWStore(tmp_path / "store", size=SIZE, chunk_size=CHUNK, budget=MappingBudget(2 * CHUNK)) as store:
        yield store


def files(store):
    return sorted(os.listdir(store.data_dir))


def blocks(store):
    return sum(os.stat(os.path.join(store.data_dir, name)).st_blocks for name in files(store))


def test_a_new_store_is_one_hole_without_files(store):
    assert store.read_at(0, SIZE) == bytes(SIZE)
    assert files(store) == []
    assert len(store.dirty_chunks) == 0
    statistics = store.statistics()
    assert (statistics.hole_chunks, statistics.hole_bytes, statistics.hole_reads) == (6, SIZE, 6)
    assert statistics.mapped_bytes == 0


def test_one_byte_in_a_hole_costs_one_block(store):
    store.write_at(2 * CHUNK + 5000, b"x")
    assert files(store) == ["2.0"]
    assert os.stat(os.path.join(store.data_dir, "2.0")).st_size == CHUNK
    assert blocks(store) * 512 == os.statvfs(store.data_dir).f_bsize
    assert store.read_at(2 * CHUNK + 4999, 3) == b"\0x\0"
    assert store.dirty_chunks.tolist() == [2]
    assert store.dirty_pages(2).tolist() == [False, True]


def test_zeros_written_to_a_hole_change_nothing(store):
    store.write_at(10, bytes(3 * CHUNK))
    assert files(store) == []
    assert len(store.dirty_chunks) == 0


def test_zeros_over_a_whole_chunk_make_a_hole(store):
    store.write_at(0, pattern(SIZE))
    store.write_at(CHUNK, bytes(CHUNK))
    store.write_at(5 * CHUNK, bytes(100))
    assert files(store) == ["0.0", "2.0", "3.0", "4.0"]
    assert store.is_hole(1)
    assert store.is_hole(5)
    assert store.dirty_chunks.tolist() == [0, 1, 2, 3, 4, 5]
    expected = bytearray(pattern(SIZE))
    expected[CHUNK : 2 * CHUNK] = bytes(CHUNK)
    expected[5 * CHUNK :] = bytes(100)
    assert store.read_at(0, SIZE) == expected
    store.write_at(CHUNK + 1, b"again")
    assert store.read_at(CHUNK, 7) == b"\0again\0"


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (SIZE, 0), (0, 1), (CHUNK - 1, 2), (CHUNK, CHUNK), (100, 3 * CHUNK), (SIZE - 1, 1), (0, SIZE)],
)
def test_every_way_to_read_agrees(store, offset, size):
    content = pattern(SIZE)
    assert store.write_at(0, content) == SIZE
    expected = content[offset : offset + size]
    assert store.read_at(offset, size) == expected
    buffer = bytearray(size)
    assert store.readinto_at(offset, buffer) == size
    assert buffer == expected
    view = store.view(offset, size)
    assert (view.dtype, view.shape, view.flags.writeable) == (np.uint8, (size,), False)
    assert view.tobytes() == expected


def test_large_reads_and_single_bytes(tmp_path):
    content = pattern(3 << 20)
    with COWStore(tmp_path / "big", size=len(content) + (1 << 20)) as store:
        store.write_at(0, content)
        assert store.read_at(1, len(content)) == content[1:] + b"\0"
        assert store.read_at(0, 400_000) == content[:400_000]
        # One-byte bytes objects are shared by the interpreter and must not be filled in place.
        assert [store.read_at(position, 1) for position in range(5)] == [
            bytes([byte]) for byte in content[:5]
        ]
        assert bytes(1) == b"\0"


def test_any_contiguous_buffer_can_be_written_and_filled(store):
    array = np.arange(100, dtype=np.uint32).reshape(10, 10)
    assert store.write_at(3, array) == 400
    back = np.zeros_like(array)
    assert store.readinto_at(3, back) == 400
    assert (back == array).all()
    with pytest.raises((BufferError, ValueError, TypeError)):
        store.write_at(0, array[:, ::2])
    with pytest.raises(TypeError):
        store.write_at(0, "text")
    with pytest.raises(TypeError, match="writable"):
        store.readinto_at(0, b"read-only")


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 65, 1)])
def test_out_of_bounds_touches_nothing(store, offset, size):
    content = pattern(SIZE)
    store.write_at(0, content)
    buffer = bytearray(size)
    for call in (
        lambda: store.read_at(offset, size),
        lambda: store.view(offset, size),
        lambda: store.write_at(offset, b"x" * size),
        lambda: store.readinto_at(offset, buffer),
    ):
        with pytest.raises(OutOfBounds):
            call()
    assert buffer == bytes(size)
    assert store.read_at(0, SIZE) == content


def test_chunk_indices_are_checked(store):
    for call in (store.is_hole, store.dirty_pages):
        for index in (-1, 6):
            with pytest.raises(OutOfBounds):
                call(index)
    with pytest.raises(OutOfBounds):
        store.read_at(0, -1)
    with pytest.raises(TypeError):
        store.read_at(0, "1")


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("size", [SIZE + 1, 6 * CHUNK, 6 * CHUNK + 1, 20 * CHUNK])
@pytest.mark.parametrize("kind", ["hole", "private", "frozen", "lazy", "base", "base-copied"])
def test_growing_keeps_the_content_and_adds_zeros(tmp_path, kind, size, written):
    content = bytearray(pattern(SIZE))
    if kind == "hole":
        content[5 * CHUNK :] = bytes(100)
    (tmp_path / "file").write_bytes(content)
    if kind.startswith("base"):
        store = COWStore.from_file(tmp_path / "file", tmp_path / "s", CHUNK, copy=kind == "base-copied")
    elif kind == "lazy":
        source = MemorySource(bytes(content), CHUNK)
        store = COWStore(tmp_path / "s", size=SIZE, chunk_size=CHUNK, chunks=range(6), source=source)
    else:
        store = COWStore(tmp_path / "s", size=SIZE, chunk_size=CHUNK)
        store.write_at(0, content)
    with store:
        if kind == "frozen":
            store.checkpoint().release()
        if written:
            store.write_at(SIZE - 10, b"0123456789")
            content[SIZE - 10 :] = b"0123456789"
        view = store.view(5 * CHUNK, 100)
        store.resize(size)
        content += bytes(size - SIZE)
        assert store.size == size
        assert store.read_at(0, size) == content
        assert bytes(view) == content[5 * CHUNK : 5 * CHUNK + 100]
        store.write_at(size - 1, b"z")
        content[-1:] = b"z"
        assert store.read_at(0, size) == content
        if kind != "hole" or written:
            assert 5 in store.dirty_chunks
        for name in os.listdir(store.data_dir):
            length = min(CHUNK, store.size - int(name.partition(".")[0]) * CHUNK)
            assert os.stat(os.path.join(store.data_dir, name)).st_size == length


def test_a_store_never_shrinks(store):
    store.resize(SIZE)
    for size in (SIZE - 1, 0, -1):
        with pytest.raises(ValueError, match=r"shrink|out of range"):
            store.resize(size)
    with pytest.raises(ValueError, match="out of range"):
        store.resize(1 << 60)
    assert store.size == SIZE


def test_an_empty_store_works_and_grows(tmp_path):
    with COWStore(tmp_path / "s", size=0, chunk_size=CHUNK) as store:
        assert store.read_at(0, 0) == b""
        assert store.chunk_count == 0
        store.export(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b""
        store.resize(10)
        store.write_at(0, b"0123456789")
        assert store.read_at(0, 10) == b"0123456789"


def test_dirty_pages_are_exactly_those_written(store):
    store.write_at(CHUNK + 4095, b"xx")
    store.write_at(3 * CHUNK - 1, b"xx")
    assert store.dirty_chunks.tolist() == [1, 2, 3]
    assert store.dirty_pages(1).tolist() == [True, True]
    assert store.dirty_pages(2).tolist() == [False, True]
    assert store.dirty_pages(3).tolist() == [True, False]
    assert store.dirty_pages(5).tolist() == [False]


def test_closing_removes_the_files_and_ends_every_use(tmp_path):
    before = open_files()
    store = COWStore(tmp_path / "new" / "dir", size=SIZE, chunk_size=CHUNK)
    store.write_at(0, pattern(SIZE))
    file = store.open()
    checkpoint = store.checkpoint()
    store.write_at(0, b"x")
    store.close()
    store.close()
    assert store.closed
    assert not (tmp_path / "new" / "dir").exists()
    assert open_files() == before
    for call in (
        lambda: store.read_at(0, 1),
        lambda: store.write_at(0, b"x"),
        lambda: store.view(0, 1),
        lambda: store.readinto_at(0, bytearray(1)),
        lambda: read_chunk(store, 0),
        lambda: store.resize(SIZE + 1),
        store.sync,
        store.checkpoint,
        store.statistics,
        store.open,
        lambda: store.dirty_chunks,
        lambda: store.export(tmp_path / "x"),
        store.__enter__,
        lambda: file.read(1),
        lambda: checkpoint.readinto(0, bytearray(CHUNK)),
        lambda: checkpoint.path(0),
        lambda: checkpoint.commit(),
    ):
        with pytest.raises(StoreClosed):
            call()
    checkpoint.release()
    assert not list(tmp_path.rglob("x"))


def test_a_folder_that_was_there_stays_with_what_else_is_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with COWStore(tmp_path, size=SIZE, chunk_size=CHUNK) as store:
        store.write_at(0, b"x")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_belongs_to_one_store_at_a_time(tmp_path):
    with COWStore(tmp_path, size=SIZE), pytest.raises(StoreInUse, match="open store"):
        COWStore(tmp_path, size=SIZE)
    (tmp_path / "3.0").write_bytes(b"left by a crash")
    before = open_files()
    with pytest.raises(StoreInUse, match=r"3\.0"):
        COWStore(tmp_path, size=SIZE)
    assert open_files() == before


def test_senseless_arguments_are_refused(tmp_path):
    source = MemorySource(b"", CHUNK)
    for arguments, error in (
        ({"size": -1}, ValueError),
        ({"size": "1"}, TypeError),
        ({"size": 1, "chunk_size": 5000}, ValueError),
        ({"size": 1, "chunks": [0]}, ValueError),
        ({"size": CHUNK, "chunks": [1], "source": source, "chunk_size": CHUNK}, OutOfBounds),
        ({"size": CHUNK, "chunks": [-1], "source": source, "chunk_size": CHUNK}, OutOfBounds),
        ({"size": CHUNK, "chunks": np.ones(2, bool), "source": source, "chunk_size": CHUNK}, ValueError),
        ({"size": CHUNK, "chunks": np.ones(1), "source": source, "chunk_size": CHUNK}, TypeError),
        ({"size": CHUNK, "chunks": [0.5], "source": source, "chunk_size": CHUNK}, TypeError),
    ):
        with pytest.raises(error):
            COWStore(tmp_path / "s", **arguments)
        assert not (tmp_path / "s").exists()


def test_sync_makes_files_and_folder_durable_once(store, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store.write_at(CHUNK, b"x" * (CHUNK + 1))
    store.sync()
    assert synced == [f"{store.data_dir}/1.0", f"{store.data_dir}/2.0", store.data_dir]
    synced.clear()
    store.sync()
    assert synced == [store.data_dir]


def test_a_failed_sync_is_raised_and_tried_again(store, monkeypatch):
    real = os.fsync

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    store.write_at(0, b"x")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.sync()
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    store.sync()
    assert len(synced) == 2


def test_a_write_that_a_sync_overtakes_is_synced_by_the_next_one(store, monkeypatch):
    store.write_at(0, b"x")
    real = os.pwrite

    def sync_first(fd, data, offset):
        store.sync()
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", sync_first)
        store.write_at(0, b"y")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    store.sync()
    assert synced == [f"{store.data_dir}/0.0", store.data_dir]


def test_a_sync_does_not_trust_one_that_is_under_way(store, monkeypatch):
    """The first one fails after the second one had time to return, which must flush the chunk itself then."""
    store.write_at(0, b"x")
    synced = []
    other = threading.Thread(target=store.sync)

    def fail_first(fd):
        if threading.current_thread() is other:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            return
        other.start()
        other.join(0.2)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_first)
    with pytest.raises(OSError, match="Input/output"):
        store.sync()
    other.join(PATIENCE)
    assert synced == [f"{store.data_dir}/0.0", store.data_dir]


@pytest.mark.parametrize("kind", ["hole", "lazy", "base", "private", "frozen"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_big_reads_agree_with_small_ones_mapped_or_not(tmp_path, kind, budget):
    """From 128 KiB on a first read goes to the file, and a copy lets other threads run."""
    big = 256 * 1024
    size = 3 * big - 1000
    content = pattern(size) if kind != "hole" else bytes(size)
    (tmp_path / "file").write_bytes(content)
    arguments = {"size": size, "chunk_size": big, "budget": MappingBudget(budget)}
    if kind == "base":
        store = COWStore.from_file(tmp_path / "file", tmp_path / "s", big, copy=False)
    elif kind == "lazy":
        store = COWStore(tmp_path / "s", chunks=range(3), source=MemorySource(content, big), **arguments)
    else:
        store = COWStore(tmp_path / "s", **arguments)
        store.write_at(0, content)
        if kind == "frozen":
            store.checkpoint().commit()
    before = open_files()
    with store:
        for offset, length in ((5, big - 5), (0, size), (big + 1, big // 2), (0, size), (size - big, big)):
            expected = content[offset : offset + length]
            assert store.read_at(offset, length) == expected
            buffer = bytearray(b"?" * length)
            assert store.readinto_at(offset, buffer) == length
            assert buffer == expected
            assert store.view(offset, length).tobytes() == expected
            assert open_files() == before


def test_a_big_read_of_a_file_that_is_too_short_is_an_error_and_maps_nothing(tmp_path):
    big = 256 * 1024
    budget = MappingBudget()
    source = MemorySource(pattern(big + 100), big)
    with COWStore(
        tmp_path / "s", size=2 * big, chunk_size=big, chunks=[0, 1], source=source, budget=budget
    ) as store:
        with pytest.raises(TruncatedFile, match="chunk 1 "):
            store.read_at(0, 2 * big)
        assert budget.mapped_bytes == big
        assert store.read_at(0, big) == source.content[:big]


class FullDisk:
    """Lets `room` bytes through pwrite, then says ENOSPC."""

    def __init__(self, room):
        self.room = room
        self.real = os.pwrite

    def __call__(self, fd, data, offset):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: self.room]
        self.room -= len(data)
        return self.real(fd, data, offset)


@pytest.mark.parametrize("kind", ["hole", "lazy", "base", "frozen"])
@pytest.mark.parametrize(
    ("room", "length"), [(0, 100), (50, 100), (0, CHUNK), (50, CHUNK), (CHUNK - 1, CHUNK)]
)
def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch, kind, room, length):
    content = pattern(2 * CHUNK) if kind != "hole" else bytes(2 * CHUNK)
    (tmp_path / "file").write_bytes(content)
    if kind == "base":
        store = COWStore.from_file(tmp_path / "file", tmp_path / "s", CHUNK, copy=False)
    else:
        source = MemorySource(content, CHUNK)
        chunks = [0, 1] if kind == "lazy" else []
        store = COWStore(tmp_path / "s", size=2 * CHUNK, chunk_size=CHUNK, chunks=chunks, source=source)
    with store:
        if kind == "frozen":
            store.write_at(0, content)
            store.checkpoint().commit()
        before = sorted(os.listdir(store.data_dir)), open_files()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(room))
            with pytest.raises(OSError, match="No space"):
                store.write_at(0, b"n" * length)
        assert (sorted(os.listdir(store.data_dir)), open_files()) == before
        assert store.read_at(0, 2 * CHUNK) == content
        assert len(store.dirty_chunks) == 0
        store.write_at(0, b"n" * length)
        assert store.read_at(0, 2 * CHUNK) == b"n" * length + content[length:]


def test_a_full_disk_in_a_private_chunk_leaves_old_or_new_bytes_and_it_is_dirty(store, monkeypatch):
    store.write_at(0, b"o" * CHUNK)
    store.checkpoint().commit()
    store.write_at(0, b"p" * CHUNK)
    store.checkpoint().commit()
    store.write_at(0, b"o")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", FullDisk(4096))
        with pytest.raises(OSError, match="No space"):
            store.write_at(0, b"n" * 5000)
    assert store.read_at(0, 5001) == b"n" * 4096 + b"p" * 905
    assert store.dirty_chunks.tolist() == [0]


def test_a_failed_growth_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    content = pattern(SIZE)
    source = MemorySource(content, CHUNK)
    with COWStore(tmp_path / "s", size=SIZE, chunk_size=CHUNK, chunks=range(6), source=source) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", FullDisk(10))
            with pytest.raises(OSError, match="No space"):
                store.resize(SIZE + CHUNK)
        assert store.size == SIZE
        assert store.read_at(0, SIZE) == content
        assert os.listdir(store.data_dir) == []
        store.resize(SIZE + CHUNK)
        assert store.read_at(0, SIZE + CHUNK) == content + bytes(CHUNK)


def test_repr_says_where_and_how_big(store):
    assert str(SIZE) in repr(store)
    store.close()
    assert "closed" in repr(store)


@pytest.mark.parametrize("count", [200_000])
def test_a_store_of_very_many_chunks_opens_cheaply(tmp_path, count):
    import tracemalloc

    source = MemorySource(pattern(4096) * 3, 4096)
    mask = np.ones(count, np.bool_)
    tracemalloc.start()
    try:
        with COWStore(
            tmp_path / "s", size=count * 4096, chunk_size=4096, chunks=mask, source=source, readahead=None
        ) as store:
            store.read_at(4096, 4096)
            assert tracemalloc.get_traced_memory()[1] < 20 * count
            assert store.statistics().lazy_chunks == count
    finally:
        tracemalloc.stop()
