"""Pins: what they keep, for how long, and how they are written."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from filecache_helpers import BLAKE3, blob, blob_file, child, disk_bytes_below, key, leftovers, put

from snaploader._environment import HostEnvironment
from snaploader.digest import Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from snaploader.filecache import FileCache, retention

BLOCK = 4096


def small(cache: FileCache, seed: int | str) -> Digest:
    return put(cache, seed, 100)


def present(cache: FileCache, *seeds: int | str) -> set[int | str]:
    return {seed for seed in seeds if blob_file(cache, blob(seed, 100)[0]).exists()}


def rows(*digests: Digest) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(one.hash for one in digests)), np.uint8).reshape(-1, 32)


def pin_file(cache: FileCache, name: str) -> Path:
    return Path(cache.root, "v1", "groups", cache.group_id or "_default", "pins", name)


def test_pinned_blobs_and_refs_stay_and_others_go(tmp_path):
    with FileCache(tmp_path, max_bytes=4 * BLOCK) as cache:
        cache.put_ref(key("kept"), b"x")
        cache.put_ref(key("other"), b"x")
        cache.pin("p", [small(cache, "a")], refs=[key("kept")])
        for seed in "bcdefgh":
            small(cache, seed)
        assert present(cache, *"abcdefgh") == set("agh")
        assert cache.refs() == [key("kept")]


def test_pin_outlives_the_cache_that_made_it(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        small(cache, "b")
    with FileCache(tmp_path, _environment=HostEnvironment(boot_id=lambda: "another")) as cache:
        assert cache.prune() == BLOCK
        assert present(cache, *"ab") == {"a"}
        assert cache.pins() == ["p"]
    assert leftovers(tmp_path) == []


def test_unpinned_blobs_go(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a"), small(cache, "b")])
        cache.pin("q", [small(cache, "b")])
        assert cache.unpin("p")
        assert not cache.unpin("p")
        cache.prune()
        assert present(cache, *"ab") == {"b"}
        assert cache.unpin("q")
        assert cache.prune() == 0


def test_pin_under_a_name_replaces_what_it_kept(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        cache.prune()
        cache.pin("p", [small(cache, "b")])
        cache.prune()
        assert present(cache, *"ab") == {"b"}
        assert cache.pins() == ["p"]


def test_blob_pinned_before_it_is_added_stays(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", hashes=[rows(blob("a", 100)[0])])
        small(cache, "a")
        cache.prune()
        assert present(cache, "a") == {"a"}


def test_pin_of_one_group_keeps_nothing_of_another(tmp_path):
    with FileCache(tmp_path, group_id="a") as mine, FileCache(tmp_path, group_id="b") as other:
        mine.pin("p", [small(mine, "x")])
        small(other, "x")
        other.prune()
        assert present(mine, "x") == {"x"}
        assert present(other, "x") == set()
        assert other.pins() == []


def test_pin_of_another_process_is_seen_by_an_eviction_under_way(tmp_path):
    """The list of candidates was made before the pin."""
    program = """
import sys
from filecache_helpers import blob
from snaploader.filecache import FileCache
with FileCache(sys.argv[1]) as cache:
    for line in sys.stdin:
        what, seed = line.split()
        if what == "pin":
            cache.pin(seed, [blob(seed, 100)[0]])
        else:
            cache.unpin(seed)
        print("done", flush=True)
