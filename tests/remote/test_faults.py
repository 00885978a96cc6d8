"""Every fault at every method: the right bytes or a typed error, never wrong bytes, never a hang."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from remote_data import BLAKE3, KIB, MIB, QUICK, SHA256, MakeRemote, MakeServer, named, noise, text, uploads

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Upload
from snaploader.digest import Buffer, Digest
from snaploader.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from snaploader.remote import Limits, RemoteCache, RetryEvent, RetryPolicy, Timeouts
from snaploader.remote.calls import Attempts, Transport
from snaploader.testing import CallGate, Fault

LIMITS = Limits(batch_bytes=256 * KIB, stream_frame_bytes=64 * KIB)
SMALL = noise(1000)
BIG = noise(900_000)
KEY = Digest.of(b"an action", BLAKE3)

METHODS = (
    "GetCapabilities",
    "FindMissingBlobs",
    "BatchUpdateBlobs",
    "BatchReadBlobs",
    "Write",
    "Read",
    "UpdateActionResult",
    "GetActionResult",
)


def round_trip(remote: RemoteCache) -> None:
    """Uses every method once, and checks every byte."""
    blobs = named(SMALL, BIG)
    remote.upload_missing(uploads(blobs))
    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs
    remote.update_action_result(KEY, reapi.ActionResult(stdout_raw=b"out"))
    assert remote.get_action_result(KEY).stdout_raw == b"out"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "code", ["UNAVAILABLE", "ABORTED", "INTERNAL", "UNKNOWN", "RESOURCE_EXHAUSTED", "CANCELLED"]
)
def test_two_transient_failures_are_outlived(
    method: str, code: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault(method, status=code, times=2))
    events: list[RetryEvent] = []
    remote = make_remote(server, limits=LIMITS, on_retry=events.append)
    round_trip(remote)
    assert server.faults.pending == []
    assert len(events) == remote.statistics().retries == 2
    assert remote.statistics().failed_calls[method] == 2
    assert [event.attempt for event in events] == [1, 2]
    assert all("scripted fault" in str(event.error) and code in str(event.error) for event in events)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", Unavailable),
        ("INTERNAL", Internal),
        ("RESOURCE_EXHAUSTED", ResourceExhausted),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
    ],
)
def test_lasting_transient_failure_is_raised_after_all_attempts(
    method: str, code: str, kind: type[SnaploaderError], make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault(method, status=code, times=None))
    remote = make_remote(server, limits=LIMITS)
    with pytest.raises(kind, match="scripted fault") as caught:
        round_trip(remote)
    assert caught.value.transient
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert server.calls(method) == QUICK.attempts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("PERMISSION_DENIED", PermissionDenied),
        ("UNAUTHENTICATED", Unauthenticated),
        ("FAILED_PRECONDITION", FailedPrecondition),
        ("NOT_FOUND", NotFound),
        ("DATA_LOSS", DataLoss),
    ],
)
def test_final_failure_is_not_retried(
    method: str, code: str, kind: type[SnaploaderError], make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault(method, status=code, times=None))
    remote = make_remote(server, limits=LIMITS)
    with pytest.raises(kind, match="scripted fault"):
        round_trip(remote)
    assert remote.statistics().retries == 0
    assert server.calls(method) == (2 if (method, code) == ("Read", "DATA_LOSS") else 1)


@pytest.mark.parametrize("method", ["BatchReadBlobs", "BatchUpdateBlobs"])
@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "INVALID_ARGUMENT"])
def test_unknown_and_malformed_requests_are_typed(
    method: str, code: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    faults = [Fault(name, status=code, times=None) for name in (method, "Read", "Write")]
    remote = make_remote(make_server(*faults), limits=LIMITS)
    kind = {"UNIMPLEMENTED": Unimplemented, "INVALID_ARGUMENT": InvalidArgument}[code]
    with pytest.raises(kind, match="scripted fault"):
        round_trip(remote)


@pytest.mark.parametrize("cuts", [[1], [64 * KIB], [300_000, 300_000], [100, 200, 300, 400_000, 5, 0]])
@pytest.mark.parametrize("compression", [True, False])
def test_cut_download_goes_on_at_its_offset(
    cuts: list[int], compression: bool, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(*(Fault("Read", cut_after_bytes=n) for n in cuts), read_chunk_bytes=64 * KIB)
    digest = server.put_blob(BIG, BLAKE3)
    remote = make_remote(server, limits=LIMITS, compression=compression)
    assert remote.read(digest) == BIG
    reads = [call for call in server.requests if call.method == "Read"]
    assert len(reads) == len(cuts) + 1
    if not compression:
        assert [call.read_offset for call in reads] == [sum(cuts[:n]) for n in range(len(reads))]
        assert remote.statistics().wire_bytes_read == len(BIG)


@pytest.mark.parametrize("zstd_read_offset", [True, False])
def test_cut_compressed_download_is_right_whatever_offsets_mean(
    zstd_read_offset: bool, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    data = text(4 * MIB)
    server = make_server(
        Fault("Read", cut_after_bytes=600_000), zstd_read_offset=zstd_read_offset, read_chunk_bytes=100 * KIB
    )
    digest = server.put_blob(data, BLAKE3)
    remote = make_remote(server)
    pieces: list[Buffer] = []
    remote.read_to(digest, pieces.append)
    assert b"".join(pieces) == data
    first, second = (call for call in server.requests if call.method == "Read")
    assert "compressed-blobs/zstd" in first.resource_name
    assert second.read_offset > 0
    assert "compressed" not in second.resource_name


def test_many_cuts_are_outlived_while_bytes_come(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("Read", cut_after_bytes=50_000, times=17))
    digest = server.put_blob(BIG, BLAKE3)
    assert make_remote(server, limits=LIMITS, compression=False).read(digest) == BIG


def test_stream_that_ends_too_soon_goes_on(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("Read", truncate_after_bytes=1000, times=2))
    digest = server.put_blob(BIG, BLAKE3)
    assert make_remote(server, limits=LIMITS, compression=False).read(digest) == BIG
    server.faults.add(Fault("Read", truncate_after_bytes=0, times=None))
    with pytest.raises(DataLoss, match="after 0 bytes"):
        make_remote(server, limits=LIMITS, compression=False).read(digest)


@pytest.mark.parametrize("cut", [0, 1, 64 * KIB, 500_000])
@pytest.mark.parametrize("can_query", [True, False])
@pytest.mark.parametrize("compression", [True, False])
def test_cut_upload_goes_on_or_starts_again(
    cut: int, can_query: bool, compression: bool, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(
        Fault("Write", cut_after_bytes=cut, times=2), query_write_status=can_query, resumable_writes=can_query
    )
    remote = make_remote(server, limits=LIMITS, compression=compression)
    blobs = named(text(2_000_000) if compression else BIG)
    remote.write_many(uploads(blobs))
    assert {digest: server.get_blob(digest) for digest in blobs} == blobs
    writes = [call for call in server.requests if call.method == "Write"]
    assert len(writes) == remote.statistics().failed_calls["Write"] + 1
    if can_query and not compression and cut >= 64 * KIB:
        assert writes[1].read_offset > 0
        assert writes[1].resource_name == writes[0].resource_name
    else:
        assert cut < 64 * KIB or [write.read_offset for write in writes] == [0, 0, 0]


def test_an_ended_attempt_that_is_still_read_does_not_disturb_the_next(
    make_server: MakeServer, make_remote: MakeRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of gRPC's may take messages of an attempt after its call has ended."""
    left_over: list[Iterator[bytes]] = []
    send = Transport.send

    def end_first(self: Transport, method: str, requests: Iterator[bytes], attempts: Attempts) -> Any:
        if not left_over:
            next(requests)
            left_over.append(requests)
            raise Unavailable("the call has ended")
        response = send(self, method, requests, attempts)
        assert list(left_over[0])
        return response

    monkeypatch.setattr(Transport, "send", end_first)
    server = make_server()
    blobs = named(text(2_000_000))
    make_remote(server, limits=LIMITS, compression=True).write_many(uploads(blobs))
    assert {digest: server.get_blob(digest) for digest in blobs} == blobs
    assert len([call for call in server.requests if call.method == "Write"]) == 1


