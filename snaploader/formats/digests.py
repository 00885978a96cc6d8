"""What there is too much of for an object each: many digests as arrays, and the fields of large messages.

A `DigestArray` takes 40 bytes for each digest, where the objects for 200,000 chunks take 50 MiB.
It is a sequence of `Digest`, so any `BlobStore` can be asked for one. Stores that know it look at its
arrays, and make objects only for the few blobs that they lack. A `HashSet` is for looking up: hashes are
words there, of eight bytes, which compare and sort fastest.

Messages of protobuf with too many parts to parse them whole are read without a message class, one field
after the other. See "Encoding" in protobuf's documentation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, final, overload

import numpy as np
import numpy.typing as npt

from snaploader.digest import HASH_BYTES, Digest, DigestFunction
from snaploader.errors import InvalidArgument

Words: TypeAlias = "npt.NDArray[np.uint64]"
"""Hashes as rows of four words, most significant first."""

Prefixes: TypeAlias = "npt.NDArray[np.uint64]"
"""First eight bytes of hashes, where a chance collision does no harm."""

_PIECE = 4096
"""Hashes that are converted at once: their text then takes 256 KiB, which stays in the processor's cache."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Groups (3 and 4) are refused: no message of ours ever had one."""

_FIXED_LENGTHS = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
_HASH_AT = 4
_SIZE_AT = _HASH_AT + 2 * HASH_BYTES + 1


def sizes_of(digests: Iterable[Digest]) -> npt.NDArray[np.int64]:
    """The sizes of blobs, in bytes. InvalidArgument when one is out of range."""
    try:
        sizes = np.array([digest.size_bytes for digest in digests], np.int64)
    except OverflowError:
        sizes = np.full(1, -1)
    if sizes.min(initial=0) < 0:
        raise InvalidArgument("the size of a blob is out of range")
    return sizes


