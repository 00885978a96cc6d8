"""The server answers bad requests properly, keeps its limits, and starts and stops cleanly."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from served import Serve, code_of

from snaploader._proto import bytestream_pb2, remote_execution_pb2 as reapi, services
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snaploader.testing import (
    CallGate,
    DiskStorage,
    EmbeddedServer,
    Fault,
    FaultScript,
    MemoryStorage,
    ServerOptions,
    ServerTLS,
)
from snaploader.testing.conformance import Endpoint
from snaploader.testing.conformance.endpoint import fresh, message, write_requests

SHA256 = DigestFunction.SHA256
BLOB = b"some content" * 100
DIGEST = Digest.of(BLOB, SHA256)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def _write(endpoint: Endpoint, *requests: bytestream_pb2.WriteRequest) -> int:
    response = endpoint.call(services.BYTE_STREAM, "Write", iter(requests))
    size: int = response.committed_size
    return size


def _piece(
    name: str = "", offset: int = 0, data: bytes = b"", finish: bool = False
) -> bytestream_pb2.WriteRequest:
    return bytestream_pb2.WriteRequest(
        resource_name=name, write_offset=offset, data=data, finish_write=finish
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blobs",
        "blobs/xyz/5",
        f"blobs/{DIGEST.hash}",
        f"blobs/{DIGEST.hash}/-5",
        f"blobs/{DIGEST.hash}/99999999999999999999",
        f"blobs/sha256/{DIGEST}",
        f"blobs/md5/{DIGEST}",
        f"blobs/{DIGEST}/trailing",
        f"compressed-blobs/deflate/{DIGEST}",
        f"uploads/1/blobs/{DIGEST}",
        f"blobs/{DIGEST.hash.upper()}/{DIGEST.size_bytes}",
    ],
)
def test_malformed_names_cannot_be_read(serve: Serve, name: str) -> None:
    served = serve()
    served.server.put_blob(BLOB)
    request = bytestream_pb2.ReadRequest(resource_name=name)
    assert code_of(lambda: list(served.endpoint.call(services.BYTE_STREAM, "Read", request))) is INVALID


@pytest.mark.parametrize(
    ("offset", "limit", "outcome"),
    [
        (0, 0, BLOB),
        (5, 0, BLOB[5:]),
        (len(BLOB), 0, b""),
        (0, 7, BLOB[:7]),
        (5, 7, BLOB[5:12]),
        (5, 10**9, BLOB[5:]),
        (-1, 0, grpc.StatusCode.OUT_OF_RANGE),
        (len(BLOB) + 1, 0, grpc.StatusCode.OUT_OF_RANGE),
        (0, -1, INVALID),
    ],
)
def test_reads_keep_to_their_range(serve: Serve, offset: int, limit: int, outcome: object) -> None:
    served = serve()
    served.server.put_blob(BLOB)
    request = bytestream_pb2.ReadRequest(
        resource_name=f"blobs/{DIGEST}", read_offset=offset, read_limit=limit
    )

    def read() -> bytes:
        return b"".join(part.data for part in served.endpoint.call(services.BYTE_STREAM, "Read", request))

    if isinstance(outcome, bytes):
        assert read() == outcome
    else:
        assert code_of(read) is outcome


NAME = f"uploads/u/blobs/{DIGEST}"


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [_piece(data=BLOB, finish=True)],
        [_piece(f"blobs/{DIGEST}", data=BLOB, finish=True)],
        [_piece(NAME, 5, BLOB, finish=True)],
        [_piece(NAME, 0, BLOB[:5]), _piece("", 6, BLOB[5:], finish=True)],
        [_piece(NAME, 0, BLOB[:5]), _piece("other", 5, BLOB[5:], finish=True)],
        [_piece(NAME, 0, BLOB), _piece("", len(BLOB), b"x", finish=True)],
        [_piece(NAME, 0, BLOB[:-1], finish=True)],
        [_piece(NAME, 0, BLOB[:-1] + b"x", finish=True)],
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_malformed_writes_are_refused_and_leave_nothing(
    serve: Serve, tmp_path: Path, pieces: list[Any], on_disk: bool
) -> None:
    served = serve(storage=tmp_path if on_disk else None)
    assert code_of(_write, served.endpoint, *pieces) is INVALID
    assert served.server.blobs() == []
    assert not on_disk or not list((tmp_path / "v1/tmp").iterdir())
    assert served.endpoint.write(DIGEST, BLOB) == len(BLOB)


def test_a_message_that_is_no_protobuf_is_refused(serve: Serve) -> None:
    served = serve()
    with grpc.insecure_channel(served.server.address) as channel:
        for service, method in (
            (services.CAS, "FindMissingBlobs"),
            (services.ACTION_CACHE, "GetActionResult"),
        ):
            call: Any = channel.unary_unary(f"/{service}/{method}")
            assert code_of(call, b"\xff\xff\xff", timeout=300) is INVALID
            assert served.server.calls(method) == 1


def test_an_unknown_method_is_unimplemented(serve: Serve) -> None:
    served = serve()
    with grpc.insecure_channel(served.server.address) as channel:
        call: Any = channel.unary_unary(f"/{services.CAS}/SplitBlob")
        assert code_of(call, b"", timeout=300) is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_beyond_the_limit_is_refused(serve: Serve) -> None:
    served = serve(max_message_bytes=1024 * 1024, read_chunk_bytes=512 * 1024, enforced_batch_bytes=0)
    blobs = [fresh(600_000) for _ in range(2)]
    assert code_of(served.endpoint.batch_update, blobs) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for digest, data in blobs:
        served.server.put_blob(data)
        assert served.endpoint.batch_read([digest])[digest.hash].data == data
    assert code_of(served.endpoint.batch_read, [digest for digest, _ in blobs]) is INVALID


def test_a_batch_beyond_the_stated_limit_is_refused(serve: Serve) -> None:
    served = serve(max_batch_total_size_bytes=1000)
    blobs = [fresh(501), fresh(500)]
    assert code_of(served.endpoint.batch_update, blobs) is INVALID
    assert code_of(served.endpoint.batch_read, [digest for digest, _ in blobs]) is INVALID
    assert code_of(served.endpoint.batch_update, blobs[:1]) is grpc.StatusCode.OK


def test_a_blob_beyond_the_limit_is_refused(serve: Serve) -> None:
    served = serve(max_cas_blob_size_bytes=len(BLOB) - 1)
    assert served.endpoint.batch_update([(DIGEST, BLOB)]) == {DIGEST.hash: INVALID}
    assert code_of(served.endpoint.write, DIGEST, BLOB) is INVALID


def test_a_read_only_server_takes_nothing(serve: Serve) -> None:
    served = serve(read_only=True)
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert code_of(served.endpoint.batch_update, [(DIGEST, BLOB)]) is denied
    assert code_of(served.endpoint.write, DIGEST, BLOB) is denied
    assert code_of(served.endpoint.update_action_result, DIGEST, reapi.ActionResult()) is denied
    assert not served.endpoint.update_enabled


def test_other_instances_are_refused(serve: Serve) -> None:
    options: dict[str, Any] = {
        "instance_names": frozenset({"main"}),
        "unknown_instance_status": grpc.StatusCode.NOT_FOUND,
    }
    assert code_of(serve(instance_name="main", **options).endpoint.missing, [DIGEST]) is grpc.StatusCode.OK
    other = serve(instance_name="other", **options).endpoint
    assert code_of(other.missing, [DIGEST]) is grpc.StatusCode.NOT_FOUND
    assert code_of(other.read, DIGEST) is grpc.StatusCode.NOT_FOUND
    assert code_of(lambda: other.capabilities) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("on_disk", [False, True])
def test_instances_do_not_see_each_other(serve: Serve, tmp_path: Path, on_disk: bool) -> None:
    storage = DiskStorage(tmp_path) if on_disk else MemoryStorage()
    one, two = (serve(storage=storage, instance_name=name).endpoint for name in ("a/../b", "a"))
    one.write(DIGEST, BLOB)
    one.update_action_result(DIGEST, reapi.ActionResult(stdout_raw=b"x"))
    assert one.missing([DIGEST]) == set()
    assert two.missing([DIGEST]) == {DIGEST.hash}
    assert code_of(two.get_action_result, DIGEST) is grpc.StatusCode.NOT_FOUND
    storage.close()


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({"bearer_token": "secret"}, ("authorization", "Bearer secret")),
        ({"required_headers": {"x-key": "abc"}}, ("x-key", "abc")),
    ],
)
def test_credentials_are_demanded(serve: Serve, options: dict[str, Any], header: tuple[str, str]) -> None:
    for headers in ((), ((header[0], "wrong"),)):
        served = serve(headers=headers, **options)
        for call in (
            lambda e: e.missing([DIGEST]),
            lambda e: e.read(DIGEST),
            lambda e: e.write(DIGEST, BLOB),
        ):
            assert code_of(call, served.endpoint) is grpc.StatusCode.UNAUTHENTICATED
    assert serve(headers=(header,), **options).endpoint.missing([DIGEST]) == {DIGEST.hash}


def test_digest_functions_that_are_not_offered_are_refused(serve: Serve) -> None:
    served = serve(digest_functions=(SHA256,))
    digest, data = fresh(100, DigestFunction.BLAKE3)
    assert code_of(served.endpoint.missing, [digest]) is INVALID
    assert code_of(served.endpoint.write, digest, data) is INVALID
    assert code_of(served.endpoint.get_action_result, digest) is INVALID


def test_a_compressed_bomb_is_refused_in_bounded_memory(serve: Serve, tmp_path: Path) -> None:
    served = serve(storage=tmp_path)
    digest = Digest(DIGEST.hash, 100)
    bomb = zstandard.compress(bytes(64 * 1024 * 1024))
    assert len(bomb) < 64 * 1024
    assert code_of(served.endpoint.write, digest, bomb, zstd=True) is INVALID
    assert served.endpoint.batch_update([(digest, bomb)], zstd=True) == {digest.hash: INVALID}
    assert not list((tmp_path / "v1/tmp").iterdir())


def test_damaged_blobs_are_dropped_by_a_server_that_verifies(serve: Serve) -> None:
    served = serve(verify_reads=True)
    for read, expected in (
        (lambda: served.endpoint.read(DIGEST), grpc.StatusCode.DATA_LOSS),
        (lambda: served.endpoint.read(DIGEST, zstd=True), grpc.StatusCode.DATA_LOSS),
        (lambda: served.endpoint.batch_read([DIGEST]), grpc.StatusCode.OK),
    ):
        served.server.put_blob(BLOB)
        served.server.corrupt_blob(DIGEST)
        assert code_of(read) is expected
        assert served.server.blobs() == []


def test_a_damaged_blob_is_served_as_it_is_otherwise(serve: Serve) -> None:
    served = serve()
    served.server.put_blob(BLOB)
    served.server.corrupt_blob(DIGEST, bit=8)
    assert served.endpoint.read(DIGEST) == BLOB[:1] + bytes([BLOB[1] ^ 1]) + BLOB[2:]


def test_action_results_are_kept_under_hash_and_size_or_hash(serve: Serve) -> None:
    result = reapi.ActionResult(stdout_raw=b"x")
    resized = DIGEST._replace(size_bytes=1)
    for has_size, expected in ((True, grpc.StatusCode.NOT_FOUND), (False, grpc.StatusCode.OK)):
        served = serve(result_key_has_size=has_size)
        served.endpoint.update_action_result(DIGEST, result)
        assert code_of(served.endpoint.get_action_result, resized) is expected
        assert list(served.server.action_results().values()) == [result]
        served.server.delete_action_result(DIGEST)
        assert served.server.action_results() == {}


@pytest.mark.parametrize("lost", ["file", "tree", "chunk", "stdout", "stderr"])
def test_results_are_incomplete_without_any_of_their_blobs(serve: Serve, lost: str) -> None:
    served = serve()
    blobs = {name: served.server.put_blob(name.encode()) for name in ("file", "chunk", "stdout", "stderr")}
    tree = reapi.Tree(root=reapi.Directory(files=[reapi.FileNode(name="0", digest=message(blobs["chunk"]))]))
    blobs["tree"] = served.server.put_blob(tree.SerializeToString())
    result = reapi.ActionResult(
        stdout_digest=message(blobs["stdout"]), stderr_digest=message(blobs["stderr"])
    )
    result.output_files.add(path="f", digest=message(blobs["file"]))
    result.output_directories.add(path="d", tree_digest=message(blobs["tree"]))
    served.endpoint.update_action_result(DIGEST, result)
    assert served.endpoint.get_action_result(DIGEST) == result
    served.server.delete_blob(blobs[lost])
    assert code_of(served.endpoint.get_action_result, DIGEST) is grpc.StatusCode.NOT_FOUND


def test_trees_come_in_pages(serve: Serve) -> None:
    served = serve()
    leaves = [served.server.put_blob(_directory(name=str(n))) for n in range(3)]
    shared = [
        reapi.DirectoryNode(name=f"d{n}", digest=message(leaf)) for n, leaf in enumerate([*leaves, leaves[0]])
    ]
    root = served.server.put_blob(reapi.Directory(directories=shared).SerializeToString())
    request = reapi.GetTreeRequest(root_digest=message(root), page_size=2)
    pages = list(served.endpoint.call(services.CAS, "GetTree", request))
    assert [len(page.directories) for page in pages] == [2, 2]
    assert [page.next_page_token for page in pages] == ["2", ""]
    request.page_token = "2"
    assert list(served.endpoint.call(services.CAS, "GetTree", request)) == pages[1:]
    absent = reapi.GetTreeRequest(root_digest=message(DIGEST))
    code = code_of(lambda: list(served.endpoint.call(services.CAS, "GetTree", absent)))
    assert code is grpc.StatusCode.NOT_FOUND


def _directory(name: str) -> bytes:
    return reapi.Directory(files=[reapi.FileNode(name=name)]).SerializeToString()


def test_calls_and_bytes_are_counted(serve: Serve) -> None:
    served = serve(headers=(("x-me", "1"),))
    served.endpoint.write(DIGEST, BLOB)
    served.endpoint.read(DIGEST)
    assert (served.server.calls("Write"), served.server.calls("Read"), served.server.total_calls()) == (
        1,
        1,
        2,
    )
    assert len(BLOB) < served.server.received_bytes("Write") < len(BLOB) + 300
    assert len(BLOB) < served.server.sent_bytes("Read") < len(BLOB) + 100
    write, read = served.server.requests
    assert (write.method, write.hashes, write.status) == ("Write", (DIGEST.hash,), "OK")
    assert read.resource_name == f"blobs/{DIGEST}"
    assert read.metadata["x-me"] == "1"
    served.server.clear_log()
    assert (served.server.requests, served.server.total_calls()) == ([], 0)


def test_the_log_is_bounded_and_the_counters_are_not(serve: Serve) -> None:
    with EmbeddedServer(log_capacity=2) as server, Endpoint(server.url) as endpoint:
        for _ in range(5):
            endpoint.missing([DIGEST])
        assert (len(server.requests), server.calls("FindMissingBlobs")) == (2, 5)


@pytest.mark.parametrize(
    "use",
    [
        lambda server: server.get_blob(DIGEST),
        lambda server: server.delete_blob(DIGEST),
        lambda server: server.corrupt_blob(DIGEST),
        lambda server: server.delete_action_result(DIGEST),
    ],
)
def test_direct_access_to_what_is_absent_is_an_error(
    serve: Serve, use: Callable[[EmbeddedServer], object]
) -> None:
    with pytest.raises(NotFound, match=DIGEST.hash):
        use(serve().server)


def test_content_survives_a_restart_on_the_same_port(tmp_path: Path) -> None:
    for storage in (None, tmp_path):
        server = EmbeddedServer(storage)
        with server, Endpoint(server.url) as endpoint:
            endpoint.write(DIGEST, BLOB)
            endpoint.update_action_result(DIGEST, reapi.ActionResult(stdout_raw=b"x"))
            port = server.port
        with server, Endpoint(server.url) as endpoint:
            assert server.port == port
            assert endpoint.read(DIGEST) == BLOB
            assert endpoint.get_action_result(DIGEST).stdout_raw == b"x"


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path), pytest.raises(FailedPrecondition, match="another server uses"):
        EmbeddedServer(tmp_path).start()
    with EmbeddedServer(tmp_path):
        pass


def test_a_port_has_one_server(tmp_path: Path) -> None:
    with EmbeddedServer() as server:
        second = EmbeddedServer(tmp_path, port=server.port)
        with pytest.raises(Unavailable, match=str(server.port)):
            second.start()
        assert not second.is_running
    with second:
        assert second.is_running


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((InvalidArgument, FailedPrecondition), match="file"):
        EmbeddedServer(tmp_path / "file").start()


def test_start_and_stop_are_strict_and_lenient() -> None:
    server = EmbeddedServer()
    server.stop()
    server.start()
    with pytest.raises(FailedPrecondition):
        server.start()
    server.stop()
    server.stop()
    assert not server.is_running


def test_it_listens_on_a_unix_socket(tmp_path: Path) -> None:
    with EmbeddedServer(unix_socket=tmp_path / "s") as server, Endpoint(server.url) as endpoint:
        assert server.url.startswith("unix:")
        assert endpoint.missing([DIGEST]) == {DIGEST.hash}


def test_it_speaks_tls_and_demands_client_certificates() -> None:
    certificate, key = _self_signed()
    trusted: dict[str, Any] = {"root_certificates": certificate}
    shown = {**trusted, "client_certificate": certificate, "client_key": key}
    for authority, refused, accepted in ((None, {}, trusted), (certificate, trusted, shown)):
        with EmbeddedServer(tls=ServerTLS(certificate, key, authority)) as server:
            assert server.url.startswith("grpcs://127.0.0.1:")
            with Endpoint(server.url, **refused) as endpoint:
                assert code_of(endpoint.missing, [DIGEST]) is grpc.StatusCode.UNAVAILABLE
            with Endpoint(server.url, **accepted) as endpoint:
                assert endpoint.missing([DIGEST]) == {DIGEST.hash}


def _self_signed() -> tuple[bytes, bytes]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
    )


def test_several_servers_share_a_process() -> None:
    with EmbeddedServer() as one, EmbeddedServer() as two:
        one.put_blob(BLOB)
        with Endpoint(one.url) as first, Endpoint(two.url) as second:
            assert (first.missing([DIGEST]), second.missing([DIGEST])) == (set(), {DIGEST.hash})
            one.stop()
            assert second.missing([DIGEST]) == {DIGEST.hash}


def test_it_can_be_used_beside_another_event_loop() -> None:
    async def use() -> set[str]:
        with EmbeddedServer() as server, Endpoint(server.url) as endpoint:
            return await asyncio.to_thread(endpoint.missing, [DIGEST])

    assert asyncio.run(use()) == {DIGEST.hash}


def test_many_clients_at_once_get_their_own_answers(serve: Serve, tmp_path: Path) -> None:
    served = serve(storage=tmp_path)
    blobs = [fresh(50_000 + n) for n in range(40)]

    def use(index: int) -> bool:
        digest, data = blobs[index % len(blobs)]
        if index % 2:
            served.endpoint.write(digest, data)
        else:
            served.endpoint.batch_update([(digest, data)])
        return served.endpoint.read(digest) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(80)))
    assert served.server.blobs() == sorted(digest for digest, _ in blobs)


def test_a_broken_write_is_resumed_where_it_broke(serve: Serve, tmp_path: Path) -> None:
    for storage in (None, tmp_path):
        served = serve(Fault("Write", cut_after_bytes=1_500_000), storage=storage)
        digest, data = fresh(3_000_000)
        name = served.endpoint.upload_name(digest)
        write = served.endpoint.stub(services.BYTE_STREAM, "Write")
        assert code_of(write, write_requests(name, data)) is grpc.StatusCode.UNAVAILABLE
        query = bytestream_pb2.QueryWriteStatusRequest(resource_name=name)
        status = served.endpoint.call(services.BYTE_STREAM, "QueryWriteStatus", query)
        assert (status.committed_size, status.complete) == (1_500_000, False)
        assert code_of(write, write_requests(name, data, offset=1_000_000)) is INVALID
        assert write(write_requests(name, data, offset=1_500_000)).committed_size == len(data)
        status = served.endpoint.call(services.BYTE_STREAM, "QueryWriteStatus", query)
        assert (status.committed_size, status.complete) == (len(data), True)
        assert served.endpoint.read(digest) == data


def test_a_compressed_write_is_resumed_where_it_broke(serve: Serve) -> None:
    served = serve(Fault("Write", cut_after_bytes=1_500_000))
    digest, data = fresh(3_000_000)
    packed = zstandard.compress(data)
    name = served.endpoint.upload_name(digest, zstd=True)
    write = served.endpoint.stub(services.BYTE_STREAM, "Write")
    assert code_of(write, write_requests(name, packed)) is grpc.StatusCode.UNAVAILABLE
    assert write(write_requests(name, packed, offset=1_500_000)).committed_size == len(packed)
    assert served.endpoint.read(digest) == data


def test_unfinished_writes_leave_nothing_when_the_server_stops(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, Endpoint(server.url) as endpoint:
        digest, data = fresh(3_000_000)
        name = endpoint.upload_name(digest)
        endpoint.call(services.BYTE_STREAM, "Write", write_requests(name, data, end=2_000_000))
        assert list((tmp_path / "v1/tmp").iterdir())
    assert not list((tmp_path / "v1/tmp").iterdir())
    with EmbeddedServer(tmp_path) as server:
        assert server.blobs() == []


def test_a_forked_child_does_not_stop_its_parents_server(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path).start()
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with Endpoint(server.url) as endpoint:
        assert endpoint.missing([DIGEST]) == {DIGEST.hash}
    server.stop()
    with EmbeddedServer(tmp_path):
        pass


def test_nothing_is_left_running() -> None:
    before = set(threading.enumerate())
    with EmbeddedServer() as server, Endpoint(server.url) as endpoint:
        endpoint.missing([DIGEST])
    assert {t for t in threading.enumerate() if t.name.startswith("snaploader-server")} <= before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


@pytest.mark.parametrize(
    "options",
    [
        {"digest_functions": ()},
        {"max_message_bytes": 10},
        {"read_chunk_bytes": 0},
        {"read_chunk_bytes": 8 * 1024 * 1024},
        {"required_headers": {"X-Key": "1"}},
        {"stream_idle_s": 0},
        {"max_streams": 0},
        {"max_upload_memory_bytes": 0},
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        ServerOptions(**options)


def test_health_is_told_until_the_drain_and_in_it() -> None:
    gate = CallGate()
    watch = health_pb2.HealthCheckRequest()
    with EmbeddedServer(faults=FaultScript(Fault("Read", gate=gate)), introspection=True) as server:
        server.put_blob(BLOB)
        with (
            grpc.insecure_channel(server.address) as channel,
            Endpoint(server.url) as endpoint,
            ThreadPoolExecutor(2) as pool,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(watch).status == health_pb2.HealthCheckResponse.SERVING
            statuses = stub.Watch(watch)
            assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
            held = pool.submit(endpoint.read, DIGEST)
            assert gate.wait_reached(60)
            stopping = pool.submit(server.stop, 60)
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            gate.open()
            assert held.result() == BLOB
            statuses.cancel()
            stopping.result()


def test_a_reflection_client_finds_every_service_and_its_messages() -> None:
    with EmbeddedServer(introspection=True) as server, grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = {*services.SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert set(database.get_services()) == names
        pool = DescriptorPool(database)
        for name in names:
            assert pool.FindServiceByName(name).methods
        request = message_factory.GetMessageClass(
            pool.FindMessageTypeByName("build.bazel.remote.execution.v2.GetCapabilitiesRequest")
        )
        response = message_factory.GetMessageClass(
            pool.FindMessageTypeByName("build.bazel.remote.execution.v2.ServerCapabilities")
        )
        call = channel.unary_unary(
            "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert call(request()).cache_capabilities.digest_functions


def test_introspection_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc_health.v1", None)
    with pytest.raises(FailedPrecondition, match=r"snaploader\[serve\]"):
        EmbeddedServer(introspection=True).start()
