"""Calls that are called off, or whose time is up, at each of their steps: they end, and leave nothing."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from filecache_helpers import (
    SHA256,
    blob,
    blob_file,
    damage,
    disk_bytes_below,
    key,
    open_without_o_tmpfile,
)

from snaploader import context as contexts, files
from snaploader.blobstore import Upload
from snaploader.context import CallContext, Cancellation
from snaploader.digest import Digest
from snaploader.errors import Cancelled, DataLoss, DeadlineExceeded, FailedPrecondition
from snaploader.filecache import FileCache

PIECE = 1000
SIZE = 20 * PIECE
KEPT, KEPT_DATA = blob("kept", SIZE)
NEW, NEW_DATA = blob("new", SIZE)
SMALL = [blob(number, 100) for number in range(5)]
ABSENT = [Digest(key(f"absent {number}"), 1, SHA256) for number in range(2000)]
REF = key("ref")
FILE_MODE = 0o644
FILE_TIME_NS = 10**18


class Fuse(Cancellation):
    """Is set at the n-th look at it."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def is_cancelled(self):
        self.looks -= 1
        if self.looks == 0:
            self.cancel()
        return super().is_cancelled

    def check(self):
        if self.is_cancelled:
            raise Cancelled("by the test")


class Clock:
    """Takes one more second at each look at it."""

    now_s = 0

    def __call__(self):
        self.now_s += 1
        return self.now_s


@pytest.fixture(params=["called off", "late"])
def ending(request, monkeypatch):
    """A function that makes the context of a call which ends at its n-th look, and the error of that."""
    if request.param == "called off":
        return (lambda looks: CallContext(cancellation=Fuse(looks))), Cancelled
    clock = Clock()
    monkeypatch.setattr(contexts, "time", SimpleNamespace(monotonic=clock))
    return (lambda looks: CallContext(deadline_s=clock.now_s + looks)), DeadlineExceeded


@pytest.fixture
def folder(tmp_path):
    """Where the files are that are no business of the cache."""
    path = tmp_path / "outside"
    path.mkdir()
    file = path / "in"
    file.write_bytes(NEW_DATA)
    os.chmod(file, FILE_MODE)
    os.utime(file, ns=(FILE_TIME_NS, FILE_TIME_NS))
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache folder with a blob, a ref and a pin; then all is done in small pieces."""
    with FileCache(tmp_path / "cache") as cache:
        cache.put_verified(KEPT, KEPT_DATA)
        cache.put_ref(REF, KEPT_DATA)
        cache.pin("pin", [KEPT, *ABSENT], refs=[REF])
        cache.prune()
    monkeypatch.setattr(files, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(files, "BUFFER_BYTES", PIECE)
    monkeypatch.setattr(files, "_buffers", files.ThreadBuffers())
    monkeypatch.setattr("snaploader.filecache.cache._PIECE_BYTES", PIECE)
    monkeypatch.setattr(files, "_FIRST_TRY_S", 0.00001)
    monkeypatch.setattr(files, "_LOOK_S", 0.0001)
    return tmp_path / "cache"


@pytest.fixture
def cache(root):
    """That cache, which has verified nothing yet and knows no pin."""
    with FileCache(root) as cache:
        yield cache


def state(cache, folder):
    """All that there is on disk and open, found out behind the cache's back."""
    base = os.path.join(cache.root, "v1")
    entries = sorted(
        os.path.join(parent, name)
        for top in ("groups", "quarantine", "leases", "trash")
        for parent, _, names in os.walk(os.path.join(base, top))
        for name in names
    )
    staged = [name for _, _, names in os.walk(cache._context.folder._staging) for name in names]
    assert staged == []
    with cache._context.ledger.section() as section:
        assert section.total_bytes == disk_bytes_below(cache.root)
        assert not section._scanning
    outside = {
        name: (status.st_mode & 0o7777, status.st_mtime_ns, status.st_nlink)
        for name in os.listdir(folder)
        for status in [os.stat(folder / name)]
    }
    return entries, outside, len(os.listdir("/proc/self/fd"))


def add(**options):
    def call(cache, folder, context):
        cache.put_file(NEW, folder / "in", context=context, **options)

    return call