@final
class DigestArray(Sequence[Digest]):
    """A sequence of digests of one function, in arrays. Immutable; the arrays must not be written to.

    Args:
        hashes: One row of 32 bytes for each; uint8.
        sizes: Of the blobs, in bytes; int64.
        function: Behind all hashes.
    """

    __slots__ = ("function", "hashes", "sizes")

    def __init__(
        self, hashes: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64], function: DigestFunction
    ) -> None:
        self.hashes = hashes
        self.sizes = sizes
        self.function = function

    @classmethod
    def of(cls, digests: Iterable[Digest], function: DigestFunction) -> DigestArray:
        """Make an array of digests, in their order; all must be of `function`.

        InvalidArgument when a hash is malformed, or a size is out of range.
        """
        listed = list(digests)
        hashes = decode_hashes([digest.hash for digest in listed])
        return cls(hashes, sizes_of(listed), function)

    @classmethod
    def joined(cls, arrays: Iterable[DigestArray], function: DigestFunction) -> DigestArray:
        """Join arrays of one function, with each digest once, sorted by hash."""
        parts = [cls.of((), function), *arrays]
        hashes = np.concatenate([part.hashes for part in parts])
        sizes = np.concatenate([part.sizes for part in parts])
        words = np.ascontiguousarray(hashes).view(">u8")
        first = words[:, 0].astype(np.uint64)
        order = np.argsort(first, kind="stable")

        def are_equal(some: npt.NDArray[np.intp], others: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
            equal: npt.NDArray[np.bool_] = sizes[some] == sizes[others]
            equal &= (words[some] == words[others]).all(axis=1)
            return equal

        # Hashes with one first word are equal but by rare chance, when all columns are sorted by.
        alike = np.flatnonzero(first[order[1:]] == first[order[:-1]])
        if not are_equal(order[alike], order[alike + 1]).all():
            order = np.lexsort((sizes, *words.astype(np.uint64).T[::-1]))
            alike = np.flatnonzero(are_equal(order[:-1], order[1:]))
        kept = np.ones(len(order), np.bool_)
        kept[alike + 1] = False
        return cls(hashes[order[kept]], sizes[order[kept]], function)

    @property
    def size_bytes(self) -> int:
        """Size of all blobs together."""
        return int(self.sizes.sum())

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> DigestArray:
        """The digests in some rows."""
        return DigestArray(self.hashes[rows], self.sizes[rows], self.function)

    def without(self, others: HashSet) -> DigestArray:
        """The digests but for those whose hash is one of `others`."""
        return self.take(~others.contains(to_rows(self.hashes))) if len(others) else self

    def stranger(self, digests: Collection[Digest]) -> Digest | None:
        """Find one of `digests`, which come from outside, that is not here; None when all are."""
        listed = list(digests)
        try:
            others = DigestArray.of(listed, self.function)
        except InvalidArgument:
            known = set(self)
            return next(digest for digest in listed if digest not in known)
        is_here = HashSet(_with_sizes(self)).contains(_with_sizes(others))
        return None if is_here.all() else listed[int(is_here.argmin())]

    def encoded(self, field_number: int) -> bytes:
        """Serialise the digests, none of the empty blob, as a repeated field of a message has them."""
        parts = []
        for start in range(0, len(self), _PIECE):
            hashes, sizes = self.hashes[start : start + _PIECE], self.sizes[start : start + _PIECE]
            numbers, lengths = _varints(sizes)
            rows = np.empty((len(sizes), _SIZE_AT + numbers.shape[1]), np.uint8)
            rows[:, 0] = tag(field_number, BYTES)
            rows[:, 1] = _SIZE_AT - 2 + lengths
            rows[:, 2], rows[:, 3] = tag(1, BYTES), 2 * HASH_BYTES
            rows[:, _HASH_AT : _SIZE_AT - 1] = hex_rows(hashes)
            rows[:, _SIZE_AT - 1] = tag(2, VARINT)
            rows[:, _SIZE_AT:] = numbers
            used = np.arange(rows.shape[1]) < _SIZE_AT + lengths[:, np.newaxis]
            parts.append(rows[used].tobytes())
        return b"".join(parts)

    @overload
    def __getitem__(self, row: int) -> Digest: ...
    @overload
    def __getitem__(self, row: slice) -> DigestArray: ...
    def __getitem__(self, row: int | slice) -> Digest | DigestArray:
        if isinstance(row, slice):
            return self.take(row)
        return Digest(self.hashes[row].tobytes().hex(), int(self.sizes[row]), self.function)

    def __iter__(self) -> Iterator[Digest]:
        for start in range(0, len(self), _PIECE):
            text = self.hashes[start : start + _PIECE].tobytes().hex()
            for row, size in enumerate(self.sizes[start : start + _PIECE].tolist()):
                yield Digest(text[64 * row : 64 * row + 64], size, self.function)

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, Digest) or digest.function is not self.function:
            return False
        return self.stranger([digest]) is None

    def __repr__(self) -> str:
        return f"DigestArray({len(self)} digests, {self.function.name})"


class HashSet:
    """An immutable set of hashes, 32 bytes each, that answers for many at once; equal to a set of digests.

    Args:
        words: A row for each. Rows of more words than a hash has work too.
    """

    def __init__(self, words: Words) -> None:
        self._words = words[np.argsort(words[:, 0], kind="stable")]
        self._first = np.ascontiguousarray(self._words[:, 0])

    @classmethod
    def of(cls, digests: Iterable[Digest] = ()) -> Self:
        """Make the set of the hashes of distinct blobs. No object is held for each, however many they are."""
        rows = bytearray()
        for digest in digests:
            rows += bytes.fromhex(digest.hash)
        words = np.frombuffer(rows, dtype=">u8").reshape(-1, 4).astype(np.uint64)
        del rows  # of a million hashes 32 MiB, and sorting takes as much again
        return cls(words)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._words,)

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, digest: Digest) -> bool:
        return bool(self.contains(to_words([digest.hash]))[0])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, frozenset | set):
            other = HashSet.of(other)
        if not isinstance(other, HashSet):
            return NotImplemented
        return len(self) == len(other) and bool(self.contains(other._words).all())

    __hash__ = None  # type: ignore[assignment]

    def contains(self, words: Words) -> npt.NDArray[np.bool_]:
        """Tell of each row whether it is in the set. Whole hashes are compared."""
        found = np.zeros(len(words), dtype=np.bool_)
        places = np.searchsorted(self._first, words[:, 0], side="left")
        rows = np.flatnonzero(places < len(self._first))
        rows = rows[self._first[places[rows]] == words[rows, 0]]
        found[rows] = (self._words[places[rows]] == words[rows]).all(axis=1)
        # Of hashes that begin with the same eight bytes only the first was compared. Chance makes no such
        # hashes, but a server can: however many there are, the time grows with their number and no faster.
        rows = rows[~found[rows]]
        if len(rows):
            alike = self._words[are_among(self._first, distinct(words[rows, 0]))]
            known = {row.tobytes() for row in alike}
            found[rows] = [row.tobytes() in known for row in words[rows]]
        return found


