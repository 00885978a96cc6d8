"""The bound: disk blocks, the longest unused first, leases, over restarts and scans."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filecache_helpers import blob, blob_file, child, disk_bytes_below, key, leftovers, put

from snaploader import files
from snaploader._environment import HostEnvironment
from snaploader.errors import InvalidArgument, NotFound, ResourceExhausted
from snaploader.filecache import FileCache, blobs, evict, layout

BLOCK = 4096
"""What a small file takes; checked below."""


def present(cache: FileCache, *seeds: int | str) -> set[int | str]:
    """Which seeds' blobs are there, without using them."""
    return {seed for seed in seeds if blob_file(cache, blob(seed, 100)[0]).exists()}


def small(cache: FileCache, seed: int | str):
    return put(cache, seed, 100)


def test_longest_unused_goes_first(tmp_path):
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache:
        for seed in "abc":
            small(cache, seed)
        assert cache.statistics().total_bytes == 3 * BLOCK
        cache.read(blob("a", 100)[0])
        small(cache, "d")
        assert present(cache, *"abcd") == set("acd")
        small(cache, "e")
        assert present(cache, *"abcde") == set("ade")
        assert cache.statistics().evicted_entries == 2


@pytest.mark.parametrize(
    "add",
    [lambda cache: small(cache, "e"), lambda cache: cache.put_ref(key("e"), b"x")],
    ids=["blob", "ref"],
)
def test_cache_over_a_lowered_bound_makes_room_before_it_writes_to_a_full_disk(tmp_path, monkeypatch, add):
    with FileCache(tmp_path) as cache:
        for seed in "abcd":
            small(cache, seed)

    def full_above_the_bound(fd, data, _write=files.write_all):
        if disk_bytes_below(tmp_path) > 2 * BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(fd, data)

    monkeypatch.setattr(files, "write_all", full_above_the_bound)
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:
        add(cache)
        assert cache.statistics().total_bytes == 2 * BLOCK
        assert present(cache, *"abcd") == {"d"}


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, digest: cache.read(digest),
        lambda cache, digest: os.close(cache.open(digest)),
        lambda cache, digest: cache.find_missing([digest]),
        lambda cache, digest: cache.find_missing([digest, *(blob(n, 10)[0] for n in range(1100))]),
        lambda cache, digest: cache.put_verified(digest, blob("a", 100)[1]),
        lambda cache, digest: cache.write(digest, blob("a", 100)[1]),
        lambda cache, digest: cache.path(digest),
    ],
)
@pytest.mark.parametrize("after_scan", [False, True])
def test_every_kind_of_use_counts(tmp_path, use, after_scan):
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache:
        if after_scan:
            for seed in range(4):
                small(cache, seed)
            assert cache.statistics().scans == 2
        for seed in "abc":
            small(cache, seed)
        use(cache, blob("a", 100)[0])
        small(cache, "d")
        assert present(cache, *"abcd") == set("acd")


def test_use_of_a_candidate_after_the_scan_is_seen(tmp_path):
    with FileCache(tmp_path, max_bytes=4 * BLOCK) as cache, FileCache(tmp_path) as other:
        for seed in "abcd":
            small(cache, seed)
        small(cache, "e")
        scans = cache.statistics().scans
        other.read(blob("b", 100)[0])
        many = [blob("c", 100)[0], *(blob(n, 10)[0] for n in range(blobs.BULK_DIGESTS))]
        other.find_missing(many)
        small(cache, "f")
        assert present(cache, *"abcdef") == set("bcef")
        assert cache.statistics().scans == scans


@pytest.mark.parametrize("in_bulk", [False, True])
def test_what_was_added_since_the_scan_goes_before_what_was_used_later(tmp_path, in_bulk):
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache:
        for seed in "abcd":
            small(cache, seed)
        assert present(cache, *"abcd") == set("bcd")
        # All that the scan found is used, and so the longest unused is one that it did not find.
        used = [blob(seed, 100)[0] for seed in "bc"]
        if in_bulk:
            used += [blob(n, 10)[0] for n in range(blobs.BULK_DIGESTS)]
        cache.find_missing(used)
        small(cache, "e")
        assert present(cache, *"bcde") == set("bce")


