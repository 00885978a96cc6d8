"""Converting files, exporting, and the file object."""

from __future__ import annotations

import io
import os
import subprocess

import pytest
from cow_sources import MemorySource, open_files, pattern

from cow import COWStore, MappingBudget, TruncatedFile

CHUNK = 65536


@pytest.fixture
def sparse(tmp_path):
    """Data in 0 and 5, written zeros in 2, one byte at the end of 9, a short 10; holes elsewhere."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(pattern(CHUNK))
        file.seek(2 * CHUNK)
        file.write(bytes(CHUNK))
        file.seek(5 * CHUNK + 4096)
        file.write(pattern(4096))
        file.seek(10 * CHUNK - 1)
        file.write(b"x" + pattern(777, 2))
    return path


def disk(path):
    return os.stat(path).st_blocks * 512


def file_system(path):
    return subprocess.run(
        ["stat", "-f", "-c", "%T", path], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("copy", [True, False])
def test_converting_skips_holes(tmp_path, sparse, copy):
    with COWStore.from_file(sparse, tmp_path / "s", CHUNK, copy=copy) as store:
        assert store.read_at(0, store.size) == sparse.read_bytes()
        assert len(store.dirty_chunks) == 0
        holes = [index for index in range(11) if store.is_hole(index)]
        assert holes == ([1, 2, 3, 4, 6, 7, 8] if copy else [1, 3, 4, 6, 7, 8])
        statistics = store.statistics()
        if copy:
            assert sorted(os.listdir(store.data_dir)) == ["0.0", "10.0", "5.0", "9.0"]
            # tmpfs copies into pages of whichever size it likes.
            if file_system(tmp_path) != "tmpfs":
                assert disk(tmp_path / "s" / "5.0") == 4096
            assert statistics.private_chunks == 4
        else:
            assert os.listdir(store.data_dir) == []
            assert statistics.base_chunks == 5
            assert statistics.origins["local_file"].chunks == 5


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("size", [0, 1, 3 * CHUNK + 5])
def test_a_file_without_data_is_all_holes(tmp_path, copy, size):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    with COWStore.from_file(tmp_path / "file", tmp_path / "s", CHUNK, copy=copy) as store:
        assert store.statistics().hole_chunks == store.chunk_count
        assert store.read_at(0, size) == bytes(size)
        with store.checkpoint() as checkpoint:
            assert len(checkpoint.chunks) == 0
        store.export(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(size)
    assert disk(tmp_path / "out") == 0


def test_a_converted_store_needs_its_file_no_more(tmp_path, sparse):
    content = sparse.read_bytes()
    before = open_files()
    with COWStore.from_file(sparse, tmp_path / "s", CHUNK) as store:
        assert open_files() == before + 1
        sparse.write_bytes(b"something else")
        assert store.read_at(0, store.size) == content


def test_writes_to_an_uncopied_file_go_elsewhere(tmp_path, sparse):
    content = bytearray(sparse.read_bytes())
    with COWStore.from_file(sparse, tmp_path / "s", CHUNK, copy=False) as store:
        view = store.view(5 * CHUNK, 8192)
        store.write_at(5 * CHUNK + 100, b"new")
        assert sparse.read_bytes() == content
        assert bytes(view) == content[5 * CHUNK : 5 * CHUNK + 8192]
        content[5 * CHUNK + 100 : 5 * CHUNK + 103] = b"new"
        assert store.read_at(0, store.size) == content


def test_conversion_that_fails_leaves_nothing(tmp_path, sparse, monkeypatch):
    before = open_files()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        COWStore.from_file(sparse, tmp_path / "s", CHUNK)
    assert not (tmp_path / "s").exists()
    assert open_files() == before


@pytest.mark.parametrize("copy", [True, False])
def test_a_file_of_too_many_chunks_is_refused_and_leaves_no_folder(tmp_path, copy):
    with (tmp_path / "file").open("wb") as file:
        file.truncate((1 << 24) * 4096 + 1)
    with pytest.raises(ValueError, match="out of range"):
        COWStore.from_file(tmp_path / "file", tmp_path / "s", 4096, copy=copy)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_what_is_no_file_cannot_be_converted(tmp_path, name):
    (tmp_path / "folder").mkdir()
    before = open_files()
    with pytest.raises((OSError, ValueError)):
        COWStore.from_file(tmp_path / name, tmp_path / "s", CHUNK)
    assert open_files() == before
    assert not (tmp_path / "s").exists()


def test_a_truncated_original_is_an_error_not_a_crash(tmp_path, sparse):
    with COWStore.from_file(sparse, tmp_path / "s", CHUNK, copy=False) as store:
        os.truncate(sparse, 5 * CHUNK + 5000)
        assert store.read_at(0, CHUNK) == sparse.read_bytes()[:CHUNK]
        for call in (
            lambda: store.read_at(5 * CHUNK, 6000),
            lambda: store.view(5 * CHUNK, 10),
            lambda: store.write_at(5 * CHUNK, b"x"),
            lambda: store.readinto_at(9 * CHUNK, bytearray(CHUNK)),
            lambda: store.read_at(0, store.size),
            lambda: store.export(tmp_path / "out"),
            lambda: store.resize(store.size + 1),
        ):
            with pytest.raises(TruncatedFile, match="image"):
                call()
        assert os.listdir(store.data_dir) == []
        assert sorted(os.listdir(tmp_path)) == ["image", "s"]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("kind", ["copy", "base", "lazy"])
def test_exporting_writes_the_content_and_its_holes(tmp_path, sparse, kind, durable):
    content = bytearray(sparse.read_bytes())
    budget = MappingBudget()
    source = MemorySource(bytes(content), CHUNK)
    if kind == "lazy":
        store = COWStore(
            tmp_path / "s",
            size=len(content),
            chunk_size=CHUNK,
            chunks=[0, 5, 9, 10],
            source=source,
            budget=budget,
        )
    else:
        store = COWStore.from_file(sparse, tmp_path / "s", CHUNK, copy=kind == "copy", budget=budget)
    (tmp_path / "out").write_text("old")
    with store:
        store.write_at(7 * CHUNK + 5, b"y")
        content[7 * CHUNK + 5] = ord("y")
        before = open_files()
        store.export(tmp_path / "out", durable=durable)
        assert open_files() == before
        assert (tmp_path / "out").read_bytes() == content
        assert disk(tmp_path / "out") <= disk(sparse) + (CHUNK if kind == "lazy" else 8192)
        assert budget.mapped_bytes == 0
        assert sorted(os.listdir(tmp_path)) == ["image", "out", "s"]
        if kind == "lazy":
            assert [index for batch in source.prefetched for index in batch] == [0, 5, 9, 10]
            origins = store.statistics().origins
            assert (origins["remote"].chunks, origins["hole"].chunks) == (4, 6)


def test_exporting_names_every_lazy_chunk_to_the_source_once_and_in_time(tmp_path):
    chunk_size = 1 << 20
    content = pattern(chunk_size) * 50
    source = MemorySource(content, chunk_size)
    behind = []

    def check(index):
        if not any(index in batch for batch in source.prefetched):
            behind.append(index)

    source.before_open = check
    with COWStore(
        tmp_path / "s", size=len(content), chunk_size=chunk_size, chunks=range(50), source=source
    ) as store:
        store.export(tmp_path / "out")
    asked = [index for batch in source.prefetched for index in batch]
    assert asked == list(range(50))
    assert max(len(batch) for batch in source.prefetched) <= 32
    assert behind == []


def test_an_export_that_fails_leaves_the_target_as_it_was(tmp_path):
    source = MemorySource(pattern(3 * CHUNK), CHUNK)

    def fail(index):
        if index == 2:
            raise LookupError("chunk 2 is gone")

    source.before_open = fail
    (tmp_path / "out").write_text("old")
    with (
        COWStore(tmp_path / "s", size=3 * CHUNK, chunk_size=CHUNK, chunks=range(3), source=source) as store,
        pytest.raises(LookupError, match="chunk 2"),
    ):
        store.export(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_store_is_a_file(tmp_path, sparse):
    content = sparse.read_bytes()
    with COWStore.from_file(sparse, tmp_path / "s", CHUNK) as store:
        with store.open() as file:
            assert (file.readable(), file.writable(), file.seekable()) == (True, True, True)
            assert file.read() == content
            assert file.read(10) == b""
            assert file.seek(-5, io.SEEK_END) == len(content) - 5
            assert file.read(10) == content[-5:]
            assert file.seek(10) == file.tell() == 10
            assert file.seek(5, io.SEEK_CUR) == 15
            assert file.write(b"hello") == 5
            assert file.tell() == 20
            assert store.read_at(15, 5) == b"hello"
            with pytest.raises(ValueError, match="seek"):
                file.seek(-1)
            with pytest.raises(ValueError, match="whence"):
                file.seek(0, 9)
            file.seek(0, io.SEEK_END)
            with pytest.raises(ValueError, match="inside"):
                file.write(b"x")
            assert file.truncate(len(content) + 10) == len(content) + 10
            assert file.write(b"0123456789") == 10
            with pytest.raises(ValueError, match="shrink"):
                file.truncate(5)
            file.seek(10**9)
            assert file.read(1) == b""
        with pytest.raises(ValueError, match="closed"):
            file.read(1)
        with io.BufferedRandom(store.open()) as buffered:
            buffered.seek(100)
            buffered.write(b"buffered")
            buffered.seek(98)
            assert buffered.read(12)[2:10] == b"buffered"
        assert store.read_at(100, 8) == b"buffered"
