"""A directory tree in memory: paths, and what stands at each.

    DirectoryTree({"": DirectoryEntry(0o755), "etc": DirectoryEntry(0o755), ...}, function)

`dirtreecodec` writes one as a Remote Execution API Tree, and reads it back.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

from snaploader.digest import MAX_BLOB_BYTES, Digest, DigestFunction
from snaploader.errors import InvalidArgument, NotFound
from snaploader.formats.chunktable import ChunkTable

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

    __slots__ = ("_entries", "_function", "decoded_bytes")

    decoded_bytes: int
    """What all entries take in memory while the tree is read, at most; without the tables of `tables`."""

    def __init__(self, entries: Mapping[str, Entry], function: DigestFunction) -> None:
        if len(entries) > MAX_ENTRIES:
            raise InvalidArgument(
                f"a directory tree of {len(entries)} entries is refused: {MAX_ENTRIES} are allowed"
            )
        # NUL, which is in no name, sorts before all others: so what is in "a" comes before "a-b".
        ordered = {path: entries[path] for path in sorted(entries, key=lambda path: path.replace("/", "\0"))}
        self._fill(ordered, function)

    @classmethod
    def from_ordered(cls, entries: dict[str, Entry], function: DigestFunction) -> DirectoryTree:
        """A tree of entries that are in the order of iteration already. Takes the dictionary over."""
        tree = cls.__new__(cls)
        tree._fill(entries, function)
        return tree

    def _fill(self, entries: dict[str, Entry], function: DigestFunction) -> None:
        self._entries = entries
        self._function = function
        self._check()

    @property
    def function(self) -> DigestFunction:
        """The function behind all digests."""
        return self._function

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
        """The tree with what stands at `paths` and below them, and with the directories they are in.

        Raises:
            NotFound: Nothing stands at one of `paths`.
        """
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
        return DirectoryTree.from_ordered(entries, self._function)

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
            if isinstance(entry, FileEntry):
                size_bytes += entry.size_bytes
                self._check_function(path, entry.digest.function)
            elif isinstance(entry, ChunkedEntry):
                size_bytes += entry.size_bytes
                rows += entry.table.stored_count
                self._check_function(path, entry.table.function)
        for what, count, limit in (
            ("bytes in memory", self.decoded_bytes, MAX_DECODED_BYTES),
            ("bytes of content", size_bytes, MAX_BLOB_BYTES),
            ("chunks", rows, MAX_ROWS),
        ):
            if count > limit:
                raise InvalidArgument(f"a directory tree of {count} {what} is refused: {limit} are allowed")

    def _check_function(self, path: str, function: DigestFunction) -> None:
        if function is not self._function:
            raise InvalidArgument(
                f"{path[:200]!r} has a {function.name} digest in a tree of {self._function.name} digests"
            )

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirectoryTree):
            return NotImplemented
        return self._function is other._function and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"DirectoryTree({len(self._entries)} entries, {self._function.name})"


def check_entry_count(count: int, size_bytes: int = 0) -> None:
    """InvalidArgument when all directories of a snapshot together have more entries than may be.

    Args:
        size_bytes: What `decoded_bytes` says of them.
    """
    if count > MAX_ENTRIES or size_bytes > MAX_DECODED_BYTES:
        raise InvalidArgument(
            f"the directories of a snapshot have more than {MAX_ENTRIES} entries together, or take more than "
            f"{MAX_DECODED_BYTES >> 20} MiB of memory: save them as several snapshots, or exclude some"
        )


def decoded_bytes(path: str, entry: Entry) -> int:
    """What an entry takes in memory while its tree is read, at most.

    Measured on CPython 3.11. Its name, which is no longer than its path, stands in the listing of its
    directory too.
    """
    names = 2 * sys.getsizeof(path)
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


def check_path(path: str) -> int:
    """The length of `path` in bytes, if a tree can hold it; InvalidArgument otherwise."""
    length = len(bytes_on_disk(path, path))
    if length > MAX_PATH_BYTES:
        raise InvalidArgument(
            f"the path {path[:200]!r}… has {length} bytes, {MAX_PATH_BYTES} are allowed in a directory tree"
        )
    if path.count("/") >= MAX_DEPTH:
        raise InvalidArgument(f"the path {path[:200]!r}… is deeper than {MAX_DEPTH} directories")
    return length


def check_entry(path: str, entry: Entry) -> None:
    """InvalidArgument unless all that `entry` says can be kept."""
    if not MIN_MTIME_NS <= entry.mtime_ns <= MAX_MTIME_NS:
        raise InvalidArgument(f"the time {entry.mtime_ns} ns of {path[:200]!r} is not in the years 1 to 9999")
    if isinstance(entry, SymlinkEntry):
        _check_target(path, entry.target)
    elif not 0 <= entry.mode <= MODE_BITS:
        raise InvalidArgument(f"the mode {entry.mode:#o} of {path[:200]!r} is not within {MODE_BITS:#o}")


def _check_target(path: str, target: str) -> None:
    length = len(bytes_on_disk(target, path))
    if not 0 < length <= MAX_TARGET_BYTES or "\0" in target:
        raise InvalidArgument(
            f"the target of symbolic link {path[:200]!r} is empty, has a NUL or more than "
            f"{MAX_TARGET_BYTES} bytes"
        )
