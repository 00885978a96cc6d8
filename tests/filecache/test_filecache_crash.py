"""A process killed at any step leaves whole entries or nothing, and a cache that works."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filecache_helpers import blob, child, disk_bytes_below, key, leftovers, put, tracked_directory

from snaploader.errors import NotFound
from snaploader.filecache import FileCache

MAX_BYTES = 9 * 4096
STEPS = Path(__file__).parents[1] / "compatibility/crash_steps.json"
"""See `test_crash_steps.py` beside it."""
OLD = [f"old {number}" for number in range(6)]
NEW = ["piece", "file", *(f"new {number}" for number in range(4))]

WORK = """
import itertools, os, signal, sys
from filecache_helpers import blob, key, put
from snaploader._environment import HostEnvironment
from snaploader.filecache import FileCache

def work(root, fatal, max_bytes):
    steps = itertools.count()

    def checkpoint(name):
        if next(steps) == fatal:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    with FileCache(root, max_bytes=max_bytes, _environment=HostEnvironment(after_step=checkpoint)) as cache:
        with cache.lease([blob("old 5", 100)[0]]):
            cache.put_ref(key("ref"), b"two" * 100)
            digest, data = blob("piece", 100)
            with cache.writer(digest) as writer:
                writer.write(data)
                writer.commit()
            digest, data = blob("file", 100)
            with open(root + "/mine", "wb") as file:
                file.write(data)
            cache.put_file(digest, root + "/mine", move=True)
            for number in range(4):
                put(cache, f"new {number}", 100)
            cache.put_ref(key("other"), b"new" * 100, overwrite=False)
            cache.pin("mine", [blob("old 0", 100)[0]], refs=[key("other")])
            cache.pin("mine", [blob("new 1", 100)[0]], refs=[key("other")])
            cache.prune(4 * 4096)
            cache.unpin("mine")
    print("done", flush=True)

# Forking costs much less than starting a process for each step.
for line in sys.stdin:
    root, fatal, max_bytes = line.split()
    pid = os.fork()
    if not pid:
        try:
            work(root, int(fatal), int(max_bytes))
            os._exit(0)
        except BaseException as error:
            print(f"failed: {error!r}", flush=True)
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def work() -> Iterator[Callable[[Path, int], str]]:
    """Works on a cache until the step of a number; the step's name, or "done"."""
    with child(WORK) as process:

        def run(root: Path, fatal: int) -> str:
            process.stdin.write(f"{root} {fatal} {MAX_BYTES}\n")
            process.stdin.flush()
            name = process.stdout.readline().strip()
            assert process.stdout.readline().strip() == ("0" if name == "done" else "-9")
            return name

        yield run


def prepare(root: Path) -> None:
    with FileCache(root, max_bytes=MAX_BYTES) as cache:
        cache.put_ref(key("ref"), b"one" * 100)
        for seed in OLD:
            put(cache, seed, 100)
    tracked_directory(root, "old")


def check(root: Path) -> None:
    """Everything that is visible is whole, and the cache goes on working."""
    with FileCache(root, max_bytes=MAX_BYTES) as cache:
        report = cache.verify()
        assert report.bad_blobs == ()
        assert report.bad_refs == ()
        assert report.bad_pins == ()
        for seed in OLD + NEW:
            digest, data = blob(seed, 100)
            if not cache.find_missing([digest]):
                assert cache.read(digest) == data
        with contextlib.suppress(NotFound):
            assert cache.get_ref(key("ref")) in (b"one" * 100, b"two" * 100)
        total = cache.prune(1 << 30)
        assert total == disk_bytes_below(root) <= MAX_BYTES
        assert list(root.glob("v1/groups/*/trees/*/*")) == []
        for seed in OLD + NEW:
            put(cache, seed, 100)
            assert cache.read(blob(seed, 100)[0]) == blob(seed, 100)[1]
        assert cache.put_ref(key("ref"), b"three")
        # What was pinned again was never unprotected in between, and a pin is there whole or not at all.
        if cache.unpin("mine"):
            assert cache.prune() <= 4096 * 2
        assert cache.prune() == 0
    assert leftovers(root) == []


