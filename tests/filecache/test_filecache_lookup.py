"""Looking up many: listings of folders, the log of uses, the memo of what was verified."""

from __future__ import annotations

import hashlib
import os
import random
import time

import numpy as np
import pytest
from filecache_helpers import BLAKE3, SHA256, blob, blob_file, put

from snaploader.digest import Digest, DigestFunction, empty_digest
from snaploader.errors import Cancelled
from snaploader.filecache import FileCache, blobs, bulk
from snaploader.filecache.blobs import VerifiedMemo
from snaploader.filecache.bulk import Position, UseLog
from snaploader.filecache.layout import Layout, OpenFolder
from snaploader.files import Access, FileLock
from snaploader.formats.digests import DigestArray

HASHES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(5000)]


def test_many_digests_of_both_functions_are_looked_up_exactly(tmp_path):
    rng = random.Random(1)
    with FileCache(tmp_path) as cache:
        there = set()
        for number in range(300):
            digest, data = blob(number, 10, rng.choice([SHA256, BLAKE3]))
            cache.put_verified(digest, data)
            there.add(digest)
        # The same hashes under the other function are other blobs.
        swapped = {SHA256: BLAKE3, BLAKE3: SHA256}
        other = {digest._replace(function=swapped[digest.function]) for digest in there}
        absent = {Digest(hash_, 1, SHA256) for hash_ in HASHES} | other
        for _ in range(2):
            assert cache.find_missing(there | absent) == absent
        gone = set(rng.sample(sorted(there), 20))
        for digest in gone:
            blob_file(cache, digest).unlink()
        assert cache.find_missing(there | absent) == absent | gone


def test_empty_blob_is_never_missing(tmp_path):
    empty = {empty_digest(function) for function in DigestFunction}
    many = {Digest(hash_, 1, SHA256) for hash_ in HASHES}
    with FileCache(tmp_path) as cache:
        assert cache.find_missing(empty) == set()
        assert cache.find_missing(many | empty) == many
        # Other digests of no bytes are wrong, and so are others of this hash.
        wrong = {Digest(HASHES[0], 0, SHA256), Digest(empty_digest(SHA256).hash, 1, SHA256)}
        assert cache.find_missing(wrong) == wrong
        assert cache.find_missing(many | wrong) == many | wrong


def test_digests_asked_for_twice_are_answered_once(tmp_path):
    many = [Digest(hash_, 1, SHA256) for hash_ in HASHES] * 2
    with FileCache(tmp_path) as cache:
        assert cache.find_missing(many) == set(many)
        assert cache.find_missing(many[:2] + many[:2]) == set(many[:2])
        here = [put(cache, number, 10) for number in range(3)]
        for some in ([*here, *many], [*here, *many[:2]]):
            assert cache.find_missing(DigestArray.of(some, SHA256)) == set(some) - set(here)


