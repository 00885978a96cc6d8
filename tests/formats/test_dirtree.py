"""Directory trees and their bytes."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument, NotFound
from snaploader.formats import dirtree
from snaploader.formats.chunktable import ChunkTable, encode_tree
from snaploader.formats.dirtree import (
    MAX_DEPTH,
    MAX_PATH_BYTES,
    MAX_TARGET_BYTES,
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    Entry,
    FileEntry,
    SymlinkEntry,
    decode_directory_tree,
    encode_directory_tree,
)

SHA256 = DigestFunction.SHA256
HELLO = Digest.of(b"hello\n", SHA256)
TABLE = ChunkTable(
    20_000,
    4096,
    SHA256,
    np.array([0, 4]),
    np.frombuffer(bytes.fromhex("ab" * 32 + "01" * 32), np.uint8).reshape(2, 32),
)
T = 1_700_000_000 * 10**9


def tree_of(entries: dict[str, Entry], root: DirectoryEntry | None = None) -> DirectoryTree:
    return DirectoryTree({"": root or DirectoryEntry(), **entries}, SHA256)


def parsed(tree: DirectoryTree) -> reapi.Tree:
    return reapi.Tree.FromString(encode_directory_tree(tree))


def decoded(message: reapi.Tree) -> DirectoryTree:
    return decode_directory_tree(message.SerializeToString(), SHA256)


def add_child(message: reapi.Tree, parent: reapi.Directory, name: str, child: reapi.Directory) -> None:
    """Put a directory into another, which must not be in a tree yet."""
    data = child.SerializeToString(deterministic=True)
    node = parent.directories.add(name=name)
    node.digest.hash, node.digest.size_bytes = SHA256.hash(data), len(data)
    message.children.append(child)


# Bytes that are not UTF-8 are among them.
NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6),
    st.binary(min_size=1, max_size=6).map(os.fsdecode).filter(lambda name: not {"/", "\0"} & {*name}),
)
MTIMES = st.integers(-62_135_596_800 * 10**9, 253_402_300_800 * 10**9 - 1)
MODES = st.integers(0, 0o1777)


@st.composite
def entry_of(draw: st.DrawFn, function: DigestFunction) -> Entry:
    kind = draw(st.sampled_from(["file", "chunked", "symlink", "directory"]))
    mtime = draw(MTIMES)
    if kind == "symlink":
        targets = st.one_of(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
            st.binary(min_size=1).map(os.fsdecode).filter(lambda target: "\0" not in target),
        )
        return SymlinkEntry(draw(targets.filter(lambda text: len(os.fsencode(text)) < 4096)), mtime)
    mode = draw(MODES)
    if kind == "directory":
        return DirectoryEntry(mode, mtime)
    if kind == "file":
        hash_ = draw(st.binary(min_size=32, max_size=32)).hex()
        return FileEntry(Digest(hash_, draw(st.integers(0, 1 << 40)), function), mode, mtime)
    size = draw(st.integers(0, 5 * 4096))
    indices = draw(st.sets(st.integers(0, max(0, -(-size // 4096) - 1)))) if size else set()
    hashes = draw(st.binary(min_size=32 * len(indices), max_size=32 * len(indices)))
    rows = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    table = ChunkTable(size, 4096, function, np.array(sorted(indices), np.int64), rows)
    return ChunkedEntry(table, mode, mtime)


@st.composite
def trees(draw: st.DrawFn) -> DirectoryTree:
    function = draw(st.sampled_from(DigestFunction))
    entries: dict[str, Entry] = {"": DirectoryEntry(draw(MODES), draw(MTIMES))}
    for _ in range(draw(st.integers(0, 12))):
        folders = sorted(path for path, entry in entries.items() if isinstance(entry, DirectoryEntry))
        parent = draw(st.sampled_from(folders))
        name = draw(NAMES.filter(lambda name: name not in {".", ".."}))
        entries.setdefault(f"{parent}/{name}" if parent else name, draw(entry_of(function)))
    return DirectoryTree(entries, function)


@given(trees())
def test_trees_survive_the_wire(tree: DirectoryTree) -> None:
    data = encode_directory_tree(tree)
    again = decode_directory_tree(data, tree.function)
    assert again == tree
    assert list(again) == list(tree)
    assert encode_directory_tree(again) == data


@given(trees())
def test_bytes_are_canonical(tree: DirectoryTree) -> None:
    data = encode_directory_tree(tree)
    message = reapi.Tree.FromString(data)
    assert message.SerializeToString(deterministic=True) == data
    hashes = [tree.function.hash(child.SerializeToString(deterministic=True)) for child in message.children]
    assert len(set(hashes)) == len(hashes), "each distinct child once"
    for place, directory in enumerate([message.root, *message.children]):
        chunked = any(item.name == "chunk_size" for item in directory.node_properties.properties)
        for nodes in (directory.directories, directory.symlinks, *([] if chunked else [directory.files])):
            names = [node.name for node in nodes]
            assert names == sorted(names)
        for node in directory.directories:
            assert hashes.index(node.digest.hash) >= place, "parents before children"
    referred = {node.digest.hash for d in (message.root, *message.children) for node in d.directories}
    assert referred == set(hashes)


def test_order_of_entries_does_not_matter() -> None:
    entries: dict[str, Entry] = {"a": DirectoryEntry(), "a/x": FileEntry(HELLO), "a-b": FileEntry(HELLO)}
    tree = tree_of(entries)
    assert list(tree) == ["", "a", "a/x", "a-b"]
    assert encode_directory_tree(tree) == encode_directory_tree(tree_of(dict(reversed(entries.items()))))


def test_equal_directories_stand_once_after_all_their_parents() -> None:
    twin: dict[str, Entry] = {"": DirectoryEntry(), "f": FileEntry(HELLO)}
    entries: dict[str, Entry] = {"deep": DirectoryEntry(0o700), "deep/in": DirectoryEntry(0o711)}
    for place in ("a", "deep/in/twin", "z"):
        entries[place] = twin[""]
        entries[f"{place}/f"] = twin["f"]
    message = parsed(tree_of(entries))
    assert [child.node_properties.unix_mode.value for child in message.children] == [0o700, 0o711, 0o755]
    assert decoded(message) == tree_of(entries)


def test_equal_chunked_files_stand_once_and_share_their_table() -> None:
    tree = tree_of({"a": ChunkedEntry(TABLE), "b": ChunkedEntry(TABLE), "c": ChunkedEntry(TABLE, 0o600)})
    message = parsed(tree)
    assert len(message.children) == 2
    again = decoded(message)
    assert again == tree
    assert len(list(again.tables())) == 2
    assert len(list(again.digests())) == 4


def test_a_chunked_file_has_the_chunks_of_its_own_tree() -> None:
    message = parsed(tree_of({"disk": ChunkedEntry(TABLE, 0o640, T)}))
    (child,) = message.children
    own = reapi.Tree.FromString(encode_tree(TABLE)).root
    assert child.files == own.files
    assert child.node_properties.properties == own.node_properties.properties
    assert child.node_properties.unix_mode.value == 0o640
    assert child.node_properties.mtime.seconds == T // 10**9


def test_golden_bytes() -> None:
    tree = tree_of(
        {
            "bin": DirectoryEntry(0o1777, T + 5),
            "bin/sh": FileEntry(HELLO, 0o755, T),
            "disk": ChunkedEntry(TABLE, 0o600, T),
            "empty": DirectoryEntry(0, 0),
            "link": SymlinkEntry("../x", -1),
        },
        DirectoryEntry(0o700, T),
    )
    data = encode_directory_tree(tree)
    assert SHA256.hash(data) == "b863d0c2c97e9aae2d149604b31c289cb0c255609dec74d7e4d8f90248ebd74e"
    assert len(data) == 617
    assert decode_directory_tree(data, SHA256) == tree


def test_many_chunks_and_files_are_cheap_to_read() -> None:
    hashes = np.random.default_rng(1).integers(0, 256, (20_000, 32), np.uint8)
    table = ChunkTable(20_000 << 19, 1 << 19, SHA256, np.arange(20_000), hashes)
    tree = tree_of({"disk": ChunkedEntry(table, 0o600, T)})
    data = encode_directory_tree(tree)
    assert decode_directory_tree(data, SHA256) == tree


# What others may write, and what is refused


def test_modes_and_times_that_are_missing_have_defaults() -> None:
    message = reapi.Tree()
    file = message.root.files.add(name="f")
    file.digest.hash, file.digest.size_bytes = HELLO.hash, HELLO.size_bytes
    program = message.root.files.add(name="p", is_executable=True)
    program.digest.CopyFrom(file.digest)
    message.root.symlinks.add(name="l", target="f")
    assert decoded(message) == tree_of(
        {"f": FileEntry(HELLO), "p": FileEntry(HELLO, 0o755), "l": SymlinkEntry("f")}
    )


def test_set_id_bits_are_dropped() -> None:
    message = reapi.Tree()
    message.root.node_properties.unix_mode.value = 0o107755
    file = message.root.files.add(name="f")
    file.digest.hash, file.digest.size_bytes = HELLO.hash, HELLO.size_bytes
    file.node_properties.unix_mode.value = 0o104711
    tree = decoded(message)
    assert tree[""] == DirectoryEntry(0o1755)
    assert tree["f"] == FileEntry(HELLO, 0o711)


def test_children_that_nothing_refers_to_are_passed_over() -> None:
    message = parsed(tree_of({"a": DirectoryEntry()}))
    message.children.add().node_properties.unix_mode.value = 0o700
    assert decoded(message) == tree_of({"a": DirectoryEntry()})


def test_other_encodings_and_unknown_fields_are_read() -> None:
    tree = tree_of({"a": FileEntry(HELLO), "b": DirectoryEntry(), "c": SymlinkEntry("a")})
    message = parsed(tree)
    first, second = reapi.Tree(), reapi.Tree()
    second.CopyFrom(message)
    first.root.files.extend(message.root.files)
    del second.root.files[:]
    unknown = bytes([15 << 3 | 2, 3, 1, 2, 3])
    data = second.SerializeToString() + unknown + first.SerializeToString()
    assert decode_directory_tree(data, SHA256) == tree


def test_a_chunked_file_in_another_encoding_is_read() -> None:
    tree = tree_of({"disk": ChunkedEntry(TABLE, 0o600, T)})
    child = parsed(tree).children[0]
    properties = list(child.node_properties.properties)
    del child.node_properties.properties[:]
    child.node_properties.properties.extend(reversed(properties))
    child.node_properties.properties.add(name="other", value="x")
    message = reapi.Tree()
    add_child(message, message.root, "disk", child)
    message.root.node_properties.unix_mode.value = 0o755
    assert decoded(message) == tree


def hostile(change: Callable[[reapi.Tree], object]) -> reapi.Tree:
    message = parsed(tree_of({"d": DirectoryEntry(), "d/f": FileEntry(HELLO), "l": SymlinkEntry("x")}))
    change(message)
    return message


def file_named(name: str) -> Callable[[reapi.Tree], object]:
    def change(message: reapi.Tree) -> None:
        node = message.root.files.add(name=name)
        node.digest.hash, node.digest.size_bytes = HELLO.hash, HELLO.size_bytes

    return change


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "../up", "nul\0", "a/"])
@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
def test_unsafe_names_are_refused(name: str, kind: str) -> None:
    message = reapi.Tree()
    if kind == "files":
        file_named(name)(message)
    elif kind == "directories":
        add_child(message, message.root, name, reapi.Directory())
    else:
        message.root.symlinks.add(name=name, target="x")
    with pytest.raises(InvalidArgument, match="cannot name an entry"):
        decoded(message)


def named_on_disk(kind: str, *names: str) -> reapi.Tree:
    """A tree with one entry, called "stand-in", that has properties with names of its own."""
    message = reapi.Tree()
    properties = reapi.NodeProperties()
    for name in names:
        properties.properties.add(name="unix_name", value=name)
    if kind == "files":
        file_named("stand-in")(message)
        message.root.files[0].node_properties.CopyFrom(properties)
    elif kind == "directories":
        add_child(message, message.root, "stand-in", reapi.Directory(node_properties=properties))
    else:
        message.root.symlinks.add(name="stand-in", target="x", node_properties=properties)
    return message


@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
def test_a_name_that_is_not_utf8_stands_in_a_property(kind: str) -> None:
    assert list(decoded(named_on_disk(kind, "ff61"))) == ["", "\udcffa"]


@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
@pytest.mark.parametrize(
    "names",
    [
        [""],
        ["f"],
        ["FF"],
        ["ff ff"],
        ["\u0661\u0661"],
        ["61"],  # UTF-8
        ["2e2e"],
        ["ff2f61"],  # with a slash
        ["ff00"],
        ["ff" * 256],
        ["ff" * 5000],
        ["ff", "fe"],
    ],
)
def test_hostile_names_in_properties_are_refused(kind: str, names: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        decoded(named_on_disk(kind, *names))


def test_two_files_of_one_name_on_disk_are_refused() -> None:
    message = named_on_disk("files", "ff")
    child = reapi.Directory()
    child.node_properties.properties.add(name="unix_name", value="ff")
    add_child(message, message.root, "other", child)
    with pytest.raises(InvalidArgument, match="twice"):
        decoded(message)


def test_readers_that_know_no_properties_find_names_they_can_write() -> None:
    tree = tree_of({"\udcff" * 255: FileEntry(HELLO), "a\udcff": SymlinkEntry("\udcff" * 4095)})
    message = parsed(tree)
    names = [message.root.files[0].name, message.root.symlinks[0].name]
    assert names[1].startswith("a\\xff~")
    assert all(len(name.encode()) <= 255 for name in names)
    assert len(message.root.symlinks[0].target.encode()) <= 4095


def test_a_stand_in_that_is_taken_is_told() -> None:
    name = parsed(tree_of({"a\udcff": FileEntry(HELLO)})).root.files[0].name
    with pytest.raises(InvalidArgument, match="rename one of them"):
        encode_directory_tree(tree_of({"a\udcff": FileEntry(HELLO), name: FileEntry(HELLO)}))


@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
def test_names_longer_than_a_file_system_takes_are_refused(kind: str) -> None:
    message = reapi.Tree()
    name = "\u00e9" * 128
    if kind == "files":
        file_named(name)(message)
    elif kind == "directories":
        add_child(message, message.root, name, reapi.Directory())
    else:
        message.root.symlinks.add(name=name, target="x")
    with pytest.raises(InvalidArgument, match="256 bytes, 255 are allowed"):
        decoded(message)


@pytest.mark.parametrize("name", ["d", "l"])
def test_a_name_may_stand_once_among_files_directories_and_symbolic_links(name: str) -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        decoded(hostile(file_named(name)))


def test_missing_and_changed_children_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'d'.*is missing"):
        decoded(hostile(lambda message: message.ClearField("children")))

    def change(message: reapi.Tree) -> None:
        message.children[0].files[0].name = "other"

    with pytest.raises(InvalidArgument, match=r"'d'.*is missing"):
        decoded(hostile(change))

    def resize(message: reapi.Tree) -> None:
        message.root.directories[0].digest.size_bytes += 1

    with pytest.raises(InvalidArgument, match="is missing"):
        decoded(hostile(resize))


def test_a_tree_of_another_function_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="missing"):
        decode_directory_tree(encode_directory_tree(tree_of({"d": DirectoryEntry()})), DigestFunction.BLAKE3)


def test_malformed_digests_times_and_targets_are_refused() -> None:
    def bad_digest(message: reapi.Tree) -> None:
        message.root.files.add(name="f").digest.hash = "XY"

    def bad_time(message: reapi.Tree) -> None:
        message.root.node_properties.mtime.nanos = -1

    def bad_year(message: reapi.Tree) -> None:
        message.root.node_properties.mtime.seconds = 1 << 60

    def bad_target(target: str) -> Callable[[reapi.Tree], None]:
        return lambda message: setattr(message.root.symlinks[0], "target", target)

    changes = [bad_digest, bad_time, bad_year, *map(bad_target, ["", "a\0b", "x" * (MAX_TARGET_BYTES + 1)])]
    for change in changes:
        with pytest.raises(InvalidArgument):
            decoded(hostile(change))


def test_a_tree_whose_root_is_a_chunked_file_is_no_directory() -> None:
    with pytest.raises(InvalidArgument, match="chunked file"):
        decode_directory_tree(encode_tree(TABLE), SHA256)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x12\x00", b"\x0a\x05abc"])
def test_bytes_that_are_no_tree_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_directory_tree(data, SHA256)


def test_a_small_tree_of_very_many_paths_is_refused() -> None:
    """Each directory holds the one below twice, so that the number of paths doubles with every level."""
    message = reapi.Tree()
    inner = reapi.Directory()
    for level in range(60):
        outer = reapi.Directory()
        data = inner.SerializeToString(deterministic=True)
        for name in ("a", "b"):
            node = outer.directories.add(name=name)
            node.digest.hash, node.digest.size_bytes = SHA256.hash(data), len(data)
        message.children.append(inner)
        inner = outer
        del level
    message.root.CopyFrom(inner)
    with pytest.raises(InvalidArgument, match="1000 entries"):
        decode_directory_tree(message.SerializeToString(), SHA256, max_entries=1000)


def test_long_and_deep_paths_are_refused() -> None:
    def nested(name: str, levels: int) -> reapi.Tree:
        message = reapi.Tree()
        inner = reapi.Directory()
        for _ in range(levels):
            outer = reapi.Directory()
            add_child(message, outer, name, inner)
            inner = outer
        message.root.CopyFrom(inner)
        return message

    assert len(decoded(nested("d", MAX_DEPTH))) == MAX_DEPTH + 1
    with pytest.raises(InvalidArgument, match="deeper"):
        decoded(nested("d", MAX_DEPTH + 1))
    with pytest.raises(InvalidArgument, match=f"{MAX_PATH_BYTES} are allowed"):
        decoded(nested("d" * 255, 17))


@pytest.mark.parametrize(
    ("limit", "value", "what"),
    [("MAX_DECODED_BYTES", 3, "memory"), ("MAX_BLOB_BYTES", 5, "content"), ("MAX_ROWS", 1, "chunks")],
)
def test_bounds_hold_for_the_whole_tree(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, what: str
) -> None:
    monkeypatch.setattr(dirtree, limit, value)
    with pytest.raises(InvalidArgument, match=what):
        tree_of({"file": FileEntry(HELLO), "disk": ChunkedEntry(TABLE)})


@pytest.mark.parametrize(
    "entries",
    [
        {"a/b": FileEntry(HELLO)},
        {"a": FileEntry(HELLO), "a/b": FileEntry(HELLO)},
        {"a": SymlinkEntry("/etc"), "a/passwd": FileEntry(HELLO)},
        {"..": DirectoryEntry(), "../x": FileEntry(HELLO)},
        {"": FileEntry(HELLO)},
        {"a": FileEntry(HELLO, 0o4755)},
        {"a": DirectoryEntry(-1)},
        {"a": FileEntry(Digest.of(b"x", DigestFunction.BLAKE3))},
        {"\ud800": FileEntry(HELLO)},
        {"\udcc3\udca9": FileEntry(HELLO)},  # UTF-8, in disguise
        {"a" * 256: FileEntry(HELLO)},
        {"\udcff" * 256: FileEntry(HELLO)},
        {"a": SymlinkEntry("\ud800")},
    ],
)
def test_entries_that_fit_no_tree_are_refused(entries: dict[str, Entry]) -> None:
    with pytest.raises(InvalidArgument):
        DirectoryTree({"": DirectoryEntry(), **entries}, SHA256)


def test_a_tree_needs_its_root() -> None:
    with pytest.raises(InvalidArgument, match="root"):
        DirectoryTree({}, SHA256)


def test_sums() -> None:
    tree = tree_of({"f": FileEntry(HELLO), "g": FileEntry(HELLO), "d": ChunkedEntry(TABLE)})
    assert tree.size_bytes == 20_012
    assert tree.hole_bytes == TABLE.hole_bytes
    assert list(tree.blobs()) == [HELLO]
    assert repr(tree) == "DirectoryTree(4 entries, SHA256)"


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_or_another_tree(seed: int) -> None:
    """Whatever comes, nothing but InvalidArgument is raised."""
    chance = random.Random(seed)
    tree = tree_of(
        {
            "d": DirectoryEntry(),
            "d/disk": ChunkedEntry(TABLE),
            "d/f": FileEntry(HELLO, 0o600, T),
            "l": SymlinkEntry("d"),
        }
    )
    original = encode_directory_tree(tree)
    for _ in range(50):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            data[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        try:
            found = decode_directory_tree(data, SHA256)
        except InvalidArgument:
            continue
        assert encode_directory_tree(found)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_tree(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        assert isinstance(decode_directory_tree(data, SHA256), DirectoryTree)


def test_a_part_of_a_tree_has_the_directories_on_the_way() -> None:
    folder, file = DirectoryEntry(), FileEntry(HELLO)
    paths = ["", "a", "a/b", "a/b/c", "a/b/d", "a-b", "e", "e/f"]
    tree = DirectoryTree({path: folder if path in {"", "a", "a/b", "e"} else file for path in paths}, SHA256)
    assert list(tree.only(["a/b/c"])) == ["", "a", "a/b", "a/b/c"]
    assert list(tree.only(["a/b", "e/f"])) == ["", "a", "a/b", "a/b/c", "a/b/d", "e", "e/f"]
    assert list(tree.only(["a"])) == ["", "a", "a/b", "a/b/c", "a/b/d"]
    assert tree.only([""]) == tree
    assert list(tree.only([])) == [""]
    for path in ("x", "a/x", "a/b/c/", "../a"):
        with pytest.raises(NotFound):
            tree.only(["a", path])
