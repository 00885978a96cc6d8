"""Processes, threads and descriptors: none before the first call, none after close, safe over a fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import grpc
import pytest
from remote_data import BLAKE3, MakeRemote, MakeServer, named, noise, uploads

from snaploader.errors import FailedPrecondition, Unavailable
from snaploader.remote import Limits, RemoteCache, RetryPolicy, tune_malloc
from snaploader.testing import EmbeddedServer


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("snaploader-remote")}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_opened_before_the_first_call() -> None:
    before = descriptors(), threading.active_count()
    remote = RemoteCache("grpc://127.0.0.1:1")
    assert (descriptors(), threading.active_count()) == before
    remote.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        remote.capabilities()


def test_close_joins_the_threads(make_server: MakeServer) -> None:
    server = make_server()
    with RemoteCache(server.url, limits=Limits(workers=3, batch_blobs=1, batch_bytes=100_000)) as remote:
        blobs = named(*(noise(1000, n) for n in range(20)), noise(200_000))
        remote.write_many(uploads(blobs))
        assert "snaploader-remote-watchdog" in threads()
        assert 1 <= len(threads()) <= 4
    assert threads() == set()


def test_many_caches_leave_no_descriptors(make_server: MakeServer) -> None:
    server = make_server()
    digest = server.put_blob(b"x", BLAKE3)

    def use() -> None:
        with RemoteCache(server.url) as remote:
            assert remote.read(digest) == b"x"

    use()
    before = descriptors()
    for _ in range(20):
        use()
    gc.collect()
    assert descriptors() <= before + 5


def test_importing_starts_nothing() -> None:
    code = "import threading, snaploader.remote; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_statistics_outlive_close(make_server: MakeServer) -> None:
    with RemoteCache(make_server().url) as remote:
        remote.write_many(uploads(named(b"abc")))
    statistics = remote.statistics()
    assert (statistics.blobs_written, statistics.content_bytes_written) == (1, 3)
    assert statistics.calls == {"GetCapabilities": 1, "BatchUpdateBlobs": 1}


def test_threads_share_one_cache(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server)
    start = threading.Barrier(12)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait(300)
            blobs = named(*(noise(2000, number * 100 + n) for n in range(20)))
            remote.upload_missing(uploads(blobs))
            got = {}
            remote.read_many(blobs, got.__setitem__)
            assert got == blobs
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert errors == []
    assert server.calls("GetCapabilities") == 1


class Counting(grpc.UnaryUnaryClientInterceptor):
    """Counts the calls of a channel, by method."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.calls[details.method.rpartition("/")[2]] += 1
        return continuation(details, request)


def test_a_channel_of_the_callers_is_spoken_on_and_closed(make_server: MakeServer) -> None:
    server = make_server()
    counting, channels = Counting(), []

    def channel() -> grpc.Channel:
        channels.append(grpc.intercept_channel(grpc.insecure_channel(server.address), counting))
        return channels[-1]

    blobs = named(b"x", noise(3_000_000))
    with RemoteCache("grpc://elsewhere:1", channel=channel, retry=RetryPolicy(attempts=1)) as remote:
        assert channels == []
        remote.write_many(uploads(blobs))
        for digest, data in blobs.items():
            assert remote.read(digest) == data
        assert counting.calls == {"GetCapabilities": 1, "BatchUpdateBlobs": 1, "BatchReadBlobs": 1}
        server.stop()
        with pytest.raises(Unavailable):
            remote.read(digest)
        server.start()
        remote.find_missing(blobs)
        assert len(channels) == 2
    for closed in channels:
        with pytest.raises(ValueError, match="closed"):
            closed.unary_unary("/x/y")(b"")


FORKING = """
import os, sys
from snaploader.digest import Digest, DigestFunction
from snaploader.remote import RemoteCache

url, used_before = sys.argv[1], sys.argv[2] == "used"
digest = Digest.of(b"x", DigestFunction.BLAKE3)

def use():
    remote.write(digest, b"x")
    remote.read_many([digest], lambda *_: None)
    assert remote.read(digest) == b"x"

remote = RemoteCache(url)
if used_before:
    use()
children = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        try:
            use()
            remote.close()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
use()
remote.close()
assert codes == [0, 0, 0], codes
"""


@pytest.mark.parametrize("when", ["fresh", "used"])
def test_children_of_a_fork_make_their_own_connection(when: str) -> None:
    with EmbeddedServer() as server:
        done = subprocess.run(
            [sys.executable, "-c", FORKING, server.url, when], timeout=300, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert server.calls("GetCapabilities") == 4


def test_malloc_can_be_tuned() -> None:
    code = "from snaploader.remote import tune_malloc; assert tune_malloc() is True"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(tune_malloc)