"""

    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache, child(program, tmp_path) as other:

        def tell(line):
            other.stdin.write(f"{line}\n")
            other.stdin.flush()
            assert other.stdout.readline() == "done\n"

        for seed in "abcd":
            small(cache, seed)
        scans = cache.statistics().scans
        tell("pin b")
        small(cache, "e")
        assert present(cache, *"abcde") == set("bde")
        tell("unpin b")
        small(cache, "f")
        assert present(cache, *"bdef") == set("def")
        assert cache.statistics().scans == scans


def test_pin_between_the_choice_of_a_blob_and_its_eviction_holds(tmp_path):
    def step(name):
        if name == "scan.listed" and not other.pins():
            other.pin("late", [blob("a", 100)[0]])

    with (
        FileCache(tmp_path) as other,
        FileCache(tmp_path, _environment=HostEnvironment(after_step=step)) as cache,
    ):
        small(cache, "a")
        small(cache, "b")
        cache.prune()
        assert present(cache, *"ab") == {"a"}


def test_cache_full_of_pins_says_how_much_is_pinned(tmp_path):
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:
        cache.pin("p", [small(cache, "a")])
        cache.pin("q", [small(cache, "b")])
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match=rf"pinned \({2 * BLOCK} bytes by 2 pins\)"):
                small(cache, "c")
        cache.unpin("p")
        small(cache, "c")
        assert present(cache, *"abc") == set("bc")


def test_what_a_pin_keeps_can_be_read_back(tmp_path):
    first, second = blob("a", 100)[0], blob("b", 200, BLAKE3)[0]
    third = blob("c", 300)[0]
    with FileCache(tmp_path) as cache:
        cache.pin(
            "p", [second, first, first], hashes=[rows(first, third)], refs=[key("y"), key("x"), key("x")]
        )
        pin = cache.pinned("p")
        known = {first.hash: 100, second.hash: 200, third.hash: -1}
        assert [row.tobytes().hex() for row in pin.hashes] == sorted(known)
        assert pin.sizes_bytes.tolist() == [known[hash_] for hash_ in sorted(known)]
        assert pin.sizes_bytes.dtype == np.int64
        assert pin.refs == tuple(sorted((key("x"), key("y"))))
        assert pin.name == "p"
        with pytest.raises(ValueError, match="read-only"):
            pin.hashes[0] = 0


def test_pin_of_nothing_is_a_pin(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("empty")
        pin = cache.pinned("empty")
        assert pin.hashes.shape == (0, 32)
        assert pin.refs == ()
        small(cache, "a")
        assert cache.prune() == 0


def test_names_are_listed_by_prefix(tmp_path):
    names = ["w-2@1", "w-1@2", "w-1@10", "_x", "-", "A" * 200]
    with FileCache(tmp_path) as cache:
        assert cache.pins() == []
        for name in names:
            cache.pin(name)
        assert cache.pins() == sorted(names)
        assert cache.pins("w-1@") == ["w-1@10", "w-1@2"]
        assert cache.pins("none") == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "a" * 201, "a\0"])
def test_malformed_names_are_refused(tmp_path, name):
    with FileCache(tmp_path) as cache:
        for call in (cache.pin, cache.unpin, cache.pinned):
            with pytest.raises(InvalidArgument, match="pin name"):
                call(name)


def test_malformed_contents_are_refused_and_nothing_is_pinned(tmp_path):
    good = blob("a", 100)[0]
    with FileCache(tmp_path) as cache:
        for arguments in (
            {"digests": [good._replace(hash="xyz")]},
            {"digests": [good._replace(size_bytes=-1)]},
            {"digests": [good._replace(size_bytes=2**70)]},
            {"digests": [good, good._replace(size_bytes=101)]},
            {"hashes": [np.zeros((2, 31), np.uint8)]},
            {"hashes": [np.zeros((2, 32), np.int8)]},
            {"hashes": [np.zeros(32, np.uint8)]},
            {"refs": ["../x"]},
        ):
            with pytest.raises(InvalidArgument):
                cache.pin("p", **arguments)
        assert cache.pins() == []
        with pytest.raises(NotFound, match="'p'"):
            cache.pinned("p")
    assert leftovers(tmp_path) == []


def damaged_copies(whole: bytes) -> dict[str, bytes]:
    middle = len(whole) // 2
    return {
        "empty": b"",
        "cut short": whole[:-1],
        "too long": whole + b"\0",
        "other magic": b"snappin2" + whole[8:],
        "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "zeros": bytes(len(whole)),
    }


@pytest.mark.parametrize("how", damaged_copies(bytes(100)))
def test_damaged_pin_stops_evictions_of_its_group_until_it_is_mended(tmp_path, how):
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache, FileCache(tmp_path, group_id="b") as other:
        cache.pin("p", [small(cache, "a")])
        path = pin_file(cache, "p")
        whole = path.read_bytes()
        path.write_bytes(damaged_copies(whole)[how])
        small(cache, "b")
        small(other, "x")
        small(cache, "c")
        assert present(other, "x") == set()
        with pytest.raises(ResourceExhausted, match=str(path)):
            small(cache, "d")
        assert present(cache, *"abc") == set("abc")
        assert cache.pins() == ["p"]
        with pytest.raises(DataLoss, match="pin again"):
            cache.pinned("p")
        cache.pin("p", [blob("a", 100)[0]])
        small(cache, "d")
        assert present(cache, *"abcd") == set("acd")


def test_damaged_pin_can_be_unpinned(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        pin_file(cache, "p").write_bytes(b"")
        assert cache.prune() == BLOCK
        assert cache.unpin("p")
        assert cache.prune() == 0


def test_what_cannot_be_read_as_a_pin_counts_as_a_damaged_one(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        pin_file(cache, "folder").mkdir()
        small(cache, "b")
        assert cache.prune() == 2 * BLOCK
        pin_file(cache, "folder").rmdir()
        assert cache.prune() == BLOCK


def test_pin_that_cannot_be_read_for_a_moment_is_not_damaged_for_ever(tmp_path, monkeypatch):
    with FileCache(tmp_path, max_bytes=2 * BLOCK) as cache:
        cache.pin("p", [small(cache, "a")])
        small(cache, "b")
        load = retention.load_pin

        def too_many_open(path):
            raise OSError(errno.EMFILE, "too many open files", path)

        monkeypatch.setattr(retention, "load_pin", too_many_open)
        assert len(cache.statistics().damaged_pins) == 1
        monkeypatch.setattr(retention, "load_pin", load)
        small(cache, "c")
        assert present(cache, *"abc") == set("ac")
        assert cache.statistics().damaged_pins == ()


def test_pin_that_is_listed_twice_counts_once(tmp_path, monkeypatch):
    listed = retention.PinTable._listed
    monkeypatch.setattr(retention.PinTable, "_listed", lambda self: [*listed(self), *listed(self)])
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        assert cache.prune() == BLOCK
        cache.pin("q")
        assert cache.prune() == BLOCK
        cache.unpin("p")
        assert cache.prune() == 0


def test_file_with_another_name_is_no_pin(tmp_path):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])
        pin_file(cache, ".swp").write_bytes(b"junk")
        small(cache, "b")
        assert cache.prune() == BLOCK
        assert cache.pins() == ["p"]


def test_only_new_and_changed_pins_are_read(tmp_path, monkeypatch):
    read = []
    load = retention.load_pin

    def counting(path):
        read.append(os.path.basename(path))
        return load(path)

    monkeypatch.setattr(retention, "load_pin", counting)
    with FileCache(tmp_path) as cache:
        for number in range(5):
            cache.pin(f"p{number}", [small(cache, number)])
        cache.prune()
        assert sorted(read) == [f"p{number}" for number in range(5)]
        read.clear()
        cache.prune()
        cache.pin("p3", [small(cache, "new")])
        cache.unpin("p1")
        cache.prune()
        assert read == ["p3"]
        assert present(cache, *range(5), "new") == {0, 2, 4, "new"}


def test_removal_by_name_is_not_prevented(tmp_path):
    with FileCache(tmp_path) as cache:
        digest = small(cache, "a")
        cache.put_ref(key("r"), b"x")
        cache.pin("p", [digest], refs=[key("r")])
        assert cache.remove(digest)
        assert cache.delete_ref(key("r"))
        assert cache.pins() == ["p"]


def test_disk_that_is_full_leaves_the_old_pin(tmp_path, monkeypatch):
    with FileCache(tmp_path) as cache:
        cache.pin("p", [small(cache, "a")])

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(retention.os, "fsync", full)
        with pytest.raises(ResourceExhausted, match="cannot pin 'p'"):
            cache.pin("p", [small(cache, "b")])
        monkeypatch.undo()
        cache.prune()
        assert present(cache, *"ab") == {"a"}
        assert list(Path(tmp_path, "v1", "tmp").glob("*/*")) == []


def test_pin_is_flushed_with_its_folder_before_the_call_returns(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def noting(fd):
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    with FileCache(tmp_path) as cache:
        monkeypatch.setattr(os, "fsync", noting)
        cache.pin("p", [small(cache, "a")])
        staged, *folders = flushed
        assert "/tmp/" in staged
        groups = f"{cache.root}/v1/groups"
        assert folders == [
            f"{groups}/_default/pins",
            f"{groups}/_default",
            groups,
            f"{cache.root}/v1",
            cache.root,
        ]
        flushed.clear()
        cache.unpin("p")
        assert flushed == [f"{groups}/_default/pins"]


def test_statistics_count_each_pinned_blob_once(tmp_path):
    with FileCache(tmp_path) as cache, FileCache(tmp_path, group_id="b") as other:
        a, b, c = (small(cache, seed) for seed in "abc")
        cache.pin("p", [a, b], refs=[key("r")])
        cache.pin("q", [b], hashes=[rows(c)], refs=[key("r")])
        other.pin("p", [a])
        found = cache.statistics()
        assert (found.pins, found.pinned_blobs, found.pinned_bytes, found.pinned_refs) == (3, 4, 300, 1)
        cache.unpin("p")
        cache.pin("q", [c])
        found = other.statistics()
        assert (found.pins, found.pinned_blobs, found.pinned_bytes, found.pinned_refs) == (2, 2, 200, 0)
        assert found.damaged_pins == ()


def test_entries_tell_what_is_pinned(tmp_path):
    with FileCache(tmp_path) as cache:
        digest = small(cache, "a")
        small(cache, "b")
        cache.put_ref(key("r"), b"x")
        cache.put_ref(digest.hash, b"of the same name as a pinned blob")
        cache.pin("p", [digest], refs=[key("r")])
        pinned = {(entry.kind, entry.key) for entry in cache.entries() if entry.pinned}
        assert pinned == {("blob", digest.hash), ("ref", key("r"))}
        pin = cache.pinned("p")
        assert pin.keeps(digest.hash)
        assert pin.keeps(key("r"))
        assert not pin.keeps(key("s"))


def test_verify_reports_damaged_pins_and_leaves_them(tmp_path):
    with FileCache(tmp_path) as cache:
        for name in ("good", "bad", "worse"):
            cache.pin(name, [small(cache, name)])
        pin_file(cache, "bad").write_bytes(b"")
        pin_file(cache, "worse").unlink()
        pin_file(cache, "worse").symlink_to("good")
        report = cache.verify()
        assert report.pins == 3
        assert report.bad_pins == ("bad", "worse")
        assert cache.pins() == ["bad", "good", "worse"]
        # Nothing told the ledger; the next scan looks for itself.
        cache.prune()
        assert cache.statistics().damaged_pins == (str(pin_file(cache, "bad")), str(pin_file(cache, "worse")))


KILLED = """
import os, signal, sys
from filecache_helpers import blob, key
from snaploader._environment import HostEnvironment
from snaploader.filecache import FileCache