def test_recency_survives_a_restart(tmp_path):
    with FileCache(tmp_path) as cache:
        for seed in "abcd":
            small(cache, seed)
        cache.read(blob("a", 100)[0])
        many = [blob("b", 100)[0], *(blob(n, 10)[0] for n in range(blobs.BULK_DIGESTS))]
        cache.find_missing(many)
    with FileCache(tmp_path, max_bytes=4 * BLOCK) as cache:
        small(cache, "e")
        small(cache, "f")
        assert present(cache, *"abcdef") == set("abef")


def test_disk_blocks_count_and_not_sizes(tmp_path):
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(50 << 20)
        file.write(b"x")
    with FileCache(tmp_path / "cache", max_bytes=1 << 20) as cache, pytest.raises(ResourceExhausted):
        cache.add_file(sparse)
    with FileCache(tmp_path / "cache", max_bytes=60 << 20) as cache:
        digest, _ = cache.add_file(sparse)
        cache.remove(digest)
        assert cache.put_file(digest, sparse, link=True)
        assert cache.statistics().total_bytes == sparse.stat().st_blocks * 512 < 1 << 20
        small(cache, 1)
        assert cache.statistics().total_bytes == disk_bytes_below(cache.root)


def test_bound_holds_right_after_a_restart_scan(tmp_path):
    with FileCache(tmp_path) as cache:
        for seed in range(10):
            small(cache, seed)
    # As after a crash: nobody knows the count.
    os.unlink(tmp_path / "v1" / "usage" / "ledger")
    with FileCache(tmp_path, max_bytes=5 * BLOCK) as cache:
        assert cache.statistics().total_bytes is None
        small(cache, 10)
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path) == 5 * BLOCK
        assert present(cache, *range(11)) == {6, 7, 8, 9, 10}


def test_removal_behind_the_back_is_put_right_by_the_next_scan(tmp_path):
    with FileCache(tmp_path, max_bytes=5 * BLOCK) as cache:
        for seed in range(5):
            small(cache, seed)
        for seed in range(4):
            blob_file(cache, blob(seed, 100)[0]).unlink()
        small(cache, 5)
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_blob_bigger_than_the_cache_is_refused_without_evicting(tmp_path):
    with FileCache(tmp_path, max_bytes=4 * BLOCK) as cache:
        small(cache, "a")
        digest, data = blob("big", 5 * BLOCK)
        with pytest.raises(ResourceExhausted):
            cache.put_verified(digest, data)
        with pytest.raises(ResourceExhausted):
            cache.writer(digest)
        assert present(cache, "a") == {"a"}


def test_leased_blobs_stay_and_a_cache_full_of_them_says_so(tmp_path):
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache, FileCache(tmp_path) as other:
        digests = [small(cache, seed) for seed in "abc"]
        with other.lease(digests[:2]):
            small(cache, "d")
            assert present(cache, *"abcd") == set("abd")
            with other.lease([blob("d", 100)[0]]):
                for _ in range(3):
                    with pytest.raises(ResourceExhausted, match="max_bytes"):
                        small(cache, "e")
                assert cache.prune() == 3 * BLOCK
            small(cache, "e")
            assert present(cache, *"abcde") == set("abe")
        small(cache, "f")
        assert present(cache, *"abef") == set("bef")


def test_full_cache_is_not_scanned_for_every_refusal(tmp_path):
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:
        with cache.lease([small(cache, "a"), small(cache, "b")]):
            for seed in range(50):
                with pytest.raises(ResourceExhausted):
                    small(cache, seed)
        assert cache.statistics().scans < 10


