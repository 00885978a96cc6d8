"""The checks of the conformance suite: capabilities, blobs in batches and streams, action results."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import zstandard
from grpc import StatusCode as Code

from snaploader._proto import any_pb2, bytestream_pb2 as bytestream, remote_execution_pb2 as reapi, services
from snaploader.digest import Digest, DigestFunction
from snaploader.testing.conformance.endpoint import (
    Check,
    CheckFailed,
    CheckSkipped,
    Endpoint,
    code,
    fresh,
    message,
    require,
    skip_unless,
    unpack,
    write_requests,
)

CHECKS: list[Check] = []

_KIB = 1024
_MIB = 1024 * 1024
_WRITERS = 4
_EARLY_S = 10.0
_TREE_FILES = 2000
_MISLEADING = (Code.OK, Code.CANCELLED, Code.UNKNOWN, Code.INTERNAL, Code.UNAVAILABLE)
"""What a client takes for a broken connection, or for success."""
_REFUSALS = (
    Code.PERMISSION_DENIED,
    Code.UNIMPLEMENTED,
    Code.FAILED_PRECONDITION,
    Code.UNAUTHENTICATED,
    Code.INVALID_ARGUMENT,
)


def check(function: Callable[[Endpoint], None]) -> Callable[[Endpoint], None]:
    """Add a function to `CHECKS`, named and described by its name and docstring."""
    CHECKS.append(Check(function.__name__, (function.__doc__ or "").strip(), function))
    return function


def check_each(function: Callable[[Endpoint, DigestFunction], None]) -> Callable[[Endpoint], None]:
    """Add a function to `CHECKS` that is called with each digest function that both sides know."""

    @check
    @functools.wraps(function)
    def with_each(endpoint: Endpoint) -> None:
        for digest_function in endpoint.functions:
            function(endpoint, digest_function)

    return with_each


@check
def capabilities_are_usable(endpoint: Endpoint) -> None:
    """The server offers SHA-256 or BLAKE3 and speaks version 2 of the API."""
    capabilities = endpoint.capabilities
    require(bool(endpoint.functions), "neither SHA-256 nor BLAKE3 is among the digest functions")
    low, high = capabilities.low_api_version.major, capabilities.high_api_version.major
    require(low <= 2 <= (high or 2), f"the API versions {low} to {high} do not include 2")
    limit = capabilities.cache_capabilities.max_batch_total_size_bytes
    require(limit >= 0, f"max_batch_total_size_bytes is {limit}")


@check
def health_is_told_in_the_standard_way(endpoint: Endpoint) -> None:
    """Where there is a service grpc.health.v1.Health, it says that the server is serving; none is fine."""
    try:
        # A HealthCheckRequest for the server as a whole is empty; the answer is {status: 1}, SERVING.
        answer = endpoint.call_raw("/grpc.health.v1.Health/Check", b"")
    except grpc.RpcError as error:
        if error.code() == Code.UNIMPLEMENTED:
            raise CheckSkipped("the server has no health service, which is fine") from None
        raise
    require(answer == b"\x08\x01", "the server serves, but its health service does not say so")


@check_each
def unknown_blobs_are_missing(endpoint: Endpoint, function: DigestFunction) -> None:
    """FindMissingBlobs names what was never stored."""
    digest, _ = fresh(100, function)
    require(endpoint.missing([digest]) == {digest.hash}, f"{digest} was never stored, but is not missing")


@check_each
def stored_blobs_are_not_missing(endpoint: Endpoint, function: DigestFunction) -> None:
    """FindMissingBlobs tells what BatchUpdateBlobs stored from what it did not."""
    stored, absent = [fresh(size, function) for size in (1, 1000)], fresh(50, function)
    _store(endpoint, stored)
    missing = endpoint.missing([digest for digest, _ in [*stored, absent]])
    require(missing == {absent[0].hash}, f"only {absent[0]} should be missing, the server says {missing}")


@check_each
def the_empty_blob_is_never_missing(endpoint: Endpoint, function: DigestFunction) -> None:
    """FindMissingBlobs leaves out the empty blob once it was stored; some servers have it from the start."""
    empty = Digest.of(b"", function)
    if endpoint.missing([empty]):
        _store(endpoint, [(empty, b"")])
    require(not endpoint.missing([empty]), "the empty blob is missing though it was stored")


@check
def many_digests_fit_in_one_question(endpoint: Endpoint) -> None:
    """FindMissingBlobs takes 10,000 digests at once."""
    function = endpoint.functions[0]
    # Salted, since some servers look up by hash alone and may hold a blob of few bytes.
    salt = os.urandom(16)
    digests = [Digest(function.hash(salt + b"%d" % number), 77, function) for number in range(10_000)]
    missing = endpoint.missing(digests)
    require(len(missing) == len(digests), f"{len(missing)} of {len(digests)} unknown blobs are missing")


@check
def a_digest_may_be_asked_for_twice(endpoint: Endpoint) -> None:
    """FindMissingBlobs takes a digest that is there twice."""
    digest, _ = fresh(10, endpoint.functions[0])
    require(endpoint.missing([digest, digest]) == {digest.hash}, "a digest named twice confuses the server")


@check_each
def batches_give_back_the_bytes(endpoint: Endpoint, function: DigestFunction) -> None:
    """BatchReadBlobs returns what BatchUpdateBlobs stored."""
    blobs = [fresh(size, function) for size in (1, 4096, 60 * _KIB - 1)]
    for blob in blobs:
        _store_and_expect(endpoint, [blob])


@check
def full_batches_are_taken(endpoint: Endpoint) -> None:
    """A batch that uses the stated limit, or a message of 4 MiB, passes either way."""
    function = endpoint.functions[0]
    size = min(512 * _KIB, endpoint.batch_bytes // 2)
    blobs = [fresh(size, function) for _ in range(endpoint.batch_bytes // size)]
    _store_and_expect(endpoint, blobs)


@check_each
def an_absent_blob_does_not_spoil_a_batch(endpoint: Endpoint, function: DigestFunction) -> None:
    """BatchReadBlobs says NOT_FOUND for what is absent, and returns the rest."""
    stored, absent = fresh(500, function), fresh(500, function)
    _store(endpoint, [stored])
    items = endpoint.batch_read([absent[0], stored[0]])
    _require_status("BatchReadBlobs", _statuses(items), absent[0], Code.NOT_FOUND)
    require(items[stored[0].hash].data == stored[1], "the blob that is there came with other bytes")


@check_each
def wrong_bytes_are_refused_in_a_batch(endpoint: Endpoint, function: DigestFunction) -> None:
    """BatchUpdateBlobs stores no bytes under a digest they do not have, and stores the rest."""
    good, bad = fresh(500, function), fresh(500, function)
    statuses = endpoint.batch_update([(bad[0], bytes(500)), good])
    require(
        statuses.get(bad[0].hash) != Code.OK,
        "wrong bytes were taken for a blob: the server does not verify (NativeLink: add a verify store)",
    )
    _require_status("BatchUpdateBlobs", statuses, good[0])
    missing = endpoint.missing([bad[0], good[0]])
    require(missing == {bad[0].hash}, f"only the refused blob should be missing, the server says {missing}")


@check
def a_wrong_size_is_refused_in_a_batch(endpoint: Endpoint) -> None:
    """BatchUpdateBlobs refuses bytes whose hash is right and whose size is not."""
    digest, data = fresh(500, endpoint.functions[0])
    try:
        statuses = endpoint.batch_update([(digest._replace(size_bytes=501), data)])
    except grpc.RpcError:
        return
    require(statuses.get(digest.hash) != Code.OK, "a blob was stored under a wrong size")


@check
def batches_may_be_compressed(endpoint: Endpoint) -> None:
    """BatchUpdateBlobs takes zstd, and BatchReadBlobs returns the same bytes, whatever it packs them in."""
    skip_unless(endpoint.zstd_batches, "the server does not state zstd for batches")
    for function in endpoint.functions:
        data = fresh(100)[1] * 300
        digest = Digest.of(data, function)
        statuses = endpoint.batch_update([(digest, zstandard.compress(data))], zstd=True)
        _require_status("BatchUpdateBlobs", statuses, digest)
        item = endpoint.batch_read([digest], accept_zstd=True)[digest.hash]
        content = unpack(item.data, len(data)) if item.compressor == reapi.Compressor.ZSTD else item.data
        require(content == data, "a compressed batch changed the bytes")
        plain = endpoint.batch_read([digest])[digest.hash]
        require(plain.compressor == reapi.Compressor.IDENTITY, "zstd came though it was not asked for")
        require(plain.data == data, "a compressed batch changed the bytes")


@check_each
def streams_give_back_the_bytes(endpoint: Endpoint, function: DigestFunction) -> None:
    """Read returns what Write stored, below, at and above the size of a message."""
    for size in (1, _MIB, 5 * _MIB + 7):
        digest, data = fresh(size, function)
        committed = endpoint.write(digest, data)
        require(committed == size, f"committed_size is {committed} after a write of {size} bytes")
        require(endpoint.read(digest) == data, f"{digest} came with other bytes")


@check_each
def batches_and_streams_share_blobs(endpoint: Endpoint, function: DigestFunction) -> None:
    """What came in a batch can be read as a stream, and the other way round."""
    digest, data = fresh(1000, function)
    _store(endpoint, [(digest, data)])
    require(endpoint.read(digest) == data, "a blob of a batch was streamed with other bytes")
    digest, data = fresh(1000, function)
    endpoint.write(digest, data)
    item = endpoint.batch_read([digest]).get(digest.hash)
    require(item is not None and item.data == data, "a streamed blob came in a batch with other bytes")


@check_each
def reads_start_at_their_offset(endpoint: Endpoint, function: DigestFunction) -> None:
    """`read_offset` is honoured: a broken read can be resumed."""
    digest, data = fresh(2 * _MIB + 5, function)
    endpoint.write(digest, data)
    for offset in (1, _MIB, 2 * _MIB + 4):
        require(endpoint.read(digest, offset=offset) == data[offset:], f"read at {offset} is wrong")


@check_each
def absent_blobs_are_not_found(endpoint: Endpoint, function: DigestFunction) -> None:
    """Read of what was never stored ends with NOT_FOUND."""
    digest, _ = fresh(100, function)
    error = _refusal("the call succeeded instead of ending with NOT_FOUND", endpoint.read, digest)
    status = error.code()
    require(status == Code.NOT_FOUND, f"the server answered {status.name}, not NOT_FOUND")


@check_each
def existing_blobs_may_be_written_again(endpoint: Endpoint, function: DigestFunction) -> None:
    """A second write of a blob succeeds, early or not, and says it has the whole size."""
    digest, data = fresh(3 * _MIB, function)
    for _ in range(2):
        committed = endpoint.write(digest, data)
        require(committed == len(data), f"committed_size is {committed} after a write of {len(data)} bytes")


@check_each
def wrong_bytes_are_refused_in_a_stream(endpoint: Endpoint, function: DigestFunction) -> None:
    """Write stores no bytes under a digest they do not have."""
    digest, data = fresh(2 * _MIB, function)
    _refusal(
        "a write of wrong bytes succeeded: the server does not verify (NativeLink: add a verify store)",
        endpoint.write,
        digest,
        data[:-1] + bytes([data[-1] ^ 1]),
    )
    require(endpoint.missing([digest]) == {digest.hash}, "wrong bytes were stored")


@check
def an_early_refusal_keeps_its_status(endpoint: Endpoint) -> None:
    """A Write that is refused at its first message ends with that status, before the client is done."""
    digest, _ = fresh(_MIB, endpoint.functions[0])
    name = endpoint.upload_name(digest).replace(digest.hash, "no-hash")
    error = _refusal(
        "a write under a malformed resource name succeeded", _write_and_wait, endpoint, name, b"x"
    )
    require(
        error.code() not in _MISLEADING,
        f"a malformed resource name was answered with {error.code().name}: {error.details()}",
    )


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
            error.code() == Code.ALREADY_EXISTS,
            f"a write of a blob that exists was answered with {error.code().name}",
        )
        raise CheckSkipped("the server ends such writes with ALREADY_EXISTS") from None
    require(committed == len(data), f"committed_size is {committed} of {len(data)} bytes that exist")


@check_each
def abandoned_writes_are_invisible(endpoint: Endpoint, function: DigestFunction) -> None:
    """A blob whose write was broken off is missing, and can be written afterwards."""
    digest, data = fresh(2 * _MIB, function)
    name = endpoint.upload_name(digest)
    with _open_write(endpoint, write_requests(name, data, end=_MIB)) as (_, sent):
        sent.wait(endpoint.timeout_s)
    require(endpoint.missing([digest]) == {digest.hash}, "half a blob is not missing")
    endpoint.write(digest, data)
    require(endpoint.read(digest) == data, "a blob written after an abandoned write has other bytes")


@check_each
def broken_writes_can_be_resumed(endpoint: Endpoint, function: DigestFunction) -> None:
    """Where QueryWriteStatus knows a broken write, it goes on at the committed offset."""
    digest, data = fresh(3 * _MIB, function)
    name = endpoint.upload_name(digest)
    # The stream ends without finishing the write, which servers may call an error.
    with contextlib.suppress(grpc.RpcError):
        endpoint.call(services.BYTE_STREAM, "Write", write_requests(name, data, end=2 * _MIB))
    committed = _committed(endpoint, name)
    require(0 <= committed <= 2 * _MIB, f"{committed} bytes are committed, but {2 * _MIB} were sent")
    messages = write_requests(name, data, offset=committed)
    response = endpoint.call(services.BYTE_STREAM, "Write", messages)
    require(response.committed_size == len(data), f"committed_size is {response.committed_size} at the end")
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


@check_each
def streams_may_be_compressed(endpoint: Endpoint, function: DigestFunction) -> None:
    """Write takes zstd and Read gives it; plain reads of the same blob give the same bytes."""
    _require_zstd(endpoint)
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
        _refusal("a compressed write of wrong bytes succeeded", endpoint.write, digest, wrong, zstd=True)
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


@check_each
def unknown_actions_are_not_found(endpoint: Endpoint, function: DigestFunction) -> None:
    """GetActionResult of what was never stored ends with NOT_FOUND."""
    require(not _is_found(endpoint, fresh(100, function)[0]), "a result was found that was never stored")


@check_each
def results_come_back(endpoint: Endpoint, function: DigestFunction) -> None:
    """A result returns with its files, trees, exit code and auxiliary metadata, byte for byte."""
    _require_updates(endpoint)
    _require_update(endpoint, fresh(100, function)[0], files=3)


@check
def a_later_result_replaces_the_first(endpoint: Endpoint) -> None:
    """UpdateActionResult of a known key leaves the latest."""
    _require_updates(endpoint)
    key, _ = fresh(100, endpoint.functions[0])
    endpoint.update_action_result(key, _result(endpoint, key.function, files=1))
    _require_update(endpoint, key, files=1)


@check
def results_of_many_chunks_come_back(endpoint: Endpoint) -> None:
    """A result may name a tree of 2,000 files."""
    _require_updates(endpoint)
    _require_update(endpoint, fresh(100, endpoint.functions[0])[0], files=_TREE_FILES)


@check
def incomplete_results_are_not_found(endpoint: Endpoint) -> None:
    """A result that names an output file that is absent is refused or not found."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    result = _result(endpoint, function, files=1)
    result.output_files.add(path="absent", digest=message(fresh(10, function)[0]))
    _require_incomplete(endpoint, function, result)


