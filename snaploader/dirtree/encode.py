"""Writing a directory tree as a Remote Execution API Tree."""

from __future__ import annotations

import hashlib
from operator import attrgetter

from snaploader import wire
from snaploader._proto import remote_execution_pb2
from snaploader.digest import Digest
from snaploader.dirtree.entries import (
    MAX_NAME_BYTES,
    MAX_TARGET_BYTES,
    UNIX_NAME_PROPERTY,
    UNIX_TARGET_PROPERTY,
    ChunkedEntry,
    DirectoryEntry,
    Entry,
    FileEntry,
    SymlinkEntry,
    bytes_on_disk,
)
from snaploader.dirtree.model import DirectoryTree
from snaploader.errors import InvalidArgument
from snaploader.tree import MAX_TREE_BYTES, encode_chunk_directory

_ROOT = bytes((wire.tag(1, wire.BYTES),))
_CHILD = bytes((wire.tag(2, wire.BYTES),))


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
