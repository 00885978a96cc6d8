from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats import chunktable
from snaploader.formats.chunktable import (
    MAX_CHUNKS,
    ChunkTable,
    decode_chunked_file,
    decode_tree,
    encode_tree,
)

CHUNK = 4096
SHA256 = DigestFunction.SHA256


def message_of(table: ChunkTable) -> reapi.Tree:
    """The tree of a table, made the slow way."""
    message = reapi.Tree()
    for row in range(table.stored_count):
        digest = table.digest(row)
        message.root.files.add(
            name=str(int(table.indices[row]) * table.chunk_size),
            digest=reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes),
        )
    properties = message.root.node_properties.properties
    properties.add(name="chunk_size", value=str(table.chunk_size))
    properties.add(name="size", value=str(table.size))
    return message


def random_table(seed: int, size: int, chunk_size: int, stored: int) -> ChunkTable:
    rng = np.random.default_rng(seed)
    count = -(-size // chunk_size)
    indices = np.sort(rng.choice(count, min(stored, count), replace=False))
    return ChunkTable(
        size, chunk_size, SHA256, indices, rng.integers(0, 256, (len(indices), 32), dtype=np.uint8)
    )


@st.composite
def tables(draw: st.DrawFn) -> ChunkTable:
    chunk_size = 1 << draw(st.integers(12, 26))
    # Around powers of ten names change their length; the last chunk may be short, by much or little.
    near = draw(st.sampled_from([0, 10**4, 10**5, 10**6, 10**9, 10**12]))
    size = max(0, near + draw(st.integers(-3 * chunk_size, 3 * chunk_size)))
    count = -(-size // chunk_size)
    if count > MAX_CHUNKS:
        size, count = MAX_CHUNKS * chunk_size, MAX_CHUNKS
    indices = draw(st.sets(st.integers(max(0, count - 30), count - 1), max_size=20)) if count else set()
    if count:
        indices |= draw(st.sets(st.integers(0, count - 1), max_size=10))
    hashes = draw(st.binary(min_size=32 * len(indices), max_size=32 * len(indices)))
    table = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    function = draw(st.sampled_from(DigestFunction))
    return ChunkTable(size, chunk_size, function, np.array(sorted(indices), np.int64), table)


@given(tables())
def test_bytes_are_those_of_protobuf(table: ChunkTable) -> None:
    assert encode_tree(table) == message_of(table).SerializeToString(deterministic=True)


@given(tables())
def test_tables_survive_the_wire(table: ChunkTable) -> None:
    data = encode_tree(table)
    assert decode_tree(data, table.function) == table
    canonical = chunktable._decode_canonical(memoryview(data), table.function)
    assert canonical is not None
    assert canonical[0] == table
    assert chunktable._read_any(chunktable._root_fields(memoryview(data)), table.function)[0] == table


def test_tables_of_several_blocks_survive_the_wire() -> None:
    table = random_table(1, 30_000 * CHUNK - 1, CHUNK, 25_000)
    data = encode_tree(table)
    assert data == message_of(table).SerializeToString(deterministic=True)
    canonical = chunktable._decode_canonical(memoryview(data), SHA256)
    assert canonical is not None
    assert canonical[0] == table


def test_golden_tree_bytes() -> None:
    hashes = np.array([list(bytes.fromhex("ab" * 32)), list(bytes.fromhex("01" * 32))], np.uint8)
    table = ChunkTable(20_000, CHUNK, SHA256, np.array([0, 4]), hashes)
    digest = "0a40" + "6162" * 32
    last_digest = "0a40" + "3031" * 32
    assert encode_tree(table).hex() == (
        "0ac101"  # root
        + ("0a4a" + "0a0130" + "1245" + digest + "108020")  # file "0" of 4096 bytes
        + ("0a4e" + "0a053136333834" + "1245" + last_digest + "10a01c")  # file "16384" of 3616 bytes
        + ("2a23" + "0a12" + "0a0a6368756e6b5f73697a65" + "120434303936")  # chunk_size=4096
        + ("0a0d" + "0a0473697a65" + "12053230303030")  # size=20000
    )


def test_a_file_of_nothing_but_zeros_has_a_tree() -> None:
    table = ChunkTable.empty(1 << 40, 1 << 20, SHA256)
    assert len(encode_tree(table)) < 64
    assert decode_tree(encode_tree(table), SHA256) == table


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: Callable[[bytes], bytes]) -> None:
    table = random_table(1, 10 * CHUNK, CHUNK, 5)
    assert decode_tree(kind(encode_tree(table)), SHA256) == table


def reordered(message: reapi.Tree) -> bytes:
    """The same message with its properties first, in two parts, and each digest with its size first."""
    parts = [message.root.node_properties.SerializeToString()]
    data = bytes([5 << 3 | 2, len(parts[0])]) + parts[0]
    first = b"\x0a" + bytes([len(data)]) + data
    return first + reapi.Tree(root=reapi.Directory(files=message.root.files)).SerializeToString()


def test_other_encodings_of_the_same_message_are_read() -> None:
    table = random_table(2, 10 * CHUNK - 7, CHUNK, 6)
    message = message_of(table)
    assert decode_tree(reordered(message), SHA256) == table
    message.root.files[0].is_executable = True
    message.root.files[1].node_properties.unix_mode.value = 0o644
    message.root.node_properties.properties.add(name="other", value="x")
    message.root.node_properties.mtime.seconds = 1
    assert decode_tree(message.SerializeToString(), SHA256) == table


def test_a_mode_stands_beside_the_sizes_and_the_default_is_not_written() -> None:
    table = random_table(2, 10 * CHUNK - 7, CHUNK, 6)
    message = message_of(table)
    assert encode_tree(table, 0o600) == message.SerializeToString(deterministic=True)
    assert decode_chunked_file(encode_tree(table), SHA256) == (table, 0o600)
    message.root.node_properties.unix_mode.value = 0o640
    assert encode_tree(table, 0o640) == message.SerializeToString(deterministic=True)
    assert decode_chunked_file(reordered(message), SHA256) == (table, 0o640)


@pytest.mark.parametrize("mode", [0, 0o777])
def test_every_mode_is_read_as_it_was_written(mode: int) -> None:
    table = ChunkTable.empty(0, CHUNK, SHA256)
    assert decode_chunked_file(encode_tree(table, mode), SHA256) == (table, mode)


def test_bits_of_a_mode_that_lend_rights_are_dropped() -> None:
    table = random_table(2, 10 * CHUNK, CHUNK, 6)
    assert decode_chunked_file(encode_tree(table, 0o104755), SHA256) == (table, 0o755)


def test_unknown_fields_are_passed_over() -> None:
    table = random_table(3, 10 * CHUNK, CHUNK, 6)
    unknown = bytes([15 << 3 | 2, 3, 1, 2, 3, 14 << 3, 5])
    root = reapi.Tree.FromString(encode_tree(table)).root.SerializeToString() + unknown
    data = reapi.Tree(root=reapi.Directory.FromString(root)).SerializeToString() + unknown
    assert decode_tree(data, SHA256) == table


def drop_properties(message: reapi.Tree) -> None:
    message.root.ClearField("node_properties")


def set_property(place: int, value: str) -> Callable[[reapi.Tree], None]:
    def change(message: reapi.Tree) -> None:
        message.root.node_properties.properties[place].value = value

    return change


def set_name(place: int, name: str) -> Callable[[reapi.Tree], None]:
    def change(message: reapi.Tree) -> None:
        message.root.files[place].name = name

    return change


def set_hash(hash_: str) -> Callable[[reapi.Tree], None]:
    def change(message: reapi.Tree) -> None:
        message.root.files[2].digest.hash = hash_

    return change


def set_size(place: int, size: int) -> Callable[[reapi.Tree], None]:
    def change(message: reapi.Tree) -> None:
        message.root.files[place].digest.size_bytes = size

    return change


def repeat_property(message: reapi.Tree) -> None:
    message.root.node_properties.properties.add(name="size", value="0")


def many_properties(message: reapi.Tree) -> None:
    for _ in range(2000):
        message.root.node_properties.properties.add()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop_properties, "lacks its properties"),
        (set_property(0, ""), "decimal"),
        (set_property(0, "04096"), "decimal"),
        (set_property(0, "8192"), "multiple"),
        (set_property(0, "5000"), "power of two"),
        (set_property(0, "2048"), "power of two"),
        (set_property(0, "0"), "power of two"),
        (set_property(1, "-1"), "decimal"),
        (set_property(1, "1e9"), "decimal"),
        (set_property(1, "٣"), "decimal"),
        (set_property(1, str(1 << 51)), "out of range"),
        (set_property(1, "9" * 17), "decimal"),
        (set_property(1, str(1 << 50)), "larger chunks"),
        (set_property(1, "4096"), "past the end"),
        (set_property(1, "0"), "past the end"),
        (set_property(1, str(19 * CHUNK)), "size 9"),
        (repeat_property, "one decimal number"),
        (many_properties, "properties"),
        (set_name(0, ""), "offset"),
        (set_name(0, "-4096"), "offset"),
        (set_name(0, "00"), "offset"),
        (set_name(0, "+0"), "offset"),
        (set_name(0, "0x0"), "offset"),
        (set_name(0, "0\n"), "offset"),
        (set_name(0, "../etc/passwd"), "offset"),
        (set_name(2, "٤٠٩٦"), "offset"),
        (set_name(2, "9" * 17), "offset"),
        (set_name(2, "9" * 16), "multiple"),
        (set_name(2, str(1 << 49)), "past the end"),
        (set_name(2, "8193"), "multiple"),
        (set_name(2, "4096"), "repeated or out of order"),
        (set_name(2, "0"), "repeated or out of order"),
        (set_hash(""), "hexadecimal"),
        (set_hash("ab" * 31), "hexadecimal"),
        (set_hash("AB" * 32), "hexadecimal"),
        (set_hash("  " + "ab" * 31), "hexadecimal"),
        (set_hash("zz" * 32), "hexadecimal"),
        (set_hash("ab" * 33), "hexadecimal"),
        (set_size(2, CHUNK + 1), "size 4097"),
        (set_size(2, 0), "size 0"),
        (set_size(2, -1), "out of range"),
        (set_size(2, 1 << 60), "out of range"),
        (set_size(-1, CHUNK), "size 4096"),
        (lambda message: message.root.files[1].ClearField("digest"), "hexadecimal"),
        (lambda message: message.root.directories.add(name="sub"), "nothing but files"),
        (lambda message: message.root.symlinks.add(name="a", target="/etc"), "nothing but files"),
        (lambda message: message.children.add(), "child directories"),
        (set_name(1, "1" * (70 << 10)), "are allowed"),
    ],
)
def test_trees_that_break_a_rule_are_refused(change: Callable[[reapi.Tree], None], complaint: str) -> None:
    hashes = np.random.default_rng(1).integers(0, 256, (4, 32), dtype=np.uint8)
    message = message_of(ChunkTable(17 * CHUNK + 9, CHUNK, SHA256, np.array([0, 1, 2, 17]), hashes))
    change(message)
    with pytest.raises(InvalidArgument, match=complaint):
        decode_tree(message.SerializeToString(deterministic=True), SHA256)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "lacks its properties"),
        (b"\x0a\x00", "lacks its properties"),
        (b"\x08\x01", "wire type 0"),
        (b"\x0a\x02\x08\x01", "wire type 0"),
        (b"\x0a\x03\x0a\x01\xff", "FileNode"),
        (b"\x0a\x04\x0a\x02\x08\x01", "offset"),
        (b"\x0a\xff\xff\xff\x7f", "cut short"),
        (b"\x0a\x00" * 2000, "parts"),
        (b"\x78\x00" * 2000, "parts"),
        (b"not a tree at all", "not a protobuf message"),
    ],
)
def test_bytes_that_are_no_tree_are_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        decode_tree(data, SHA256)