root, what, fatal = sys.argv[1:]

def checkpoint(name):
    if name == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

with FileCache(root, _environment=HostEnvironment(after_step=checkpoint)) as cache:
    if what == "pin":
        cache.pin("p", [blob("b", 100)[0]], refs=[key("r")])
    else:
        cache.unpin("p")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("pin.written", "a"),
        ("pin.announced", "a"),
        ("pin.renamed", "b"),
        ("unpin.announced", "a"),
        ("unpin.unlinked", ""),
    ],
)
def test_killed_process_leaves_a_whole_pin_or_none(tmp_path, step, expected):
    """And an eviction of a process that runs on sees which."""
    with FileCache(tmp_path, max_bytes=3 * BLOCK) as cache:
        for seed in "xab":
            small(cache, seed)
        cache.pin("p", [blob("a", 100)[0]])
        small(cache, "c")
        assert present(cache, *"xab") == set("ab")
        with child(KILLED, tmp_path, step.partition(".")[0], step) as process:
            assert process.wait(300) == -9
        for seed in "defg":
            small(cache, seed)
        assert present(cache, *"ab") == set(expected)
        assert cache.pins() == (["p"] if expected else [])
        assert cache.verify().bad_pins == ()
        if expected:
            assert cache.pinned("p").keeps(blob(expected, 100)[0].hash)
    with FileCache(tmp_path):
        pass
    assert leftovers(tmp_path) == []