@pytest.mark.slow
def test_killed_at_every_step(tmp_path, work):
    names = []
    for fatal in range(200):
        root = tmp_path / str(fatal)
        root.mkdir()
        prepare(root)
        name = work(root, fatal)
        check(root)
        if name == "done":
            break
        names.append(name)
    assert name == "done"
    assert names == json.loads(STEPS.read_text())["filecache"]


@pytest.mark.slow
def test_killed_again_and_again_on_one_folder(tmp_path, work):
    prepare(tmp_path)
    for fatal in (3, 9, 4, 14, 21, 2, 17, 30, 11, 26):
        work(tmp_path, fatal)
    check(tmp_path)


def test_what_a_killed_process_staged_is_swept_and_that_of_a_living_one_is_not(tmp_path):
    program = """
import os, sys
from filecache_helpers import blob, open_without_o_tmpfile
from snaploader.filecache import FileCache
os.open = open_without_o_tmpfile
cache = FileCache(sys.argv[1])
writer = cache.writer(blob(1, 100)[0])
writer.write(b"half")
print(cache.root, flush=True)
sys.stdin.readline()
"""
    with child(program, tmp_path) as living:
        living.stdout.readline()
        with child(program, tmp_path) as dying:
            dying.stdout.readline()
            assert len(list(Path(tmp_path, "v1", "tmp").glob("*/*"))) == 2
            dying.kill()
            dying.wait()
        with FileCache(tmp_path):
            assert len(list(Path(tmp_path, "v1", "tmp").glob("*/*"))) == 1
        assert living.poll() is None
    with FileCache(tmp_path):
        pass
    assert leftovers(tmp_path) == []


STRESS = """
import random, sys, threading
from filecache_helpers import blob, key, put
from snaploader.errors import NotFound, ResourceExhausted
from snaploader.filecache import FileCache

root, seed = sys.argv[1], int(sys.argv[2])

def work(cache, rng):
    for _ in range(120):
        number = rng.randrange(60)
        digest, data = blob(number, 100 + 100 * number)
        what = rng.randrange(8)
        try:
            if what < 3:
                cache.put_verified(digest, data)
            elif what < 5:
                assert cache.read(digest) == data
            elif what == 5:
                with cache.lease([digest]):
                    cache.put_verified(digest, data)
                    assert cache.read(digest) == data
            elif what == 6:
                cache.put_ref(key(str(number % 5)), b"%d" % (number % 5) * 50)
            else:
                number %= 5
                assert cache.get_ref(key(str(number))) == b"%d" % number * 50
                cache.remove(digest)
        except (NotFound, ResourceExhausted):
            pass

with FileCache(root, max_bytes=120_000) as cache:
    threads = [threading.Thread(target=work, args=(cache, random.Random(seed * 10 + n))) for n in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert cache.statistics().quarantined_blobs == 0
    assert cache.statistics().total_bytes <= 120_000
print("done", flush=True)
"""


@pytest.mark.slow
def test_several_processes_share_a_folder(tmp_path):
    with contextlib.ExitStack() as stack:
        workers: list[subprocess.Popen[str]] = [
            stack.enter_context(child(STRESS, tmp_path, str(number))) for number in range(4)
        ]
        for worker in workers:
            assert worker.stdout.readline() == "done\n"
            assert worker.wait(300) == 0
    with FileCache(tmp_path, max_bytes=120_000) as cache:
        assert cache.verify().bad_blobs == ()
        # Nobody was killed, so the count is exact without a scan.
        assert cache.statistics().total_bytes == disk_bytes_below(tmp_path)
    assert leftovers(tmp_path) == []
