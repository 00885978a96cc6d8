"""Faults hit the calls they are about, in order, and do what they say."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from served import Serve, code_of

from snaploader._proto import any_pb2, bytestream_pb2, duration_pb2, remote_execution_pb2 as reapi, status_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.testing import Call, CallGate, EmbeddedServer, Fault, FaultScript, Link
from snaploader.testing.conformance import Endpoint
from snaploader.testing.conformance.endpoint import fresh

SHA256 = DigestFunction.SHA256
BLOB = bytes(range(256)) * 40
DIGEST = Digest.of(BLOB, SHA256)


def test_rules_fire_in_order_and_are_used_up() -> None:
    first, second = Fault("Read", times=2), Fault("Read")
    script = FaultScript(first, second)
    assert [script.take(Call("Read")) for _ in range(4)] == [first, first, second, None]
    assert [firing.fault for firing in script.fired] == [first, first, second]
    assert script.pending == []


def test_calls_pass_until_the_rule_begins() -> None:
    fault = Fault("Read", after=2)
    script = FaultScript(fault)
    assert [script.take(Call("Read")) for _ in range(4)] == [None, None, fault, None]


def test_a_rule_without_end_never_counts_as_pending() -> None:
    fault = Fault(times=None)
    script = FaultScript(fault)
    assert [script.take(Call("Read")), script.take(Call("Write"))] == [fault, fault]
    assert script.pending == []


@pytest.mark.parametrize(
    ("fault", "hits"),
    [
        (Fault(), True),
        (Fault("Read"), True),
        (Fault("Write"), False),
        (Fault(digest=DIGEST), True),
        (Fault(digest=DIGEST.hash), True),
        (Fault(digest="0" * 64), False),
        (Fault(resource="blobs/"), True),
        (Fault(resource="uploads/"), False),
        (Fault(matches=lambda call: call.read_offset > 0), False),
    ],
)
def test_rules_choose_their_calls(fault: Fault, hits: bool) -> None:
    call = Call("Read", resource_name=f"blobs/{DIGEST}", hashes=(DIGEST.hash,))
    assert (FaultScript(fault).take(call) is fault) is hits


def test_cleared_rules_are_gone() -> None:
    script = FaultScript(Fault())
    script.take(Call("Read"))
    script.add(Fault())
    script.clear()
    assert (script.take(Call("Read")), script.fired, script.pending) == (None, [], [])


@pytest.mark.parametrize(
    "arguments",
    [
        {"times": 0},
        {"after": -1},
        {"latency_s": -1},
        {"cut_after_bytes": -1},
        {"bandwidth_bytes_per_s": 0},
        {"status": "BROKEN"},
        {"item_status": "BROKEN"},
    ],
)
def test_senseless_faults_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Fault("Read", **arguments)  # type: ignore[arg-type]


def test_a_method_fails_twice_and_then_works(serve: Serve) -> None:
    served = serve(Fault("FindMissingBlobs", status="UNAVAILABLE", message="later", times=2))
    codes = [code_of(served.endpoint.missing, [DIGEST]) for _ in range(3)]
    assert codes == [grpc.StatusCode.UNAVAILABLE] * 2 + [grpc.StatusCode.OK]
    assert [call.status for call in served.server.requests] == ["UNAVAILABLE", "UNAVAILABLE", "OK"]


def test_retry_info_says_when_to_come_back(serve: Serve) -> None:
    served = serve(Fault(status="UNAVAILABLE", retry_after_s=1.25))
    with pytest.raises(grpc.RpcError) as caught:
        served.endpoint.missing([DIGEST])
    trailers: dict[str, Any] = {entry.key: entry.value for entry in caught.value.trailing_metadata()}
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    (detail,) = status.details
    assert isinstance(detail, any_pb2.Any)
    assert detail.type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert detail.value[0] == 0x0A
    delay = duration_pb2.Duration.FromString(detail.value[2:])
    assert (delay.seconds, delay.nanos) == (1, 250_000_000)


def test_a_lost_reply_comes_after_the_work(serve: Serve) -> None:
    served = serve(Fault("BatchUpdateBlobs", lose_reply=True), Fault("Write", lose_reply=True))
    other, data = fresh(5000)
    assert code_of(served.endpoint.batch_update, [(DIGEST, BLOB)]) is grpc.StatusCode.UNAVAILABLE
    assert code_of(served.endpoint.write, other, data) is grpc.StatusCode.UNAVAILABLE
    assert served.server.blobs() == sorted([DIGEST, other])


@pytest.mark.parametrize("cut", [0, 1, 5000, len(BLOB)])
def test_a_cut_read_delivers_so_many_bytes_and_fails(serve: Serve, cut: int) -> None:
    served = serve(Fault("Read", cut_after_bytes=cut, status="INTERNAL"), read_chunk_bytes=4096)
    served.server.put_blob(BLOB)
    stream = served.endpoint.call("google.bytestream.ByteStream", "Read", _read_request(DIGEST))
    parts: list[bytes] = []
    assert code_of(_drain, stream, parts) is grpc.StatusCode.INTERNAL
    assert b"".join(parts) == BLOB[:cut]


def test_a_truncated_read_looks_whole(serve: Serve) -> None:
    served = serve(Fault("Read", truncate_after_bytes=100))
    served.server.put_blob(BLOB)
    assert served.endpoint.read(DIGEST) == BLOB[:100]


def test_one_bit_of_a_read_is_flipped(serve: Serve) -> None:
    served = serve(Fault("Read", flip_bit=8 * 5000 + 3), read_chunk_bytes=4096)
    served.server.put_blob(BLOB)
    wrong = served.endpoint.read(DIGEST)
    assert [i for i in range(len(BLOB)) if wrong[i] != BLOB[i]] == [5000]
    assert wrong[5000] ^ BLOB[5000] == 8
    assert served.endpoint.read(DIGEST) == BLOB


def test_one_bit_of_a_batch_is_flipped(serve: Serve) -> None:
    served = serve(Fault("BatchReadBlobs", flip_bit=1, digest=DIGEST))
    other = served.server.put_blob(b"other")
    served.server.put_blob(BLOB)
    items = served.endpoint.batch_read([other, DIGEST])
    assert items[other.hash].data == b"other"
    assert items[DIGEST.hash].data == bytes([BLOB[0] ^ 2]) + BLOB[1:]


@pytest.mark.parametrize("method", ["BatchUpdateBlobs", "Write"])
def test_a_bit_flipped_on_the_way_in_is_noticed(serve: Serve, method: str) -> None:
    served = serve(Fault(method, flip_bit=77))
    if method == "Write":
        assert code_of(served.endpoint.write, DIGEST, BLOB) is grpc.StatusCode.INVALID_ARGUMENT
    else:
        statuses = served.endpoint.batch_update([(DIGEST, BLOB)])
        assert statuses[DIGEST.hash] is grpc.StatusCode.INVALID_ARGUMENT
    assert served.server.blobs() == []


def test_a_bit_of_an_action_result_is_flipped(serve: Serve) -> None:
    served = serve(Fault("GetActionResult", flip_bit=8 * 2 + 1))
    served.endpoint.update_action_result(DIGEST, reapi.ActionResult(stdout_raw=b"hello"))
    assert served.endpoint.get_action_result(DIGEST).stdout_raw == b"jello"
    assert served.endpoint.get_action_result(DIGEST).stdout_raw == b"hello"


def test_a_dropped_blob_is_gone(serve: Serve) -> None:
    served = serve(Fault("Read", drop_blob=True), Fault("FindMissingBlobs", drop_blob=True, digest=DIGEST))
    other = served.server.put_blob(b"other")
    served.server.put_blob(BLOB)
    assert code_of(served.endpoint.read, other) is grpc.StatusCode.NOT_FOUND
    assert served.endpoint.missing([DIGEST]) == {DIGEST.hash}


@pytest.mark.parametrize("method", ["BatchUpdateBlobs", "Write"])
def test_an_upload_may_be_lost_after_success(serve: Serve, method: str) -> None:
    served = serve(Fault(method, drop_blob=True))
    if method == "Write":
        assert served.endpoint.write(DIGEST, BLOB) == len(BLOB)
    else:
        assert served.endpoint.batch_update([(DIGEST, BLOB)]) == {DIGEST.hash: grpc.StatusCode.OK}
    assert served.endpoint.missing([DIGEST]) == {DIGEST.hash}


def test_one_blob_of_a_batch_may_fail(serve: Serve) -> None:
    served = serve(
        Fault("BatchUpdateBlobs", digest=DIGEST, item_status="UNAVAILABLE", times=2),
        Fault("BatchReadBlobs", digest=DIGEST, item_status="UNAVAILABLE"),
    )
    other, data = fresh(10)
    expected = {DIGEST.hash: grpc.StatusCode.UNAVAILABLE, other.hash: grpc.StatusCode.OK}
    assert served.endpoint.batch_update([(DIGEST, BLOB), (other, data)]) == expected
    assert served.server.blobs() == [other]
    served.server.put_blob(BLOB)
    assert served.endpoint.batch_update([(DIGEST, BLOB)])[DIGEST.hash] is grpc.StatusCode.UNAVAILABLE
    assert served.endpoint.missing([DIGEST]) == set()
    items = served.endpoint.batch_read([DIGEST, other])
    assert items[DIGEST.hash].status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert (items[DIGEST.hash].data, items[other.hash].data) == (b"", data)


def test_latency_delays_only_its_call(serve: Serve) -> None:
    served = serve(Fault("FindMissingBlobs", latency_s=0.15))
    started = time.monotonic()
    served.endpoint.missing([DIGEST])
    assert time.monotonic() - started >= 0.15


def test_bandwidth_is_limited(serve: Serve) -> None:
    faults = [
        Fault(method, bandwidth_bytes_per_s=len(BLOB) / 0.1) for method in ("Read", "Write", "BatchReadBlobs")
    ]
    served = serve(*faults)
    for call in (
        lambda: served.endpoint.write(DIGEST, BLOB),
        lambda: served.endpoint.read(DIGEST),
        lambda: served.endpoint.batch_read([DIGEST]),
    ):
        started = time.monotonic()
        call()
        assert time.monotonic() - started >= 0.09


def test_a_link_is_shared_by_all_calls() -> None:
    link = Link(len(BLOB) / 0.1, latency_s=0.05)
    with (
        EmbeddedServer(faults=FaultScript(link=link)) as server,
        Endpoint(server.url) as endpoint,
        ThreadPoolExecutor(4) as pool,
    ):
        server.put_blob(BLOB)
        for call in (
            lambda: endpoint.read(DIGEST) == BLOB,
            lambda: endpoint.batch_read([DIGEST])[DIGEST.hash].data == BLOB,
            lambda: endpoint.batch_update([(DIGEST, BLOB)])[DIGEST.hash] == grpc.StatusCode.OK,
        ):
            started = time.monotonic()
            assert all(each.result() for each in [pool.submit(call) for _ in range(4)])
            assert time.monotonic() - started >= 0.44


def test_a_stale_index_claims_to_have_what_is_missing(serve: Serve) -> None:
    other = Digest.of(b"other", SHA256)
    served = serve(Fault(stale_index=True, digest=DIGEST), Fault("FindMissingBlobs", stale_index=True))
    assert served.endpoint.missing([DIGEST, other]) == {other.hash}
    assert served.endpoint.missing([DIGEST, other]) == set()
    assert served.endpoint.missing([DIGEST, other]) == {DIGEST.hash, other.hash}


def test_a_gate_holds_a_call_until_it_is_opened(serve: Serve) -> None:
    gate = CallGate()
    served = serve(Fault("Read", gate=gate))
    served.server.put_blob(BLOB)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(served.endpoint.read, DIGEST)
        assert gate.wait_reached(10)
        assert served.endpoint.missing([DIGEST]) == set()
        assert not held.done()
        gate.open()
        assert held.result(300) == BLOB
    assert not gate.wait_reached(0, calls=2)


def test_a_call_that_hangs_ends_by_its_deadline(serve: Serve) -> None:
    served = serve(Fault("FindMissingBlobs", hang=True))
    served.endpoint.timeout_s = 0.1
    assert code_of(served.endpoint.missing, [DIGEST]) is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("fault", [Fault(hang=True), Fault(gate=CallGate())])
def test_stopping_ends_calls_that_hang(serve: Serve, fault: Fault) -> None:
    gate = CallGate()
    gate.open()
    served = serve(Fault(gate=gate, hang=fault.hang) if fault.gate is None else fault)
    reached = gate if fault.gate is None else fault.gate
    ended = threading.Event()

    def call() -> grpc.StatusCode:
        code = code_of(served.endpoint.missing, [DIGEST])
        ended.set()
        return code

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(call)
        assert reached.wait_reached(10)
        assert not ended.is_set()
        served.server.stop()
        assert hanging.result(300) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    reached.open()


def _drain(stream: Any, parts: list[bytes]) -> None:
    for part in stream:
        parts.append(part.data)


def _read_request(digest: Digest) -> object:
    return bytestream_pb2.ReadRequest(resource_name=f"blobs/{digest}")
