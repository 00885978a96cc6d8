"""Each call in the group that it names: groups see nothing of each other."""

import contextlib
import os
import threading

import pytest

from snaploader.context import CallContext
from snaploader.digest import Digest, DigestFunction, hash_strings
from snaploader.errors import InvalidArgument, NotFound
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
