"""A directory tree: paths, what stands at each, and the Tree that says so.

    tree = DirectoryTree({"": DirectoryEntry(0o755), "etc": DirectoryEntry(0o755), ...}, function)
    decode_directory_tree(encode_directory_tree(tree), tree.function) == tree

docs/formats/directories.md describes the format. A Remote Execution API Tree comes from outside, and is
small beside what it may claim: equal directories stand in it once, so a few kilobytes can name more paths
than there is memory for. All bounds are checked as paths are made.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias, final

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import MAX_BLOB_BYTES, Buffer, Digest, DigestFunction
from snaploader.errors import InvalidArgument, NotFound
from snaploader.formats.chunktable import (
    DIRECTORY_DIRECTORIES,
    DIRECTORY_FILES,
    DIRECTORY_PROPERTIES,
    DIRECTORY_SYMLINKS,
    MAX_TREE_BYTES,
    TREE_CHILDREN,
    TREE_ROOT,
    ChunkTable,
    bytes_of,
    decode_chunk_directory,
    encode_chunk_directory,
    merge_properties,
    parse_field,
    set_mode,
    tree_view,
)
from snaploader.formats.digests import Field, header, read_fields

MODE_BITS = 0o1777
"""Permission and sticky bits. Set-id bits are never kept: what is restored may not lend anyone's rights."""

MAX_ENTRIES = 1 << 19
"""Most paths of a tree, and of all directories of a snapshot together."""

MAX_DECODED_BYTES = 240 << 20
"""Of the entries of all directories of a snapshot in memory, as `decoded_bytes` estimates them: a small Tree
can name very many paths, and long ones."""

CHILD_BYTES = 450
"""What a child in a Tree takes in memory before it is read, in bytes."""

MAX_DEPTH = 200
"""Most names in a path."""

MAX_NAME_BYTES = 255
"""Longest name, in bytes; that of Linux file systems."""

MAX_PATH_BYTES = 4095
"""Longest path, in bytes; that of Linux."""

MAX_TARGET_BYTES = 4095
"""Longest target of a symbolic link, in bytes; that of Linux."""

MAX_ROWS = 1 << 22
"""Chunks of all chunked files of a tree together, equal files counted each: 2 TiB in chunks of 512 KiB."""

UNIX_NAME_PROPERTY = "unix_name"
UNIX_TARGET_PROPERTY = "unix_target"
"""Properties with the bytes, in hexadecimal, of a name and of a symbolic link's target that are not UTF-8."""

MIN_MTIME_NS = -62_135_596_800 * 10**9
MAX_MTIME_NS = 253_402_300_800 * 10**9 - 1
"""The years 1 to 9999, which are those of a protobuf Timestamp."""

_MAX_ROOT_PARTS = 1000
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2}){1,4096}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file that is kept whole, as one blob."""

    digest: Digest
    mode: int = 0o644
    """Permission bits and the sticky bit, at most 0o1777."""
    mtime_ns: int = 0
    """Time of last write, in nanoseconds since the epoch."""

    @property
    def size_bytes(self) -> int:
        """Size of the content."""
        return self.digest.size_bytes


@dataclass(frozen=True, slots=True)
class ChunkedEntry:
    """A big file that is kept in chunks."""

    table: ChunkTable
    mode: int = 0o644
    mtime_ns: int = 0

    @property
    def size_bytes(self) -> int:
        """Size of the content, holes included."""
        return self.table.size


@dataclass(frozen=True, slots=True)
class SymlinkEntry:
    """A symbolic link, whatever it points to. It has no mode of its own.

    A target that is not UTF-8 has lone surrogates in it, as `os.readlink` gives it (PEP 383).
    """

    target: str
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A directory, perhaps an empty one."""

    mode: int = 0o755
    mtime_ns: int = 0


Entry: TypeAlias = FileEntry | ChunkedEntry | SymlinkEntry | DirectoryEntry


