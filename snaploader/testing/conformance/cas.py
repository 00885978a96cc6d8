"""Checks of the capabilities and of the content-addressable storage in batches."""

from __future__ import annotations

import os

import grpc
import zstandard

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest
from snaploader.testing.conformance.endpoint import (
    CheckSkipped,
    Endpoint,
    Suite,
    code,
    fresh,
    require,
    require_stored,
    store,
    unpack,
)

check = Suite()

_KIB = 1024
_OK = grpc.StatusCode.OK


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
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise CheckSkipped("the server has no health service, which is fine") from None
        raise
    require(answer == b"\x08\x01", "the server serves, but its health service does not say so")


@check
def unknown_blobs_are_missing(endpoint: Endpoint) -> None:
    """FindMissingBlobs names what was never stored."""
    for function in endpoint.functions:
        digest, _ = fresh(100, function)
        require(endpoint.missing([digest]) == {digest.hash}, f"{digest} was never stored, but is not missing")


@check
def stored_blobs_are_not_missing(endpoint: Endpoint) -> None:
    """FindMissingBlobs tells what BatchUpdateBlobs stored from what it did not."""
    for function in endpoint.functions:
        stored, absent = [fresh(size, function) for size in (1, 1000)], fresh(50, function)
        store(endpoint, stored)
        missing = endpoint.missing([digest for digest, _ in [*stored, absent]])
        require(missing == {absent[0].hash}, f"only {absent[0]} should be missing, the server says {missing}")


@check
def the_empty_blob_is_never_missing(endpoint: Endpoint) -> None:
    """FindMissingBlobs leaves out the empty blob once it was stored; some servers have it from the start."""
    for function in endpoint.functions:
        empty = Digest.of(b"", function)
        if endpoint.missing([empty]):
            store(endpoint, [(empty, b"")])
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


@check
def batches_give_back_the_bytes(endpoint: Endpoint) -> None:
    """BatchReadBlobs returns what BatchUpdateBlobs stored."""
    for function in endpoint.functions:
        blobs = [fresh(size, function) for size in (1, 4096, 60 * _KIB - 1)]
        for blob in blobs:
            store(endpoint, [blob])
            _expect(endpoint, [blob])


@check
def full_batches_are_taken(endpoint: Endpoint) -> None:
    """A batch that uses the stated limit, or a message of 4 MiB, passes either way."""
    function = endpoint.functions[0]
    size = min(512 * _KIB, endpoint.batch_bytes // 2)
    blobs = [fresh(size, function) for _ in range(endpoint.batch_bytes // size)]
    store(endpoint, blobs)
    _expect(endpoint, blobs)


@check
def an_absent_blob_does_not_spoil_a_batch(endpoint: Endpoint) -> None:
    """BatchReadBlobs says NOT_FOUND for what is absent, and returns the rest."""
    for function in endpoint.functions:
        stored, absent = fresh(500, function), fresh(500, function)
        store(endpoint, [stored])
        items = endpoint.batch_read([absent[0], stored[0]])
        _require_status(items, absent[0], grpc.StatusCode.NOT_FOUND)
        require(items[stored[0].hash].data == stored[1], "the blob that is there came with other bytes")


@check
def wrong_bytes_are_refused_in_a_batch(endpoint: Endpoint) -> None:
    """BatchUpdateBlobs stores no bytes under a digest they do not have, and stores the rest."""
    for function in endpoint.functions:
        good, bad = fresh(500, function), fresh(500, function)
        statuses = endpoint.batch_update([(bad[0], bytes(500)), good])
        require(
            statuses.get(bad[0].hash) != _OK,
            "wrong bytes were taken for a blob: the server does not verify (NativeLink: add a verify store)",
        )
        require_stored(statuses, good[0])
        missing = endpoint.missing([bad[0], good[0]])
        require(
            missing == {bad[0].hash}, f"only the refused blob should be missing, the server says {missing}"
        )


@check
def a_wrong_size_is_refused_in_a_batch(endpoint: Endpoint) -> None:
    """BatchUpdateBlobs refuses bytes whose hash is right and whose size is not."""
    digest, data = fresh(500, endpoint.functions[0])
    try:
        statuses = endpoint.batch_update([(digest._replace(size_bytes=501), data)])
    except grpc.RpcError:
        return
    require(statuses.get(digest.hash) != _OK, "a blob was stored under a wrong size")


@check
def batches_may_be_compressed(endpoint: Endpoint) -> None:
    """BatchUpdateBlobs takes zstd, and BatchReadBlobs returns the same bytes, whatever it packs them in."""
    if not endpoint.zstd_batches:
        raise CheckSkipped("the server does not state zstd for batches")
    for function in endpoint.functions:
        data = fresh(100)[1] * 300
        digest = Digest.of(data, function)
        statuses = endpoint.batch_update([(digest, zstandard.compress(data))], zstd=True)
        require_stored(statuses, digest)
        item = endpoint.batch_read([digest], accept_zstd=True)[digest.hash]
        require(_content(item, len(data)) == data, "a compressed batch changed the bytes")
        plain = endpoint.batch_read([digest])[digest.hash]
        require(plain.compressor == reapi.Compressor.IDENTITY, "zstd came though it was not asked for")
        require(plain.data == data, "a compressed batch changed the bytes")


def _expect(endpoint: Endpoint, blobs: list[tuple[Digest, bytes]]) -> None:
    items = endpoint.batch_read([digest for digest, _ in blobs])
    for digest, data in blobs:
        _require_status(items, digest, _OK)
        require(items[digest.hash].data == data, f"{digest} came with other bytes")


def _require_status(
    items: dict[str, reapi.BatchReadBlobsResponse.Response], digest: Digest, expected: grpc.StatusCode
) -> None:
    require(digest.hash in items, f"the response says nothing about {digest}")
    status = code(items[digest.hash].status.code)
    require(status == expected, f"BatchReadBlobs answered {status.name} for {digest}, not {expected.name}")


def _content(item: reapi.BatchReadBlobsResponse.Response, size: int) -> bytes:
    if item.compressor == reapi.Compressor.ZSTD:
        return unpack(item.data, size)
    return item.data
