"""Directory trees as Remote Execution API Trees, and back.

    decode_directory_tree(encode_directory_tree(tree), tree.function) == tree

docs/formats/directories.md describes the format. A Tree comes from outside, and is small beside what it
may claim: equal directories stand in it once, so a few kilobytes can name more paths than there is memory
for. All bounds are checked as paths are made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from snaploader._proto import remote_execution_pb2
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats import wire
from snaploader.formats.chunktree import (
    MAX_TREE_BYTES,
    bytes_of,
    decode_chunk_directory,
    encode_chunk_directory,
    merge_properties,
    parse_field,
)
from snaploader.formats.dirtree import (
    CHILD_BYTES,
    MAX_DECODED_BYTES,
    MAX_ENTRIES,
    MAX_NAME_BYTES,
    MAX_TARGET_BYTES,
    MODE_BITS,
    UNIX_NAME_PROPERTY,
    UNIX_TARGET_PROPERTY,
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    Entry,
    FileEntry,
    SymlinkEntry,
    bytes_on_disk,
    check_name,
    check_path,
    decoded_bytes,
)

_TREE_ROOT, _TREE_CHILDREN = 1, 2
_FILES, _DIRECTORIES, _SYMLINKS, _PROPERTIES = 1, 2, 3, 5
_ROOT = bytes((wire.tag(_TREE_ROOT, wire.BYTES),))
_CHILD = bytes((wire.tag(_TREE_CHILDREN, wire.BYTES),))
_MAX_ROOT_PARTS = 1000
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2}){1,4096}")


def encode_directory_tree(tree: DirectoryTree) -> bytes:
    """The serialised Tree: equal directory trees give equal bytes.

    Children stand in the order of paths, equal ones once, where the last of them is: so every parent
    is before its children.

    Raises:
        InvalidArgument: It is larger than `MAX_TREE_BYTES`.
    """
    root, children = _encoded(tree)
    parts = [_ROOT, wire.varint(len(root)), root]
    for child in children.values():
        parts += [_CHILD, wire.varint(len(child)), child]
    encoded = b"".join(parts)
    if len(encoded) > MAX_TREE_BYTES:
        raise InvalidArgument(
            f"the tree of a directory of {len(tree)} entries has {len(encoded)} bytes, {MAX_TREE_BYTES} are "
            "allowed: save its subdirectories one by one"
        )
    return encoded


def child_directories(tree: DirectoryTree) -> dict[Digest, bytes]:
    """Every Directory below the root, serialised: the children in the Tree, as blobs of their own."""
    return _encoded(tree)[1]


def _encoded(tree: DirectoryTree) -> tuple[bytes, dict[Digest, bytes]]:
    """The root, and the children in their order."""
    children: dict[Digest, bytes] = {}
    unfinished: dict[str, remote_execution_pb2.Directory] = {}
    # From the last path to the first: a directory is finished when everything in it was added.
    for path in reversed(list(tree)[1:]):
        parent, _, name = path.rpartition("/")
        directory = unfinished.setdefault(parent, remote_execution_pb2.Directory())
        entry = tree[path]
        properties = _properties(entry)
        if not _is_utf8(name):
            name = _stand_in(name, properties)
            if (f"{parent}/{name}" if parent else name) in tree:
                raise InvalidArgument(
                    f"{path[:200]!r} is not UTF-8, and beside it stands {name!r}, which it would be called "
                    "for others: rename one of them"
                )
        if isinstance(entry, FileEntry):
            _add_file(directory, name, entry, properties)
        elif isinstance(entry, SymlinkEntry):
            _add_symlink(directory, name, entry, properties)
        else:
            # A DirectoryNode has no properties: those of a directory stand in itself.
            if isinstance(entry, ChunkedEntry):
                child = encode_chunk_directory(entry.table, properties)
            else:
                child = _finished(unfinished.pop(path, None), properties)
            digest = Digest.of(child, tree.function)
            _add_directory(directory, name, digest)
            children.setdefault(digest, child)
    root = tree[""]
    assert isinstance(root, DirectoryEntry)
    return _finished(unfinished.pop("", None), _properties(root)), dict(reversed(children.items()))


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _stand_in(name: str, properties: remote_execution_pb2.NodeProperties) -> str:
    """What a file whose name is not UTF-8 is called for others; its own name is added to the properties."""
    data = bytes_on_disk(name, name)
    properties.properties.add(name=UNIX_NAME_PROPERTY, value=data.hex())
    # The hash keeps apart what is escaped alike.
    suffix = "~" + hashlib.sha256(data).hexdigest()[:32]
    return _escaped(data, MAX_NAME_BYTES - len(suffix)) + suffix


def _escaped(data: bytes, limit: int) -> str:
    """Bytes that are not UTF-8 as text of at most `limit` bytes, with a backslash before what is not."""
    return data.decode("utf-8", "backslashreplace").encode()[:limit].decode("utf-8", "ignore")


def _finished(
    directory: remote_execution_pb2.Directory | None, properties: remote_execution_pb2.NodeProperties
) -> bytes:
    """The bytes of a directory to which everything was added, from the last name to the first."""
    directory = directory or remote_execution_pb2.Directory()
    for nodes in (directory.files, directory.directories, directory.symlinks):
        nodes.sort(key=attrgetter("name"))
    directory.node_properties.CopyFrom(properties)
    return directory.SerializeToString(deterministic=True)


def _add_file(
    directory: remote_execution_pb2.Directory,
    name: str,
    entry: FileEntry,
    properties: remote_execution_pb2.NodeProperties,
) -> None:
    node = directory.files.add(name=name, is_executable=bool(entry.mode & 0o100))
    node.digest.hash, node.digest.size_bytes = entry.digest.hash, entry.digest.size_bytes
    node.node_properties.CopyFrom(properties)


def _add_symlink(
    directory: remote_execution_pb2.Directory,
    name: str,
    entry: SymlinkEntry,
    properties: remote_execution_pb2.NodeProperties,
) -> None:
    target = entry.target
    if not _is_utf8(target):
        data = bytes_on_disk(target, name)
        properties.properties.add(name=UNIX_TARGET_PROPERTY, value=data.hex())
        target = _escaped(data, MAX_TARGET_BYTES)
    node = directory.symlinks.add(name=name, target=target)
    node.node_properties.CopyFrom(properties)


def _add_directory(directory: remote_execution_pb2.Directory, name: str, digest: Digest) -> None:
    node = directory.directories.add(name=name)
    node.digest.hash, node.digest.size_bytes = digest.hash, digest.size_bytes


def _properties(entry: Entry) -> remote_execution_pb2.NodeProperties:
    properties = remote_execution_pb2.NodeProperties()
    seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
    properties.mtime.seconds, properties.mtime.nanos = seconds, nanoseconds
    # Zero is a time and a mode, so both must be there even when their values are the default.
    properties.mtime.SetInParent()
    if not isinstance(entry, SymlinkEntry):
        properties.unix_mode.SetInParent()
        properties.unix_mode.value = entry.mode
    return properties


@dataclass(slots=True)
class _Listing:
    """One Directory, read: its own entry, and those in it; of directories there only the digests."""

    entry: DirectoryEntry | ChunkedEntry
    unix_name: str | None
    """What it is called, whatever its parent says; None when that says it."""
    entries: dict[str, Entry] = field(default_factory=dict)
    directories: dict[str, Digest] = field(default_factory=dict)


def decode_directory_tree(
    data: Buffer,
    function: DigestFunction,
    *,
    max_entries: int | None = None,
    max_decoded_bytes: int | None = None,
) -> DirectoryTree:
    """The directory tree in a serialised Tree, all of it checked.

    Children that nothing refers to are passed over, as are fields and properties that mean nothing here.
    Without a mode, files have 0644 or 0755 and directories 0755; without a time, the epoch.

    Args:
        data: The whole blob.
        function: Behind the digests in it, which do not say so themselves.
        max_entries: What is left of `MAX_ENTRIES` in a snapshot of several directories. Default: all.
        max_decoded_bytes: The same of `MAX_DECODED_BYTES`.

    Raises:
        InvalidArgument: It is no Tree of a directory; a name is unsafe or there twice; a child directory
            is missing; a digest is malformed; or a limit (`MAX_ENTRIES`, …) is exceeded.
    """
    view = memoryview(data).cast("B")
    if len(view) > MAX_TREE_BYTES:
        raise InvalidArgument(f"a tree of {len(view)} bytes is refused: {MAX_TREE_BYTES} are allowed")
    entries = MAX_ENTRIES if max_entries is None else max_entries
    decoded = MAX_DECODED_BYTES if max_decoded_bytes is None else max_decoded_bytes
    return _Reader(view, function, entries, decoded).read()


class _Reader:
    def __init__(
        self, tree: memoryview, function: DigestFunction, max_entries: int, max_decoded_bytes: int
    ) -> None:
        self._function = function
        self._max_entries = max_entries
        self._max_decoded_bytes = max_decoded_bytes
        self._root, self._children = _split(tree, function)
        self._read: dict[str, _Listing] = {}
        self._entries: dict[str, Entry] = {}
        self._decoded_bytes = self._listed_bytes = CHILD_BYTES * len(self._children)
        self._check_room(0, self._decoded_bytes)

    def read(self) -> DirectoryTree:
        root = self._read_directory(self._root)
        if isinstance(root.entry, ChunkedEntry):
            raise InvalidArgument("a chunked file was found where the tree of a directory should be")
        self._put("", root.entry)
        pending = [self._contents("", root)]
        while pending:
            # A directory's contents follow it, so that all stands in the order of a DirectoryTree.
            for path, found in pending[-1]:
                if isinstance(found, _Listing):
                    self._put(path, found.entry)
                    pending.append(self._contents(path, found))
                    break
                self._put(path, found)
            else:
                pending.pop()
        return DirectoryTree.from_ordered(self._entries, self._function)

    def _contents(self, path: str, listing: _Listing) -> Iterator[tuple[str, Entry | _Listing]]:
        """What is in a directory, by path, in order. Nothing is made before it is asked for."""
        prefix = f"{path}/" if path else ""
        names = [*listing.entries]
        children: dict[str, _Listing] = {}
        for name, digest in listing.directories.items():
            child = self._child(digest, prefix + name)
            called = child.unix_name or name
            if called in listing.entries or called in children:
                raise InvalidArgument(f"{(prefix + called)[:200]!r} is in a tree twice")
            children[called] = child
        names += children
        names.sort()
        for name in names:
            yield prefix + name, children[name] if name in children else listing.entries[name]

    def _put(self, path: str, entry: Entry) -> None:
        self._entries[path] = entry
        check_path(path)
        self._decoded_bytes += decoded_bytes(path, entry)
        if isinstance(entry, DirectoryEntry | ChunkedEntry):
            self._decoded_bytes -= CHILD_BYTES  # counted with the children
        self._check_room(len(self._entries), self._decoded_bytes)

    def _check_room(self, entries: int, size_bytes: int) -> None:
        if entries > self._max_entries or size_bytes > self._max_decoded_bytes:
            raise InvalidArgument(
                f"a directory tree of more than {self._max_entries} entries, or of more than "
                f"{self._max_decoded_bytes} bytes in memory, is refused"
            )

    def _child(self, digest: Digest, path: str) -> _Listing:
        child = self._read.get(digest.hash)
        data = self._children.get(digest.hash)
        if data is None or len(data) != digest.size_bytes:
            raise InvalidArgument(f"the directory {path[:200]!r} ({digest}) is missing in its tree")
        if child is None:
            child = self._read[digest.hash] = self._read_directory(data)
        return child

    def _read_directory(self, data: memoryview) -> _Listing:
        function = self._function
        chunked = decode_chunk_directory(data, function)
        if chunked is not None:
            table, properties = chunked
            chunked_entry = ChunkedEntry(table, _mode(properties, 0o644), _mtime_ns(properties))
            return _Listing(chunked_entry, _checked_unix_name(properties))
        properties = remote_execution_pb2.NodeProperties()
        files: dict[str, Entry] = {}
        directories: dict[str, Digest] = {}
        for count, part in enumerate(wire.fields(data)):
            if count > MAX_ENTRIES:
                raise InvalidArgument(f"a directory of more than {MAX_ENTRIES} entries is refused")
            if part.number == _PROPERTIES:
                merge_properties(properties, part)
                continue
            named = _node(part, function)
            if named is None:
                continue
            name, node = named
            check_name(name, name)
            # Each of them will have a path that is no shorter, and is counted with it then.
            entry = DirectoryEntry() if isinstance(node, Digest) else node
            self._listed_bytes += decoded_bytes(name, entry)
            if isinstance(node, Digest):
                self._listed_bytes -= CHILD_BYTES
            self._check_room(len(files) + len(directories), self._listed_bytes)
            if name in files or name in directories:
                raise InvalidArgument(f"{name[:80]!r} is in a directory twice")
            if isinstance(node, Digest):
                directories[name] = node
            else:
                files[name] = node
        own = DirectoryEntry(_mode(properties, 0o755), _mtime_ns(properties))
        return _Listing(own, _checked_unix_name(properties), files, directories)


def _split(tree: memoryview, function: DigestFunction) -> tuple[memoryview, dict[str, memoryview]]:
    """The bytes of the root, and those of the children by their hashes."""
    roots: list[memoryview] = []
    children: dict[str, memoryview] = {}
    for count, part in enumerate(wire.fields(tree)):
        if count > MAX_ENTRIES:
            raise InvalidArgument(f"a tree of more than {MAX_ENTRIES} directories is refused")
        if part.number == _TREE_ROOT:
            roots.append(bytes_of(part))
        elif part.number == _TREE_CHILDREN:
            child = bytes_of(part)
            children[function.hash(child)] = child
    if not roots or len(roots) > _MAX_ROOT_PARTS:
        raise InvalidArgument(f"a tree with its root in {len(roots)} parts is refused")
    # Protobuf reads a message that comes in parts as if they stood one behind the other.
    return roots[0] if len(roots) == 1 else memoryview(b"".join(roots)), children


def _node(part: wire.Field, function: DigestFunction) -> tuple[str, Entry | Digest] | None:
    """The name and the node in a field of a Directory; of a directory its digest. None for other fields."""
    if part.number == _FILES:
        file = parse_field(remote_execution_pb2.FileNode, part)
        digest = Digest.checked(file.digest.hash, file.digest.size_bytes, function)
        default = 0o755 if file.is_executable else 0o644
        properties = file.node_properties
        name = _on_disk(properties, UNIX_NAME_PROPERTY) or file.name
        return name, FileEntry(digest, _mode(properties, default), _mtime_ns(properties))
    if part.number == _DIRECTORIES:
        directory = parse_field(remote_execution_pb2.DirectoryNode, part)
        return directory.name, Digest.checked(directory.digest.hash, directory.digest.size_bytes, function)
    if part.number == _SYMLINKS:
        symlink = parse_field(remote_execution_pb2.SymlinkNode, part)
        properties = symlink.node_properties
        name = _on_disk(properties, UNIX_NAME_PROPERTY) or symlink.name
        target = _on_disk(properties, UNIX_TARGET_PROPERTY) or symlink.target
        return name, SymlinkEntry(target, _mtime_ns(properties))
    return None


def _checked_unix_name(properties: remote_execution_pb2.NodeProperties) -> str | None:
    name = _on_disk(properties, UNIX_NAME_PROPERTY)
    if name is not None:
        check_name(name, name)
    return name


def _on_disk(properties: remote_execution_pb2.NodeProperties, what: str) -> str | None:
    """The text of a property with bytes that are not UTF-8; None when there is no such property."""
    values = [item.value for item in properties.properties if item.name == what]
    if not values:
        return None
    if len(values) > 1 or not _HEXADECIMAL.fullmatch(values[0]):
        raise InvalidArgument(f"property {what!r} of a tree is not one hexadecimal number")
    text = bytes.fromhex(values[0]).decode("utf-8", "surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text
    # Else one file could stand under two names, which other readers tell apart.
    raise InvalidArgument(f"property {what!r} of a tree is UTF-8: {text[:80]!r} is to stand for itself")


def _mode(properties: remote_execution_pb2.NodeProperties, default: int) -> int:
    return properties.unix_mode.value & MODE_BITS if properties.HasField("unix_mode") else default


def _mtime_ns(properties: remote_execution_pb2.NodeProperties) -> int:
    nanoseconds = properties.mtime.nanos
    if not 0 <= nanoseconds < 10**9:
        raise InvalidArgument(f"a time in a tree has {nanoseconds} nanoseconds")
    return int(properties.mtime.seconds) * 10**9 + nanoseconds