def test_a_tree_beyond_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunktable, "MAX_TREE_BYTES", 100)
    with pytest.raises(InvalidArgument, match="100 are allowed"):
        decode_tree(bytes(101), SHA256)


def test_a_tree_of_too_many_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_tree(random_table(1, 20 * CHUNK, CHUNK, 11))
    monkeypatch.setattr(chunktable, "MAX_STORED_CHUNKS", 10)
    with pytest.raises(InvalidArgument, match="more than 10 chunks"):
        decode_tree(data, SHA256)


SAMPLE = encode_tree(random_table(4, 40 * CHUNK + 3, CHUNK, 20))


@given(st.data())
def test_damaged_trees_are_read_as_protobuf_reads_them_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = decode_tree(damaged, SHA256)
    except InvalidArgument:
        return
    message = reapi.Tree.FromString(bytes(damaged))
    files = [(file.name, file.digest.hash, file.digest.size_bytes) for file in message.root.files]
    assert files == [
        (file.name, file.digest.hash, file.digest.size_bytes) for file in message_of(table).root.files
    ]


@given(st.integers(0, len(SAMPLE) - 1))
def test_a_tree_that_was_cut_is_refused(length: int) -> None:
    with pytest.raises(InvalidArgument):
        decode_tree(SAMPLE[:length], SHA256)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_tree_or_an_error(data: bytes) -> None:
    for prefix in (b"", b"\x0a", SAMPLE[:100]):
        try:
            decode_tree(prefix + data, SHA256)
        except InvalidArgument:
            pass


@pytest.mark.slow
def test_200_000_chunks_take_little_memory_and_time() -> None:
    table = random_table(5, 220_000 * (512 << 10) - 100, 512 << 10, 200_000)
    start = time.process_time()
    data = encode_tree(table)
    decoded = decode_tree(data, SHA256)
    assert time.process_time() - start < 1.0  # about 0.1
    assert decoded == table
    del decoded
    gc.collect()
    tracemalloc.start()
    try:
        decode_tree(data, SHA256)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
