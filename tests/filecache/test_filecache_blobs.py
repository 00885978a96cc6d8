"""Blobs: in, out, verified, whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from filecache_helpers import (
    BLAKE3,
    SHA256,
    blob,
    blob_file,
    damage,
    disk_bytes_below,
    leftovers,
    open_without_o_tmpfile,
    put,
)

from snaploader import files
from snaploader.blobstore import Upload
from snaploader.digest import Digest, empty_digest
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from snaploader.filecache import FileCache
from snaploader.filecache.blobs import VerifiedMemo


@pytest.fixture
def cache(tmp_path: Path):
    with FileCache(tmp_path / "cache") as cache:
        yield cache
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("function", [SHA256, BLAKE3])
@pytest.mark.parametrize("size", [1, 4096, files.BUFFER_BYTES, files.BUFFER_BYTES * 2 + 1])
def test_blob_comes_back_after_reopening(tmp_path, function, size):
    digest, data = blob("x", size, function)
    with FileCache(tmp_path) as cache:
        assert cache.find_missing([digest]) == {digest}
        cache.write(digest, data)
    with FileCache(tmp_path) as cache:
        assert cache.find_missing([digest]) == set()
        assert cache.read(digest) == data
        assert cache.statistics().verified_blobs == 1
        assert cache.read(digest) == data
        assert cache.statistics().verified_blobs == 1


def test_absent_blob_is_not_found(cache):
    digest, _ = blob(1)
    for ask in (cache.read, cache.open, cache.path, lambda d: cache.materialize(d, cache.root + "/out")):
        with pytest.raises(NotFound, match=digest.hash):
            ask(digest)


@pytest.mark.parametrize(
    "digest",
    [
        Digest("../" * 21 + "a", 1, SHA256),
        Digest("A" * 64, 1, SHA256),
        Digest("a" * 63, 1, SHA256),
        Digest("", 0, SHA256),
    ],
)
def test_malformed_digest_is_refused(cache, digest):
    for ask in (
        cache.read,
        lambda d: cache.find_missing([d]),
        lambda d: cache.put_verified(d, b"x" * d.size_bytes),
        lambda d: cache.lease([d]),
    ):
        with pytest.raises(InvalidArgument):
            ask(digest)


def test_malformed_digest_among_many_is_refused(cache):
    many = [blob(number, 1)[0]._replace(hash=f"{number:064x}") for number in range(3000)]
    with pytest.raises(InvalidArgument):
        cache.find_missing([*many, Digest("z" * 64, 1, SHA256)])
    with pytest.raises(InvalidArgument):
        cache.find_missing([*many, Digest("a" * 65, 1, SHA256), Digest("b" * 63, 1, SHA256)])


def test_blob_file_is_read_only_and_lies_where_documented(cache):
    digest = put(cache, 1)
    path = blob_file(cache, digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert cache.path(digest) == str(path)


def test_second_put_says_present(cache):
    digest, data = blob(1)
    assert cache.put_verified(digest, data)
    assert not cache.put_verified(digest, data)
    statistics = cache.statistics()
    assert (statistics.added_blobs, statistics.present_blobs, statistics.added_bytes) == (1, 1, len(data))


def test_blob_that_is_there_is_verified_when_it_is_put_and_that_is_no_hit(tmp_path):
    digest, data = blob(1)
    with FileCache(tmp_path) as cache:
        cache.put_verified(digest, data)
    with FileCache(tmp_path) as cache:
        assert not cache.put_verified(digest, data)
        assert not cache.put_verified(digest, data)
        statistics = cache.statistics()
        assert (statistics.verified_blobs, statistics.present_blobs) == (1, 2)
        assert (statistics.hits, statistics.misses) == (0, 0)


@pytest.mark.parametrize("verified", [False, True])
def test_good_bytes_take_the_place_of_bad_ones(tmp_path, verified):
    digest, data = blob(1)
    with FileCache(tmp_path) as first, FileCache(tmp_path) as cache:
        first.put_verified(digest, data)
        if verified:
            cache.read(digest)
        damage(blob_file(cache, digest), b"?" + data[1:])
        assert cache.put_verified(digest, data)
        assert cache.read(digest) == data
        assert cache.statistics().quarantined_blobs == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_blob_that_changes_while_it_is_looked_at_is_put(tmp_path, monkeypatch, damaged):
    digest, data = blob(1)
    knows = VerifiedMemo.knows

    def changes_first(memo, *arguments):
        monkeypatch.undo()
        known = knows(memo, *arguments)
        if damaged:
            damage(blob_file(cache, digest), b"?" + data[1:])
        else:
            blob_file(cache, digest).unlink()
        return known

    with FileCache(tmp_path) as first, FileCache(tmp_path) as cache:
        first.put_verified(digest, data)
        monkeypatch.setattr(VerifiedMemo, "knows", changes_first)
        assert cache.put_verified(digest, data)
        assert cache.read(digest) == data


def test_blob_that_is_never_known_long_enough_is_left_as_it_is(tmp_path, monkeypatch):
    digest, data = blob(1)
    with FileCache(tmp_path) as cache:
        cache.put_verified(digest, data)
        monkeypatch.setattr(VerifiedMemo, "knows", lambda *_: False)
        assert not cache.put_verified(digest, data)
        assert cache.statistics().present_blobs == 1


def test_empty_blob_exists_without_being_added(cache):
    for function in (SHA256, BLAKE3):
        digest = empty_digest(function)
        assert cache.find_missing([digest]) == set()
        assert cache.read(digest) == b""


@pytest.mark.parametrize("how", ["bytes", "file", "move", "link", "writer"])
def test_wrong_bytes_are_never_stored(cache, tmp_path, how):
    digest, data = blob(1)
    wrong = bytes([data[0] ^ 1]) + data[1:]
    path = tmp_path / "wrong"
    path.write_bytes(wrong)

    def write():
        with cache.writer(digest) as writer:
            writer.write(wrong)
            writer.commit()

    ways = {
        "bytes": lambda: cache.write(digest, wrong),
        "file": lambda: cache.put_file(digest, path),
        "move": lambda: cache.put_file(digest, path, move=True),
        "link": lambda: cache.put_file(digest, path, link=True),
        "writer": write,
    }
    with pytest.raises(DataLoss):
        ways[how]()
    assert path.read_bytes() == wrong
    assert cache.find_missing([digest]) == {digest}
    assert disk_bytes_below(cache.root) == 0


@pytest.mark.parametrize("size", [4999, 5001, 0])
def test_wrong_size_is_never_stored(cache, tmp_path, size):
    digest, data = blob(1)
    wrong = (data + b"x")[:size]
    path = tmp_path / "wrong"
    path.write_bytes(wrong)
    with pytest.raises(DataLoss):
        cache.put_verified(digest, wrong)
    with pytest.raises(DataLoss):
        cache.put_file(digest, path, verify=False)
    with cache.writer(digest) as writer, pytest.raises(DataLoss):  # noqa: PT012
        writer.write(wrong)
        writer.commit()
    assert cache.find_missing([digest]) == {digest}


def test_file_is_copied_moved_or_linked(cache, tmp_path):
    inodes = {}
    for how in ("copy", "move", "link"):
        digest, data = blob(how)
        path = tmp_path / how
        path.write_bytes(data)
        inodes[how] = path.stat().st_ino
        assert cache.put_file(digest, path, move=how == "move", link=how == "link")
        assert cache.read(digest) == data
        shared = blob_file(cache, digest).stat().st_ino == inodes[how]
        assert shared == (how != "copy")
        assert path.exists() == (how != "move")
    assert stat.S_IMODE((tmp_path / "link").stat().st_mode) == 0o400
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) != 0o400


def test_moved_file_goes_also_when_the_blob_was_there(cache, tmp_path):
    digest, data = blob(1)
    cache.put_verified(digest, data)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert not cache.put_file(digest, path, move=True)
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EMLINK, errno.EPERM])
def test_where_links_are_refused_files_are_copied(cache, tmp_path, monkeypatch, code):
    digest, data = blob(1)
    path = tmp_path / "file"
    path.write_bytes(data)
    real = os.link

    def link(source, target, **options):
        if str(source) in (str(path), str(blob_file(cache, digest))):
            raise OSError(code, os.strerror(code))
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    assert cache.put_file(digest, path, link=True)
    assert blob_file(cache, digest).stat().st_ino != path.stat().st_ino
    assert cache.statistics().total_bytes == disk_bytes_below(cache.root)
    cache.materialize(digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def test_added_file_is_hashed_on_the_way(cache, tmp_path):
    digest, data = blob(1, function=BLAKE3)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert cache.add_file(path, BLAKE3) == (digest, True)
    assert cache.add_file(path, BLAKE3) == (digest, False)
    assert cache.read(digest) == data


def test_only_regular_files_are_added(cache, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InvalidArgument):
            cache.add_file(path)
    with pytest.raises(NotFound):
        cache.add_file(tmp_path / "absent")


def test_writer_adds_on_commit_only(cache):
    digest, data = blob(1)
    with cache.writer(digest) as writer:
        writer.write(data[:100])
        writer.write(memoryview(data)[100:])
        assert cache.find_missing([digest]) == {digest}
        assert writer.commit()
    with pytest.raises(FailedPrecondition):
        writer.write(b"")
    assert cache.read(digest) == data


def test_writer_left_without_commit_leaves_nothing(cache):
    digest, data = blob(1)
    with cache.writer(digest) as writer:
        writer.write(data)
    assert cache.find_missing([digest]) == {digest}
    assert list(Path(cache.root, "v1", "tmp").glob("*/*")) == []


def test_writer_stops_at_the_first_byte_too_many(cache):
    digest, data = blob(1)
    with cache.writer(digest) as writer:
        writer.write(data)
        with pytest.raises(DataLoss):
            writer.write(b"x")


def test_materialized_file_is_a_link_unless_writable(cache, tmp_path):
    digest, data = blob(1)
    cache.put_verified(digest, data)
    cache.materialize(digest, tmp_path / "shared")
    cache.materialize(digest, tmp_path / "own", writable=True)
    assert (tmp_path / "shared").stat().st_ino == blob_file(cache, digest).stat().st_ino
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600
    (tmp_path / "own").write_bytes(b"changed")
    assert cache.read(digest) == data
    assert (tmp_path / "shared").read_bytes() == data


@pytest.mark.parametrize("writable", [False, True])
def test_materializing_never_overwrites(cache, tmp_path, writable):
    digest = put(cache, 1)
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(FailedPrecondition):
        cache.materialize(digest, tmp_path / "out", writable=writable)
    assert (tmp_path / "out").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]


def test_materializing_works_without_o_tmpfile(cache, tmp_path, monkeypatch):
    digest, data = blob(1)
    cache.put_verified(digest, data)
    monkeypatch.setattr(os, "open", open_without_o_tmpfile)
    cache.materialize(digest, tmp_path / "out", writable=True)
    assert (tmp_path / "out").read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]


def test_blobs_are_added_without_o_tmpfile(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", open_without_o_tmpfile)
    digest, data = blob(1)
    assert cache.put_verified(digest, data)
    second, more = blob(2)
    with cache.writer(second) as writer:
        writer.write(more)
        assert writer.commit()
    (tmp_path / "file").write_bytes(data + more)
    third, _ = cache.add_file(tmp_path / "file")
    assert [cache.read(one) for one in (digest, second, third)] == [data, more, data + more]
    assert list(Path(cache.root, "v1", "tmp").glob("*/*")) == []


def test_removed_blob_keeps_old_links_and_descriptors(cache, tmp_path):
    digest, data = blob(1)
    cache.put_verified(digest, data)
    cache.materialize(digest, tmp_path / "link")
    fd = cache.open(digest)
    assert cache.remove(digest)
    assert not cache.remove(digest)
    try:
        assert os.pread(fd, len(data), 0) == data
    finally:
        os.close(fd)
    assert (tmp_path / "link").read_bytes() == data
    with pytest.raises(NotFound):
        cache.read(digest)


@pytest.mark.parametrize("content", ["flipped", "short", "empty", "long"])
def test_bad_content_is_data_loss_once_and_quarantined(tmp_path, content):
    digest, data = blob(1)
    bad = {"flipped": b"?" + data[1:], "short": data[:-1], "empty": b"", "long": data + b"x"}[content]
    with FileCache(tmp_path) as cache:
        cache.put_verified(digest, data)
        damage(blob_file(cache, digest), bad)
        with pytest.raises(DataLoss, match=digest.hash):
            cache.open(digest)
        with pytest.raises(NotFound):
            cache.open(digest)
        assert [path.read_bytes() for path in Path(tmp_path, "v1", "quarantine").iterdir()] == [bad]
        assert cache.statistics().quarantined_blobs == 1
        # The damage changed the disk blocks behind the cache's back; a scan sets the count right.
        assert cache.prune(cache.max_bytes) == 0
        assert cache.put_verified(digest, data)
        assert cache.read(digest) == data


def test_content_changed_after_verification_is_noticed(cache):
    digest, data = blob(1)
    cache.put_verified(digest, data)
    assert cache.read(digest) == data
    damage(blob_file(cache, digest), b"?" + data[1:])
    with pytest.raises(DataLoss):
        cache.read(digest)


def test_wrong_size_of_a_known_hash_is_data_loss_and_harms_nothing(tmp_path):
    digest, data = blob(1)
    wrong = digest._replace(size_bytes=digest.size_bytes + 1)
    with FileCache(tmp_path) as cache:
        cache.put_verified(digest, data)
    with FileCache(tmp_path) as cache:
        assert cache.find_missing([wrong]) == {wrong}
        with pytest.raises(DataLoss, match="digest is wrong"):
            cache.open(wrong)
        assert cache.read(digest) == data
        assert cache.statistics().quarantined_blobs == 0


def test_quarantine_keeps_only_the_newest(cache):
    for number in range(20):
        digest = put(cache, number, 10)
        damage(blob_file(cache, digest), b"bad")
        with pytest.raises(DataLoss):
            cache.open(digest)
    kept = {path.name[:64] for path in Path(cache.root, "v1", "quarantine").iterdir()}
    assert len(kept) == 16


def test_file_removed_behind_the_back_is_noticed(cache):
    digest = put(cache, 1)
    assert cache.find_missing([digest]) == set()
    blob_file(cache, digest).unlink()
    assert cache.find_missing([digest]) == {digest}
    with pytest.raises(NotFound):
        cache.open(digest)
    assert put(cache, 1) == digest
    assert cache.find_missing([digest]) == set()


def test_full_disk_is_a_typed_error_and_leaves_nothing(cache, monkeypatch):
    digest, data = blob(1)

    def full(fd, data):
        os.write(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(ResourceExhausted):
        cache.put_verified(digest, data)
    with pytest.raises(ResourceExhausted), cache.writer(digest) as writer:
        writer.write(data)
    with pytest.raises(ResourceExhausted):
        cache.add_file(__file__)
    assert list(Path(cache.root, "v1", "tmp").glob("*/*")) == []
    monkeypatch.undo()
    assert cache.find_missing([digest]) == {digest}
    assert cache.put_verified(digest, data)


def test_many_are_written_and_read(cache, tmp_path):
    uploads = {}
    for number in range(10):
        digest, data = blob(number)
        uploads[digest] = data
    path = tmp_path / "file"
    path.write_bytes(uploads[digest])
    sources = [Upload(digest, data) for digest, data in uploads.items()]
    sources[-1] = Upload(digest, path)
    transferred = cache.write_many(sources)
    assert (transferred.blobs, transferred.content_bytes, transferred.present_blobs) == (10, 50_000, 0)
    assert cache.write_many(sources).present_blobs == 10
    received = {}
    cache.read_many(uploads, received.__setitem__)
    assert received == uploads


def test_threads_adding_one_blob_add_it_once(cache):
    digest, data = blob(1)
    barrier = threading.Barrier(8)
    results = []

    def work():
        barrier.wait(300)
        results.append(cache.put_verified(digest, data))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]
    assert cache.statistics().total_bytes == disk_bytes_below(cache.root)


def test_closed_cache_says_so(tmp_path):
    cache = FileCache(tmp_path)
    lease = cache.lease([blob(1)[0]])
    cache.close()
    cache.close()
    lease.release()
    with pytest.raises(FailedPrecondition, match="closed"):
        cache.read(blob(1)[0])
    assert leftovers(tmp_path) == []


def test_cache_whose_folder_was_removed_closes(tmp_path):
    cache = FileCache(tmp_path / "cache")
    digest = put(cache, 1)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(NotFound):
        cache.open(digest)
    cache.close()


def test_cache_from_before_a_fork_is_refused_in_the_child_and_unharmed(tmp_path):
    with FileCache(tmp_path) as cache:
        digest = put(cache, 1)
        with cache.lease([digest]):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    cache.read(digest)
                except FailedPrecondition:
                    cache.close()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert len(list(Path(tmp_path, "v1", "leases").iterdir())) == 1
            put(cache, 2)


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_bound_must_be_positive(tmp_path, max_bytes):
    with pytest.raises(InvalidArgument):
        FileCache(tmp_path, max_bytes=max_bytes)
