"""A directory tree in memory: paths and what stands there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import final

from snaploader.chunktable import ChunkTable
from snaploader.digest import MAX_BLOB_BYTES, Digest, DigestFunction
from snaploader.dirtree.entries import (
    MAX_DECODED_BYTES,
    MAX_ENTRIES,
    MAX_ROWS,
    ChunkedEntry,
    DirectoryEntry,
    Entry,
    FileEntry,
    check_entry,
    check_name,
    check_path,
    decoded_bytes,
)
from snaploader.errors import InvalidArgument, NotFound


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
        """Behind all digests."""
        return self._function

    @property
    def size_bytes(self) -> int:
        """Of all files, holes included."""
        return sum(e.size_bytes for e in self._entries.values() if isinstance(e, FileEntry | ChunkedEntry))

    @property
    def hole_bytes(self) -> int:
        """In chunks of nothing but zeros."""
        return sum(e.table.hole_bytes for e in self._entries.values() if isinstance(e, ChunkedEntry))

    def tables(self) -> Iterator[ChunkTable]:
        """The tables of all chunked files; one that stands in several places in memory only once."""
        chunked = (entry.table for entry in self._entries.values() if isinstance(entry, ChunkedEntry))
        yield from {id(table): table for table in chunked}.values()

    def blobs(self) -> Iterator[Digest]:
        """Of all files that are kept whole, each once; not the empty one, which exists everywhere."""
        whole = (entry.digest for entry in self._entries.values() if isinstance(entry, FileEntry))
        yield from dict.fromkeys(digest for digest in whole if digest.size_bytes)

    def digests(self) -> Iterator[Digest]:
        """Of all that the tree needs: `blobs`, and the chunks of `tables`, which may repeat."""
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