PINNER = """
import random, sys
from filecache_helpers import blob, key, put
from snaploader.errors import NotFound, ResourceExhausted
from snaploader.filecache import FileCache

root, seed = sys.argv[1], sys.argv[2]
rng = random.Random(seed)
with FileCache(root, max_bytes=60 * 4096) as cache:
    kept = {}
    for round_ in range(40):
        name, numbers = f"{seed}-{rng.randrange(5)}", [rng.randrange(40) for _ in range(4)]
        digests = [blob(number, 100)[0] for number in numbers]
        ref = key(f"{seed} {round_}")
        try:
            cache.pin(f"{seed}-new", digests, refs=[ref])
            for number in numbers:
                put(cache, number, 100)
            cache.put_ref(ref, b"x")
            cache.pin(name, digests, refs=[ref])
            kept[name] = numbers, ref
            put(cache, f"{seed} {round_}", 100)
        except ResourceExhausted:
            pass
        cache.unpin(f"{seed}-new")
        if rng.randrange(3) == 0 and kept:
            gone = rng.choice(sorted(kept))
            assert cache.unpin(gone)
            del kept[gone]
        for numbers, ref in kept.values():
            for number in numbers:
                assert cache.read(blob(number, 100)[0]) == blob(number, 100)[1]
            assert cache.get_ref(ref) == b"x"
    assert cache.pins(f"{seed}-") == sorted(kept)
    assert cache.statistics().evicted_entries > 0
print("done", flush=True)
"""


