"""Writing a directory tree as a Remote Execution API Tree."""

from __future__ import annotations

from snaploader import wire
from snaploader._proto import remote_execution_pb2
from snaploader.digest import Digest
from snaploader.dirtree.entries import ChunkedEntry, DirectoryEntry, Entry, FileEntry, SymlinkEntry
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
        if isinstance(entry, FileEntry):
            _add_file(directory, name, entry)
        elif isinstance(entry, SymlinkEntry):
            _add_symlink(directory, name, entry)
        else:
            if isinstance(entry, ChunkedEntry):
                child = encode_chunk_directory(entry.table, _properties(entry))
            else:
                child = _finished(unfinished.pop(path, None), entry)
            digest = Digest.of(child, tree.function)
            _add_directory(directory, name, digest)
            children.setdefault(digest, child)
    root = tree[""]
    assert isinstance(root, DirectoryEntry)
    return _finished(unfinished.pop("", None), root), dict(reversed(children.items()))


def _finished(directory: remote_execution_pb2.Directory | None, entry: DirectoryEntry) -> bytes:
    """The bytes of a directory to which everything was added, from the last name to the first."""
    directory = directory or remote_execution_pb2.Directory()
    for nodes in (directory.files, directory.directories, directory.symlinks):
        nodes.reverse()
    directory.node_properties.CopyFrom(_properties(entry))
    return directory.SerializeToString(deterministic=True)


def _add_file(directory: remote_execution_pb2.Directory, name: str, entry: FileEntry) -> None:
    node = directory.files.add(name=name, is_executable=bool(entry.mode & 0o100))
    node.digest.hash, node.digest.size_bytes = entry.digest.hash, entry.digest.size_bytes
    node.node_properties.CopyFrom(_properties(entry))


def _add_symlink(directory: remote_execution_pb2.Directory, name: str, entry: SymlinkEntry) -> None:
    node = directory.symlinks.add(name=name, target=entry.target)
    node.node_properties.CopyFrom(_properties(entry))


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
