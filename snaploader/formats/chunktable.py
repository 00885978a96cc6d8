"""The chunks of one file: which of them hold data, and the digest of each; in memory, and as a chunk tree.

A file of 100 GiB has 200,000 chunks, so a table is two numpy arrays, 40 bytes per stored chunk, and
Python objects are made for single chunks only when asked for.

A chunk tree is a Remote Execution API Tree with one FileNode per stored chunk, so that a server that
checks what a Tree names checks every chunk. docs/formats/manifest.md describes the format. The bytes are
those of protobuf's deterministic serialisation, but made and read as numpy arrays: with a protobuf message
per chunk, 200,000 chunks took 30 times as long to write, 6 times as long to read, and 100 MiB more.

Reading picks a table out of the bytes unchecked and encodes it again: it is right if that gives the very
same bytes. All others are read one FileNode at a time, by all rules: slowly, and in as little memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar, final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import HASH_BYTES, MAX_BLOB_BYTES, Buffer, Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.digests import (
    BYTES,
    VARINT,
    DigestArray,
    Field,
    header,
    hex_rows,
    read_fields,
    tag,
    varint,
)

_Integers: TypeAlias = "npt.NDArray[np.int64]"
_Bytes: TypeAlias = "npt.NDArray[np.uint8]"

M = TypeVar("M", bound=Message)

MIN_CHUNK_SIZE = 4 << 10
MAX_CHUNK_SIZE = 64 << 20

MAX_CHUNKS = 1 << 24
"""Most chunks of a file, holes included: 8 TiB in chunks of 512 KiB."""

MAX_STORED_CHUNKS = 1 << 20
"""Most chunks of a file that hold data: 512 GiB in chunks of 512 KiB."""

MAX_TREE_BYTES = 128 << 20
"""Largest tree that is read; one of `MAX_STORED_CHUNKS` chunks is smaller."""

SIZE_PROPERTY = "size"
CHUNK_SIZE_PROPERTY = "chunk_size"

DEFAULT_MODE = 0o600
"""Permission bits of a chunked file whose tree names none: a disk or a memory is its owner's alone."""

_BLOCK_ROWS = 8192
"""Chunks handled at a time, so that temporary arrays stay within a few MiB."""

_MAX_DIGITS = 16
"""Of an offset: no file is larger than MAX_BLOB_BYTES, 1 PiB."""

_MAX_RUNS = 2 * _MAX_DIGITS
"""Nodes of one length stand together: a run for each number of digits, and one for a short last chunk."""

_MAX_PARTS = 1000
"""Of a Tree whose root comes in parts, and of its properties: one and two are written."""

_MAX_FIELD_BYTES = 64 << 10
"""Of a FileNode, and of the properties: a parsed message can take many times the memory of its bytes."""

# Tags, in the bytes of a FileNode: tag, length, tag, length, name, tag, length, tag, length, hash, tag, size.
_FIRST_BYTES = tag(1, BYTES)  # Tree.root, Directory.files, FileNode.name, Digest.hash
_NODE_DIGEST = tag(2, BYTES)
_DIGEST_SIZE = tag(2, VARINT)
_NAME_AT = 4
_NAME_TO_HASH = 4

# Fields that are read one by one.
TREE_ROOT, TREE_CHILDREN = 1, 2
DIRECTORY_FILES, DIRECTORY_DIRECTORIES, DIRECTORY_SYMLINKS, DIRECTORY_PROPERTIES = 1, 2, 3, 5