def test_listing_made_right_after_a_change_is_not_trusted(tmp_path, monkeypatch):
    """A change within the same tick of the file system's clock leaves the folder's time as it was."""
    padding = {Digest(hash_, 1, SHA256) for hash_ in HASHES[: blobs.BULK_DIGESTS]}
    with FileCache(tmp_path) as cache:
        digest = put(cache, 1, 10)
        folder = blob_file(cache, digest).parent
        now = time.time_ns()
        for age_ns, noticed in ((bulk.RACY_NS // 2, True), (bulk.RACY_NS * 2, False)):
            put(cache, 1, 10)
            os.utime(folder, ns=(now, now))
            monkeypatch.setattr(bulk.time, "time_ns", lambda age_ns=age_ns: now + age_ns)
            assert cache.find_missing(padding | {digest}) == padding
            blob_file(cache, digest).unlink()
            os.utime(folder, ns=(now, now))
            # Not noticing is what the rule is there for; it shows that the test would fail without it.
            assert (digest in cache.find_missing(padding | {digest})) == noticed


def test_listing_is_kept_while_the_folder_stands_still(tmp_path, monkeypatch):
    padding = {Digest(hash_, 1, SHA256) for hash_ in HASHES[: blobs.BULK_DIGESTS]}
    with FileCache(tmp_path) as cache:
        digest = put(cache, 1, 10)
        os.utime(blob_file(cache, digest).parent, ns=(0, 0))
        cache.find_missing(padding | {digest})
        with monkeypatch.context() as patched:
            patched.setattr(bulk.os, "listdir", None)
            assert cache.find_missing(padding | {digest}) == padding


def test_strange_names_in_a_blob_folder_are_passed_over(tmp_path):
    padding = {Digest(hash_, 1, SHA256) for hash_ in HASHES[: blobs.BULK_DIGESTS]}
    with FileCache(tmp_path) as cache:
        digest = put(cache, 1, 10)
        for name in (".hidden", "A" * 62, "x" * 62, digest.hash[2:] + "~"):
            (blob_file(cache, digest).parent / name).write_bytes(b"")
        assert cache.find_missing(padding | {digest}) == padding
        assert [entry.digest for entry in cache.entries()] == [digest]
        assert cache.prune() == 0


@pytest.fixture
def log(tmp_path):
    folder = OpenFolder(Layout(str(tmp_path), "_default"), Access())
    uses = UseLog(folder)
    yield uses
    uses.close()
    folder.close()


def prefixes(*numbers: int):
    return np.array(numbers, dtype=np.uint64)


def test_log_of_uses_is_read_in_pieces(log):
    records, position = log.read()
    assert len(records) == 0
    assert not log.grew(position)
    log.append("g", prefixes(1, 2), 10)
    assert log.grew(position)
    records, position = log.read(position)
    assert not log.grew(position)
    log.append("g", prefixes(1), 20)
    more, _ = log.read(position)
    assert [int(time) for time in more["time_ns"]] == [20]
    times = bulk.apply_uses(
        np.array([5, 15, 5]), bulk.use_keys("g", prefixes(1, 2, 3)), np.concatenate([records, more]), 100
    )
    assert times.tolist() == [20, 15, 5]


def test_log_of_uses_tells_groups_apart_and_does_not_trust_the_future(log):
    log.append("a", prefixes(1), 10**30 % 2**62)
    records, _ = log.read()
    assert bulk.apply_uses(np.array([5]), bulk.use_keys("b", prefixes(1)), records, 100).tolist() == [5]
    assert bulk.apply_uses(np.array([5]), bulk.use_keys("a", prefixes(1)), records, 100).tolist() == [100]


def test_newest_record_of_each_key_is_found_in_any_order():
    rng = random.Random(1)
    records = bulk.newest(np.empty(0, dtype=[("key", "<u8"), ("time_ns", "<i8")]))
    assert len(records) == 0
    pairs = [(rng.randrange(50), rng.randrange(1000)) for _ in range(500)]
    found = bulk.newest(np.array(pairs, dtype=records.dtype))
    expected = {key: max(time for other, time in pairs if other == key) for key, _ in pairs}
    assert found.tolist() == sorted(expected.items())


def test_torn_record_of_a_killed_writer_is_overwritten(log, tmp_path):
    log.append("g", prefixes(1), 10)
    with open(tmp_path / "v1/usage/uses", "ab") as file:
        file.write(b"torn")
    records, position = log.read()
    assert len(records) == 1
    assert not log.grew(position)
    log.append("g", prefixes(2), 20)
    records, _ = log.read(position)
    assert records["time_ns"].tolist() == [20]


def test_big_log_is_compacted_and_readers_start_over(log, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "COMPACT_BYTES", 1600)
    position = Position()
    for round_ in range(20):
        log.append("g", prefixes(*range(10)), round_)
        _, position = log.read(position)
    assert (tmp_path / "v1/usage/uses").stat().st_size <= 1600 + 160
    records, _ = log.read(Position(position.inode + 1, position.offset))
    newest = bulk.newest(records)
    assert len(newest) == 10
    assert set(newest["time_ns"].tolist()) == {19}
    for round_ in range(20, 60):
        log.append("g", prefixes(*range(1000 + 10 * round_, 1010 + 10 * round_)), round_)
    assert (tmp_path / "v1/usage/uses").stat().st_size <= 1600 + 160
    assert 59 in log.read()[0]["time_ns"]


def test_memo_knows_a_file_by_all_that_identifies_it(tmp_path):
    memo = VerifiedMemo()
    digest, data = blob(1)
    path = tmp_path / "file"
    path.write_bytes(data)
    status = path.stat()
    assert not memo.knows(digest, status)
    memo.add(digest, status)
    assert memo.knows(digest, status)
    assert not memo.knows(digest._replace(size_bytes=1), status)
    assert not memo.knows(blob(2)[0], status)
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    assert not memo.knows(digest, path.stat())


def test_closed_lock_says_so(tmp_path):
    lock = FileLock(os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT))
    lock.close()
    with pytest.raises(Cancelled), lock.held():
        pass