@final
class DirectoryTree(Mapping[str, Entry]):
    """The entries of a directory by their paths: relative, with "/" between names; "" is the root.

    Names that are not UTF-8 have lone surrogates in them, as `os.listdir` gives them (PEP 383).

    Immutable. Iteration gives a directory before what is in it, and names of one directory sorted.

    Args:
        entries: Every path with its directories.
        function: Behind all digests.

    Raises:
        InvalidArgument: The root is missing or no directory, a path stands in no directory, a name cannot
            be one, a digest is of another function, or a limit (`MAX_ENTRIES`, …) is exceeded.
    """

    __slots__ = ("_entries", "decoded_bytes", "function")

    function: DigestFunction
    """Behind all digests."""
    decoded_bytes: int
    """What all entries take in memory while the tree is read, at most; without the tables of `tables`."""

    def __init__(self, entries: Mapping[str, Entry], function: DigestFunction) -> None:
        if len(entries) > MAX_ENTRIES:
            raise InvalidArgument(
                f"a directory tree of {len(entries)} entries is refused: {MAX_ENTRIES} are allowed"
            )
        # NUL, which is in no name, sorts before all others: so what is in "a" comes before "a-b".
        ordered = sorted(entries, key=lambda path: path.replace("/", "\0"))
        self._entries = {path: entries[path] for path in ordered}
        self.function = function
        self._check()

    @classmethod
    def from_ordered(cls, entries: dict[str, Entry], function: DigestFunction) -> DirectoryTree:
        """A tree of entries that are in the order of iteration already. Takes the dictionary over."""
        tree = cls.__new__(cls)
        tree._entries, tree.function = entries, function
        tree._check()
        return tree

    @property
    def size_bytes(self) -> int:
        """Size of all files, holes included."""
        return sum(e.size_bytes for e in self._entries.values() if isinstance(e, FileEntry | ChunkedEntry))

    @property
    def hole_bytes(self) -> int:
        """Bytes in chunks of nothing but zeros."""
        return sum(e.table.hole_bytes for e in self._entries.values() if isinstance(e, ChunkedEntry))

    def tables(self) -> Iterator[ChunkTable]:
        """The tables of all chunked files; one that stands in several places in memory only once."""
        chunked = (entry.table for entry in self._entries.values() if isinstance(entry, ChunkedEntry))
        yield from {id(table): table for table in chunked}.values()

    def blobs(self) -> Iterator[Digest]:
        """Digests of all files that are kept whole, each once; not the empty one, which exists everywhere."""
        whole = (entry.digest for entry in self._entries.values() if isinstance(entry, FileEntry))
        yield from dict.fromkeys(digest for digest in whole if digest.size_bytes)

    def digests(self) -> Iterator[Digest]:
        """Digests of all that the tree needs: `blobs`, and the chunks of `tables`, which may repeat."""
        yield from self.blobs()
        for table in self.tables():
            yield from table.digests()

    def only(self, paths: Collection[str]) -> DirectoryTree:
        """The tree with what is at `paths` and below, and their directories. NotFound where nothing is."""
        kept: set[str] = {""}
        for path in paths:
            if path not in self._entries:
                raise NotFound(f"the directory has no {path[:200]!r}")
            while path not in kept:
                kept.add(path)
                path = path.rpartition("/")[0]
        chosen, entries = set(paths), {}
        for path, entry in self._entries.items():
            if path in chosen or (path and path.rpartition("/")[0] in chosen):
                chosen.add(path)
            if path in chosen or path in kept:
                entries[path] = entry
        return DirectoryTree.from_ordered(entries, self.function)

    def _check(self) -> None:
        if not isinstance(self._entries.get(""), DirectoryEntry):
            raise InvalidArgument("the root of a directory tree must be a directory")
        self.decoded_bytes = size_bytes = rows = 0
        for path, entry in self._entries.items():
            self.decoded_bytes += decoded_bytes(path, entry)
            check_path(path)
            check_entry(path, entry)
            if path:
                parent, _, name = path.rpartition("/")
                check_name(name, path)
                if not isinstance(self._entries.get(parent), DirectoryEntry):
                    raise InvalidArgument(f"{path[:200]!r} is in a directory tree, and its directory is not")
            if not isinstance(entry, FileEntry | ChunkedEntry):
                continue
            size_bytes += entry.size_bytes
            rows += entry.table.stored_count if isinstance(entry, ChunkedEntry) else 0
            function = (entry.digest if isinstance(entry, FileEntry) else entry.table).function
            if function is not self.function:
                raise InvalidArgument(
                    f"{path[:200]!r} has a {function.name} digest in a tree of {self.function.name} digests"
                )
        for what, count, limit in (
            ("bytes in memory", self.decoded_bytes, MAX_DECODED_BYTES),
            ("bytes of content", size_bytes, MAX_BLOB_BYTES),
            ("chunks", rows, MAX_ROWS),
        ):
            if count > limit:
                raise InvalidArgument(f"a directory tree of {count} {what} is refused: {limit} are allowed")

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirectoryTree):
            return NotImplemented
        return self.function is other.function and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DirectoryTree({len(self._entries)} entries, {self.function.name})"


