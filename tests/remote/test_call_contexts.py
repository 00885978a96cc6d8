"""Calls in contexts: they end when they are called off or late, leave nothing, and speak for one caller."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from interrupts import Interrupter
from remote_data import BLAKE3, KIB, MakeRemote, MakeServer, named, noise, uploads

from snaploader import workers
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.context import CallContext, Cancellation
from snaploader.digest import Digest
from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    Unavailable,
)
from snaploader.remote import BearerToken, Limits, RemoteCache, RetryPolicy, cache, calls, cas, streams
from snaploader.remote.auth import CredentialHelper
from snaploader.testing import CallGate, EmbeddedServer, Fault

LIMITS = Limits(batch_bytes=128 * KIB, stream_frame_bytes=64 * KIB, workers=3)
LONG = RetryPolicy(initial_delay_s=600, max_delay_s=600, budget_s=3600)
PATIENCE_S = 300
SMALL = noise(1000)
BIG = noise(600_000)
KEY = Digest.of(b"an action", BLAKE3)
HEADER = "build.bazel.remote.execution.v2.requestmetadata-bin"


class Work:
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.result: object = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        """Wait for its end; returns what it raised."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.error


def small(remote: RemoteCache, context: CallContext) -> None:
    remote.read(Digest.of(SMALL, BLAKE3), context=context)


def big(remote: RemoteCache, context: CallContext) -> None:
    remote.read(Digest.of(BIG, BLAKE3), context=context)


def streamed(remote: RemoteCache, context: CallContext) -> None:
    remote.read_to(Digest.of(BIG, BLAKE3), lambda _: None, context=context)


def read_many(remote: RemoteCache, context: CallContext) -> None:
    remote.read_many([Digest.of(data, BLAKE3) for data in (SMALL, BIG)], lambda *_: None, context=context)


def find(remote: RemoteCache, context: CallContext) -> None:
    remote.find_missing([KEY], context=context)


def write(remote: RemoteCache, context: CallContext) -> None:
    remote.write(Digest.of(b"new", BLAKE3), b"new", context=context)


def write_big(remote: RemoteCache, context: CallContext) -> None:
    data = noise(700_000, 9)
    remote.write(Digest.of(data, BLAKE3), data, context=context)


def upload_missing(remote: RemoteCache, context: CallContext) -> None:
    remote.upload_missing(uploads(named(b"new", noise(700_000, 9))), context=context)


def get_result(remote: RemoteCache, context: CallContext) -> None:
    remote.get_action_result(KEY, context=context)


def update_result(remote: RemoteCache, context: CallContext) -> None:
    remote.update_action_result(KEY, reapi.ActionResult(), context=context)


CALLS = [
    (small, "GetCapabilities", None),
    (small, "BatchReadBlobs", None),
    (big, "Read", None),
    (big, "Read", 100 * KIB),
    (streamed, "Read", 100 * KIB),
    (read_many, "Read", 100 * KIB),
    (find, "FindMissingBlobs", None),
    (write, "BatchUpdateBlobs", None),
    (write_big, "Write", None),
    (write_big, "Write", 100 * KIB),
    (upload_missing, "Write", 100 * KIB),
    (get_result, "GetActionResult", None),
    (update_result, "UpdateActionResult", None),
]
"""What is called, and at which method the server falls silent: at once, or after so many bytes."""

silences = pytest.mark.parametrize(
    ("call", "method", "after"), CALLS, ids=lambda value: getattr(value, "__name__", str(value))
)


def stored(server: EmbeddedServer) -> None:
    for data in (SMALL, BIG):
        server.put_blob(data, BLAKE3)


@silences
def test_a_call_that_is_called_off_ends_though_the_server_is_silent_and_so_does_the_servers(
    call: Callable[[RemoteCache, CallContext], None],
    method: str,
    after: int | None,
    make_server: MakeServer,
    make_remote: MakeRemote,
) -> None:
    gate, flag = CallGate(), Cancellation()
    server = make_server(
        Fault(method, gate=gate, stall_after_bytes=after, times=None), read_chunk_bytes=64 * KIB
    )
    stored(server)
    before = server.blobs()
    remote = make_remote(server, limits=LIMITS, compression=False)
    work = Work(lambda: call(remote, CallContext(cancellation=flag)))
    assert gate.wait_reached(PATIENCE_S)
    flag.cancel()
    error = work.end()
    assert isinstance(error, Cancelled)
    assert not error.transient
    assert server.wait_idle(PATIENCE_S)
    assert {one.status for one in server.requests if one.method == method} == {"CANCELLED"}
    assert remote.statistics().retries == 0
    assert server.action_results() == {}
    assert set(server.blobs()) - set(before) <= {Digest.of(b"new", BLAKE3)}

    gate.open()  # nothing of it disturbs who comes next
    remote.read(Digest.of(BIG, BLAKE3))