@check
def results_with_incomplete_trees_are_not_found(endpoint: Endpoint) -> None:
    """A result whose tree names a file that is absent is refused or not found."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    tree = _stored_tree(endpoint, [fresh(10, function)[0] for _ in range(2)])
    result = reapi.ActionResult(exit_code=0)
    result.output_directories.add(path="disk", tree_digest=tree)
    _require_incomplete(endpoint, function, result)


@check
def updates_are_refused_where_they_are_not_enabled(endpoint: Endpoint) -> None:
    """A server that states that updates are not enabled does not take them."""
    skip_unless(not endpoint.update_enabled, "the server states that updates are enabled")
    key, _ = fresh(100, endpoint.functions[0])
    try:
        endpoint.update_action_result(key, reapi.ActionResult(stdout_raw=b"x"))
    except grpc.RpcError as error:
        require(error.code() in _REFUSALS, f"the refusal is {error.code().name}, which looks transient")
    require(not _is_found(endpoint, key), "an update was taken though updates are not enabled")


def _refusal(message: str, call: Callable[..., object], *args: Any, **options: Any) -> grpc.RpcError:
    """The error that a call ends with. CheckFailed with this message when it succeeds."""
    try:
        call(*args, **options)
    except grpc.RpcError as error:
        return error
    raise CheckFailed(message)


def _store_and_expect(endpoint: Endpoint, blobs: list[tuple[Digest, bytes]]) -> None:
    _store(endpoint, blobs)
    items = endpoint.batch_read([digest for digest, _ in blobs])
    for digest, data in blobs:
        _require_status("BatchReadBlobs", _statuses(items), digest)
        require(items[digest.hash].data == data, f"{digest} came with other bytes")


def _require_zstd(endpoint: Endpoint) -> None:
    skip_unless(endpoint.zstd_streams, "the server does not state zstd for streams")


def _compressible(size: int, function: DigestFunction) -> tuple[Digest, bytes]:
    data = fresh(64)[1] * (size // 64)
    return Digest.of(data, function), data


@contextlib.contextmanager
def _open_write(
    endpoint: Endpoint, requests: Iterable[bytestream.WriteRequest]
) -> Iterator[tuple[Any, threading.Event]]:
    """A write that sends these messages, and no end: the call, and what tells that all were sent."""
    sent, over = threading.Event(), threading.Event()

    def messages() -> Iterator[bytestream.WriteRequest]:
        yield from requests
        sent.set()
        over.wait(endpoint.timeout_s)

    stub = endpoint.stub(services.BYTE_STREAM, "Write")
    call = stub.future(messages(), timeout=endpoint.timeout_s, metadata=endpoint.headers)
    try:
        yield call, sent
    finally:
        call.cancel()
        over.set()


def _write_and_wait(endpoint: Endpoint, name: str, data: bytes) -> int:
    """Send the first message of a write, and no end, until the server ends the call: the committed size.

    CheckSkipped for a server that does not answer before the end. Raises grpc.RpcError.
    """
    with _open_write(endpoint, [bytestream.WriteRequest(resource_name=name, data=data)]) as (call, _):
        try:
            committed: int = call.result(timeout=min(_EARLY_S, endpoint.timeout_s)).committed_size
        except grpc.FutureTimeoutError:
            raise CheckSkipped("the server answers a write at its end only") from None
    return committed


def _committed(endpoint: Endpoint, name: str) -> int:
    request = bytestream.QueryWriteStatusRequest(resource_name=name)
    try:
        status = endpoint.call(services.BYTE_STREAM, "QueryWriteStatus", request)
    except grpc.RpcError as error:
        if error.code() in (Code.UNIMPLEMENTED, Code.NOT_FOUND):
            raise CheckSkipped("the server does not know of broken writes") from None
        raise
    require(not status.complete, "half a write is said to be complete")
    skip_unless(status.committed_size > 0, "the server kept nothing of the broken write")
    size: int = status.committed_size
    return size


def _require_updates(endpoint: Endpoint) -> None:
    skip_unless(endpoint.update_enabled, "the server states that updates are not enabled")


def _is_found(endpoint: Endpoint, key: Digest) -> bool:
    try:
        endpoint.get_action_result(key)
    except grpc.RpcError as error:
        if error.code() == Code.NOT_FOUND:
            return False
        raise
    return True


def _stored_tree(endpoint: Endpoint, digests: list[Digest]) -> reapi.Digest:
    """Store a tree as a chunked file has it: a file per chunk, named by its offset."""
    tree = reapi.Tree()
    for index, digest in enumerate(digests):
        tree.root.files.add(name=str(index * 4096), digest=message(digest))
    data = tree.SerializeToString(deterministic=True)
    stored = Digest.of(data, digests[0].function)
    endpoint.write(stored, data)
    return message(stored)


def _result(endpoint: Endpoint, function: DigestFunction, files: int) -> reapi.ActionResult:
    """A result like a snapshot's manifest, all of whose blobs are stored."""
    blobs = [fresh(8, function) for _ in range(files)]
    for start in range(0, files, 500):
        _store(endpoint, blobs[start : start + 500])
    result = reapi.ActionResult(exit_code=0)
    plain, data = fresh(100, function)
    endpoint.write(plain, data)
    result.output_files.add(path="vmstate", digest=message(plain), is_executable=True)
    tree = _stored_tree(endpoint, [digest for digest, _ in blobs])
    result.output_directories.add(path="disk", tree_digest=tree)
    for name in ("VMConfiguration", "VMMetadata"):
        packed = any_pb2.Any(type_url=f"type.googleapis.com/snaploader.v1.{name}", value=b"\x08\x02")
        result.execution_metadata.auxiliary_metadata.append(packed)
    return result


