"""Each option that takes an ability away does that, and the disk's own errors are told from the client's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from served import Serve, Served, code_of, eventually

from snaploader._proto import bytestream_pb2, remote_execution_pb2 as reapi, services
from snaploader.digest import Digest, DigestFunction, empty_digest
from snaploader.testing import CallGate, Fault, MemoryStorage, ServerOptions
from snaploader.testing.byte_stream import MAX_PARTIAL_UPLOADS
from snaploader.testing.conformance.endpoint import fresh, message, write_requests
from snaploader.testing.options import (
    like_bazel_remote,
    like_buildbarn,
    like_buildgrid,
    like_casd,
    like_nativelink,
)
from snaploader.testing.services import Backend

SHA256 = DigestFunction.SHA256
BLOB = b"some content" * 100_000
DIGEST = Digest.of(BLOB, SHA256)
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("says", "expected"),
    [("compressed", len(zstandard.compress(BLOB))), ("uncompressed", len(BLOB)), ("minus-one", -1)],
)
def test_committed_size_of_compressed_writes_differs(serve: Serve, says: str, expected: int) -> None:
    served = serve(compressed_committed_size=says)
    assert served.endpoint.write(DIGEST, zstandard.compress(BLOB), zstd=True) == expected
    assert served.endpoint.write(DIGEST, zstandard.compress(BLOB), zstd=True) == -1


@pytest.mark.parametrize("is_honoured", [True, False])
def test_compressed_reads_may_ignore_the_offset(serve: Serve, is_honoured: bool) -> None:
    served = serve(zstd_read_offset=is_honoured)
    served.server.put_blob(BLOB)
    packed = served.endpoint.read(DIGEST, offset=1000, zstd=True)
    content = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    assert content == (BLOB[1000:] if is_honoured else BLOB)


@pytest.mark.parametrize(
    ("status", "prefix", "expected"),
    [
        (UNIMPLEMENTED, "blobs", UNIMPLEMENTED),
        (None, "blobs", grpc.StatusCode.OK),
        (None, "compressed-blobs/zstd", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_read_limit_may_be_refused(
    serve: Serve, status: grpc.StatusCode | None, prefix: str, expected: grpc.StatusCode
) -> None:
    served = serve(read_limit_status=status)
    served.server.put_blob(BLOB)
    request = bytestream_pb2.ReadRequest(resource_name=f"{prefix}/{DIGEST}", read_limit=5)
    assert code_of(lambda: list(served.endpoint.call(services.BYTE_STREAM, "Read", request))) is expected


def test_services_may_be_missing(serve: Serve) -> None:
    served = serve(capabilities=False, query_write_status=False)
    assert code_of(lambda: served.endpoint.capabilities) is UNIMPLEMENTED
    query = bytestream_pb2.QueryWriteStatusRequest(resource_name=f"uploads/u/blobs/{DIGEST}")
    assert code_of(served.endpoint.call, services.BYTE_STREAM, "QueryWriteStatus", query) is UNIMPLEMENTED


def test_writes_may_not_be_resumable(serve: Serve) -> None:
    served = serve(resumable_writes=False)
    name = served.endpoint.upload_name(DIGEST)
    write = served.endpoint.stub(services.BYTE_STREAM, "Write")
    assert write(write_requests(name, BLOB, end=1000)).committed_size == 1000
    assert code_of(write, write_requests(name, BLOB, offset=1000)) is grpc.StatusCode.INVALID_ARGUMENT
    query = bytestream_pb2.QueryWriteStatusRequest(resource_name=name)
    code = code_of(served.endpoint.call, services.BYTE_STREAM, "QueryWriteStatus", query)
    assert code is grpc.StatusCode.NOT_FOUND


def test_a_write_from_the_start_replaces_the_broken_one(serve: Serve, tmp_path: Path) -> None:
    served = serve(storage=tmp_path)
    name = served.endpoint.upload_name(DIGEST)
    write = served.endpoint.stub(services.BYTE_STREAM, "Write")
    for _ in range(2):
        write(write_requests(name, BLOB, end=1_100_000))
    assert len(list((tmp_path / "v1/tmp").iterdir())) == 1
    assert write(write_requests(name, BLOB)).committed_size == len(BLOB)
    assert not list((tmp_path / "v1/tmp").iterdir())


def test_broken_writes_are_kept_in_bounded_number(serve: Serve) -> None:
    served = serve()
    write = served.endpoint.stub(services.BYTE_STREAM, "Write")
    names = [served.endpoint.upload_name(DIGEST) for _ in range(MAX_PARTIAL_UPLOADS + 2)]
    for name in names:
        write(write_requests(name, BLOB, end=10))
    codes = [code_of(write, write_requests(name, BLOB, offset=10)) for name in (*names[:3], names[-1])]
    assert codes == [grpc.StatusCode.INVALID_ARGUMENT] * 2 + [grpc.StatusCode.OK] * 2


def test_a_server_that_ignores_the_function_takes_all_digests_for_one(serve: Serve) -> None:
    served = serve(digest_functions=(SHA256,), ignores_digest_function=True)
    digest, data = fresh(100, DigestFunction.BLAKE3)
    assert served.endpoint.batch_update([(digest, data)])[digest.hash] is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(served.endpoint.read, digest) is grpc.StatusCode.INVALID_ARGUMENT
    served.server.put_blob(data)
    own = Digest.of(data, SHA256)
    assert served.endpoint.missing([own._replace(function=DigestFunction.BLAKE3)]) == set()


def test_the_empty_blob_is_always_there(serve: Serve) -> None:
    served = serve()
    for function in DigestFunction:
        empty = empty_digest(function)
        assert served.endpoint.missing([empty]) == set()
        assert served.endpoint.read(empty) == b""
        packed = served.endpoint.read(empty, zstd=True)
        assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == b""
        assert served.endpoint.write(empty, b"") == 0
        assert served.endpoint.batch_read([empty])[empty.hash].data == b""
        assert served.endpoint.batch_update([(empty, zstandard.compress(b""))], zstd=True) == {
            empty.hash: grpc.StatusCode.OK
        }


@pytest.mark.parametrize(
    ("is_refused", "expected"), [(True, grpc.StatusCode.NOT_FOUND), (False, grpc.StatusCode.OK)]
)
def test_an_empty_result_may_not_be_found(serve: Serve, is_refused: bool, expected: grpc.StatusCode) -> None:
    served = serve(empty_result_not_found=is_refused)
    served.endpoint.update_action_result(DIGEST, reapi.ActionResult())
    assert code_of(served.endpoint.get_action_result, DIGEST) is expected


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_tree_that_is_none_is_incomplete(serve: Serve, is_checked: bool) -> None:
    served = serve(check_completeness=is_checked)
    result = reapi.ActionResult()
    result.output_directories.add(path="d", tree_digest=message(served.server.put_blob(b"\xff\xff")))
    served.endpoint.update_action_result(DIGEST, result)
    found = code_of(served.endpoint.get_action_result, DIGEST)
    assert found is (grpc.StatusCode.NOT_FOUND if is_checked else grpc.StatusCode.OK)


def test_an_update_needs_a_result_of_valid_digests(serve: Serve) -> None:
    served = serve()
    request = reapi.UpdateActionResultRequest(action_digest=message(DIGEST))
    code = code_of(served.endpoint.call, services.ACTION_CACHE, "UpdateActionResult", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    result = reapi.ActionResult(stdout_digest=reapi.Digest(hash="zz", size_bytes=1))
    code = code_of(served.endpoint.update_action_result, DIGEST, result)
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_data_that_is_not_zstd_is_refused(serve: Serve) -> None:
    served = serve()
    digest, data = fresh(1000)
    assert code_of(served.endpoint.write, digest, data, zstd=True) is grpc.StatusCode.INVALID_ARGUMENT
    statuses = served.endpoint.batch_update([(digest, data)], zstd=True)
    assert statuses == {digest.hash: grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, grpc.StatusCode.RESOURCE_EXHAUSTED), (errno.EIO, grpc.StatusCode.INTERNAL)],
)
def test_errors_of_the_disk_are_the_servers(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: grpc.StatusCode
) -> None:
    served = serve(storage=tmp_path)

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("snaploader.testing.storage.write_all", fail)
        assert code_of(served.endpoint.write, DIGEST, BLOB) is expected
        assert served.endpoint.batch_update([(DIGEST, BLOB)]) == {DIGEST.hash: expected}
        result = reapi.ActionResult(exit_code=1)
        assert code_of(served.endpoint.update_action_result, DIGEST, result) is expected
    assert not list((tmp_path / "v1/tmp").iterdir())
    assert served.endpoint.write(DIGEST, BLOB) == len(BLOB)


def test_an_error_nobody_thought_of_is_internal_and_logged(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> bool:
        raise ZeroDivisionError("unheard of")

    served = serve()
    monkeypatch.setattr("snaploader.testing.storage.MemoryPartition.contains", fail)
    with pytest.raises(grpc.RpcError) as caught:
        served.endpoint.missing([DIGEST])
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "unheard of" in str(caught.value.details())
    assert "unheard of" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_cancelled_work_ends_before_its_caller_goes_on(fails: bool) -> None:
    started, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        started.set()
        may_end.wait(300)
        order.append("work")
        if fails:
            raise ValueError("too late")

    async def cancel() -> None:
        backend = Backend(ServerOptions(), MemoryStorage())
        task = asyncio.ensure_future(backend.run_to_end(work))
        await asyncio.to_thread(started.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        order.append("caller")
        backend.close()

    asyncio.run(cancel())
    assert order == ["work", "caller"]


@pytest.mark.parametrize("batch", [False, True])
def test_wrong_bytes_are_taken_where_nothing_is_verified_and_a_wrong_size_is_not(
    serve: Serve, batch: bool
) -> None:
    digest = Digest.of(b"other", SHA256)
    for data, expected in ((b"wrong", grpc.StatusCode.OK), (b"longer", grpc.StatusCode.INVALID_ARGUMENT)):
        served = serve(verify_writes=False)
        if batch:
            assert served.endpoint.batch_update([(digest, data)]) == {digest.hash: expected}
        else:
            assert code_of(served.endpoint.write, digest, data) == expected
        assert served.server.blobs() == ([digest] if expected is grpc.StatusCode.OK else [])


def test_a_peculiar_server_answers_as_the_real_one(serve: Serve) -> None:
    buildbarn = serve(beyond_end_status=grpc.StatusCode.INVALID_ARGUMENT, get_tree=False)
    buildbarn.server.put_blob(BLOB)
    assert code_of(buildbarn.endpoint.read, DIGEST, offset=len(BLOB) + 1) == grpc.StatusCode.INVALID_ARGUMENT
    tree = reapi.GetTreeRequest(root_digest=reapi.Digest(hash=DIGEST.hash, size_bytes=DIGEST.size_bytes))
    call = functools.partial(buildbarn.endpoint.call, services.CAS, "GetTree", tree)
    assert code_of(lambda: list(call())) == grpc.StatusCode.UNIMPLEMENTED

    bazel_remote = serve(zstd_skippable_frame=True, read_limit_status=grpc.StatusCode.OUT_OF_RANGE)
    bazel_remote.server.put_blob(BLOB)
    assert bazel_remote.endpoint.read(DIGEST, zstd=True)[:4] == b"\x50\x2a\x4d\x18"
    assert bazel_remote.endpoint.batch_read([DIGEST], accept_zstd=True)[DIGEST.hash].data[:2] == b"\x50\x2a"
    name = f"compressed-blobs/zstd/{DIGEST}"
    limited = bytestream_pb2.ReadRequest(resource_name=name, read_limit=5)
    call = functools.partial(bazel_remote.endpoint.call, services.BYTE_STREAM, "Read", limited)
    assert code_of(lambda: list(call())) == grpc.StatusCode.INVALID_ARGUMENT


USUAL = {
    "skippable": False,
    "beyond the end": grpc.StatusCode.OUT_OF_RANGE,
    "tree": grpc.StatusCode.OK,
    "wrong bytes": grpc.StatusCode.INVALID_ARGUMENT,
}
"""The answers of a server without peculiarities."""


def answers(served: Served) -> dict[str, Any]:
    """What the peculiar answers of a server are, over the network."""
    endpoint = served.endpoint
    served.server.put_blob(BLOB)
    wrong = Digest.of(b"other", SHA256)

    def read(prefix: str = "blobs", **fields: int) -> grpc.StatusCode:
        request = bytestream_pb2.ReadRequest(resource_name=f"{prefix}/{DIGEST}", **fields)
        return code_of(lambda: list(endpoint.call(services.BYTE_STREAM, "Read", request)))

    tree = reapi.GetTreeRequest(root_digest=message(empty_digest(SHA256)))
    stated = endpoint.capabilities.cache_capabilities
    return {
        "zstd": endpoint.zstd_streams,
        "batch limit": stated.max_batch_total_size_bytes,
        "functions": list(stated.digest_functions),
        "skippable": endpoint.zstd_streams and endpoint.read(DIGEST, zstd=True)[:4] == b"\x50\x2a\x4d\x18",
        "beyond the end": read(read_offset=len(BLOB) + 1),
        "limit": read(read_limit=5),
        "compressed limit": endpoint.zstd_streams and read("compressed-blobs/zstd", read_limit=5),
        "tree": code_of(lambda: list(endpoint.call(services.CAS, "GetTree", tree))),
        "wrong bytes": code_of(endpoint.write, wrong, b"wrong"),
    }


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            like_bazel_remote(),
            {
                "zstd": True,
                "batch limit": 0,
                "functions": [reapi.DigestFunction.SHA256],
                "skippable": True,
                "limit": grpc.StatusCode.OUT_OF_RANGE,
                "compressed limit": grpc.StatusCode.INVALID_ARGUMENT,
            },
        ),
        (
            like_buildbarn(),
            {
                "zstd": False,
                "batch limit": 0,
                "beyond the end": grpc.StatusCode.INVALID_ARGUMENT,
                "limit": UNIMPLEMENTED,
                "tree": UNIMPLEMENTED,
            },
        ),
        (
            like_nativelink(),
            {
                "zstd": False,
                "batch limit": 64 * 1024,
                "functions": [reapi.DigestFunction.SHA256, reapi.DigestFunction.BLAKE3],
                "wrong bytes": grpc.StatusCode.OK,
            },
        ),
        (like_nativelink(verify_hash=True), {"wrong bytes": grpc.StatusCode.INVALID_ARGUMENT}),
        (like_casd(), {"zstd": False, "batch limit": 0, "functions": [reapi.DigestFunction.SHA256]}),
        (like_buildgrid(), {"zstd": False, "limit": grpc.StatusCode.DATA_LOSS}),
    ],
    ids=[
        "bazel-remote",
        "buildbarn",
        "nativelink",
        "nativelink-verify",
        "casd",
        "buildgrid",
    ],
)
def test_each_preset_has_the_habits_of_its_server(
    serve: Serve, preset: ServerOptions, expected: dict[str, Any]
) -> None:
    options = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    found = answers(serve(**options))
    expected = {**USUAL, **expected}
    assert {habit: found[habit] for habit in expected} == expected


@pytest.mark.parametrize(
    ("verify_hash", "expected"), [(True, grpc.StatusCode.INVALID_ARGUMENT), (False, grpc.StatusCode.OK)]
)
def test_a_nativelink_that_verifies_refuses_batches_of_blake3(
    serve: Serve, verify_hash: bool, expected: grpc.StatusCode
) -> None:
    preset = like_nativelink(verify_hash=verify_hash)
    options = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    digest, data = fresh(100, DigestFunction.BLAKE3)
    endpoint = serve(**options).endpoint
    assert endpoint.batch_update([(digest, data)]) == {digest.hash: expected}
    assert endpoint.write(digest, data) == len(data)


def test_a_stream_whose_reader_reads_nothing_ends(serve: Serve) -> None:
    served = serve(stream_idle_s=0.05)
    content = bytes(32 * 1024 * 1024)
    digest = served.server.put_blob(content)
    name = f"blobs/{digest}"
    call = served.endpoint.call(services.BYTE_STREAM, "Read", bytestream_pb2.ReadRequest(resource_name=name))
    size = len(next(call).data)
    eventually(lambda: served.server.requests[-1].status == "DEADLINE_EXCEEDED")
    with pytest.raises(grpc.RpcError, match="the client read nothing for"):
        size += sum(len(response.data) for response in call)
    assert size < len(content)


STALLING = bytes(16 * 1024 * 1024)


@contextlib.contextmanager
def stalled_reader(served: Served) -> Iterator[Any]:
    """A Read, on a connection of its own, whose client takes nothing."""
    request = bytestream_pb2.ReadRequest(resource_name=f"blobs/{served.server.put_blob(STALLING)}")
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(served.server.address, own) as channel:
        read = channel.unary_stream(
            f"/{services.BYTE_STREAM}/Read", bytestream_pb2.ReadRequest.SerializeToString
        )
        call = read(request, timeout=120)  # which is cancelled when nobody holds it
        yield call


def test_readers_that_stall_give_their_places_back(serve: Serve) -> None:
    served = serve(stream_idle_s=0.05, max_streams=2)
    served.server.put_blob(BLOB)
    with stalled_reader(served), stalled_reader(served):
        eventually(lambda: [call.status for call in served.server.requests] == ["DEADLINE_EXCEEDED"] * 2)
        for _ in range(3):
            assert served.endpoint.read(DIGEST) == BLOB


def test_the_connection_of_a_reader_that_stalls_is_closed(serve: Serve) -> None:
    served = serve(stream_idle_s=0.05, max_connection_age_s=1, max_connection_grace_s=0.1)

    def is_open() -> bool:
        """Whether this process, and so the server, holds a connection to the server's port."""
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if not os.readlink(link).startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(link.name))) as copy:
                    if copy.getpeername() and copy.getsockname()[1:2] == (served.server.port,):
                        return True
        return False

    with stalled_reader(served) as call:
        eventually(is_open)
        eventually(lambda: not is_open())
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_connection_has_a_bounded_number_of_calls(serve: Serve) -> None:
    gate = CallGate()
    served = serve(Fault("Read", gate=gate), max_connection_calls=1)
    served.server.put_blob(BLOB)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(served.endpoint.read, DIGEST)
        assert gate.wait_reached(60)
        find = served.endpoint.stub(services.CAS, "FindMissingBlobs")
        with pytest.raises(grpc.RpcError) as raised:
            find(reapi.FindMissingBlobsRequest(), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert served.server.calls("FindMissingBlobs") == 0
        gate.open()
        assert held.result() == BLOB
    assert served.endpoint.missing([DIGEST]) == set()


@pytest.mark.parametrize("begun", [True, False])
def test_a_write_whose_client_sends_nothing_ends_and_is_recorded(serve: Serve, begun: bool) -> None:
    served = serve(stream_idle_s=0.05)
    over = threading.Event()

    def messages() -> Iterator[bytestream_pb2.WriteRequest]:
        if begun:
            yield next(write_requests(served.endpoint.upload_name(DIGEST), BLOB, end=10))
        over.wait(60)

    with pytest.raises(grpc.RpcError, match="the client sent nothing for"):
        served.endpoint.call(services.BYTE_STREAM, "Write", messages())
    over.set()
    assert [(call.method, call.status) for call in served.server.requests] == [("Write", "DEADLINE_EXCEEDED")]


def test_a_write_without_a_message_is_recorded(serve: Serve) -> None:
    served = serve()
    assert code_of(served.endpoint.call, services.BYTE_STREAM, "Write", iter(())) == (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    assert served.server.calls("Write") == 1
    assert served.server.requests[0].status == "INVALID_ARGUMENT"


def test_streams_beyond_the_limit_are_told_to_come_back(serve: Serve) -> None:
    gate = CallGate()
    served = serve(Fault("Read", gate=gate), max_streams=1)
    served.server.put_blob(BLOB)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(served.endpoint.read, DIGEST)
        assert gate.wait_reached(60)
        for refused in (served.endpoint.read, lambda digest: served.endpoint.write(digest, BLOB)):
            with pytest.raises(grpc.RpcError) as raised:
                refused(DIGEST)
            assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "grpc-status-details-bin" in dict(raised.value.trailing_metadata())
        assert served.endpoint.missing([DIGEST]) == set()
        gate.open()
        assert held.result() == BLOB
    assert served.endpoint.read(DIGEST) == BLOB


def test_open_uploads_are_bounded_and_broken_ones_give_way(serve: Serve) -> None:
    served = serve(max_upload_memory_bytes=len(BLOB) * 3 // 2)
    other = bytes(len(BLOB))
    other_digest = Digest.of(other, SHA256)
    over = threading.Event()
    name = served.endpoint.upload_name(DIGEST)

    def messages() -> Iterator[bytestream_pb2.WriteRequest]:
        yield next(write_requests(name, BLOB, end=10))
        over.wait(60)
        yield from write_requests(name, BLOB, offset=10)

    def is_begun() -> bool:
        query = bytestream_pb2.QueryWriteStatusRequest(resource_name=name)
        return code_of(served.endpoint.call, services.BYTE_STREAM, "QueryWriteStatus", query) == (
            grpc.StatusCode.OK
        )

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(served.endpoint.call, services.BYTE_STREAM, "Write", messages())
        eventually(is_begun)
        assert code_of(served.endpoint.write, other_digest, other) == grpc.StatusCode.RESOURCE_EXHAUSTED
        over.set()
        assert held.result().committed_size == len(BLOB)

    served.server.delete_blob(DIGEST)
    name = served.endpoint.upload_name(DIGEST)
    served.endpoint.call(services.BYTE_STREAM, "Write", write_requests(name, BLOB, end=10))
    assert served.endpoint.write(other_digest, other) == len(other)
    resumed = write_requests(name, BLOB, offset=10)
    assert code_of(served.endpoint.call, services.BYTE_STREAM, "Write", resumed) == (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    assert served.endpoint.write(DIGEST, BLOB) == len(BLOB)


def test_one_upload_is_taken_at_any_size(serve: Serve) -> None:
    assert serve(max_upload_memory_bytes=1).endpoint.write(DIGEST, BLOB) == len(BLOB)


def test_links_to_absolute_paths_are_not_forbidden(serve: Serve) -> None:
    stated = serve().endpoint.capabilities.cache_capabilities.symlink_absolute_path_strategy
    assert stated == reapi.SymlinkAbsolutePathStrategy.ALLOWED


def test_an_action_cache_may_be_write_once(serve: Serve) -> None:
    served = serve(update_again_status=grpc.StatusCode.INTERNAL)
    first, second = reapi.ActionResult(exit_code=1), reapi.ActionResult(exit_code=2)
    served.endpoint.update_action_result(DIGEST, first)
    assert code_of(served.endpoint.update_action_result, DIGEST, second) == grpc.StatusCode.INTERNAL
    assert served.endpoint.get_action_result(DIGEST) == first


def test_an_action_cache_may_keep_the_latest_results_only(serve: Serve) -> None:
    served = serve(max_action_results=2)
    keys = [fresh(1)[0]._replace(hash=f"{number:064x}") for number in range(3)]
    for key in (keys[0], keys[1], keys[0], keys[2]):
        served.endpoint.update_action_result(key, reapi.ActionResult(exit_code=1))
    assert sorted(served.server.action_results()) == [keys[0], keys[2]]
