"""Hand-written requests equal protobuf's; batches keep within their limits."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, strategies as st

from snaploader._proto import bytestream_pb2, remote_execution_pb2 as reapi
from snaploader.blobstore import Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.remote.cas import BatchLimit, batches, function_field, halves, to_message
from snaploader.remote.codec import ITEM_OVERHEAD_BYTES, Item, batch_update_request, varint, write_request

functions = st.sampled_from(DigestFunction)


@given(
    st.text(max_size=200), functions, st.lists(st.tuples(st.binary(max_size=300), st.booleans()), max_size=5)
)
def test_batch_update_request_is_what_protobuf_reads(
    instance: str, function: DigestFunction, blobs: list[tuple[bytes, bool]]
) -> None:
    items = [Item(Upload(Digest.of(data, function), data), data, zstd) for data, zstd in blobs]
    expected = reapi.BatchUpdateBlobsRequest(
        instance_name=instance,
        requests=[
            reapi.BatchUpdateBlobsRequest.Request(
                digest=to_message(item.digest), data=bytes(item.data), compressor=int(item.zstd)
            )
            for item in items
        ],
        digest_function=function_field(function),
    )
    assert batch_update_request(instance, items, function) == expected.SerializeToString(deterministic=True)


@given(st.text(max_size=200), st.integers(0, 1 << 50), st.binary(max_size=300), st.booleans())
def test_write_request_is_what_protobuf_reads(name: str, offset: int, data: bytes, finish: bool) -> None:
    expected = bytestream_pb2.WriteRequest(
        resource_name=name, write_offset=offset, data=data, finish_write=finish
    )
    assert write_request(name, offset, memoryview(data), finish=finish) == expected.SerializeToString()


@given(st.integers(0, 1 << 62))
def test_item_overhead_covers_the_worst_item(size: int) -> None:
    digest = Digest("f" * 64, size, DigestFunction.BLAKE3)
    head = len(batch_update_request("", [Item(Upload(digest, b""), b"", True)], DigestFunction.BLAKE3))
    assert head + len(varint(1 << 32)) <= ITEM_OVERHEAD_BYTES


def sized(size: int, function: DigestFunction = DigestFunction.SHA256) -> Digest:
    return Digest("0" * 64, size, function)


def itself(digest: Digest) -> Digest:
    return digest


@given(st.lists(st.builds(sized, st.integers(0, 500), functions)), st.integers(200, 1500), st.integers(1, 6))
def test_batches_keep_order_and_limits_and_have_one_function(
    digests: list[Digest], limit: int, most: int
) -> None:
    groups = list(batches(digests, itself, lambda: limit, most))
    assert [digest for group in groups for digest in group] == digests
    for group in groups:
        assert 1 <= len(group) <= most
        assert len({digest.function for digest in group}) == 1
        size = sum(digest.size_bytes + ITEM_OVERHEAD_BYTES for digest in group)
        assert len(group) == 1 or size <= limit


def test_batches_take_only_what_the_next_group_needs() -> None:
    taken: list[int] = []

    def source() -> Iterator[Digest]:
        for number in range(100):
            taken.append(number)
            yield sized(number)

    groups = batches(source(), itself, lambda: 10_000, 5)
    assert next(groups) == [sized(number) for number in range(5)]
    assert len(taken) == 6


def test_batches_follow_a_limit_that_falls() -> None:
    limit = BatchLimit(1 << 20)
    groups = batches([sized(100_000)] * 20, itself, limit, 100)
    assert len(next(groups)) == 10
    limit.refused(500_000)
    assert len(next(groups)) == 2


def test_refusals_lower_the_limit_but_not_to_nothing() -> None:
    limit = BatchLimit(1 << 20)
    assert limit.fits((1 << 20) - ITEM_OVERHEAD_BYTES)
    assert not limit.fits(1 << 20)
    limit.refused(1 << 21)
    assert limit() == 1 << 20
    limit.refused(1000)
    assert limit() == 64 * 1024


@given(st.lists(st.integers(), min_size=2))
def test_halves_are_whole_and_smaller(items: list[int]) -> None:
    first, second = halves(items)
    assert [*first, *second] == items
    assert first
    assert second
