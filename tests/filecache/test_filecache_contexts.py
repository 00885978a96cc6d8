"""Each call in its own context: groups that see nothing of each other, and calls that end early."""

import contextlib
import os
import threading

import pytest

from snaploader import files
from snaploader.context import CallContext, Cancellation
from snaploader.digest import Digest, DigestFunction, hash_strings
from snaploader.errors import Cancelled, DataLoss, DeadlineExceeded, InvalidArgument, NotFound
from snaploader.filecache import FileCache
from snaploader.filecache.layout import Layout

A, B = CallContext(group_id="a"), CallContext(group_id="b")
DATA = b"content of group a"
DIGEST = Digest.of(DATA, DigestFunction.SHA256)
REF = hash_strings("ref")


@pytest.fixture
def cache(tmp_path):
    with FileCache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def filled(cache):
    """A cache in whose group "a" there are a blob, a ref and a pin."""
    cache.put_verified(DIGEST, DATA, context=A)
    cache.put_ref(REF, b"value", context=A)
    cache.pin("pin", [DIGEST], refs=[REF], context=A)
    return cache


def everything(cache, context):
    """All that a group shows of itself."""
    with contextlib.suppress(NotFound):
        return cache.read(DIGEST, context=context), cache.get_ref(REF, context=context)
    return (
        cache.find_missing([DIGEST], context=context),
        cache.refs(context=context),
        cache.pins(context=context),
        cache.entries(context=context),
        cache.verify(context=context).blobs,
        cache.remove(DIGEST, context=context),
        cache.delete_ref(REF, context=context),
        cache.unpin("pin", context=context),
    )


NOTHING = ({DIGEST}, [], [], [], 0, False, False, False)


def test_nothing_of_one_group_is_seen_in_another(filled):
    assert everything(filled, B) == NOTHING
    assert everything(filled, None) == NOTHING
    assert everything(filled, A) == (DATA, b"value")
    assert filled.pins(context=A) == ["pin"]


def test_not_across_restarts_either(filled, tmp_path):
    filled.close()
    with FileCache(tmp_path / "cache", group_id="b") as cache:
        assert everything(cache, None) == NOTHING
        assert everything(cache, A) == (DATA, b"value")
    with FileCache(tmp_path / "cache", group_id="a") as cache:
        assert everything(cache, None) == (DATA, b"value")


def test_the_context_of_the_constructor_counts_where_the_call_brings_none(tmp_path):
    with FileCache(tmp_path / "cache", context=A) as cache:
        cache.put_verified(DIGEST, DATA)
        assert cache.find_missing([DIGEST], context=A) == set()
        assert cache.find_missing([DIGEST], context=B) == {DIGEST}