def test_blobs_added_right_after_the_scan_can_go(tmp_path, monkeypatch):
    """Two threads meet in a small cache: the room that one found is taken by the other."""
    with FileCache(tmp_path) as other, FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:

        def add_first(*arguments):
            for seed in "ab":
                small(other, seed)
            monkeypatch.undo()
            return evict.Candidates(*arguments)

        monkeypatch.setattr(evict, "Candidates", add_first)
        small(cache, "c")
        assert present(cache, *"abc") == set("bc")


def test_blob_added_during_the_scan_can_go(tmp_path):
    replaced = []

    def step(name):
        if name == "scan.listed" and not replaced:
            replaced.append(other.remove(blob("a", 100)[0]))
            small(other, "b")

    with (
        FileCache(tmp_path) as other,
        FileCache(tmp_path, max_bytes=BLOCK, _environment=HostEnvironment(after_step=step)) as cache,
    ):
        small(other, "a")
        small(cache, "c")
        assert replaced == [True]
        assert present(cache, *"abc") == {"c"}


def test_scans_end_though_others_change_the_cache_during_each(tmp_path):
    def step(name):
        if name == "scan.listed":
            other.remove(digests[-1])
            digests.append(small(other, len(digests)))

    with (
        FileCache(tmp_path) as other,
        FileCache(tmp_path, max_bytes=BLOCK, _environment=HostEnvironment(after_step=step)) as cache,
    ):
        digests = [small(other, 0)]
        with pytest.raises(ResourceExhausted):
            small(cache, "a")
        assert cache.statistics().scans == evict.MAX_FRUITLESS_SCANS