def _require_update(endpoint: Endpoint, key: Digest, files: int) -> None:
    """A result of so many files comes back with what a snapshot needs; a server may add to the rest."""
    stored = _result(endpoint, key.function, files)
    endpoint.update_action_result(key, stored)
    found = endpoint.get_action_result(key)
    require(found.exit_code == stored.exit_code, f"exit_code came back as {found.exit_code}")
    require(list(found.output_files) == list(stored.output_files), "output_files came back changed")
    trees = [(d.path, d.tree_digest.hash, d.tree_digest.size_bytes) for d in found.output_directories]
    expected = [(d.path, d.tree_digest.hash, d.tree_digest.size_bytes) for d in stored.output_directories]
    require(trees == expected, "output_directories came back changed")
    wanted = list(stored.execution_metadata.auxiliary_metadata)
    metadata = list(found.execution_metadata.auxiliary_metadata)[: len(wanted)]
    require(metadata == wanted, "auxiliary_metadata came back changed")


def _require_incomplete(endpoint: Endpoint, function: DigestFunction, result: reapi.ActionResult) -> None:
    key, _ = fresh(100, function)
    try:
        endpoint.update_action_result(key, result)
    except grpc.RpcError as error:
        if error.code() in (*_REFUSALS, Code.NOT_FOUND):
            return
        raise CheckFailed(f"an incomplete result was answered with {error.code().name}") from error
    found = _is_found(endpoint, key)
    skip_unless(not found, "the server does not check that results are complete; clients must")


def _store(endpoint: Endpoint, blobs: list[tuple[Digest, bytes]]) -> None:
    """Store blobs in one batch. CheckFailed when the server does not take each."""
    statuses = endpoint.batch_update(blobs)
    for digest, _ in blobs:
        _require_status("BatchUpdateBlobs", statuses, digest)


def _statuses(items: Mapping[str, reapi.BatchReadBlobsResponse.Response]) -> dict[str, Code]:
    return {hash_: code(item.status.code) for hash_, item in items.items()}


def _require_status(
    method: str, statuses: Mapping[str, Code], digest: Digest, expected: Code = Code.OK
) -> None:
    """CheckFailed unless these statuses of a batch have the expected one for the blob."""
    status = statuses.get(digest.hash)
    name = "nothing" if status is None else status.name
    hint = ""
    if status == Code.INVALID_ARGUMENT and digest.function is DigestFunction.BLAKE3:
        # NativeLink with `verify_hash` does so, and takes the same blob in a stream.
        hint = ": it may hash batches with SHA-256 although the request names BLAKE3"
    require(status == expected, f"{method} answered {name} for {digest}, not {expected.name}{hint}")
