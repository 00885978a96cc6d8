"""Files of a snapshot are read in place, and no more of them is fetched than is read."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from loader_hosts import CHUNK, Host, HostFactory, image

from snaploader import (
    DirectorySource,
    FailedPrecondition,
    FileCache,
    InvalidArgument,
    NotFound,
    ReadSources,
    Snapshot,
    SnapshotKey,
    SnapshotLoader,
    SnapshotReader,
    Unavailable,
)
from snaploader.context import CallContext, current
from snaploader.digest import Buffer, Digest
from snaploader.formats.dirtree import ChunkedEntry, DirectoryEntry, FileEntry
from snaploader.testing import FakeCAS

DISK = image(1)
BIG = image(2)
NOTES = b"some notes\n" * 100


@pytest.fixture
def cas() -> FakeCAS:
    return FakeCAS()


def save(host: Host) -> None:
    home = host.folder / "home"
    (home / "sub" / "deep").mkdir(parents=True)
    (home / "empty").mkdir()
    (home / "notes").write_bytes(NOTES)
    (home / "sub" / "big").write_bytes(BIG)
    (home / "sub" / "nothing").write_bytes(b"")
    for link, target in {
        "link": "notes",
        "to-sub": "sub",
        "sub/deep/up": "../../notes",
        "sub/deep/chain": "../../link",
        "loop": "loop",
        "out": "../other",
        "absolute": "/etc/hosts",
        "broken": "none",
    }.items():
        (home / link).symlink_to(target)
    kernel = host.folder / "kernel"
    kernel.write_bytes(NOTES)
    sources = {"home": DirectorySource(home, chunk_threshold_bytes=CHUNK)}
    host.save(DISK, files={"kernel": kernel}, directories=sources)


@pytest.fixture
def elsewhere(make_host: HostFactory, cas: FakeCAS) -> Host:
    """Another host than the one that saved; nothing was read yet, but for trees."""
    save(make_host("a", remote=cas))
    return make_host("b", remote=cas)


@pytest.fixture
def snapshot(elsewhere: Host, cas: FakeCAS) -> Snapshot:
    result = elsewhere.find()
    cas.reads.clear()
    cas.calls.clear()
    return result


@pytest.fixture
def reader(elsewhere: Host, snapshot: Snapshot) -> Iterator[SnapshotReader]:
    with elsewhere.loader.read_snapshot(snapshot) as opened:
        yield opened


FILES = {
    "disk": DISK,
    "kernel": NOTES,
    "home/notes": NOTES,
    "home/sub/big": BIG,
    "home/sub/nothing": b"",
    "home/link": NOTES,
    "home/to-sub/big": BIG,
    "home/to-sub/deep/up": NOTES,
    "home/sub/deep/chain": NOTES,
}


@pytest.mark.parametrize("path", FILES)
def test_a_file_reads_as_it_was_saved(reader: SnapshotReader, path: str) -> None:
    content = FILES[path]
    assert reader.read_at(path, 0, len(content) + 10) == content
    with reader.open(path) as file:
        assert file.read() == content
        assert file.seek(-10, os.SEEK_END) == max(0, len(content) - 10) if content else True
    with reader.open(path, buffer_bytes=1) as file:
        assert file.read() == content


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SnapshotReader]:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "disk").write_bytes(DISK)
    with FileCache(folder / "cache") as cache, SnapshotLoader(cache) as loader:
        key = SnapshotKey(ref="main")
        saved = loader.cache_snapshot(key, chunked_files={"disk": folder / "disk"}, chunk_size=CHUNK)
        with loader.read_snapshot(loader.get_snapshot_by_id(saved.snapshot_id)) as opened:
            yield opened


OFFSETS = st.integers(0, len(DISK) + CHUNK)


@pytest.mark.may_leak("the loader lives as long as the module")
@given(st.lists(st.tuples(OFFSETS, st.integers(0, 3 * CHUNK)), max_size=8), st.integers(1, 3 * CHUNK))
def test_all_ways_to_read_ranges_give_the_same_bytes(
    warm: SnapshotReader, ranges: list[tuple[int, int]], buffer_bytes: int
) -> None:
    expected = [DISK[offset : offset + size] for offset, size in ranges]
    assert warm.read_ranges([("disk", offset, size) for offset, size in ranges]) == expected
    with warm.open("disk", buffer_bytes=buffer_bytes) as file:
        for (offset, size), content in zip(ranges, expected, strict=True):
            file.seek(offset)
            assert file.read(size) == content


def test_four_kibibytes_of_a_chunked_file_take_one_chunk(reader: SnapshotReader, cas: FakeCAS) -> None:
    assert reader.read_at("home/sub/big", 5 * CHUNK, CHUNK) == BIG[5 * CHUNK : 6 * CHUNK]
    with reader.open("disk") as file:
        file.seek(CHUNK)
        assert file.read(CHUNK) == DISK[CHUNK : 2 * CHUNK]
    assert cas.reads.total() == 2


def test_a_buffer_is_not_filled_from_a_chunk_that_nobody_reads(reader: SnapshotReader, cas: FakeCAS) -> None:
    with reader.open("disk", buffer_bytes=8 * CHUNK) as file:
        file.seek(CHUNK - 10)
        assert file.read(5) == DISK[CHUNK - 10 : CHUNK - 5]
    assert cas.reads.total() == 1


def test_a_hole_is_read_without_asking_any_cache(reader: SnapshotReader, cas: FakeCAS) -> None:
    assert reader.read_at("disk", 2 * CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
    target = bytearray(b"\1" * CHUNK)
    with reader.open("disk", buffer_bytes=1) as file:
        file.seek(2 * CHUNK)
        assert file.raw.readinto(target) == CHUNK
    assert target == bytes(CHUNK)
    assert not cas.calls


def test_many_ranges_come_in_one_batch(reader: SnapshotReader, cas: FakeCAS) -> None:
    ranges = [("disk", index * CHUNK, 10) for index in (0, 1, 4, 5)] + [("kernel", 3, 4), ("disk", 0, 5)]
    assert reader.read_ranges(ranges)[-2:] == [NOTES[3:7], DISK[:5]]
    assert (cas.calls["read_many"], cas.calls["read"]) == (1, 0)
    assert set(cas.reads.values()) == {1}


def test_what_the_cache_cannot_take_is_fetched_once_for_many_ranges(
    make_host: HostFactory, cas: FakeCAS
) -> None:
    save(make_host("a", remote=cas))
    host = make_host("b", remote=cas, max_bytes=3 * CHUNK)
    with host.loader.read_snapshot(host.find()) as reader:
        cas.reads.clear()
        assert reader.read_at("disk", 0, len(DISK)) == DISK
    assert set(cas.reads.values()) == {1}


def test_chunks_that_another_thread_fetches_are_waited_for(
    reader: SnapshotReader, cas: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, proceed = threading.Event(), threading.Event()
    read = cas.read

    def slow(digest: Digest) -> bytes:
        begun.set()
        assert proceed.wait(60)
        return read(digest)

    monkeypatch.setattr(cas, "read", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(reader.read_at, "disk", 0, 10)
        assert begun.wait(60)
        many = pool.submit(reader.read_at, "disk", 0, 2 * CHUNK)
        proceed.set()
        assert (one.result(60), many.result(60)) == (DISK[:10], DISK[: 2 * CHUNK])
    assert set(cas.reads.values()) == {1}


def test_an_outage_of_a_fetch_of_many_is_raised_and_the_next_try_succeeds(
    reader: SnapshotReader, cas: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Unavailable("the server sleeps")

    monkeypatch.setattr(cas, "read_many", fail)
    with pytest.raises(Unavailable):
        reader.read_at("disk", 0, 2 * CHUNK)
    assert not cas.calls["read"]
    monkeypatch.undo()
    assert reader.read_at("disk", 0, len(DISK)) == DISK


def test_of_many_chunks_the_lost_one_is_told(reader: SnapshotReader, cas: FakeCAS) -> None:
    table = reader.snapshot.tables["disk"]
    del cas.blobs[table.digest(1)]
    with pytest.raises(NotFound, match=table.digest(1).hash) as caught:
        reader.read_at("disk", 0, len(DISK))
    assert "needed for 'disk'" in caught.value.__notes__
    assert reader.read_at("disk", 0, 10) == DISK[:10]


def test_a_sequence_is_read_ahead(reader: SnapshotReader, cas: FakeCAS) -> None:
    with reader.open("disk", buffer_bytes=1) as file:
        for _ in range(8):
            file.read(CHUNK)
    assert cas.calls["read_many"]


def test_a_large_plain_file_is_streamed_and_not_held_in_memory(
    make_host: HostFactory, cas: FakeCAS, tmp_path: Path
) -> None:
    content = os.urandom(5 << 20)
    (tmp_path / "large").write_bytes(content)
    make_host("a", remote=cas).save(files={"large": tmp_path / "large"})
    host = make_host("b", remote=cas)
    with host.loader.read_snapshot(host.find()) as reader:
        cas.calls.clear()
        assert reader.read_at("large", 4 << 20, 10) == content[4 << 20 :][:10]
        assert reader.read_at("large", 7, 10) == content[7:17]
    assert cas.calls["read_to"] == 1
    assert not cas.calls["read"]


def test_a_large_plain_file_is_read_though_the_cache_cannot_take_it(
    make_host: HostFactory, cas: FakeCAS, tmp_path: Path
) -> None:
    content = os.urandom(5 << 20)
    (tmp_path / "large").write_bytes(content)
    make_host("a", remote=cas).save(files={"large": tmp_path / "large"})
    host = make_host("b", remote=cas, max_bytes=1 << 20)
    with host.loader.read_snapshot(host.find()) as reader:
        assert reader.read_at("large", 1, 10) == content[1:11]


def test_entries_and_names_are_those_of_the_snapshot(reader: SnapshotReader) -> None:
    assert reader.names("") == ["disk", "home", "kernel"]
    assert "link" in reader.names("home")
    assert reader.names("home/sub") == reader.names("home/to-sub/") == ("big", "deep", "nothing")
    assert reader.names("home/empty") == ()
    assert isinstance(reader.entry(""), DirectoryEntry)
    assert isinstance(reader.entry("home"), DirectoryEntry)
    assert isinstance(reader.entry("disk"), ChunkedEntry)
    assert isinstance(reader.entry("home/link"), FileEntry)
    assert reader.entry("kernel").mode == reader.snapshot.manifest.files["kernel"].mode
    assert reader.resolve("home/to-sub/deep/up") == "home/notes"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("none", "no file 'none'"),
        ("disk/", "no file"),
        ("disk/x", "no file"),
        ("home/none", "there is no 'none'"),
        ("home/notes/x", "'notes' is no directory"),
        ("home/link/x", "'notes' is no directory"),
        ("home/loop", "more than 40"),
        ("home/out", "out of the directory"),
        ("home/absolute", "link to '/etc/hosts'"),
        ("home/broken", "there is no 'none'"),
        ("home/..", "out of the directory"),
    ],
)
def test_a_path_that_leads_nowhere_is_not_found(reader: SnapshotReader, path: str, why: str) -> None:
    for call in (reader.entry, reader.names, reader.open, lambda path: reader.read_at(path, 0, 1)):
        with pytest.raises(NotFound, match=why):
            call(path)


@pytest.mark.parametrize(
    "call",
    [
        lambda reader: reader.names("disk"),
        lambda reader: reader.read_at("home", 0, 1),
        lambda reader: reader.open("home/sub"),
        lambda reader: reader.read_at("disk", -1, 1),
        lambda reader: reader.read_at("disk", 0, -1),
        lambda reader: reader.open("disk", buffer_bytes=0),
    ],
)
def test_what_cannot_be_asked_is_invalid(
    reader: SnapshotReader, call: Callable[[SnapshotReader], object]
) -> None:
    with pytest.raises(InvalidArgument):
        call(reader)


def test_a_file_behaves_as_files_do(reader: SnapshotReader) -> None:
    file = reader.open("disk")
    assert file.readable()
    assert file.seekable()
    assert not file.writable()
    assert file.seek(5) == file.tell() == 5
    assert file.seek(5, os.SEEK_CUR) == 10
    assert file.seek(10, os.SEEK_END) == len(DISK) + 10
    assert file.read(1) == b""
    with pytest.raises(OSError, match="cannot seek to -1"):
        file.seek(-1)
    with pytest.raises(ValueError, match="whence"):
        file.raw.seek(0, 7)
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
    raw = file.raw
    file.close()
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)


def test_lost_content_says_of_which_file_it_is(reader: SnapshotReader, cas: FakeCAS) -> None:
    cas.blobs.clear()
    with pytest.raises(NotFound, match="lost content") as caught:
        reader.read_at("home/notes", 0, 1)
    assert "needed for 'home/notes'" in caught.value.__notes__


def test_reads_are_those_of_the_caller_that_opened(make_host: HostFactory, cas: FakeCAS) -> None:
    save(make_host("a", remote=cas))
    host = make_host("b", remote=cas)
    groups: list[str | None] = []

    class Recording(FakeCAS):
        def read(self, digest: Digest) -> bytes:
            groups.append(current().group_id)
            return super().read(digest)

    cas.__class__ = Recording
    with host.loader.read_snapshot(host.find(), context=CallContext(group_id="team")) as reader:
        reader.read_at("disk", 0, 1)
        with reader.open("disk") as file:
            file.seek(CHUNK)
            file.read(1)
        reader.read_at("disk", 5 * CHUNK, 1, context=CallContext(group_id="other"))
    assert groups[-3:] == ["team", "team", "other"]


def test_what_is_read_stays_until_the_reader_is_closed(make_host: HostFactory) -> None:
    host = make_host("alone")
    host.save(DISK)
    with host.loader.read_snapshot(host.find()) as reader:
        host.cache.prune()
        assert reader.read_at("disk", 0, CHUNK) == DISK[:CHUNK]
    with pytest.raises(FailedPrecondition, match="closed"):
        reader.read_at("disk", 0, CHUNK)
    host.cache.prune()
    with pytest.raises(NotFound):
        host.find()


def past_the_cache(host: Host) -> Snapshot:
    return host.loader.get_snapshot(host.keys(), sources=ReadSources(local_chunks=False))


def test_a_file_that_is_read_past_the_cache_is_fetched_once_and_not_for_each_buffer(
    elsewhere: Host, cas: FakeCAS
) -> None:
    snapshot = past_the_cache(elsewhere)
    cas.reads.clear()
    cas.calls.clear()
    with elsewhere.loader.read_snapshot(snapshot) as reader:
        for path, content in (("kernel", NOTES), ("disk", DISK)):
            with reader.open(path, buffer_bytes=100) as file:
                assert b"".join(iter(lambda file=file: file.read(100), b"")) == content
        assert reader.read_at("kernel", 0, 10) == NOTES[:10]
    assert set(cas.reads.values()) == {1}
    assert cas.calls["read"] == 0  # nothing is held in memory


def test_blobs_that_are_read_past_the_cache_hold_few_descriptors(
    elsewhere: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snaploader.loader.read._MAX_SPOOLED", 2)
    snapshot = past_the_cache(elsewhere)
    before = len(os.listdir("/proc/self/fd"))
    with elsewhere.loader.read_snapshot(snapshot) as reader:
        for start in (0, CHUNK, 4 * CHUNK, 0):
            assert reader.read_at("disk", start, 10) == DISK[start : start + 10]
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_blob_that_arrives_after_the_reader_was_closed_is_dropped(
    elsewhere: Host, cas: FakeCAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = elsewhere.loader.read_snapshot(past_the_cache(elsewhere))
    read_to = cas.read_to

    def closing(digest: Digest, write: Callable[[Buffer], object]) -> None:
        read_to(digest, write)
        reader.close()

    monkeypatch.setattr(cas, "read_to", closing)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FailedPrecondition, match="closed"):
        reader.read_at("kernel", 0, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_lost_past_the_cache_says_what_to_do(elsewhere: Host, cas: FakeCAS) -> None:
    snapshot = past_the_cache(elsewhere)
    for digest in snapshot.digests():
        del cas.blobs[digest]
    with (
        elsewhere.loader.read_snapshot(snapshot) as reader,
        pytest.raises(NotFound, match="Look for a snapshot again"),
    ):
        reader.read_at("kernel", 0, 10)
    with pytest.raises(NotFound, match="Look for a snapshot again"):
        elsewhere.unpack(snapshot).chunked_files["disk"].read_at(0, 10)