@pytest.mark.slow
def test_processes_that_pin_and_evict_all_keep_what_they_pinned(tmp_path):
    with ExitStack() as stack:
        workers = [stack.enter_context(child(PINNER, tmp_path, str(number))) for number in range(3)]
        for worker in workers:
            assert worker.stdout.readline() == "done\n"
            assert worker.wait(300) == 0
    with FileCache(tmp_path) as cache:
        assert cache.verify().bad_pins == ()
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)
    assert leftovers(tmp_path) == []


def test_closed_cache_pins_nothing(tmp_path):
    cache = FileCache(tmp_path)
    cache.pin("p")
    cache.close()
    for call in (cache.pin, cache.unpin, cache.pinned):
        with pytest.raises(FailedPrecondition, match="closed"):
            call("p")
    with pytest.raises(FailedPrecondition, match="closed"):
        cache.pins()


def test_threads_that_pin_under_one_name_leave_the_pin_of_one(tmp_path):
    with FileCache(tmp_path) as cache:
        digests = [small(cache, number) for number in range(8)]
        threads = [threading.Thread(target=cache.pin, args=("p", [digest])) for digest in digests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (row,) = cache.pinned("p").hashes
        assert row.tobytes().hex() in {digest.hash for digest in digests}
        assert cache.prune() == BLOCK
        assert cache.statistics().pinned_blobs == 1