_CHUNK_SIZE_BYTES = re.compile(re.escape(CHUNK_SIZE_PROPERTY).encode())
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,15}")


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChunkTable:
    """The size of a file, its chunk size, and the hash of every chunk that is no hole. Immutable.

    A chunk has an *index*, its offset divided by the chunk size. A chunk that holds data also has a
    *row*, its place among the stored ones. All other chunks are holes and read as zeros.

    Args:
        size: Of the file, in bytes.
        chunk_size: In bytes: a power of two of 4 KiB to 64 MiB. The last chunk may be shorter.
        function: Behind all hashes.
        indices: Of the stored chunks, strictly ascending; int64.
        hashes: One row of 32 bytes for each of `indices`; uint8. Both arrays are made read-only, and
            copied only if they are of another type or not contiguous: do not keep views that can write.

    Raises:
        InvalidArgument: Any of this does not hold, or a limit (`MAX_CHUNKS`, …) is exceeded.
    """

    size: int
    chunk_size: int
    function: DigestFunction
    indices: _Integers
    hashes: _Bytes

    def __post_init__(self) -> None:
        check_geometry(self.size, self.chunk_size)
        indices = np.ascontiguousarray(self.indices, dtype=np.int64)
        hashes = np.ascontiguousarray(self.hashes, dtype=np.uint8)
        if indices.ndim != 1 or hashes.shape != (len(indices), HASH_BYTES):
            raise InvalidArgument(
                f"a chunk table needs n indices and n hashes of {HASH_BYTES} bytes, "
                f"not arrays of shape {indices.shape} and {hashes.shape}"
            )
        if len(indices) > MAX_STORED_CHUNKS:
            raise InvalidArgument(
                f"{len(indices)} chunks with data are more than the {MAX_STORED_CHUNKS} a file may have: "
                "use larger chunks"
            )
        if len(indices):
            if indices[0] < 0 or indices[-1] >= self.chunk_count:
                raise InvalidArgument(
                    f"chunks {indices[0]} to {indices[-1]} lie outside a file of {self.chunk_count} chunks"
                )
            if not (indices[1:] > indices[:-1]).all():
                raise InvalidArgument("the indices of a chunk table must be strictly ascending")
        indices.flags.writeable = False
        hashes.flags.writeable = False
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "hashes", hashes)

    def __reduce__(self) -> tuple[Any, ...]:
        # An array that was pickled can be written to; the constructor sees to that.
        return ChunkTable, (self.size, self.chunk_size, self.function, self.indices, self.hashes)

    @classmethod
    def empty(cls, size: int, chunk_size: int, function: DigestFunction) -> ChunkTable:
        """The table of a file that is one hole."""
        return cls(size, chunk_size, function, np.empty(0, np.int64), np.empty((0, HASH_BYTES), np.uint8))

    @property
    def chunk_count(self) -> int:
        """Chunks of the file, holes included."""
        return -(-self.size // self.chunk_size)

    @property
    def stored_count(self) -> int:
        """Chunks that hold data, which is the number of rows."""
        return len(self.indices)

    @property
    def stored_bytes(self) -> int:
        """Bytes in chunks that hold data."""
        stored = len(self.indices) * self.chunk_size
        if len(self.indices) and self.indices[-1] == self.chunk_count - 1:
            stored -= self.chunk_count * self.chunk_size - self.size
        return stored

    @property
    def hole_bytes(self) -> int:
        """Bytes of the file in holes."""
        return self.size - self.stored_bytes

    def chunk_length(self, index: int) -> int:
        """Bytes of chunk `index`: the chunk size, or less for the last one. IndexError outside the file."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(f"chunk {index} lies outside a file of {self.chunk_count} chunks")
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def digest(self, row: int) -> Digest:
        """The digest in `row`, one of range(table.stored_count)."""
        hash_ = self.hashes[row].tobytes().hex()
        return Digest(hash_, self.chunk_length(int(self.indices[row])), self.function)

    def get(self, index: int) -> Digest | None:
        """The digest of chunk `index`, or None when it is a hole. IndexError outside the file."""
        self.chunk_length(index)
        row = int(self.indices.searchsorted(index))
        return self.digest(row) if row < len(self.indices) and self.indices[row] == index else None

    def digests(self) -> DigestArray:
        """The digest of every row, in order, made as they are asked for; equal chunks repeat."""
        sizes = np.full(len(self.indices), self.chunk_size, np.int64)
        if len(sizes):
            sizes[-1] = self.chunk_length(int(self.indices[-1]))
        return DigestArray(self.hashes, sizes, self.function)

    def replace(self, changes: Mapping[int, bytes | None], *, size: int | None = None) -> ChunkTable:
        """A new table in which some chunks have other content. Most of the work is done on whole arrays.

        Args:
            changes: The hash, of 32 bytes, of each chunk with new data; None for one that is a hole now.
            size: Of the file, when it has grown; it cannot have shrunk. If it ended in a short chunk
                with data, that chunk is longer now and must be among the changes.

        Raises:
            InvalidArgument: Any of this does not hold.
        """
        size = self.size if size is None else size
        data = {index: hash_ for index, hash_ in changes.items() if hash_ is not None}
        for index, hash_ in data.items():
            if len(hash_) != HASH_BYTES:
                raise InvalidArgument(f"the hash of chunk {index} has {len(hash_)} bytes, not {HASH_BYTES}")
        holes = changes.keys() - data.keys()
        if holes and not 0 <= min(holes) <= max(holes) < -(-size // self.chunk_size):
            raise InvalidArgument(f"a hole lies outside a file of {size} bytes")
        if size < self.size:
            raise InvalidArgument(f"a chunked file cannot shrink from {self.size} to {size} bytes")
        last = self.chunk_count - 1
        grows_last = size > self.size and self.size % self.chunk_size and self.get(last) is not None
        if grows_last and last not in changes:
            raise InvalidArgument(f"chunk {last} grew with its file, so its digest must be given anew")
        kept = ~np.isin(self.indices, np.array([*changes], np.int64))
        merged = np.concatenate((self.indices[kept], np.array([*data], np.int64)))
        new_hashes = np.frombuffer(b"".join(data.values()), np.uint8).reshape(-1, HASH_BYTES)
        hashes = np.concatenate((self.hashes[kept], new_hashes))
        order = merged.argsort(kind="stable")
        return ChunkTable(size, self.chunk_size, self.function, merged[order], hashes[order])

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same content with the same chunks."""
        if not isinstance(other, ChunkTable):
            return NotImplemented
        return (
            (self.size, self.chunk_size, self.function) == (other.size, other.chunk_size, other.function)
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.hashes, other.hashes)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"ChunkTable(size={self.size}, chunk_size={self.chunk_size}, function={self.function.name}, "
            f"{self.stored_count} of {self.chunk_count} chunks stored)"
        )