def check_entry_count(count: int, size_bytes: int = 0) -> None:
    """InvalidArgument when directories together have too many entries, or `decoded_bytes`, for a snapshot."""
    if count > MAX_ENTRIES or size_bytes > MAX_DECODED_BYTES:
        raise InvalidArgument(
            f"the directories of a snapshot have more than {MAX_ENTRIES} entries together, or take more than "
            f"{MAX_DECODED_BYTES >> 20} MiB of memory: save them as several snapshots, or exclude some"
        )


def decoded_bytes(path: str, entry: Entry) -> int:
    """What an entry takes in memory while its tree is read, at most: measured on CPython 3.11."""
    names = 2 * sys.getsizeof(path)  # the name, no longer than the path, is in the directory's listing too
    if isinstance(entry, FileEntry):
        return names + 400
    if isinstance(entry, SymlinkEntry):
        return names + 300 + sys.getsizeof(entry.target)
    rows = entry.table.stored_count if isinstance(entry, ChunkedEntry) else 0
    return names + 800 + CHILD_BYTES + 40 * rows


def check_name(name: str, path: str) -> None:
    """InvalidArgument unless `name`, the last part of `path`, can stand in a directory."""
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise InvalidArgument(f"{name[:80]!r} in {path[:200]!r} cannot name an entry of a directory")
    length = len(bytes_on_disk(name, path))
    if length > MAX_NAME_BYTES:
        raise InvalidArgument(
            f"the name {name[:80]!r}… in {path[:200]!r} has {length} bytes, {MAX_NAME_BYTES} are allowed"
        )


def bytes_on_disk(text: str, path: str) -> bytes:
    """The bytes of a path, name or target on disk: UTF-8, and a byte for each lone surrogate (PEP 383).

    InvalidArgument when `text`, which belongs to `path`, stands for no bytes, or another text for the same.
    """
    if text.isascii():
        return text.encode()
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = b""
    if data.decode("utf-8", "surrogateescape") != text:
        raise InvalidArgument(f"{text[:200]!r} of {path[:200]!r} stands for no bytes of a file system")
    return data


def check_path(path: str) -> None:
    """InvalidArgument unless a tree can hold `path`."""
    length = len(bytes_on_disk(path, path))
    if length > MAX_PATH_BYTES:
        raise InvalidArgument(
            f"the path {path[:200]!r}… has {length} bytes, {MAX_PATH_BYTES} are allowed in a directory tree"
        )
    if path.count("/") >= MAX_DEPTH:
        raise InvalidArgument(f"the path {path[:200]!r}… is deeper than {MAX_DEPTH} directories")


def check_entry(path: str, entry: Entry) -> None:
    """InvalidArgument unless all that `entry` says can be kept."""
    if not MIN_MTIME_NS <= entry.mtime_ns <= MAX_MTIME_NS:
        raise InvalidArgument(f"the time {entry.mtime_ns} ns of {path[:200]!r} is not in the years 1 to 9999")
    if isinstance(entry, SymlinkEntry):
        length = len(bytes_on_disk(entry.target, path))
        if not 0 < length <= MAX_TARGET_BYTES or "\0" in entry.target:
            raise InvalidArgument(
                f"the target of symbolic link {path[:200]!r} is empty, has a NUL or more than "
                f"{MAX_TARGET_BYTES} bytes"
            )
    elif not 0 <= entry.mode <= MODE_BITS:
        raise InvalidArgument(f"the mode {entry.mode:#o} of {path[:200]!r} is not within {MODE_BITS:#o}")