def write_by_pieces(cache, folder, context):
    with cache.writer(NEW, context=context) as writer:
        writer.write(NEW_DATA[: SIZE // 2], context=context)
        writer.write(NEW_DATA[SIZE // 2 :], context=context)
        writer.commit(context=context)


def read_to(cache, folder, context):
    parts = []
    cache.read_to(KEPT, parts.append, context=context)
    assert b"".join(parts) == KEPT_DATA


def read_many(cache, folder, context):
    cache.read_many([KEPT, KEPT], lambda digest, data: None, context=context)


def lease(cache, folder, context):
    cache.lease([KEPT], context=context).release()


def materialize(**options):
    def call(cache, folder, context):
        cache.materialize(KEPT, folder / "out", context=context, **options)
        os.unlink(folder / "out")

    return call


def statistics(cache, folder, context):
    found = cache.statistics(context=context)
    assert (found.pins, found.damaged_pins) == (1, ())


def verify(cache, folder, context):
    found = cache.verify(context=context)
    assert (found.blobs, found.refs, found.pins) == (1, 1, 1)
    assert (found.bad_blobs, found.bad_refs, found.bad_pins) == ((), (), ())


def find_missing(cache, folder, context):
    assert cache.find_missing([KEPT, *ABSENT], context=context) == set(ABSENT)


PIECES = SIZE // PIECE
CALLS = {
    # What a call is, and in how many steps it can be ended at least.
    "add": (add(), PIECES),
    "add unverified": (add(verify=False), PIECES - 1),
    "add by link": (add(link=True), PIECES),
    "add by move": (add(move=True), PIECES),
    "add_file": (lambda cache, folder, context: cache.add_file(folder / "in", context=context), PIECES),
    "write": (lambda cache, folder, context: cache.write(NEW, NEW_DATA, context=context), PIECES),
    "put_verified": (
        lambda cache, folder, context: cache.put_verified(NEW, NEW_DATA, context=context),
        PIECES - 1,
    ),
    "writer": (write_by_pieces, PIECES),
    "open": (lambda cache, folder, context: os.close(cache.open(KEPT, context=context)), PIECES),
    "path": (lambda cache, folder, context: cache.path(KEPT, context=context), PIECES),
    "read": (lambda cache, folder, context: cache.read(KEPT, context=context), PIECES),
    "read_to": (read_to, PIECES),
    "read_many": (read_many, PIECES),
    "materialize": (materialize(), PIECES),
    "materialize a copy": (materialize(writable=True), PIECES),
    "find_missing": (find_missing, 3),
    "lease": (lease, 1),
    "get_ref": (lambda cache, folder, context: cache.get_ref(REF, context=context), PIECES),
    "put_ref": (lambda cache, folder, context: cache.put_ref(key("new"), NEW_DATA, context=context), PIECES),
    "pin": (lambda cache, folder, context: cache.pin("new", [KEPT, *ABSENT], context=context), PIECES),
    "unpin": (lambda cache, folder, context: cache.unpin("pin", context=context), 1),
    "pinned": (lambda cache, folder, context: cache.pinned("pin", context=context), PIECES),
    "entries": (lambda cache, folder, context: cache.entries(context=context), PIECES),
    "refs": (lambda cache, folder, context: cache.refs(context=context), 2),
    "statistics": (statistics, PIECES),
    "verify": (verify, PIECES),
    "prune_plan": (lambda cache, folder, context: cache.prune_plan(context=context), PIECES),
}


@pytest.mark.parametrize(
    "named", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["O_TMPFILE", "named"]
)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_ends_early_leaves_nothing(cache, folder, ending, monkeypatch, name, named):
    if named:
        monkeypatch.setattr(os, "open", open_without_o_tmpfile)
    call, steps = CALLS[name]
    context_of, error = ending
    before = state(cache, folder)
    looks = 0
    while True:
        looks += 1
        try:
            call(cache, folder, context_of(looks))
        except error:
            assert state(cache, folder) == before
        else:
            break
    assert looks > steps
    state(cache, folder)
    monkeypatch.undo()
    if set(os.listdir(folder)) == {"in"} and name != "add by link":
        assert state(cache, folder)[1] == before[1]
    assert not cache.verify().bad_blobs


def test_adding_many_leaves_whole_blobs_only(cache, folder, ending):
    uploads = [Upload(digest, data) for digest, data in [*SMALL, (NEW, NEW_DATA)]]
    context_of, error = ending
    looks = 0
    while True:
        looks += 1
        try:
            cache.write_many(uploads, context=context_of(looks))
        except error:
            state(cache, folder)
            assert not cache.verify().bad_blobs
            for digest, _ in SMALL:
                cache.remove(digest)
        else:
            break
    assert looks > len(uploads)
    assert cache.find_missing([upload.digest for upload in uploads]) == set()


def test_an_eviction_that_ends_early_has_counted_what_went(cache, folder, ending):
    context_of, error = ending
    looks = 0
    left = set()
    while True:
        looks += 1
        for digest, data in SMALL:
            cache.put_verified(digest, data)
        try:
            cache.prune(context=context_of(looks))
        except error:
            state(cache, folder)
            left.add(len(cache.entries()))
        else:
            break
    state(cache, folder)
    assert left == {2, 3, 4, 5, 6, 7}
    assert len(cache.entries()) == 2


LOCKS = {
    "ledger": lambda cache: cache._context.ledger.lock,
    "evictions": lambda cache: cache._evictor._lock,
    "uses": lambda cache: cache._uses._lock,
}
WAITING = {
    "ledger": [
        *("add", "add by link", "add by move", "add_file", "write", "put_verified", "writer", "lease"),
        *("put_ref", "pin", "unpin", "entries", "statistics", "prune_plan"),
    ],
    "evictions": ["prune_plan"],
    "uses": ["find_missing"],
}


@pytest.mark.parametrize("whose", ["of another process", "of a thread"])
@pytest.mark.parametrize(("lock", "name"), [(lock, name) for lock in LOCKS for name in WAITING[lock]])
def test_a_call_that_waits_for_others_ends_early_too(cache, root, folder, ending, lock, name, whose):
    call, _ = CALLS[name]
    context_of, error = ending
    before = state(cache, folder)
    with FileCache(root) as other:
        # Two caches of one process exclude each other as two processes do.
        held = LOCKS[lock](other).held() if whose == "of another process" else LOCKS[lock](cache)._threads
        with held, pytest.raises(error):
            call(cache, folder, context_of(200))
    assert state(cache, folder) == before
    call(cache, folder, context_of(1000))


def test_a_call_that_finds_wrong_bytes_and_waits_ends_early_too(cache, root, folder, ending):
    context_of, error = ending
    damage(blob_file(cache, KEPT), bytes(SIZE))
    with FileCache(root) as other, other._context.ledger.lock.held(), pytest.raises(error):
        cache.read(KEPT, context=context_of(200))
    with pytest.raises(DataLoss, match="quarantine"):
        cache.read(KEPT, context=context_of(200))
    state(cache, folder)


def test_a_lease_ends_though_its_call_is_over(cache, root, ending):
    context_of, _ = ending
    lease = cache.lease([KEPT])
    with FileCache(root) as other, other._context.ledger.lock.held(), context_of(20).use():
        lease.release()
    assert os.listdir(cache._context.layout.leases) == []


def test_a_write_that_ends_early_cannot_be_committed(cache, folder, ending):
    context_of, error = ending
    before = state(cache, folder)
    writer = cache.writer(NEW, verify=False)
    writer.write(NEW_DATA[:PIECE])
    with pytest.raises(error):
        writer.write(NEW_DATA[PIECE:], context=context_of(PIECES // 2))
    with pytest.raises(FailedPrecondition, match="closed"):
        writer.commit()
    assert state(cache, folder) == before


def test_what_calls_off_the_call_that_made_a_writer_calls_off_its_writes(cache):
    cancellation = Cancellation()
    with cache.writer(NEW, context=CallContext(cancellation=cancellation, timeout_s=60)) as writer:
        writer.write(NEW_DATA[:PIECE])
        cancellation.cancel()
        with pytest.raises(Cancelled):
            writer.write(NEW_DATA[PIECE:])
    assert cache.find_missing([NEW]) == {NEW}


def test_the_time_for_making_a_writer_is_not_that_for_its_writes(cache, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(contexts, "time", SimpleNamespace(monotonic=clock))
    with cache.writer(NEW, context=CallContext(timeout_s=10)) as writer:
        clock.now_s += 60
        writer.write(NEW_DATA)
        assert writer.commit()


def test_what_is_read_in_pieces_is_what_is_read_at_once(cache):
    assert cache.read(KEPT, context=CallContext(timeout_s=60)) == cache.read(KEPT) == KEPT_DATA


def test_wrong_bytes_are_no_cancellation(cache):
    with pytest.raises(DataLoss):
        cache.write(KEPT, b"something else", context=CallContext(cancellation=Cancellation()))