@pytest.mark.slow
def test_threads_share_a_cache_for_two_blobs(tmp_path):
    """Nothing is leased, so that each always gets room in the end."""
    errors = []

    def work(cache, number):
        try:
            for seed in range(50):
                small(cache, f"{number} {seed}")
        except ResourceExhausted as error:
            errors.append(error)

    for trial in range(5):
        with FileCache(tmp_path / str(trial), max_bytes=2 * BLOCK) as cache:
            threads = [threading.Thread(target=work, args=(cache, number)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert cache.statistics().total_bytes == disk_bytes_below(cache.root) == 2 * BLOCK
    assert errors == []


def test_lease_of_hashes_as_an_array_holds_too(tmp_path):
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:
        digests = [small(cache, seed) for seed in "ab"]
        rows = np.frombuffer(bytes.fromhex(digests[0].hash), np.uint8).reshape(1, 32)
        with cache.lease([], hashes=[rows, rows[:0]]):
            for seed in "cde":
                small(cache, seed)
            assert present(cache, *"ab") == {"a"}


def test_blob_leased_before_it_is_added_stays(tmp_path):
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache, cache.lease([blob("a", 100)[0]]):
        for seed in ("a", 1, 2, 3):
            small(cache, seed)
        assert present(cache, "a") == {"a"}


def test_lease_of_a_killed_process_ends_with_it(tmp_path):
    program = """
import sys
from filecache_helpers import blob
from snaploader.filecache import FileCache
lease = FileCache(sys.argv[1]).lease([blob("a", 100)[0]])
print("leased", flush=True)
sys.stdin.readline()
"""
    with FileCache(tmp_path, max_bytes=BLOCK) as cache:
        small(cache, "a")
        with child(program, tmp_path) as holder:
            assert holder.stdout.readline() == "leased\n"
            with pytest.raises(ResourceExhausted):
                small(cache, "b")
            holder.kill()
            holder.wait()
            cache.prune(BLOCK)  # scans, whatever was found a moment ago
            cache.prune(0)
        assert present(cache, "a") == set()
    assert leftovers(tmp_path) == []


def test_refs_and_groups_share_the_bound(tmp_path):
    options = {"max_bytes": 3 * BLOCK}
    with FileCache(tmp_path, group_id="a", **options) as a, FileCache(tmp_path, group_id="b", **options) as b:
        a.put_ref(key("r"), b"x" * 100)
        small(b, 1)
        small(b, 2)
        small(b, 3)
        with pytest.raises(NotFound):
            a.get_ref(key("r"))
        small(a, 4)
        assert present(b, 1, 2, 3) == {2, 3}


def test_replacing_a_snapshot_often_evicts_nothing_else(tmp_path):
    with FileCache(tmp_path, max_bytes=12 * BLOCK) as cache:
        others = [small(cache, f"other {number}") for number in range(4)]
        cache.put_ref(key("other"), b"x" * 100)
        for round_ in range(20):
            cache.find_missing(others)
            cache.get_ref(key("other"))
            for number in range(4):
                small(cache, f"{round_} {number}")
            cache.put_ref(key("mine"), str(round_).encode() * 50)
        assert cache.find_missing(others) == set()
        assert cache.get_ref(key("other"))


def test_prune_reduces_to_the_target(tmp_path):
    with FileCache(tmp_path) as cache:
        for seed in range(10):
            small(cache, seed)
        assert cache.prune(4 * BLOCK) == 4 * BLOCK
        assert present(cache, *range(10)) == {6, 7, 8, 9}
        assert cache.prune() == 0
        assert disk_bytes_below(tmp_path) == 0


def test_blob_added_again_during_eviction_is_there_afterwards(tmp_path):
    """It is the most recently used by then, so that another goes if one must."""
    digest, data = blob("a", 100)
    answers = []

    def step(name):
        if name == "evict.unlinked" and not threads:
            thread = threading.Thread(target=lambda: answers.append(other.put_verified(digest, data)))
            thread.start()
            threads.append(thread)

    threads: list[threading.Thread] = []
    with (
        FileCache(tmp_path) as other,
        FileCache(tmp_path, _environment=HostEnvironment(after_step=step)) as cache,
    ):
        small(cache, "a")
        small(cache, "b")
        cache.prune(BLOCK)
        for thread in threads:
            thread.join()
        assert answers == [True]
        assert cache.read(digest) == data
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_changes_during_a_scan_are_counted_right(tmp_path):
    """100 scans, each with random additions and removals before, in the middle of, and after the listing."""
    rng = random.Random(1)
    pending = []

    def step(name):
        if name in ("scan.begun", "scan.listed"):
            for change in pending[: len(pending) // 2]:
                change()
                pending.remove(change)

    with (
        FileCache(tmp_path) as other,
        FileCache(tmp_path, _environment=HostEnvironment(after_step=step)) as cache,
    ):
        seeds = list(range(12))
        small(cache, 0)
        for _ in range(100):
            for _ in range(6):
                digest, data = blob(rng.choice(seeds), rng.choice([100, 5000]))
                name = key(str(rng.choice(seeds)))
                pending.append(
                    rng.choice(
                        [
                            lambda d=digest, b=data: other.put_verified(d, b),
                            lambda d=digest: other.remove(d),
                            lambda n=name, b=data: other.put_ref(n, b),
                            lambda n=name: other.delete_ref(n),
                        ]
                    )
                )
            cache.prune(1 << 30)
            assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)
            pending.clear()


def test_concurrent_additions_during_scans_are_counted_right(tmp_path):
    stop = threading.Event()
    with FileCache(tmp_path) as cache, FileCache(tmp_path) as other:

        def work(number):
            seed = 0
            while not stop.is_set() and seed < 300:
                digest = put(other, f"{number} {seed}", 100)
                if seed % 3 == 0:
                    other.remove(digest)
                seed += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            cache.prune(1 << 30)
        stop.set()
        for thread in threads:
            thread.join()
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_scan_that_fails_is_given_up(tmp_path, monkeypatch):
    with FileCache(tmp_path) as cache:
        small(cache, 1)

        def broken(*arguments):
            raise PermissionError(13, "no")

        monkeypatch.setattr(evict, "Scan", broken)
        with pytest.raises(Exception, match="prune"):
            cache.prune()
        monkeypatch.undo()
        small(cache, 2)
        assert not Path(tmp_path, "v1", "usage", "journal").exists()
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)


def test_statistics_and_entries_tell_what_is_there(tmp_path):
    with FileCache(tmp_path) as cache:
        first, second = small(cache, "a"), small(cache, "b")
        cache.put_ref(key("r"), b"x")
        cache.read(first)
        entries = cache.entries()
        assert [(entry.kind, entry.key) for entry in entries] == [
            ("blob", second.hash),
            ("ref", key("r")),
            ("blob", first.hash),
        ]
        assert [entry.digest for entry in entries] == [second, None, first]
        assert sum(entry.disk_bytes for entry in entries) == cache.statistics().total_bytes


def test_lease_does_not_pay_for_imports(tmp_path):
    program = """
import sys

import numpy

known = "numpy.ma" in sys.modules  # old releases of numpy import it themselves
from filecache_helpers import blob
from snaploader.filecache import FileCache

with FileCache(sys.argv[1]) as cache, cache.lease([blob(1)[0], blob(2)[0], blob(1)[0]]):
    cache.prune()
print("numpy.ma" in sys.modules and not known)
"""
    with child(program, tmp_path / "cache") as process:
        assert process.stdout.readline() == "False\n"


def test_the_plan_of_a_prune_names_what_it_evicts_and_evicts_nothing(tmp_path):
    with FileCache(tmp_path, max_bytes=100 * BLOCK) as cache, FileCache(tmp_path, group_id="g") as other:
        for seed in "abcd":
            small(cache, seed)
        foreign = small(other, "foreign")
        other.read(foreign)
        leased = blob("a", 100)[0]
        cache.read(blob("b", 100)[0])
        with cache.lease([leased]):
            planned = cache.prune_plan(3 * BLOCK)
            assert [entry.digest for entry in planned] == [blob("c", 100)[0], blob("d", 100)[0]]
            assert [entry.disk_bytes for entry in planned] == [BLOCK] * 2
            assert present(cache, *"abcd") == set("abcd")
            assert cache.prune(3 * BLOCK) == 3 * BLOCK
            assert present(cache, *"abcd") == set("ab")
        assert foreign in {entry.digest for entry in cache.prune_plan(0)}


def evicting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "snaploader-evict"]