DecodedTable: TypeAlias = tuple[ChunkTable, reapi.NodeProperties]


def check_geometry(size: int, chunk_size: int) -> None:
    """InvalidArgument unless a file of `size` bytes can be cut into chunks of `chunk_size` bytes."""
    if not MIN_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise InvalidArgument(
            f"chunk size {chunk_size} is not a power of two of {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE} bytes"
        )
    if not 0 <= size <= MAX_BLOB_BYTES:
        raise InvalidArgument(f"file size {size} is out of range")
    if -(-size // chunk_size) > MAX_CHUNKS:
        raise InvalidArgument(
            f"a file of {size} bytes has over {MAX_CHUNKS} chunks of {chunk_size} bytes: use larger chunks"
        )


def encode_tree(table: ChunkTable, mode: int = DEFAULT_MODE) -> bytes:
    """The serialised Tree of a chunked file: equal tables and modes give equal bytes.

    Args:
        mode: Permission bits of the file, at most 0o777. The default is not written.
    """
    properties = reapi.NodeProperties()
    if mode != DEFAULT_MODE:
        set_mode(properties, mode)
    directory = encode_chunk_directory(table, properties)
    return header(TREE_ROOT, len(directory)) + directory


def encode_chunk_directory(table: ChunkTable, properties: reapi.NodeProperties) -> bytes:
    """The serialised Directory of `table`, as a big file inside a directory stands in that directory's Tree.

    Args:
        properties: Of the file, such as its mode; its sizes are added.
    """
    properties.properties.add(name=CHUNK_SIZE_PROPERTY, value=str(table.chunk_size))
    properties.properties.add(name=SIZE_PROPERTY, value=str(table.size))
    properties.properties.sort(key=attrgetter("name"))
    return b"".join(part.data for part in _encoded_parts(table, properties))


def decode_tree(data: Buffer, function: DigestFunction) -> ChunkTable:
    """The chunk table in a serialised Tree, as `decode_chunked_file` reads it."""
    return decode_chunked_file(data, function)[0]


def decode_chunked_file(data: Buffer, function: DigestFunction) -> tuple[ChunkTable, int]:
    """The chunk table and the permission bits of the file in a serialised Tree, all of it checked.

    Of a mode only the permission bits are taken: what is restored may not lend anyone's rights.

    Args:
        data: The whole blob.
        function: Behind the digests in it, which do not say so themselves.

    Raises:
        InvalidArgument: It is no tree of a chunked file, or breaks a rule of the format: offsets that
            are not canonical decimal numbers, out of order, repeated, no multiples of the chunk size
            or past the end; digests that are malformed or not of the chunk's size; absurd sizes.
    """
    view = tree_view(data)
    table, properties = _decode_canonical(view, function) or _read_any(_root_fields(view), function)
    has_mode = properties.HasField("unix_mode")
    return table, properties.unix_mode.value & 0o777 if has_mode else DEFAULT_MODE


def decode_chunk_directory(directory: memoryview, function: DigestFunction) -> DecodedTable | None:
    """The chunk table and all properties of the file in a serialised Directory; None in any other one."""
    # A string stands as it is in any encoding, so its absence needs no parsing to see.
    if _CHUNK_SIZE_BYTES.search(directory) is None:
        return None
    found = _read_canonical(directory, function)
    if found is not None:
        return found
    properties = reapi.NodeProperties()
    for field in read_fields(directory):
        if field.number == DIRECTORY_PROPERTIES:
            merge_properties(properties, field)
    if not any(item.name == CHUNK_SIZE_PROPERTY for item in properties.properties):
        return None
    return _read_any(read_fields(directory), function)


def tree_view(data: Buffer) -> memoryview:
    """The bytes of a Tree. InvalidArgument when they are more than is read."""
    view = memoryview(data).cast("B")
    if len(view) > MAX_TREE_BYTES:
        raise InvalidArgument(f"a tree of {len(view)} bytes is refused: {MAX_TREE_BYTES} are allowed")
    return view


def _encoded_parts(table: ChunkTable, properties: reapi.NodeProperties) -> Iterator[_Bytes]:
    """The parts of the serialised Directory, in order."""
    for start, stop, digits, size in _runs(table):
        template = _template(digits, size)
        for first in range(start, stop, _BLOCK_ROWS):
            rows = slice(first, min(first + _BLOCK_ROWS, stop))
            nodes = np.tile(template, (rows.stop - first, 1))
            _write_decimals(table.indices[rows] * table.chunk_size, nodes[:, _NAME_AT : _NAME_AT + digits])
            nodes[:, _hash_columns(digits)] = hex_rows(table.hashes[rows])
            yield nodes.reshape(-1)
    rest = reapi.Directory(node_properties=properties)
    yield np.frombuffer(rest.SerializeToString(deterministic=True), np.uint8)


def _runs(table: ChunkTable) -> Iterator[tuple[int, int, int, int]]:
    """Rows whose nodes differ in name and hash only: first, last + 1, digits of the offset, digest size."""
    count = table.stored_count
    if not count:
        return
    last_size = table.digest(count - 1).size_bytes
    last_digits = len(str(int(table.indices[-1]) * table.chunk_size))
    full = count if last_size == table.chunk_size else count - 1
    start = 0
    for digits in range(1, last_digits + 1):
        first_longer = -(-(10**digits) // table.chunk_size)
        stop = min(int(table.indices.searchsorted(first_longer)), full)
        if start < stop:
            yield start, stop, digits, table.chunk_size
        start = stop
    if full < count:
        yield full, count, last_digits, last_size


def _template(digits: int, size_bytes: int) -> _Bytes:
    """A serialised FileNode, with its tag and length, that lacks name and hash."""
    hash_ = bytes((_FIRST_BYTES, 2 * HASH_BYTES, *bytes(2 * HASH_BYTES)))
    digest = hash_ + bytes((_DIGEST_SIZE,)) + varint(size_bytes)
    node = bytes((_FIRST_BYTES, digits, *bytes(digits), _NODE_DIGEST, len(digest))) + digest
    return np.frombuffer(bytes((_FIRST_BYTES, len(node))) + node, np.uint8)


def _hash_columns(digits: int) -> slice:
    start = _NAME_AT + digits + _NAME_TO_HASH
    return slice(start, start + 2 * HASH_BYTES)


def _write_decimals(numbers: _Integers, columns: _Bytes) -> None:
    for column in reversed(range(columns.shape[1])):
        numbers, digit = np.divmod(numbers, 10)
        columns[:, column] = digit + ord("0")


def _read_decimals(columns: _Bytes) -> _Integers:
    numbers = np.zeros(len(columns), np.int64)
    for column in columns.T:
        numbers = numbers * 10 + (column - np.uint8(ord("0")))
    return numbers


def _unhex(columns: _Bytes) -> _Bytes:
    # ValueError where there is no hexadecimal number; spaces are skipped and leave too few bytes to reshape.
    raw = bytes.fromhex(columns.tobytes().decode("ascii"))
    return np.frombuffer(raw, np.uint8).reshape(len(columns), HASH_BYTES)


def _decode_canonical(view: memoryview, function: DigestFunction) -> DecodedTable | None:
    """Read bytes as `encode_tree` makes them; None for any others, right or wrong."""
    try:
        root = next(read_fields(view), None)
    except InvalidArgument:
        return None
    if root is None or header(TREE_ROOT, len(root.payload)) != view[: len(view) - len(root.payload)]:
        return None
    return _read_canonical(root.payload, function)


def _read_canonical(view: memoryview, function: DigestFunction) -> DecodedTable | None:
    """The table and properties in bytes as `encode_chunk_directory` makes them; None for any others."""
    data = np.frombuffer(view, np.uint8)
    try:
        offsets, hashes, rest = _pick_nodes(data)
        if len(rest) > _MAX_FIELD_BYTES:
            return None
        properties = parse_message(reapi.Directory, rest.data, "malformed").node_properties
        if len(properties.properties) > _MAX_PARTS:
            return None
        size, chunk_size = _geometry(properties)
        table = ChunkTable(size, chunk_size, function, offsets // chunk_size, hashes)
    except ValueError:
        return None
    position = 0
    for part in _encoded_parts(table, properties):
        if not np.array_equal(data[position : position + len(part)], part):
            return None
        position += len(part)
    return (table, properties) if position == len(data) else None


def _pick_nodes(root: _Bytes) -> tuple[_Integers, _Bytes, _Bytes]:
    """Pick what looks like FileNodes at the start of a Directory: offsets, hashes, and the bytes behind.

    Nothing is checked but that all reads stay inside. Stops early where nodes are not laid out in runs.
    """
    offsets: list[_Integers] = [np.empty(0, np.int64)]
    hashes: list[_Bytes] = [np.empty((0, HASH_BYTES), np.uint8)]
    runs = 0
    while len(root) > _NAME_AT and root[0] == _FIRST_BYTES and runs < _MAX_RUNS:
        digits = int(root[_NAME_AT - 1])
        length = int(root[1]) + 2
        columns = _hash_columns(digits)
        if not 1 <= digits <= _MAX_DIGITS or columns.stop > length or length > len(root):
            break
        count = min(len(root) // length, _BLOCK_ROWS)
        nodes = root[: count * length].reshape(count, length)
        alike = (nodes[:, :_NAME_AT] == nodes[0, :_NAME_AT]).all(axis=1)
        if not alike.all():
            nodes = nodes[: int(alike.argmin())]
            runs += 1
        offsets.append(_read_decimals(nodes[:, _NAME_AT : _NAME_AT + digits]))
        hashes.append(_unhex(nodes[:, columns]))
        root = root[nodes.size :]
    return np.concatenate(offsets), np.concatenate(hashes), root


def _read_any(fields: Iterator[Field], function: DigestFunction) -> DecodedTable:
    """Read the fields of any encoding, or raise the error that says what is wrong."""
    offsets, sizes = array("q"), array("q")
    hashes = bytearray()
    properties = reapi.NodeProperties()
    for count, field in enumerate(fields):
        if count > MAX_STORED_CHUNKS:
            raise InvalidArgument(f"a tree of more than {MAX_STORED_CHUNKS} chunks is refused")
        if field.number in {DIRECTORY_DIRECTORIES, DIRECTORY_SYMLINKS}:
            raise InvalidArgument("the tree of a chunked file must hold nothing but files")
        if field.number == DIRECTORY_PROPERTIES:
            merge_properties(properties, field)
        if field.number != DIRECTORY_FILES:
            continue
        node = parse_field(reapi.FileNode, field)
        if not _DECIMAL.fullmatch(node.name):
            raise InvalidArgument(f"file {node.name[:80]!r} of a tree is not called after its offset")
        digest = Digest.checked(node.digest.hash, node.digest.size_bytes, function)
        offsets.append(int(node.name))
        sizes.append(digest.size_bytes)
        hashes += bytes.fromhex(digest.hash)
    size, chunk_size = _geometry(properties)
    places, lengths = np.frombuffer(offsets, np.int64), np.frombuffer(sizes, np.int64)
    for wrong, what in (
        (places % chunk_size != 0, f"is no multiple of the chunk size {chunk_size}"),
        (places >= size, f"is past the end of a file of {size} bytes"),
        (np.diff(places, prepend=-1) <= 0, "is repeated or out of order"),
    ):
        if wrong.any():
            raise InvalidArgument(f"offset {places[wrong][0]} in a tree {what}")
    wrong = lengths != np.minimum(size - places, chunk_size)
    if wrong.any():
        raise InvalidArgument(
            f"the digest at offset {places[wrong][0]} in a tree has size {lengths[wrong][0]}"
        )
    table_hashes = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    return ChunkTable(size, chunk_size, function, places // chunk_size, table_hashes), properties


def _root_fields(tree: memoryview) -> Iterator[Field]:
    """The fields of the Directory at the root; protobuf allows it to come in several parts."""
    for count, field in enumerate(read_fields(tree)):
        if count > _MAX_PARTS:
            raise InvalidArgument(f"a tree in more than {_MAX_PARTS} parts is refused")
        if field.number == TREE_CHILDREN:
            raise InvalidArgument("the tree of a chunked file must not have child directories")
        if field.number == TREE_ROOT:
            yield from read_fields(bytes_of(field))


def set_mode(properties: reapi.NodeProperties, mode: int) -> None:
    """Write permission bits; also those of zero, which is a mode, where "none" is not to have the field."""
    properties.unix_mode.SetInParent()
    properties.unix_mode.value = mode


def merge_properties(properties: reapi.NodeProperties, field: Field) -> None:
    """Add what a part of the properties says; protobuf allows them to come in several parts."""
    properties.MergeFrom(parse_field(reapi.NodeProperties, field))
    if len(properties.properties) > _MAX_PARTS:
        raise InvalidArgument(f"a tree of more than {_MAX_PARTS} properties is refused")


def parse_field(kind: type[M], field: Field) -> M:
    """The message in a field of a tree. InvalidArgument when it is none, or too large for one entry."""
    payload = bytes_of(field)
    if len(payload) > _MAX_FIELD_BYTES:
        raise InvalidArgument(f"a tree holds a field of {len(payload)} bytes, {_MAX_FIELD_BYTES} are allowed")
    return parse_message(kind, payload, f"a tree holds a malformed {kind.DESCRIPTOR.name}")


def bytes_of(field: Field) -> memoryview:
    """What a field of bytes holds. InvalidArgument when it holds something else."""
    if field.wire_type != BYTES:
        raise InvalidArgument(f"field {field.number} of a tree has wire type {field.wire_type}")
    return field.payload


def parse_message(kind: type[M], data: Buffer, what: str) -> M:
    """The message that `data` is. InvalidArgument, which says `what` is wrong, when it is none."""
    try:
        return kind.FromString(bytes(data))
    except DecodeError as error:
        raise InvalidArgument(f"{what}: {error}") from error


def _geometry(properties: reapi.NodeProperties) -> tuple[int, int]:
    """Size and chunk size of the file. Other properties may stand beside them."""
    found: dict[str, int] = {}
    for item in properties.properties:
        if item.name not in {SIZE_PROPERTY, CHUNK_SIZE_PROPERTY}:
            continue
        if item.name in found or not _DECIMAL.fullmatch(item.value):
            raise InvalidArgument(f"property {item.name!r} of a tree is not one decimal number")
        found[item.name] = int(item.value)
    if len(found) != 2:
        raise InvalidArgument(f"a tree lacks its properties {SIZE_PROPERTY!r} and {CHUNK_SIZE_PROPERTY!r}")
    check_geometry(found[SIZE_PROPERTY], found[CHUNK_SIZE_PROPERTY])
    return found[SIZE_PROPERTY], found[CHUNK_SIZE_PROPERTY]
