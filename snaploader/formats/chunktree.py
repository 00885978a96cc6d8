"""Chunk tables as Remote Execution API Trees, and back.

The tree of a chunked file has one FileNode per stored chunk, so that a server that checks what a Tree
names checks every chunk. docs/formats/manifest.md describes the format. The bytes are those of
protobuf's deterministic serialisation, but made and read as numpy arrays: with a protobuf message per
chunk, 200,000 chunks took 30 times as long to write, 6 times as long to read, and 100 MiB more.

A big file inside a directory stands in that directory's Tree as a child Directory of the same form,
with a mode and a time beside its sizes: `encode_chunk_directory`.

Reading takes the bytes for what is written of some table, picks that table out of them
without a further look, and encodes it again: it is right if that gives the very same bytes. Bytes in
any other encoding, and all that break a rule, are read one FileNode at a time: slowly, and in as
little memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from operator import attrgetter
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from snaploader._proto import remote_execution_pb2
from snaploader.digest import HASH_BYTES, Buffer, Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats import wire
from snaploader.formats.chunktable import MAX_STORED_CHUNKS, ChunkTable, Hashes, check_geometry

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
_FIRST_BYTES = wire.tag(1, wire.BYTES)  # Tree.root, Directory.files, FileNode.name, Digest.hash
_NODE_DIGEST = wire.tag(2, wire.BYTES)
_DIGEST_SIZE = wire.tag(2, wire.VARINT)
_NAME_AT = 4
_NAME_TO_HASH = 4

# Fields that are read one by one.
_TREE_ROOT, _TREE_CHILDREN = 1, 2
_DIRECTORY_FILES, _DIRECTORY_PROPERTIES = 1, 5
_DIRECTORY_NODES = {2, 3}  # directories and symlinks

_CHUNK_SIZE_BYTES = re.compile(re.escape(CHUNK_SIZE_PROPERTY).encode())
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,15}")

_Bytes: TypeAlias = "npt.NDArray[np.uint8]"
M = TypeVar("M", bound=Message)


def encode_tree(table: ChunkTable, mode: int = DEFAULT_MODE) -> bytes:
    """The serialised Tree of a chunked file: equal tables and modes give equal bytes.

    Args:
        mode: Permission bits of the file, at most 0o777. The default is not written.
    """
    properties = remote_execution_pb2.NodeProperties()
    if mode != DEFAULT_MODE:
        # Zero is a mode, so the wrapper must be there even when its value is the default.
        properties.unix_mode.SetInParent()
        properties.unix_mode.value = mode
    directory = encode_chunk_directory(table, properties)
    return _tree_header(len(directory)) + directory


def encode_chunk_directory(
    table: ChunkTable, properties: remote_execution_pb2.NodeProperties | None = None
) -> bytes:
    """The serialised Directory of `table`: one FileNode per stored chunk.

    Args:
        properties: Of the file, such as its mode; the sizes are added to a copy.
    """
    properties = _with_sizes(table, properties or remote_execution_pb2.NodeProperties())
    return b"".join(part.data for part in _encoded_parts(table, properties))


def decode_tree(data: Buffer, function: DigestFunction) -> ChunkTable:
    """The chunk table in a serialised Tree; arguments and errors as `decode_chunked_file`."""
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
    view = memoryview(data).cast("B")
    if len(view) > MAX_TREE_BYTES:
        raise InvalidArgument(f"a tree of {len(view)} bytes is refused: {MAX_TREE_BYTES} are allowed")
    table, properties = _decode_canonical(view, function) or _read_any(_root_fields(view), function)
    has_mode = properties.HasField("unix_mode")
    return table, properties.unix_mode.value & 0o777 if has_mode else DEFAULT_MODE


def decode_chunk_directory(
    directory: memoryview, function: DigestFunction
) -> tuple[ChunkTable, remote_execution_pb2.NodeProperties] | None:
    """The chunk table in a serialised Directory, and all properties of the file; errors as `decode_tree`.

    None when it is a Directory of another kind, that is, without a chunk size.
    """
    # A string stands as it is in any encoding, so its absence needs no parsing to see.
    if _CHUNK_SIZE_BYTES.search(directory) is None:
        return None
    found = _read_canonical(directory, function)
    if found is None and _has_chunk_size(directory):
        found = _read_any(wire.fields(directory), function)
    return found


def _has_chunk_size(directory: memoryview) -> bool:
    properties = remote_execution_pb2.NodeProperties()
    for field in wire.fields(directory):
        if field.number == _DIRECTORY_PROPERTIES:
            merge_properties(properties, field)
    return any(item.name == CHUNK_SIZE_PROPERTY for item in properties.properties)


def _tree_header(root_bytes: int) -> bytes:
    return bytes((_FIRST_BYTES,)) + wire.varint(root_bytes)


def _encoded_parts(table: ChunkTable, properties: remote_execution_pb2.NodeProperties) -> Iterator[_Bytes]:
    """The parts of the serialised Directory, in order."""
    for start, stop, digits, size in _runs(table):
        template = _template(digits, size)
        for first in range(start, stop, _BLOCK_ROWS):
            rows = slice(first, min(first + _BLOCK_ROWS, stop))
            nodes = np.tile(template, (rows.stop - first, 1))
            _write_decimals(table.indices[rows] * table.chunk_size, nodes[:, _NAME_AT : _NAME_AT + digits])
            nodes[:, _hash_columns(digits)] = _hex(table.hashes[rows])
            yield nodes.reshape(-1)
    rest = remote_execution_pb2.Directory(node_properties=properties)
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
    digest = hash_ + bytes((_DIGEST_SIZE,)) + wire.varint(size_bytes)
    node = bytes((_FIRST_BYTES, digits, *bytes(digits), _NODE_DIGEST, len(digest))) + digest
    return np.frombuffer(bytes((_FIRST_BYTES, len(node))) + node, np.uint8)


def _hash_columns(digits: int) -> slice:
    start = _NAME_AT + digits + _NAME_TO_HASH
    return slice(start, start + 2 * HASH_BYTES)


def _write_decimals(numbers: npt.NDArray[np.int64], columns: _Bytes) -> None:
    for column in reversed(range(columns.shape[1])):
        numbers, digit = np.divmod(numbers, 10)
        columns[:, column] = digit + ord("0")


def _read_decimals(columns: _Bytes) -> npt.NDArray[np.int64]:
    numbers = np.zeros(len(columns), np.int64)
    for column in columns.T:
        numbers = numbers * 10 + (column - np.uint8(ord("0")))
    return numbers


def _hex(hashes: Hashes) -> _Bytes:
    return np.frombuffer(hashes.tobytes().hex().encode(), np.uint8).reshape(-1, 2 * HASH_BYTES)


def _unhex(columns: _Bytes) -> Hashes:
    # ValueError where there is no hexadecimal number; spaces are skipped and leave too few bytes to reshape.
    raw = bytes.fromhex(columns.tobytes().decode("ascii"))
    return np.frombuffer(raw, np.uint8).reshape(len(columns), HASH_BYTES)


def _with_sizes(
    table: ChunkTable, properties: remote_execution_pb2.NodeProperties
) -> remote_execution_pb2.NodeProperties:
    copy = remote_execution_pb2.NodeProperties()
    copy.CopyFrom(properties)
    copy.properties.add(name=CHUNK_SIZE_PROPERTY, value=str(table.chunk_size))
    copy.properties.add(name=SIZE_PROPERTY, value=str(table.size))
    copy.properties.sort(key=attrgetter("name"))
    return copy


def _decode_canonical(
    view: memoryview, function: DigestFunction
) -> tuple[ChunkTable, remote_execution_pb2.NodeProperties] | None:
    """Read bytes as `encode_tree` makes them; None for any others, right or wrong."""
    try:
        root = next(wire.fields(view), None)
    except InvalidArgument:
        return None
    if root is None or _tree_header(len(root.payload)) != view[: len(view) - len(root.payload)]:
        return None
    return _read_canonical(root.payload, function)


def _read_canonical(
    view: memoryview, function: DigestFunction
) -> tuple[ChunkTable, remote_execution_pb2.NodeProperties] | None:
    """The table and properties in bytes as `encode_chunk_directory` makes them; None for any others."""
    data = np.frombuffer(view, np.uint8)
    try:
        offsets, hashes, rest = _pick_nodes(data)
        if len(rest) > _MAX_FIELD_BYTES:
            return None
        properties = _parsed(remote_execution_pb2.Directory, rest.data).node_properties
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


def _pick_nodes(root: _Bytes) -> tuple[npt.NDArray[np.int64], Hashes, _Bytes]:
    """Pick what looks like FileNodes at the start of a Directory: offsets, hashes, and the bytes behind.

    Nothing is checked but that all reads stay inside. Stops early where nodes are not laid out in runs.
    """
    offsets: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    hashes: list[Hashes] = [np.empty((0, HASH_BYTES), np.uint8)]
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


def _read_any(
    fields: Iterator[wire.Field], function: DigestFunction
) -> tuple[ChunkTable, remote_execution_pb2.NodeProperties]:
    """Read the fields of any encoding, or raise the error that says what is wrong."""
    offsets, sizes = array("q"), array("q")
    hashes = bytearray()
    properties = remote_execution_pb2.NodeProperties()
    for count, field in enumerate(fields):
        if count > MAX_STORED_CHUNKS:
            raise InvalidArgument(f"a tree of more than {MAX_STORED_CHUNKS} chunks is refused")
        if field.number in _DIRECTORY_NODES:
            raise InvalidArgument("the tree of a chunked file must hold nothing but files")
        if field.number not in {_DIRECTORY_FILES, _DIRECTORY_PROPERTIES}:
            continue
        if field.number == _DIRECTORY_PROPERTIES:
            merge_properties(properties, field)
            continue
        node = parse_field(remote_execution_pb2.FileNode, field)
        if not _DECIMAL.fullmatch(node.name):
            raise InvalidArgument(f"file {node.name[:80]!r} of a tree is not called after its offset")
        digest = Digest.checked(node.digest.hash, node.digest.size_bytes, function)
        offsets.append(int(node.name))
        sizes.append(digest.size_bytes)
        hashes += bytes.fromhex(digest.hash)
    size, chunk_size = _geometry(properties)
    places = np.frombuffer(offsets, np.int64)
    _check_offsets(places, np.frombuffer(sizes, np.int64), size, chunk_size)
    table_hashes = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    return ChunkTable(size, chunk_size, function, places // chunk_size, table_hashes), properties


def _root_fields(tree: memoryview) -> Iterator[wire.Field]:
    """The fields of the Directory at the root; protobuf allows it to come in several parts."""
    for count, field in enumerate(wire.fields(tree)):
        if count > _MAX_PARTS:
            raise InvalidArgument(f"a tree in more than {_MAX_PARTS} parts is refused")
        if field.number == _TREE_CHILDREN:
            raise InvalidArgument("the tree of a chunked file must not have child directories")
        if field.number == _TREE_ROOT:
            yield from wire.fields(bytes_of(field))


def merge_properties(properties: remote_execution_pb2.NodeProperties, field: wire.Field) -> None:
    """Add what a part of the properties says; protobuf allows them to come in several parts."""
    properties.MergeFrom(parse_field(remote_execution_pb2.NodeProperties, field))
    if len(properties.properties) > _MAX_PARTS:
        raise InvalidArgument(f"a tree of more than {_MAX_PARTS} properties is refused")


def parse_field(kind: type[M], field: wire.Field) -> M:
    """The message in a field of a tree. InvalidArgument when it is none, or too large for one entry."""
    payload = bytes_of(field)
    if len(payload) > _MAX_FIELD_BYTES:
        raise InvalidArgument(f"a tree holds a field of {len(payload)} bytes, {_MAX_FIELD_BYTES} are allowed")
    return _parsed(kind, payload)


def bytes_of(field: wire.Field) -> memoryview:
    """What a field of bytes holds. InvalidArgument when it holds something else."""
    if field.wire_type != wire.BYTES:
        raise InvalidArgument(f"field {field.number} of a tree has wire type {field.wire_type}")
    return field.payload


def _parsed(kind: type[M], data: memoryview) -> M:
    try:
        return kind.FromString(bytes(data))
    except DecodeError as error:
        raise InvalidArgument(f"a tree holds a malformed {kind.DESCRIPTOR.name}: {error}") from error


def _geometry(properties: remote_execution_pb2.NodeProperties) -> tuple[int, int]:
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


def _check_offsets(
    offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], size: int, chunk_size: int
) -> None:
    wrong = offsets % chunk_size != 0
    if wrong.any():
        raise InvalidArgument(
            f"offset {offsets[wrong][0]} in a tree is no multiple of the chunk size {chunk_size}"
        )
    wrong = offsets >= size
    if wrong.any():
        raise InvalidArgument(
            f"offset {offsets[wrong][0]} in a tree is past the end of a file of {size} bytes"
        )
    wrong = np.diff(offsets, prepend=-1) <= 0
    if wrong.any():
        raise InvalidArgument(f"offset {offsets[wrong][0]} in a tree is repeated or out of order")
    wrong = sizes != np.minimum(size - offsets, chunk_size)
    if wrong.any():
        raise InvalidArgument(
            f"the digest at offset {offsets[wrong][0]} in a tree has size {sizes[wrong][0]}"
        )