def encode_directory_tree(tree: DirectoryTree) -> bytes:
    """The serialised Tree: equal directory trees give equal bytes. InvalidArgument when there are too many.

    Children stand in the order of paths, equal ones once, where the last of them is: so every parent
    is before its children.
    """
    root, children = _encoded(tree)
    parts = [header(TREE_ROOT, len(root)), root]
    for child in children.values():
        parts += [header(TREE_CHILDREN, len(child)), child]
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
    unfinished: dict[str, reapi.Directory] = {}
    # From the last path to the first: a directory is finished when everything in it was added.
    for path in reversed(list(tree)[1:]):
        parent, _, name = path.rpartition("/")
        directory = unfinished.setdefault(parent, reapi.Directory())
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
            node = directory.files.add(name=name, is_executable=bool(entry.mode & 0o100))
            node.digest.hash, node.digest.size_bytes = entry.digest.hash, entry.digest.size_bytes
            node.node_properties.CopyFrom(properties)
        elif isinstance(entry, SymlinkEntry):
            target = entry.target
            if not _is_utf8(target):
                data = bytes_on_disk(target, name)
                properties.properties.add(name=UNIX_TARGET_PROPERTY, value=data.hex())
                target = _escaped(data, MAX_TARGET_BYTES)
            directory.symlinks.add(name=name, target=target).node_properties.CopyFrom(properties)
        else:
            # A DirectoryNode has no properties: those of a directory stand in itself.
            if isinstance(entry, ChunkedEntry):
                child = encode_chunk_directory(entry.table, properties)
            else:
                child = _finished(unfinished.pop(path, reapi.Directory()), properties)
            digest = Digest.of(child, tree.function)
            link = directory.directories.add(name=name)
            link.digest.hash, link.digest.size_bytes = digest.hash, digest.size_bytes
            children.setdefault(digest, child)
    root = _finished(unfinished.pop("", reapi.Directory()), _properties(tree[""]))
    return root, dict(reversed(children.items()))


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _stand_in(name: str, properties: reapi.NodeProperties) -> str:
    """What a file whose name is not UTF-8 is called for others; its own name is added to the properties."""
    data = bytes_on_disk(name, name)
    properties.properties.add(name=UNIX_NAME_PROPERTY, value=data.hex())
    # The hash keeps apart what is escaped alike.
    suffix = "~" + hashlib.sha256(data).hexdigest()[:32]
    return _escaped(data, MAX_NAME_BYTES - len(suffix)) + suffix


def _escaped(data: bytes, limit: int) -> str:
    """Bytes that are not UTF-8 as text of at most `limit` bytes, with a backslash before what is not."""
    return data.decode("utf-8", "backslashreplace").encode()[:limit].decode("utf-8", "ignore")


def _finished(directory: reapi.Directory, properties: reapi.NodeProperties) -> bytes:
    """The bytes of a directory to which everything was added, from the last name to the first."""
    for nodes in (directory.files, directory.directories, directory.symlinks):
        nodes.sort(key=attrgetter("name"))
    directory.node_properties.CopyFrom(properties)
    return directory.SerializeToString(deterministic=True)


def _properties(entry: Entry) -> reapi.NodeProperties:
    properties = reapi.NodeProperties()
    seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
    properties.mtime.seconds, properties.mtime.nanos = seconds, nanoseconds
    properties.mtime.SetInParent()  # zero is a time
    if not isinstance(entry, SymlinkEntry):
        set_mode(properties, entry.mode)
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
    max_entries: int = MAX_ENTRIES,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> DirectoryTree:
    """The directory tree in a serialised Tree, all of it checked.

    Children that nothing refers to are passed over, as are fields and properties that mean nothing here.
    Without a mode, files have 0644 or 0755 and directories 0755; without a time, the epoch.

    Args:
        data: The whole blob.
        function: Behind the digests in it, which do not say so themselves.
        max_entries: What is left of `MAX_ENTRIES` in a snapshot of several directories.
        max_decoded_bytes: The same of `MAX_DECODED_BYTES`.

    Raises:
        InvalidArgument: It is no Tree of a directory; a name is unsafe or there twice; a child directory
            is missing; a digest is malformed; or a limit (`MAX_ENTRIES`, …) is exceeded.
    """
    return _Reader(tree_view(data), function, max_entries, max_decoded_bytes).read()


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
            check_name(called, prefix + called)
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
            return _Listing(chunked_entry, _on_disk(properties, UNIX_NAME_PROPERTY))
        properties = reapi.NodeProperties()
        files: dict[str, Entry] = {}
        directories: dict[str, Digest] = {}
        for count, part in enumerate(read_fields(data)):
            if count > MAX_ENTRIES:
                raise InvalidArgument(f"a directory of more than {MAX_ENTRIES} entries is refused")
            if part.number == DIRECTORY_PROPERTIES:
                merge_properties(properties, part)
                continue
            named = _node(part, function)
            if named is None:
                continue
            name, node = named
            check_name(name, name)
            if name in files or name in directories:
                raise InvalidArgument(f"{name[:80]!r} is in a directory twice")
            # Each of them will have a path that is no shorter, and is counted with it then.
            if isinstance(node, Digest):
                directories[name] = node
                self._listed_bytes += decoded_bytes(name, DirectoryEntry()) - CHILD_BYTES
            else:
                files[name] = node
                self._listed_bytes += decoded_bytes(name, node)
            self._check_room(len(files) + len(directories), self._listed_bytes)
        own = DirectoryEntry(_mode(properties, 0o755), _mtime_ns(properties))
        return _Listing(own, _on_disk(properties, UNIX_NAME_PROPERTY), files, directories)


