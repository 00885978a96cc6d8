"""Checks of ByteStream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import zstandard

from snaploader._proto import bytestream_pb2 as bytestream, services
from snaploader.digest import Digest
from snaploader.testing.conformance.endpoint import (
    CheckSkipped,
    Endpoint,
    Suite,
    fresh,
    require,
    store,
    unpack,
    write_requests,
)

check = Suite()

_MIB = 1024 * 1024
_WRITERS = 4
_EARLY_S = 10.0
_MISLEADING = frozenset(
    {
        # What a client takes for a broken connection, or for success.
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
    }
)


@check
def streams_give_back_the_bytes(endpoint: Endpoint) -> None:
    """Read returns what Write stored, below, at and above the size of a message."""
    for function in endpoint.functions:
        for size in (1, _MIB, 5 * _MIB + 7):
            digest, data = fresh(size, function)
            committed = endpoint.write(digest, data)
            require(committed == size, f"committed_size is {committed} after a write of {size} bytes")
            require(endpoint.read(digest) == data, f"{digest} came with other bytes")


@check
def batches_and_streams_share_blobs(endpoint: Endpoint) -> None:
    """What came in a batch can be read as a stream, and the other way round."""
    for function in endpoint.functions:
        digest, data = fresh(1000, function)
        store(endpoint, [(digest, data)])
        require(endpoint.read(digest) == data, "a blob of a batch was streamed with other bytes")
        digest, data = fresh(1000, function)
        endpoint.write(digest, data)
        item = endpoint.batch_read([digest]).get(digest.hash)
        require(item is not None and item.data == data, "a streamed blob came in a batch with other bytes")


@check
def reads_start_at_their_offset(endpoint: Endpoint) -> None:
    """`read_offset` is honoured: a broken read can be resumed."""
    for function in endpoint.functions:
        digest, data = fresh(2 * _MIB + 5, function)
        endpoint.write(digest, data)
        for offset in (1, _MIB, 2 * _MIB + 4):
            require(endpoint.read(digest, offset=offset) == data[offset:], f"read at {offset} is wrong")


@check
def absent_blobs_are_not_found(endpoint: Endpoint) -> None:
    """Read of what was never stored ends with NOT_FOUND."""
    for function in endpoint.functions:
        digest, _ = fresh(100, function)
        _require_code(grpc.StatusCode.NOT_FOUND, endpoint.read, digest)


@check
def existing_blobs_may_be_written_again(endpoint: Endpoint) -> None:
    """A second write of a blob succeeds, early or not, and says it has the whole size."""
    for function in endpoint.functions:
        digest, data = fresh(3 * _MIB, function)
        for _ in range(2):
            committed = endpoint.write(digest, data)
            require(
                committed == len(data), f"committed_size is {committed} after a write of {len(data)} bytes"
            )


@check
def wrong_bytes_are_refused_in_a_stream(endpoint: Endpoint) -> None:
    """Write stores no bytes under a digest they do not have."""
    for function in endpoint.functions:
        digest, data = fresh(2 * _MIB, function)
        try:
            endpoint.write(digest, data[:-1] + bytes([data[-1] ^ 1]))
        except grpc.RpcError:
            pass
        else:
            require(
                False,
                "a write of wrong bytes succeeded: the server does not verify "
                "(NativeLink: add a verify store)",
            )
        require(endpoint.missing([digest]) == {digest.hash}, "wrong bytes were stored")


@check
def an_early_refusal_keeps_its_status(endpoint: Endpoint) -> None:
    """A Write that is refused at its first message ends with that status, before the client is done."""
    digest, _ = fresh(_MIB, endpoint.functions[0])
    name = endpoint.upload_name(digest).replace(digest.hash, "no-hash")
    try:
        _write_and_wait(endpoint, name, b"x")
    except grpc.RpcError as error:
        require(
            error.code() not in _MISLEADING,
            f"a malformed resource name was answered with {error.code().name}: {error.details()}",
        )
    else:
        require(False, "a write under a malformed resource name succeeded")


@check
def a_write_of_what_exists_may_end_early(endpoint: Endpoint) -> None:
    """A Write of an existing blob that ends at its first message says that the whole blob is there."""
    digest, data = fresh(2 * _MIB, endpoint.functions[0])
    endpoint.write(digest, data)
    try:
        committed = _write_and_wait(endpoint, endpoint.upload_name(digest), data[:_MIB])
    except grpc.RpcError as error:
        # BuildGrid: ALREADY_EXISTS, where the specification wants OK and the size.
        require(
            error.code() == grpc.StatusCode.ALREADY_EXISTS,
            f"a write of a blob that exists was answered with {error.code().name}",
        )
        raise CheckSkipped("the server ends such writes with ALREADY_EXISTS") from None
    require(committed == len(data), f"committed_size is {committed} of {len(data)} bytes that exist")


@check
def abandoned_writes_are_invisible(endpoint: Endpoint) -> None:
    """A blob whose write was broken off is missing, and can be written afterwards."""
    for function in endpoint.functions:
        digest, data = fresh(2 * _MIB, function)
        _break_off(endpoint, endpoint.upload_name(digest), data, _MIB)
        require(endpoint.missing([digest]) == {digest.hash}, "half a blob is not missing")
        endpoint.write(digest, data)
        require(endpoint.read(digest) == data, "a blob written after an abandoned write has other bytes")


@check
def broken_writes_can_be_resumed(endpoint: Endpoint) -> None:
    """Where QueryWriteStatus knows a broken write, it goes on at the committed offset."""
    for function in endpoint.functions:
        digest, data = fresh(3 * _MIB, function)
        name = endpoint.upload_name(digest)
        _write_part(endpoint, name, data, 2 * _MIB)
        committed = _committed(endpoint, name)
        require(0 <= committed <= 2 * _MIB, f"{committed} bytes are committed, but {2 * _MIB} were sent")
        messages = write_requests(name, data, offset=committed)
        response = endpoint.call(services.BYTE_STREAM, "Write", messages)
        require(
            response.committed_size == len(data), f"committed_size is {response.committed_size} at the end"
        )
        require(endpoint.read(digest) == data, "the resumed blob has other bytes")


@check
def several_writers_of_one_blob_succeed(endpoint: Endpoint) -> None:
    """Writes of the same blob at the same time all end well."""
    function = endpoint.functions[0]
    digest, data = fresh(_MIB, function)
    with ThreadPoolExecutor(_WRITERS) as pool:
        sizes = list(pool.map(lambda _: endpoint.write(digest, data), range(_WRITERS)))
    require(sizes == [len(data)] * _WRITERS, f"the writers were told the sizes {sizes}")
    require(endpoint.read(digest) == data, "the blob has other bytes")


@check
def streams_may_be_compressed(endpoint: Endpoint) -> None:
    """Write takes zstd and Read gives it; plain reads of the same blob give the same bytes."""
    _require_zstd(endpoint)
    for function in endpoint.functions:
        digest, data = _compressible(3 * _MIB, function)
        packed = zstandard.compress(data)
        committed = endpoint.write(digest, packed, zstd=True)
        require(
            committed in (-1, len(packed), len(data)),
            f"committed_size is {committed}, not -1, {len(packed)} or {len(data)}",
        )
        require(endpoint.read(digest) == data, "a compressed write stored other bytes")
        require(unpack(endpoint.read(digest, zstd=True), len(data)) == data, "a compressed read is wrong")


@check
def compressed_reads_start_at_their_offset(endpoint: Endpoint) -> None:
    """A compressed read at an offset of the content gives the rest, or all of it where that is ignored."""
    _require_zstd(endpoint)
    digest, data = _compressible(2 * _MIB, endpoint.functions[0])
    endpoint.write(digest, data)
    content = unpack(endpoint.read(digest, offset=_MIB, zstd=True), len(data))
    require(content in (data[_MIB:], data), "a compressed read at an offset gives neither the rest nor all")


@check
def wrong_compressed_bytes_are_refused(endpoint: Endpoint) -> None:
    """Write stores nothing when the compressed bytes are of another blob, or not zstd."""
    _require_zstd(endpoint)
    digest, data = _compressible(_MIB, endpoint.functions[0])
    for wrong in (zstandard.compress(data[:-1] + b"\xff\x00"), data):
        try:
            endpoint.write(digest, wrong, zstd=True)
        except grpc.RpcError:
            pass
        else:
            require(False, "a compressed write of wrong bytes succeeded")
        require(endpoint.missing([digest]) == {digest.hash}, "wrong bytes were stored")


@check
def compressed_writes_may_have_several_frames(endpoint: Endpoint) -> None:
    """Write takes any sequence of zstd frames for one content; a server that refuses them loses nothing."""
    _require_zstd(endpoint)
    digest, data = _compressible(_MIB, endpoint.functions[0])
    middle = len(data) // 2
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4)
    packed = skippable + zstandard.compress(data[:middle]) + skippable + zstandard.compress(data[middle:])
    try:
        endpoint.write(digest, packed, zstd=True)
    except grpc.RpcError as error:
        require(endpoint.missing([digest]) == {digest.hash}, "a blob whose write was refused is not missing")
        raise CheckSkipped(f"the server takes a single zstd frame only ({error.code().name})") from None
    require(endpoint.read(digest) == data, "a sequence of zstd frames stored other bytes")


def _require_zstd(endpoint: Endpoint) -> None:
    if not endpoint.zstd_streams:
        raise CheckSkipped("the server does not state zstd for streams")


def _compressible(size: int, function: Any) -> tuple[Digest, bytes]:
    pattern = fresh(64)[1]
    data = (pattern * (size // len(pattern) + 1))[:size]
    return Digest.of(data, function), data


def _require_code(expected: grpc.StatusCode, function: Any, *args: Any) -> None:
    try:
        function(*args)
    except grpc.RpcError as error:
        require(error.code() == expected, f"the server answered {error.code().name}, not {expected.name}")
    else:
        require(False, f"the call succeeded instead of ending with {expected.name}")


def _break_off(endpoint: Endpoint, name: str, data: bytes, end: int) -> None:
    """Send part of a write and cancel it once all of that was handed to the transport."""
    sent, over = threading.Event(), threading.Event()

    def messages() -> Iterator[bytestream.WriteRequest]:
        yield from write_requests(name, data, end=end)
        sent.set()
        over.wait(endpoint.timeout_s)

    stub = endpoint.stub(services.BYTE_STREAM, "Write")
    call = stub.future(messages(), timeout=endpoint.timeout_s, metadata=endpoint.headers)
    sent.wait(endpoint.timeout_s)
    call.cancel()
    over.set()


def _write_and_wait(endpoint: Endpoint, name: str, data: bytes) -> int:
    """Send the first message of a write, and no end, until the server ends the call: the committed size.

    CheckSkipped for a server that does not answer before the end. Raises grpc.RpcError.
    """
    over = threading.Event()

    def messages() -> Iterator[bytestream.WriteRequest]:
        yield bytestream.WriteRequest(resource_name=name, data=data)
        over.wait(endpoint.timeout_s)

    stub = endpoint.stub(services.BYTE_STREAM, "Write")
    call = stub.future(messages(), timeout=endpoint.timeout_s, metadata=endpoint.headers)
    try:
        committed: int = call.result(timeout=min(_EARLY_S, endpoint.timeout_s)).committed_size
        return committed
    except grpc.FutureTimeoutError:
        raise CheckSkipped("the server answers a write at its end only") from None
    finally:
        over.set()
        call.cancel()


def _write_part(endpoint: Endpoint, name: str, data: bytes, end: int) -> None:
    """Send part of a write and end the stream without finishing it. Servers may call that an error."""
    with contextlib.suppress(grpc.RpcError):
        endpoint.call(services.BYTE_STREAM, "Write", write_requests(name, data, end=end))


def _committed(endpoint: Endpoint, name: str) -> int:
    request = bytestream.QueryWriteStatusRequest(resource_name=name)
    try:
        status = endpoint.call(services.BYTE_STREAM, "QueryWriteStatus", request)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
            raise CheckSkipped("the server does not know of broken writes") from None
        raise
    if status.complete:
        require(False, "half a write is said to be complete")
    if status.committed_size == 0:
        raise CheckSkipped("the server kept nothing of the broken write")
    size: int = status.committed_size
    return size
