from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.errors import InvalidArgument
from snaploader.formats.digests import BYTES, FIXED32, FIXED64, VARINT, read_fields, tag, varint


@given(st.text("aé\0\U0001f600", max_size=300), st.integers(0, 2**63 - 1))
def test_fields_of_a_message_are_found(hash_: str, size_bytes: int) -> None:
    data = reapi.Digest(hash=hash_, size_bytes=size_bytes).SerializeToString()
    expected = [(1, BYTES, hash_.encode())] if hash_ else []
    expected += [(2, VARINT, varint(size_bytes))] if size_bytes else []
    assert [(n, kind, bytes(payload)) for n, kind, payload in read_fields(memoryview(data))] == expected


def test_fixed_width_fields_are_passed_over() -> None:
    data = bytes([tag(3, FIXED64), *range(8), tag(4, FIXED32), *range(4)])
    found = [(field.number, len(field.payload)) for field in read_fields(memoryview(data))]
    assert found == [(3, 8), (4, 4)]


@pytest.mark.parametrize(
    ("value", "encoded"), [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (524288, "808020")]
)
def test_golden_varints(value: int, encoded: str) -> None:
    assert varint(value).hex() == encoded


@pytest.mark.parametrize(
    "data",
    [
        "0a",  # no length
        "0a0261",  # cut short
        "0a80",  # a length without an end
        "10",  # no value
        "0d000000",  # cut short
        "09000000",  # cut short
        "0b0c",  # a group
        "0001",  # field number 0
        "ff" * 11,  # a tag without an end
        "0a" + "ff" * 9 + "7f",  # a length beyond all bounds
    ],
)
def test_malformed_messages_are_refused(data: str) -> None:
    with pytest.raises(InvalidArgument, match="not a protobuf message"):
        list(read_fields(memoryview(bytes.fromhex(data))))


@given(st.binary(max_size=100))
def test_any_bytes_are_fields_or_an_error(data: bytes) -> None:
    try:
        assert sum(len(field.payload) for field in read_fields(memoryview(data))) <= len(data)
    except InvalidArgument:
        pass
