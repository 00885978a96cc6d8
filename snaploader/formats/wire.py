"""Protobuf's wire format, as far as it is read without a message class: one field after the other.

See "Encoding" in protobuf's documentation. Used where a message has too many parts to parse it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from snaploader.errors import InvalidArgument

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Groups (3 and 4) are refused: no message of ours ever had one."""

_FIXED_LENGTHS = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field of a serialised message."""

    number: int
    wire_type: int
    payload: memoryview
    """Of a field of bytes, what they are; of others, the encoded value. Shares memory with the message."""


def tag(number: int, wire_type: int) -> int:
    """What stands before a field; one byte, for the first 15 numbers."""
    return number << 3 | wire_type


def varint(value: int) -> bytes:
    """A number that is not negative, seven bits to a byte, lowest first."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a serialised message, in the order they stand there.

    Raises:
        InvalidArgument: The bytes are no message; raised once the fields before are consumed.
    """
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        number, wire_type = key >> 3, key & 7
        start = position
        if wire_type == BYTES:
            length, start = _read_varint(message, position)
            position = start + length
        elif wire_type == VARINT:
            _, position = _read_varint(message, position)
        elif wire_type in _FIXED_LENGTHS:
            position += _FIXED_LENGTHS[wire_type]
        else:
            raise InvalidArgument(f"not a protobuf message: wire type {wire_type} at byte {start}")
        if position > len(message) or not number:
            raise InvalidArgument(
                f"not a protobuf message: field {number} at byte {start} is cut short or unknown"
            )
        yield Field(number, wire_type, message[start:position])


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise InvalidArgument(f"not a protobuf message: bad number at byte {position}")