def wait_for_eviction() -> None:
    for thread in evicting_threads():
        thread.join()


class Stop:
    """A host on which whoever evicts in the background stops at the beginning of a scan, until released."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.environment = HostEnvironment(after_step=self._step)

    def _step(self, step: str) -> None:
        if step == "scan.begun" and threading.current_thread() in evicting_threads():
            self.reached.set()
            self.released.wait()


AHEAD = {"max_bytes": 20 * BLOCK, "evict_ahead_bytes": 2 * BLOCK}
"""Scanned from 13 blocks on, evicted down to 18 blocks from 20 on."""


@pytest.fixture
def no_rest(monkeypatch):
    for name in ("AHEAD_REST", "AHEAD_LONG_REST"):
        monkeypatch.setattr(evict, name, 0)


def test_room_is_kept_free_in_the_background(tmp_path, no_rest):
    with FileCache(tmp_path, **AHEAD) as cache:
        for seed in range(12):
            small(cache, seed)
        assert evicting_threads() == []
        assert cache.statistics().scans == 1
        small(cache, 12)
        wait_for_eviction()
        assert cache.statistics().scans == 2
        for seed in range(13, 19):
            small(cache, seed)
        cache.read(blob(0, 100)[0])
        assert present(cache, *range(19)) == set(range(19))
        small(cache, 19)
        wait_for_eviction()
        assert present(cache, *range(20)) == {0, *range(3, 20)}
        for seed in range(20, 60):
            small(cache, seed)
            wait_for_eviction()
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)
        assert present(cache, *range(60)) in (set(range(first, 60)) for first in (41, 42))
        assert cache.prune(0) == 0
    assert leftovers(tmp_path) == []


def test_nobody_waits_for_the_scan_in_the_background_while_there_is_room(tmp_path):
    stop = Stop()
    with FileCache(tmp_path, **AHEAD, _environment=stop.environment) as cache:
        for seed in range(13):
            small(cache, seed)
        stop.reached.wait()
        for seed in range(13, 20):
            small(cache, seed)
        assert present(cache, *range(20)) == set(range(20))
        # The next one does not fit: it waits for the scan, which is under way already.
        adding = threading.Thread(target=small, args=(cache, 20))
        adding.start()
        stop.released.set()
        adding.join()
        wait_for_eviction()
        assert 20 in present(cache, 20)
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path) <= 20 * BLOCK


def test_closing_ends_the_eviction_in_the_background(tmp_path):
    stop = Stop()
    cache = FileCache(tmp_path, **AHEAD, _environment=stop.environment)
    for seed in range(13):
        small(cache, seed)
    stop.reached.wait()
    closing = threading.Thread(target=cache.close)
    closing.start()
    stop.released.set()
    closing.join()
    assert evicting_threads() == []
    assert leftovers(tmp_path) == []


def test_where_no_thread_can_be_had_each_addition_makes_its_own_room(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with FileCache(tmp_path, **AHEAD) as cache:
        for seed in range(25):
            small(cache, seed)
        assert 24 in present(cache, 24)
        assert cache.statistics().total_bytes <= 20 * BLOCK


def test_eviction_in_the_background_rests_when_all_is_leased(tmp_path, monkeypatch):
    monkeypatch.setattr(evict, "AHEAD_LONG_REST", 1e9)
    with FileCache(tmp_path, **AHEAD) as cache:
        with cache.lease([blob(seed, 100)[0] for seed in range(20)]):
            for seed in range(20):
                small(cache, seed)
                wait_for_eviction()
            assert cache.statistics().scans == 2
            with pytest.raises(ResourceExhausted):
                small(cache, 20)
        small(cache, 20)
        assert 20 in present(cache, 20)


def test_who_adds_little_to_a_full_cache_does_not_scan_it(tmp_path):
    with FileCache(tmp_path, **AHEAD) as cache:
        for seed in range(15):
            small(cache, seed)
    with FileCache(tmp_path, **AHEAD) as cache:
        small(cache, 15)
        assert evicting_threads() == []
        assert cache.statistics().scans == 0
        small(cache, 16)
        wait_for_eviction()
        assert cache.statistics().scans == 1


@pytest.mark.parametrize("ahead", [-1, 4097])
def test_more_than_there_is_cannot_be_kept_free(tmp_path, ahead):
    with pytest.raises(InvalidArgument, match="evict_ahead_bytes"):
        FileCache(tmp_path, max_bytes=4096, evict_ahead_bytes=ahead)


def test_uses_within_a_second_count_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "GRANULARITY_NS", 1_000_000_000)
    # Ahead of the kernel's clock, which sets the time of access (relatime) when it is behind.
    now_ns = time.time_ns() + 3600 * 1_000_000_000
    with FileCache(tmp_path, _environment=HostEnvironment(now_ns=lambda: now_ns)) as cache:
        digest = small(cache, "a")
        file, added_ns = blob_file(cache, digest), now_ns
        for later_ms, used_ms in ((999, 0), (1000, 1000), (1500, 1000)):
            now_ns = added_ns + later_ms * 1_000_000
            cache.read(digest)
            cache.find_missing([digest])
            assert file.stat().st_atime_ns == added_ns + used_ms * 1_000_000
        # A clock that was put back is believed.
        now_ns = added_ns
        cache.read(digest)
        assert file.stat().st_atime_ns == added_ns