def _split(tree: memoryview, function: DigestFunction) -> tuple[memoryview, dict[str, memoryview]]:
    """The bytes of the root, and those of the children by their hashes."""
    roots: list[memoryview] = []
    children: dict[str, memoryview] = {}
    for count, part in enumerate(read_fields(tree)):
        if count > MAX_ENTRIES:
            raise InvalidArgument(f"a tree of more than {MAX_ENTRIES} directories is refused")
        if part.number == TREE_ROOT:
            roots.append(bytes_of(part))
        elif part.number == TREE_CHILDREN:
            child = bytes_of(part)
            children[function.hash(child)] = child
    if not roots or len(roots) > _MAX_ROOT_PARTS:
        raise InvalidArgument(f"a tree with its root in {len(roots)} parts is refused")
    # Protobuf reads a message that comes in parts as if they stood one behind the other.
    return roots[0] if len(roots) == 1 else memoryview(b"".join(roots)), children


def _node(part: Field, function: DigestFunction) -> tuple[str, Entry | Digest] | None:
    """The name and the node in a field of a Directory; of a directory its digest. None for other fields."""
    if part.number == DIRECTORY_FILES:
        file = parse_field(reapi.FileNode, part)
        digest = Digest.checked(file.digest.hash, file.digest.size_bytes, function)
        default = 0o755 if file.is_executable else 0o644
        properties = file.node_properties
        name = _on_disk(properties, UNIX_NAME_PROPERTY) or file.name
        return name, FileEntry(digest, _mode(properties, default), _mtime_ns(properties))
    if part.number == DIRECTORY_DIRECTORIES:
        directory = parse_field(reapi.DirectoryNode, part)
        return directory.name, Digest.checked(directory.digest.hash, directory.digest.size_bytes, function)
    if part.number == DIRECTORY_SYMLINKS:
        symlink = parse_field(reapi.SymlinkNode, part)
        properties = symlink.node_properties
        name = _on_disk(properties, UNIX_NAME_PROPERTY) or symlink.name
        target = _on_disk(properties, UNIX_TARGET_PROPERTY) or symlink.target
        return name, SymlinkEntry(target, _mtime_ns(properties))
    return None


def _on_disk(properties: reapi.NodeProperties, what: str) -> str | None:
    """The text of a property with bytes that are not UTF-8; None when there is no such property."""
    values = [item.value for item in properties.properties if item.name == what]
    if not values:
        return None
    if len(values) > 1 or not _HEXADECIMAL.fullmatch(values[0]):
        raise InvalidArgument(f"property {what!r} of a tree is not one hexadecimal number")
    text = bytes.fromhex(values[0]).decode("utf-8", "surrogateescape")
    if _is_utf8(text):
        # One file could stand under two names, which other readers tell apart.
        raise InvalidArgument(f"property {what!r} of a tree is UTF-8: {text[:80]!r} is to stand for itself")
    return text


def _mode(properties: reapi.NodeProperties, default: int) -> int:
    return properties.unix_mode.value & MODE_BITS if properties.HasField("unix_mode") else default


def _mtime_ns(properties: reapi.NodeProperties) -> int:
    nanoseconds = properties.mtime.nanos
    if not 0 <= nanoseconds < 10**9:
        raise InvalidArgument(f"a time in a tree has {nanoseconds} nanoseconds")
    return int(properties.mtime.seconds) * 10**9 + nanoseconds
