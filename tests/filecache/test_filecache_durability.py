"""After a power failure nothing wrong is served, nor taken for present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filecache_helpers import blob, blob_file, damage, disk_bytes_below, put

from snaploader._environment import HostEnvironment
from snaploader.errors import NotFound
from snaploader.filecache import FileCache, blobs

SECOND_NS = 1_000_000_000


def written_at(cache: FileCache, digest, age_s: float) -> None:
    """Make a blob look as if it had been written that long ago."""
    path = blob_file(cache, digest)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(age_s * SECOND_NS)))


def lose_content(cache: FileCache, digest) -> None:
    """As a power failure leaves a file whose blocks were not written: right size, zeros, old times."""
    path = blob_file(cache, digest)
    status = path.stat()
    damage(path, bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def booted(boot: str) -> HostEnvironment:
    return HostEnvironment(boot_id=lambda: boot)


def seen_as_missing(cache: FileCache, digests, *, many: bool) -> set:
    padding = [blob(f"padding {number}", 10)[0] for number in range(blobs.BULK_DIGESTS if many else 0)]
    return cache.find_missing([*digests, *padding]) - set(padding)


@pytest.mark.parametrize("many", [False, True])
def test_blob_lost_in_a_power_failure_is_missing(tmp_path, many):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        good, lost = put(cache, "good"), put(cache, "lost")
        lose_content(cache, lost)
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        assert seen_as_missing(cache, [good, lost], many=many) == {lost}
        assert cache.statistics().verified_blobs == 2
        assert put(cache, "lost") == lost
        assert cache.read(lost) == blob("lost")[1]


def test_lost_blob_is_added_again_though_its_name_is_there(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        digests = [put(cache, number) for number in range(4)]
        for digest in digests:
            lose_content(cache, digest)
    source = tmp_path / "file"
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        assert cache.put_verified(*blob(0))
        source.write_bytes(blob(1)[1])
        assert cache.put_file(digests[1], source)
        assert cache.add_file(source)[0] == digests[1]
        with cache.writer(digests[2]) as writer:
            writer.write(blob(2)[1])
            assert writer.commit()
        for number in range(3):
            assert cache.read(digests[number]) == blob(number)[1]


def test_what_was_flushed_is_no_suspect(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        flushed = put(cache, "flushed")
        written_at(cache, flushed, 10)
        cache.sync()
        late = put(cache, "late")
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        assert cache.find_missing([flushed]) == set()
        assert cache.statistics().verified_blobs == 0
        assert cache.find_missing([late]) == set()
        assert cache.statistics().verified_blobs == 1


def test_suspicion_outlasts_the_next_power_failure_and_flush(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        lost = put(cache, "lost")
        lose_content(cache, lost)
    for boot in ("2", "3", "4"):
        with FileCache(tmp_path, _environment=booted(boot)) as cache:
            cache.sync()
    with FileCache(tmp_path, _environment=booted("5")) as cache:
        assert cache.find_missing([lost]) == {lost}


def test_suspect_that_proves_right_is_asked_only_once(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        digest = put(cache, "a")
    for verified in (1, 0):
        with FileCache(tmp_path, _environment=booted("2")) as cache:
            assert cache.find_missing([digest]) == set()
            assert cache.statistics().verified_blobs == verified


def test_same_boot_has_no_suspects(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        digest = put(cache, "a")
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        cache.find_missing([digest])
        assert cache.statistics().verified_blobs == 0


@pytest.mark.parametrize("state", [None, b"", b"torn", b"0" * 64 + b"\n{}"])
def test_lost_state_makes_everything_a_suspect(tmp_path, state):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        lost = put(cache, "lost")
        lose_content(cache, lost)
    path = Path(tmp_path, "v1", "state")
    path.unlink()
    if state is not None:
        path.write_bytes(state)
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        assert cache.find_missing([lost]) == {lost}


def test_many_power_failures_keep_the_state_small(tmp_path):
    with FileCache(tmp_path, _environment=booted("0")) as cache:
        lost = put(cache, "lost")
        lose_content(cache, lost)
    for boot in range(1, 40):
        with FileCache(tmp_path, _environment=booted(str(boot))):
            pass
    assert Path(tmp_path, "v1", "state").stat().st_size < 2000
    with FileCache(tmp_path, _environment=booted("last")) as cache:
        assert cache.find_missing([lost]) == {lost}


def test_count_of_bytes_is_not_trusted_after_a_power_failure(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        put(cache, "a")
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        assert cache.statistics().total_bytes is None
        put(cache, "b")
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_scan_that_finds_no_suspects_ends_the_suspicion(tmp_path):
    with FileCache(tmp_path, _environment=booted("1")) as cache:
        put(cache, "a")
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        cache.verify()
        cache.prune(1 << 30)
        assert not cache._durability.windows
    with FileCache(tmp_path, _environment=booted("2")) as cache:
        assert not cache._durability.windows


def test_verify_reports_and_removes_what_is_bad_and_uses_nothing(tmp_path):
    with FileCache(tmp_path) as cache:
        first, second = put(cache, "first"), put(cache, "second")
        cache.put_ref("a" * 64, b"value")
        used = {entry.key: entry.last_used_s for entry in cache.entries()}
        lose_content(cache, second)
        damage(Path(tmp_path, "v1", "groups", "_default", "refs", "aa", "a" * 62), b"torn")
        report = cache.verify()
        assert (report.blobs, report.refs) == (2, 1)
        assert report.bad_blobs == (second,)
        assert report.bad_refs == ("a" * 64,)
        (entry,) = cache.entries()
        assert (entry.key, entry.last_used_s) == (first.hash, used[first.hash])
        with pytest.raises(NotFound):
            cache.read(second)