def test_upload_whose_reply_is_lost_is_complete(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("Write", lose_reply=True), Fault("BatchUpdateBlobs", lose_reply=True))
    remote = make_remote(server, limits=LIMITS)
    blobs = named(SMALL, BIG)
    remote.write_many(uploads(blobs))
    assert {digest: server.get_blob(digest) for digest in blobs} == blobs


@pytest.mark.parametrize("code", ["CANCELLED", "INTERNAL"])
def test_upload_that_fails_although_the_blob_is_there_succeeds(
    code: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault("Write", status=code, times=None))
    remote = make_remote(server, limits=LIMITS)
    with pytest.raises((Cancelled, Internal)):
        remote.write_many(uploads(named(BIG)))
    server.put_blob(BIG, BLAKE3)
    assert remote.write_many(uploads(named(BIG))).present_blobs == 1


def test_already_exists_is_success(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(
        Fault("Write", status="ALREADY_EXISTS"), Fault("BatchUpdateBlobs", item_status="ALREADY_EXISTS")
    )
    remote = make_remote(server, limits=LIMITS)
    remote.write_many(uploads(named(SMALL, BIG)))
    assert remote.statistics().retries == 0


@pytest.mark.parametrize("method", ["BatchReadBlobs", "Read"])
@pytest.mark.parametrize("bit", [0, 4001, 7000])
@pytest.mark.parametrize("data", [SMALL, BIG, text(250_000), text(1_500_000)], ids=["s", "b", "ts", "tb"])
def test_flipped_bit_is_fetched_again_then_data_loss(
    method: str, bit: int, data: bytes, make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path
) -> None:
    server = make_server()
    digest = server.put_blob(data, BLAKE3)
    streamed = len(data) > LIMITS.batch_bytes
    if streamed != (method == "Read"):
        method = "Read" if streamed else "BatchReadBlobs"
    remote = make_remote(server, limits=LIMITS)
    server.faults.add(Fault(method, flip_bit=bit))
    assert remote.read(digest) == data
    assert remote.statistics().corrupted == 1

    server.faults.add(Fault(method, flip_bit=bit, times=None))
    with pytest.raises(DataLoss, match=digest.hash):
        remote.read(digest)
    with pytest.raises(DataLoss):
        remote.read_many([digest], lambda *_: pytest.fail("wrong bytes were handed out"))
    assert server.calls(method) == 6


def test_flipped_bit_in_a_stream_is_told_at_its_end(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("Read", flip_bit=12345, times=1))
    digest = server.put_blob(BIG, BLAKE3)
    remote = make_remote(server, limits=LIMITS, compression=False)
    with pytest.raises(DataLoss, match=digest.hash):
        remote.read_to(digest, lambda _: None)
    server.faults.add(Fault("Read", flip_bit=12345, times=1))
    assert remote.read(digest) == BIG


def test_rotten_blob_on_the_server_is_data_loss(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    digests = [server.put_blob(data, BLAKE3) for data in (SMALL, BIG)]
    for digest in digests:
        server.corrupt_blob(digest, 77)
        with pytest.raises(DataLoss, match=digest.hash):
            make_remote(server, limits=LIMITS).read(digest)


@pytest.mark.parametrize("method", ["FindMissingBlobs", "GetActionResult", "GetCapabilities"])
@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_damaged_message_is_no_crash(
    method: str, bit: int, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    remote = make_remote(make_server(Fault(method, flip_bit=bit)), limits=LIMITS)
    try:
        remote.upload_missing(uploads(named(SMALL, BIG)))
        remote.update_action_result(KEY, reapi.ActionResult(stdout_raw=b"out"))
        remote.get_action_result(KEY)
    except SnaploaderError:
        pass


def test_answer_for_another_digest_is_not_taken(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(
        Fault("BatchReadBlobs", wrong_digest=True), Fault("BatchUpdateBlobs", wrong_digest=True)
    )
    remote = make_remote(server, limits=LIMITS)
    blobs = named(*(noise(500, n) for n in range(5)))
    remote.write_many(uploads(blobs))
    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs
    assert remote.statistics().retries == 2
    server.faults.add(Fault("FindMissingBlobs", wrong_digest=True))
    server.delete_blob(next(iter(blobs)))
    with pytest.raises(Internal, match="not asked for"):
        remote.find_missing(blobs)


def test_dropped_blob_is_not_found_and_the_others_come(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    blobs = named(*(noise(500, n) for n in range(5)))
    lost = list(blobs)[2]
    server = make_server(Fault("BatchReadBlobs", drop_blob=True, digest=lost))
    remote = make_remote(server, limits=LIMITS)
    remote.write_many(uploads(blobs))
    got: dict[Digest, bytes] = {}
    with pytest.raises(NotFound, match=lost.hash):
        remote.read_many(blobs, got.__setitem__)
    assert set(got) == set(blobs) - {lost}


def test_failed_items_of_a_batch_are_tried_again_alone(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    blobs = named(*(noise(500, n) for n in range(5)))
    weak = list(blobs)[3]
    server = make_server(
        Fault("BatchUpdateBlobs", item_status="UNAVAILABLE", digest=weak, times=2),
        Fault("BatchReadBlobs", item_status="INTERNAL", digest=weak, times=2),
    )
    remote = make_remote(server, limits=LIMITS)
    done = remote.write_many(uploads(blobs))
    got: list[Digest] = []
    remote.read_many(blobs, lambda digest, _: got.append(digest))
    assert sorted(got) == sorted(blobs)
    assert done.blobs == 5
    for method in ("BatchUpdateBlobs", "BatchReadBlobs"):
        asked = [set(call.hashes) for call in server.requests if call.method == method]
        assert asked == [{digest.hash for digest in blobs}, {weak.hash}, {weak.hash}]


@pytest.mark.parametrize("stated", [0, 3 * MIB])
def test_batches_the_server_finds_too_large_are_halved(
    stated: int, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(max_batch_total_size_bytes=stated, enforced_batch_bytes=500_000, zstd_batches=False)
    remote = make_remote(server, limits=Limits(batch_bytes=2 * MIB))
    blobs = named(*(noise(200_000, n) for n in range(12)), noise(700_000))
    remote.write_many(uploads(blobs))
    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs
    server.clear_log()
    remote.write_many(uploads(blobs))
    remote.read_many(blobs, lambda *_: None)
    assert remote.statistics().retries == 0
    assert {call.status for call in server.requests} == {"OK"}, "the lower limit was not remembered"


def test_message_above_our_own_limit_is_halved_too(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(zstd_batches=False, zstd_streams=False, read_chunk_bytes=64 * KIB)
    blobs = named(*(noise(200_000, n) for n in range(5)))
    for data in blobs.values():
        server.put_blob(data, BLAKE3)
    remote = make_remote(server, limits=Limits(max_receive_message_bytes=300_000))
    got: dict[Digest, bytes] = {}
    remote.read_many(blobs, got.__setitem__)
    assert got == blobs


def test_find_missing_that_is_too_large_is_halved(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("FindMissingBlobs", status="INVALID_ARGUMENT", times=3))
    blobs = named(*(noise(10, n) for n in range(64)))
    assert make_remote(server).find_missing(blobs) == set(blobs)


def test_retry_info_sets_the_wait(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(
        Fault("FindMissingBlobs", status="RESOURCE_EXHAUSTED", retry_after_s=0.125),
        Fault("BatchReadBlobs", status="UNAVAILABLE", retry_after_s=1000),
    )
    events: list[RetryEvent] = []
    remote = make_remote(server, on_retry=events.append)
    remote.find_missing(named(SMALL))
    assert [event.delay_s for event in events] == [0.125]
    with pytest.raises(Unavailable):  # longer than the budget: not worth the wait
        remote.read(server.put_blob(SMALL, BLAKE3))
    assert len(events) == 1


def test_latency_is_borne(make_server: MakeServer, make_remote: MakeRemote) -> None:
    round_trip(make_remote(make_server(Fault(latency_s=0.01, times=None)), limits=LIMITS))


@pytest.mark.parametrize("method", METHODS)
def test_hang_ends_at_the_deadline(method: str, make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault(method, hang=True, times=None))
    timeouts = Timeouts(call_s=0.1, idle_s=0.1)
    remote = make_remote(server, limits=LIMITS, timeouts=timeouts, retry=RetryPolicy(attempts=1))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        round_trip(remote)
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("method", METHODS)
def test_hang_is_outlived_by_the_next_attempt(
    method: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault(method, hang=True))
    remote = make_remote(server, limits=LIMITS, timeouts=Timeouts(call_s=1, idle_s=1))
    round_trip(remote)
    assert remote.statistics().retries == 1


@pytest.mark.parametrize("method", METHODS)
def test_total_budget_bounds_everything(
    method: str, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault(method, hang=True, times=None))
    policy = RetryPolicy(attempts=1000, budget_s=0.3, initial_delay_s=0.001, max_delay_s=0.001)
    timeouts = Timeouts(call_s=0.1, idle_s=0.1, min_bytes_per_s=1e9)
    remote = make_remote(server, limits=LIMITS, timeouts=timeouts, retry=policy)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        round_trip(remote)
    assert time.monotonic() - began < 50
    assert server.calls(method) >= 2


def test_stream_slower_than_the_least_rate_is_given_up(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault("Read", bandwidth_bytes_per_s=100 * KIB, times=None), read_chunk_bytes=4 * KIB)
    digest = server.put_blob(BIG, BLAKE3)
    policy = RetryPolicy(budget_s=0.1)
    remote = make_remote(server, limits=LIMITS, retry=policy, timeouts=Timeouts(min_bytes_per_s=10 * MIB))
    with pytest.raises(DeadlineExceeded):
        remote.read(digest)


def test_slow_stream_that_moves_is_not_cut(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(Fault("Read", bandwidth_bytes_per_s=2 * MIB), read_chunk_bytes=16 * KIB)
    digest = server.put_blob(BIG, BLAKE3)
    remote = make_remote(server, limits=LIMITS, timeouts=Timeouts(idle_s=0.2), compression=False)
    assert remote.read(digest) == BIG
    assert remote.statistics().retries == 0


def test_slow_receiver_is_not_the_servers_silence(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(read_chunk_bytes=64 * KIB)
    digest = server.put_blob(BIG, BLAKE3)
    remote = make_remote(server, limits=LIMITS, timeouts=Timeouts(idle_s=0.05), compression=False)
    naps = [0.15]
    remote.read_to(digest, lambda _: time.sleep(naps.pop()) if naps else None)
    assert remote.statistics().retries == 0


def test_demand_read_does_not_wait_for_bulk_work(make_server: MakeServer, make_remote: MakeRemote) -> None:
    gate = CallGate()
    wanted = named(b"wanted")
    (digest,) = wanted
    bulk = named(*(noise(1000, n) for n in range(50)))
    hold = Fault("BatchReadBlobs", gate=gate, times=None, matches=lambda call: digest.hash not in call.hashes)
    server = make_server(hold)
    remote = make_remote(server, limits=Limits(workers=2, batch_blobs=1, in_flight_bytes=1))
    remote.write_many(uploads(bulk | wanted))
    thread = threading.Thread(target=remote.read_many, args=(bulk, lambda *_: None))
    thread.start()
    try:
        assert gate.wait_reached(10)
        assert remote.read(digest) == b"wanted"
    finally:
        gate.open()
        thread.join(300)
    assert not thread.is_alive()


def test_close_calls_off_what_runs(make_server: MakeServer, make_remote: MakeRemote) -> None:
    gate = CallGate()
    server = make_server(
        *(Fault(method, gate=gate, times=None) for method in ("BatchReadBlobs", "Read", "Write"))
    )
    small, big = server.put_blob(SMALL, BLAKE3), server.put_blob(BIG, BLAKE3)
    remote = make_remote(server, limits=LIMITS)
    work = [
        lambda: remote.read(small),
        lambda: remote.read(big),
        lambda: remote.read_many([small, big], lambda *_: None),
        lambda: remote.write_many(uploads(named(noise(800_000, 5)))),
    ]
    errors: list[BaseException] = []

    def run(call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    assert gate.wait_reached(10, calls=5)
    remote.close()
    for thread in threads:
        thread.join(300)
    assert [type(error) for error in errors] == [Cancelled] * 4
    assert all(f"the remote cache {remote.url} was closed" in str(error) for error in errors)
    remote.close()
    with pytest.raises(FailedPrecondition, match="closed"):
        remote.read(small)
    assert remote.statistics().retries == 0


def test_nothing_listening_is_unavailable(make_remote: MakeRemote, tmp_path: Path) -> None:
    remote = make_remote(f"unix:{tmp_path / 'none'}")
    with pytest.raises(Unavailable):
        remote.capabilities()
    assert remote.statistics().retries == QUICK.attempts - 1


def test_server_that_comes_back_is_used_again(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    remote = make_remote(server, limits=LIMITS)
    digest = server.put_blob(SMALL, BLAKE3)
    assert remote.read(digest) == SMALL
    server.stop()
    with pytest.raises(Unavailable):
        remote.read(digest)
    server.start()
    with RemoteCache(server.url, retry=RetryPolicy(attempts=1)) as other:
        assert other.read(digest) == SMALL


def test_the_first_call_after_an_outage_succeeds(make_server: MakeServer, make_remote: MakeRemote) -> None:
    """However long gRPC's own backoff has become: nothing is tried again here, but by the caller."""
    server = make_server()
    remote = make_remote(server, retry=RetryPolicy(attempts=1))
    digest = server.put_blob(SMALL, BLAKE3)
    assert remote.read(digest) == SMALL
    server.stop()
    for _ in range(10):
        with pytest.raises(Unavailable):
            remote.read(digest)
    server.start()
    assert remote.read(digest) == SMALL


def test_upload_damaged_or_lost_on_the_way_is_never_kept_wrong(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(Fault("Write", drop_blob=True), Fault("Write", flip_bit=100_000))
    remote = make_remote(server, limits=LIMITS, digest_function=SHA256)
    blobs = named(BIG, function=SHA256)
    remote.write_many(uploads(blobs))
    try:
        remote.write_many(uploads(blobs))
    except SnaploaderError:
        pass
    for digest in server.blobs():
        assert server.get_blob(digest) == blobs[digest]


def test_upload_source_that_shrinks_is_data_loss(
    make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path
) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(BIG)
    (digest,) = named(BIG)

    def shrink(_event: RetryEvent) -> None:
        os.truncate(path, 1000)

    server = make_server(Fault("Write", status="UNAVAILABLE"), query_write_status=False)
    remote = make_remote(server, limits=LIMITS, on_retry=shrink)
    with pytest.raises(DataLoss, match="shorter"):
        remote.write_many([Upload(digest, path)])
    assert server.blobs() == []


def test_a_server_that_takes_blobs_as_streams_only_is_told_once(
    make_server: MakeServer, make_remote: MakeRemote, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(Fault("BatchUpdateBlobs", item_status="INVALID_ARGUMENT", times=None))
    remote = make_remote(server)
    blobs = named(*(noise(1000, n) for n in range(5)))
    remote.write_many(uploads(blobs))
    assert set(server.blobs()) == set(blobs)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert server.url in told
    assert "--digest-function sha256" in told