def test_threads_in_different_groups_do_not_mix(cache):
    barrier = threading.Barrier(8, timeout=60)
    failures = []

    def work(number):
        context = CallContext(group_id=f"g{number}")
        data = b"%d" % number * 100
        digest = Digest.of(data, DigestFunction.SHA256)
        barrier.wait()
        for _ in range(20):
            cache.put_verified(digest, data, context=context)
            if [entry.digest for entry in cache.entries(context=context)] != [digest]:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_groups_cost_no_descriptors(cache):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        cache.put_verified(DIGEST, DATA, context=CallContext(group_id=f"g{number}"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_group_that_was_forgotten_is_still_there(cache, monkeypatch):
    monkeypatch.setattr("snaploader.filecache.cache.MAX_PARTITIONS", 2)
    groups = [CallContext(group_id=f"g{number}") for number in range(5)]
    for context in groups:
        cache.put_verified(DIGEST, DATA, context=context)
    assert [cache.read(DIGEST, context=context) for context in groups] == [DATA] * 5


def test_a_group_id_of_a_call_is_checked(cache):
    with pytest.raises(InvalidArgument, match="group id"):
        cache.read(DIGEST, context=CallContext(group_id="../a"))


def test_the_folder_of_a_group_is_checked(cache, tmp_path):
    os.symlink(tmp_path, Layout(cache.root, "a").group_path())
    with pytest.raises(Exception, match="symbolic link"):
        cache.read(DIGEST, context=A)


def test_pins_of_all_groups_are_heeded(filled):
    filled.put_verified(Digest.of(b"b", DigestFunction.SHA256), b"b", context=B)
    filled.prune(context=B)
    assert filled.entries(context=B) == []
    assert everything(filled, A) == (DATA, b"value")


def test_what_a_call_made_stays_in_its_group(cache):
    writer = cache.writer(DIGEST, context=A)
    lease = cache.lease([DIGEST], context=A)
    writer.write(DATA)
    writer.commit()
    assert cache.prune() > 0
    assert cache.read(DIGEST, context=A) == DATA
    lease.release()
    assert cache.prune() == 0


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


def sweep(action, cache, tmp_path, *, at_least):
    """Call an action off at each of its steps; nothing is left of it, and at last it succeeds."""
    looks = 0
    while True:
        looks += 1
        try:
            action(CallContext(cancellation=Fuse(looks)), looks)
        except Cancelled:
            owner = [name for name in os.listdir(cache._context.layout.owners) if not name.endswith(".lock")]
            staged = [os.listdir(f"{cache._context.layout.owners}/{name}") for name in owner]
            assert staged == [[]]
            assert os.listdir(cache._context.layout.leases) == []
            assert cache.entries() == []
            assert not list(tmp_path.glob("out*"))
            continue
        assert looks > at_least
        return


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(files, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(files, "_buffers", files.ThreadBuffers())


BIG = bytes(range(256)) * 40
BIG_DIGEST = Digest.of(BIG, DigestFunction.SHA256)


@pytest.mark.parametrize("how", ["copy", "unverified", "link", "move"])
def test_adding_a_file_is_called_off_at_every_step(cache, tmp_path, small_pieces, how):
    path = tmp_path / "big"
    path.write_bytes(BIG)
    options = {"copy": {}, "unverified": {"verify": False}, "link": {"link": True}, "move": {"move": True}}[
        how
    ]

    def add(context, _):
        cache.put_file(BIG_DIGEST, path, context=context, **options)

    sweep(add, cache, tmp_path, at_least=5)
    assert cache.read(BIG_DIGEST) == BIG
    assert path.exists() == (how != "move")


def test_adding_a_file_of_unknown_digest_is_called_off_at_every_step(cache, tmp_path, small_pieces):
    (tmp_path / "big").write_bytes(BIG)
    sweep(lambda context, _: cache.add_file(tmp_path / "big", context=context), cache, tmp_path, at_least=10)


def test_a_blob_is_put_elsewhere_or_not_at_all(cache, tmp_path, small_pieces):
    cache.put_verified(BIG_DIGEST, BIG)
    out = tmp_path / "out"
    looks = 0
    while True:
        looks += 1
        try:
            fuse = CallContext(cancellation=Fuse(looks))
            cache.materialize(BIG_DIGEST, out, writable=True, context=fuse)
        except Cancelled:
            assert not list(tmp_path.glob("*out*"))
            continue
        break
    assert looks > 2
    assert out.read_bytes() == BIG


def test_hashing_that_is_called_off_says_nothing_of_the_blob(cache, tmp_path, small_pieces):
    cache.put_verified(BIG_DIGEST, BIG)
    cache.close()
    with FileCache(tmp_path / "cache") as again:
        with pytest.raises(Cancelled):
            again.read(BIG_DIGEST, context=CallContext(cancellation=Fuse(4)))
        assert again.read(BIG_DIGEST) == BIG


def test_a_deadline_ends_a_call_like_a_cancellation(cache, tmp_path, small_pieces, monkeypatch):
    (tmp_path / "big").write_bytes(BIG)
    now = [1000.0]

    def tick():
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr("snaploader.context.time.monotonic", tick)
    with pytest.raises(DeadlineExceeded) as caught:
        cache.add_file(tmp_path / "big", context=CallContext(timeout_s=1))
    monkeypatch.undo()
    assert not caught.value.transient
    assert cache.entries() == []


def test_a_call_that_waits_for_an_eviction_can_be_called_off(cache, tmp_path):
    with FileCache(tmp_path / "cache") as other:
        flag = Cancellation()
        errors = []

        def prune():
            try:
                cache.prune(context=CallContext(cancellation=flag))
            except Cancelled as error:
                errors.append(error)

        with other._evictor._lock.held():
            thread = threading.Thread(target=prune)
            thread.start()
            flag.cancel()
            thread.join(60)
        assert len(errors) == 1


def test_wrong_bytes_are_no_cancellation(cache):
    with pytest.raises(DataLoss):
        cache.write(DIGEST, b"something else", context=CallContext(cancellation=Cancellation()))