@silences
def test_a_call_that_is_late_ends_with_its_deadline(
    call: Callable[[RemoteCache, CallContext], None],
    method: str,
    after: int | None,
    make_server: MakeServer,
    make_remote: MakeRemote,
) -> None:
    server = make_server(
        Fault(method, hang=True, stall_after_bytes=after, times=None), read_chunk_bytes=64 * KIB
    )
    stored(server)
    remote = make_remote(server, limits=LIMITS, compression=False)
    if method != "GetCapabilities":
        remote.capabilities()
    with pytest.raises(DeadlineExceeded) as caught:
        call(remote, CallContext(timeout_s=0.05))
    assert not caught.value.transient
    assert remote.statistics().retries == 0
    assert server.wait_idle(PATIENCE_S)


def test_a_deadline_is_not_passed_by_waiting_for_another_try(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    remote = make_remote(make_server(Fault("*", status="UNAVAILABLE", times=None)), retry=LONG)
    with pytest.raises(Unavailable):
        remote.capabilities(context=CallContext(timeout_s=60))
    assert remote.statistics().retries == 0


def test_waiting_for_another_try_ends_when_the_call_is_called_off(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    flag = Cancellation()
    server = make_server(Fault("*", status="UNAVAILABLE", times=None))
    remote = make_remote(server, retry=LONG, on_retry=lambda _: flag.cancel())
    with pytest.raises(Cancelled):
        remote.capabilities(context=CallContext(cancellation=flag))
    assert server.total_calls() == 1


@contextmanager
def silent_host() -> Iterator[str]:
    """A port where connections are taken, by the system, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_connecting_ends_with_the_call(scheme: str, make_remote: MakeRemote) -> None:
    with silent_host() as host:
        remote = make_remote(f"{scheme}://{host}")
        with pytest.raises(DeadlineExceeded):
            remote.capabilities(context=CallContext(timeout_s=0.05))
        flag = Cancellation()
        work = Work(lambda: remote.capabilities(context=CallContext(cancellation=flag)))
        flag.cancel()
        assert isinstance(work.end(), Cancelled)


def test_finding_out_why_tls_fails_ends_with_the_call(
    make_remote: MakeRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing, done, flag = threading.Event(), threading.Event(), Cancellation()

    def probe(*_: object) -> None:
        probing.set()
        assert done.wait(PATIENCE_S)

    monkeypatch.setattr("snaploader.remote.calls.tls_failure", probe)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"grpcs://127.0.0.1:{listening.getsockname()[1]}"
    remote = make_remote(url)
    work = Work(lambda: remote.capabilities(context=CallContext(cancellation=flag)))
    assert probing.wait(PATIENCE_S)
    flag.cancel()
    assert isinstance(work.end(), Cancelled)
    done.set()


def test_a_token_that_does_not_come_ends_with_the_call(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    asked, done, flag = threading.Event(), threading.Event(), Cancellation()

    def token() -> str:
        asked.set()
        assert done.wait(PATIENCE_S)
        return "late"

    server = make_server()
    remote = make_remote(server)
    proof = BearerToken(token)
    work = Work(lambda: remote.capabilities(context=CallContext(cancellation=flag, credentials=proof)))
    assert asked.wait(PATIENCE_S)
    flag.cancel()
    assert isinstance(work.end(), Cancelled)
    with pytest.raises(DeadlineExceeded):
        remote.capabilities(context=CallContext(timeout_s=0.01, credentials=proof))
    done.set()
    assert server.total_calls() == 0


def test_a_credential_helper_is_killed_with_the_call_and_the_next_caller_runs_it_again(
    tmp_path: Path,
) -> None:
    started, helper, flag = tmp_path / "started", tmp_path / "helper", Cancellation()
    subprocess.run(["mkfifo", started], check=True)
    helper.write_text(
        f"#!/bin/sh\nif [ -e {tmp_path}/second ]\n"
        """then echo '{"headers": {"x-a": ["b"]}}'; exit; fi\n"""
        f"echo $$ > {started}\nexec sleep 600\n"
    )
    helper.chmod(0o700)
    credentials = CredentialHelper(helper, "https://cache", 600)

    def ask() -> object:
        with CallContext(cancellation=flag).use():
            return credentials.headers()

    leader = Work(ask)
    started.read_text()
    follower = Work(credentials.headers)
    (tmp_path / "second").touch()
    flag.cancel()
    assert isinstance(leader.end(), Cancelled)
    assert follower.end() is None
    assert follower.result == credentials.headers() == (("x-a", "b"),)
    credentials.refresh()
    with pytest.raises(DeadlineExceeded), CallContext(deadline_s=time.monotonic()).use():
        credentials.headers()


def test_one_callers_cancellation_does_not_fail_those_who_wait_for_the_same_answer(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    gate, flags = CallGate(), [Cancellation(), Cancellation()]
    server = make_server(Fault("GetCapabilities", gate=gate, times=2))
    remote = make_remote(server)
    first = Work(lambda: remote.capabilities(context=CallContext(cancellation=flags[0])))
    assert gate.wait_reached(PATIENCE_S)
    follower = Work(remote.capabilities)
    impatient = Work(lambda: remote.capabilities(context=CallContext(cancellation=flags[1])))
    flags[1].cancel()
    assert isinstance(impatient.end(), Cancelled)
    flags[0].cancel()
    assert isinstance(first.end(), Cancelled)
    assert gate.wait_reached(PATIENCE_S, calls=2)
    gate.open()
    assert follower.end() is None
    assert follower.result == remote.capabilities()


def test_a_bulk_transfer_that_waits_for_room_ends_when_it_is_called_off(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    gate, flag = CallGate(), Cancellation()
    server = make_server(Fault("BatchReadBlobs", gate=gate, times=1))
    stored(server)
    remote = make_remote(server, limits=Limits(in_flight_bytes=1, workers=1))
    digest = Digest.of(SMALL, BLAKE3)
    first = Work(lambda: remote.read_many([digest], lambda *_: None))
    assert gate.wait_reached(PATIENCE_S)
    second = Work(lambda: remote.read_many([digest], lambda *_: None, context=CallContext(cancellation=flag)))
    flag.cancel()
    assert isinstance(second.end(), Cancelled)
    with pytest.raises(DeadlineExceeded):
        remote.read_many([digest], lambda *_: None, context=CallContext(timeout_s=0.01))
    gate.open()
    assert first.end() is None


def published_whole(server: EmbeddedServer, blobs: dict[Digest, bytes]) -> bool:
    """Whether the result is there; then so is all that it stands for. What is there is right in any case."""
    there = {digest: server.get_blob(digest) for digest in server.blobs()}
    assert all(Digest.of(data, BLAKE3) == digest for digest, data in there.items())
    if server.action_results():
        assert there == blobs
        return True
    return False


def sweep(first: int, stride: int, make_server: MakeServer, make_remote: MakeRemote) -> int:
    """Publish, among faults, and call it off at a step, then at a later one; how many steps there were."""
    blobs = named(SMALL, noise(50_000, 1), noise(100_000, 2), noise(300_000, 3))
    server = make_server()
    remote = make_remote(server, limits=LIMITS, compression=False)
    files = [module.__file__ for module in (cache, calls, cas, streams, workers)]
    step, missed = first, 0
    while missed < 3:  # with other threads at work, the number of steps differs from time to time
        for digest in server.blobs():
            server.delete_blob(digest)
        for key in server.action_results():
            server.delete_action_result(key)
        server.faults.clear()
        server.faults.add(
            Fault("FindMissingBlobs", status="UNAVAILABLE"),
            Fault("BatchUpdateBlobs", item_status="RESOURCE_EXHAUSTED"),
            Fault("Write", cut_after_bytes=100_000),
            Fault("UpdateActionResult", lose_reply=True),
            Fault("Read", cut_after_bytes=100_000),
        )
        flag = Cancellation()
        got: dict[Digest, bytes] = {}
        with Interrupter(step, *files, act=flag.cancel) as interrupter:
            try:
                with CallContext(cancellation=flag).use():
                    remote.upload_missing(uploads(blobs))
                    remote.update_action_result(KEY, reapi.ActionResult(stdout_raw=b"out"))
                    remote.read_many(blobs, got.__setitem__)
            except Cancelled:
                assert interrupter.fired
            else:
                assert got == blobs
                assert published_whole(server, blobs)
        assert server.wait_idle(PATIENCE_S)
        assert all(got[digest] == blobs[digest] for digest in got)
        published_whole(server, blobs)
        missed = 0 if interrupter.fired else missed + 1
        step += stride
    return step


def test_a_call_can_be_called_off_at_any_step_and_leaves_nothing(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    assert sweep(1, 31, make_server, make_remote) > 300


@pytest.mark.slow
def test_a_call_can_be_called_off_at_every_single_step_and_leaves_nothing(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    assert sweep(1, 1, make_server, make_remote) > 300
