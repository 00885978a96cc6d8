"""What stands at one path of a directory tree."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TypeAlias

from snaploader.chunktable import ChunkTable
from snaploader.digest import Digest
from snaploader.errors import InvalidArgument

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
        """Of the content."""
        return self.digest.size_bytes


@dataclass(frozen=True, slots=True)
class ChunkedEntry:
    """A big file that is kept in chunks."""

    table: ChunkTable
    mode: int = 0o644
    mtime_ns: int = 0

    @property
    def size_bytes(self) -> int:
        """Of the content, holes included."""
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