def hex_rows(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Convert rows of 32 bytes to rows of 64 hexadecimal digits."""
    return np.frombuffer(hashes.tobytes().hex().encode(), np.uint8).reshape(-1, 2 * HASH_BYTES)


def decode_hashes(hashes: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Convert hashes in hexadecimal to rows of 32 bytes. InvalidArgument when one is malformed."""
    rows = np.empty((len(hashes), HASH_BYTES), np.uint8)
    for start in range(0, len(hashes), _PIECE):
        piece = hashes[start : start + _PIECE]
        text = "".join(piece)
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        # Looking at the whole text at once is a hundred times faster than at each hash.
        if raw.hex() != text or set(map(len, piece)) - {2 * HASH_BYTES}:
            raise InvalidArgument("a hash is not 64 lower-case hexadecimal digits")
        rows[start : start + _PIECE] = np.frombuffer(raw, np.uint8).reshape(-1, HASH_BYTES)
    return rows


def to_words(hashes: Sequence[str]) -> Words:
    """Convert hashes in hexadecimal to an array of shape (n, 4). InvalidArgument when one is malformed."""
    return to_rows(decode_hashes(hashes))


def to_rows(hashes: npt.NDArray[np.uint8]) -> Words:
    """Convert hashes that are rows of 32 bytes to an array of shape (n, 4)."""
    return np.ascontiguousarray(hashes).view(">u8").astype(np.uint64)


def to_prefixes(hashes: npt.NDArray[np.uint8]) -> Prefixes:
    """Return the prefixes of hashes that are rows of 32 bytes."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def are_among(prefixes: Prefixes, known: Prefixes) -> npt.NDArray[np.bool_]:
    """Tell of each whether it is among `known`, which is sorted. A few are found without a look at all."""
    places = np.searchsorted(known, prefixes)
    found = places < len(known)
    found[found] = known[places[found]] == prefixes[found]
    return found


def distinct(prefixes: Prefixes) -> Prefixes:
    """Return each of them once, sorted. (`np.unique` imports `numpy.ma` first, which takes some 15 ms.)"""
    ordered = np.sort(prefixes)
    return ordered[is_first(ordered)]


def is_first(ordered: Prefixes) -> npt.NDArray[np.bool_]:
    """Tell of each of some sorted words whether it differs from the one before."""
    first = np.ones(len(ordered), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def to_hex(words: Words) -> str:
    """Return the hash of one row in hexadecimal."""
    return words.astype(">u8").tobytes().hex()


def _with_sizes(digests: DigestArray) -> Words:
    """Hashes as `to_rows` gives them, and the sizes as a fifth word."""
    return np.column_stack((to_rows(digests.hashes), digests.sizes.astype(np.uint64)))


def _varints(numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Positive numbers as protobuf's varints, a row each, and how many bytes of a row are used."""
    count = max(1, -(-int(numbers.max(initial=0)).bit_length() // 7))
    groups = numbers[:, np.newaxis] >> 7 * np.arange(count)
    lengths = np.maximum(1, (groups > 0).sum(axis=1))
    is_last = np.arange(count) == lengths[:, np.newaxis] - 1
    return np.where(is_last, groups, groups & 0x7F | 0x80).astype(np.uint8), lengths


class Field(NamedTuple):
    """One field of a serialised message."""

    number: int
    wire_type: int
    payload: memoryview
    """Of a field of bytes, what they are; of others, the encoded value. Shares memory with the message."""


def tag(number: int, wire_type: int) -> int:
    """What stands before a field; one byte, for the first 15 numbers."""
    return number << 3 | wire_type


def header(number: int, length: int) -> bytes:
    """What stands before a field of `length` bytes."""
    return bytes((tag(number, BYTES),)) + varint(length)


def varint(value: int) -> bytes:
    """A number that is not negative, seven bits to a byte, lowest first."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_fields(message: memoryview) -> Iterator[Field]:
    """The fields of a serialised message, in order. InvalidArgument, after those before, where it is none."""
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
