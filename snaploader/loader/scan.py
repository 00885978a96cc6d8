"""Looking through a directory: what stands where, and which files the last capture of it knows already.

The walk goes from descriptor to descriptor and follows no symbolic link, so it stays in the directory
whatever is in there, and whatever is exchanged there meanwhile. Nothing is read but symbolic links.

A capture index is a file beside the snapshots, and only a help: when it is missing, damaged, of another
version or of another digest function, everything is read. docs/formats/directories.md describes it. A file
counts as unchanged while its size, time of last write, inode and time of last status change are what they
were. A file written twice within one tick of the kernel's clock can keep all four, so what was written
shortly before it was looked at is not remembered at all (git's documentation calls such entries "racily
clean").
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from snaploader.context import current
from snaploader.digest import HASH_BYTES, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, SnaploaderError, translate_os_errors
from snaploader.files import replace_file
from snaploader.formats.chunktable import ChunkTable, decode_tree, encode_tree
from snaploader.formats.dirtree import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_MTIME_NS,
    MIN_MTIME_NS,
    MODE_BITS,
    ChunkedEntry,
    DirectoryEntry,
    DirectoryTree,
    FileEntry,
    SymlinkEntry,
)

log = logging.getLogger(__name__)

GRANULARITY_NS = 50_000_000
"""How long after a write a second one may not show in a file's times: the kernel's clock ticks every 1 to
10 ms. That of a file server must not be behind by more than what is left of this."""

WHOLE_SECONDS_NS = 2_000_000_000
"""The same where times are whole seconds: of FAT, HFS+, ext4 with small inodes and some file servers."""

_MAGIC = b"snapidx\x01"
_HEADER = struct.Struct("<IIQQQ")  # digest function, zero, files, bytes of paths, chunked files
_CHUNKED = struct.Struct("<QQ")  # row, bytes of the tree
_CHECKSUM_BYTES = 32
_INT64 = range(-(1 << 63), 1 << 63)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class FileIdentity(NamedTuple):
    """What changes when a file is written to or replaced; see inode(7)."""

    size_bytes: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity of a file, from its status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


Content: TypeAlias = Digest | ChunkTable

CaptureIndex: TypeAlias = Mapping[tuple[str, FileIdentity], Content]
"""What files hold, by their paths and what they looked like."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A regular file, as it was when it was found."""

    path: str
    """Relative to the directory."""
    identity: FileIdentity
    mode: int
    """Permission and sticky bits."""
    mtime_ns: int
    """Within the years that a tree can hold."""


class Scan:
    """What a directory holds, by relative paths. It is looked through when this is made.

    Args:
        root: Descriptor of the directory.
        where: What it is called in messages.
        exclude: Relative paths: of a directory only the directory is found, of anything else nothing.

    Raises:
        InvalidArgument: There is more than a tree can hold.
        PermissionDenied: A directory may not be read.
        FailedPrecondition: A directory changed while it was read.
    """

    def __init__(self, root: int, where: str, exclude: Collection[str] = ()) -> None:
        self._root = root
        self._where = where
        self._exclude = frozenset(exclude)
        self._listed: dict[str, FileIdentity] = {}
        self.directories: dict[str, DirectoryEntry] = {}
        self.symlinks: dict[str, SymlinkEntry] = {}
        self.files: list[FoundFile] = []
        """In the order of the walk: those of one directory together, sorted by name."""
        self.skipped: list[str] = []
        """Sockets, FIFOs and devices, which no snapshot holds."""
        self._visit(root, "", 0)

    @property
    def entry_count(self) -> int:
        """How many entries a tree of it will hold."""
        return len(self.directories) + len(self.symlinks) + len(self.files)

    def check_directories(self) -> None:
        """FailedPrecondition when anything was added, removed or renamed in a directory since then."""
        fd = self._root
        for path, identity in self._listed.items():
            current().check()
            what = f"cannot look at {shown_path(self._where, path)} again"
            with translate_os_errors(what, absent=FailedPrecondition):
                status = os.stat(path, dir_fd=fd, follow_symlinks=False) if path else os.fstat(fd)
            if FileIdentity.of(status) != identity:
                raise changed(self._where, path)

    def _visit(self, fd: int, path: str, depth: int) -> None:
        """Take in the directory behind `fd`, and all below."""
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{shown_path(self._where, path)} is deeper than {MAX_DEPTH} directories")
        with translate_os_errors(f"cannot read the directory {shown_path(self._where, path)}"):
            before = os.fstat(fd)
            self.directories[path] = DirectoryEntry(before.st_mode & MODE_BITS, _mtime_ns(before))
            if path in self._exclude:
                return
            with os.scandir(fd) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        prefix = f"{path}/" if path else ""
        for entry in entries:
            self._take(fd, entry, prefix + entry.name, depth)
        identity = FileIdentity.of(before)
        if FileIdentity.of(os.fstat(fd)) != identity:
            raise changed(self._where, path)
        self._listed[path] = identity

    def _take(self, fd: int, entry: os.DirEntry[str], path: str, depth: int) -> None:
        current().check()
        with still_there(self._where, path):
            status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            with still_there(self._where, path):
                child = os.open(entry.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            try:
                self._visit(child, path, depth + 1)
            finally:
                os.close(child)
        elif path in self._exclude:
            return
        elif stat.S_ISREG(status.st_mode):
            mode = status.st_mode & MODE_BITS
            self.files.append(FoundFile(path, FileIdentity.of(status), mode, _mtime_ns(status)))
        elif stat.S_ISLNK(status.st_mode):
            with still_there(self._where, path):
                target = os.readlink(entry.name, dir_fd=fd)
            self.symlinks[path] = SymlinkEntry(target, _mtime_ns(status))
        else:
            self.skipped.append(path)
        if self.entry_count > MAX_ENTRIES:
            raise InvalidArgument(
                f"{self._where!r} holds more than {MAX_ENTRIES} entries: save its subdirectories one by one, "
                "or exclude some"
            )


@contextmanager
def still_there(where: str, path: str) -> Iterator[None]:
    """Translates errors about something that a listing has named."""
    try:
        with translate_os_errors(f"cannot read {shown_path(where, path)}"):
            yield
    except (LookupError, InvalidArgument) as error:
        # Gone, or of another kind than a moment ago.
        raise changed(where, path) from error


def changed(where: str, path: str = "") -> FailedPrecondition:
    """The error for what did not hold still."""
    return FailedPrecondition(
        f"{shown_path(where, path)} was changed while it was saved, so no consistent snapshot of it was "
        "taken: stop what writes to it and save again"
    )


def _mtime_ns(status: os.stat_result) -> int:
    return min(max(status.st_mtime_ns, MIN_MTIME_NS), MAX_MTIME_NS)


def shown_path(where: str, path: str) -> str:
    """The path of something in a directory, for messages."""
    return repr(os.path.join(where, path) if path else where)


def is_settled(identity: FileIdentity, looked_ns: int) -> bool:
    """Whether any change to a file later than `looked_ns` will show in its identity."""
    # Whoever may set a time of last write cannot set that of the last status change.
    is_coarse = identity.ctime_ns % 1_000_000_000 == 0
    granularity_ns = WHOLE_SECONDS_NS if is_coarse else GRANULARITY_NS
    return max(identity.mtime_ns, identity.ctime_ns) < looked_ns - granularity_ns


def read_index(path: str, function: DigestFunction) -> CaptureIndex:
    """The index in a file; an empty one when there is none, or it cannot be used."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        return _decode(data, function)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the capture index %r cannot be read, so all files are read again: %s", path, error)
    except (ValueError, OverflowError, struct.error) as error:
        log.warning("the capture index %r is not used, so all files are read again: %s", path, error)
    return {}


def write_index(path: str, files: CaptureIndex, function: DigestFunction) -> str:
    """Replace the index in one step; what went wrong, or an empty string. The old one then stands."""
    data = _encode(files, function)
    try:
        with translate_os_errors(f"cannot write the capture index {path!r}"):
            # Not flushed: after a power failure the checksum tells whether it was written in time.
            replace_file(path, data)
    except SnaploaderError as error:
        return f"{error.message}; the next capture will read all files again"
    return ""


def _encode(files: CaptureIndex, function: DigestFunction) -> bytes:
    kept = [
        (path, identity, content)
        for (path, identity), content in files.items()
        if identity.mtime_ns in _INT64 and identity.ctime_ns in _INT64
    ]
    paths = "\0".join(path for path, _, _ in kept).encode("utf-8", "surrogateescape")
    numbers = np.array([[i.size_bytes, i.mtime_ns, i.ctime_ns] for _, i, _ in kept], "<i8").reshape(-1, 3)
    inodes = np.array([identity.inode for _, identity, _ in kept], "<u8")
    hashes = b"".join(
        bytes.fromhex(content.hash) if isinstance(content, Digest) else bytes(HASH_BYTES)
        for _, _, content in kept
    )
    chunked = [
        _CHUNKED.pack(row, len(tree)) + tree
        for row, (_, _, content) in enumerate(kept)
        if isinstance(content, ChunkTable) and (tree := encode_tree(content))
    ]
    header = _HEADER.pack(int(function), 0, len(kept), len(paths), len(chunked))
    body = b"".join((header, paths, numbers.tobytes(), inodes.tobytes(), hashes, *chunked))
    return _MAGIC + hashlib.sha256(body).digest() + body


def _decode(data: bytes, function: DigestFunction) -> CaptureIndex:
    start = len(_MAGIC) + _CHECKSUM_BYTES
    body = memoryview(data)[start:]
    if not data.startswith(_MAGIC):
        raise ValueError("it is no capture index of this version")
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise ValueError("it is damaged: its checksum is wrong")
    kind, _, count, paths_bytes, chunked = _HEADER.unpack_from(body)
    if kind != int(function):
        raise ValueError(f"it holds no {function.name} digests")
    position = _HEADER.size + paths_bytes
    text = bytes(body[_HEADER.size : position]).decode("utf-8", "surrogateescape")
    paths = text.split("\0") if count else []
    numbers = np.frombuffer(body, "<i8", 3 * count, position).reshape(-1, 3).tolist()
    position += 24 * count
    inodes = np.frombuffer(body, "<u8", count, position).tolist()
    position += 8 * count
    hashes = bytes(body[position : position + HASH_BYTES * count]).hex()
    position += HASH_BYTES * count
    tables = {}
    for _ in range(chunked):
        row, length = _CHUNKED.unpack_from(body, position)
        position += _CHUNKED.size
        tables[row] = decode_tree(body[position : position + length], function)
        position += length
    found: dict[tuple[str, FileIdentity], Content] = {}
    for row, (path, (size, mtime_ns, ctime_ns), inode) in enumerate(zip(paths, numbers, inodes, strict=True)):
        digest = Digest(hashes[64 * row : 64 * row + 64], size, function)
        found[path, FileIdentity(size, mtime_ns, inode, ctime_ns)] = tables.get(row, digest)
    return found


def write_restored_index(tree: DirectoryTree, root: Path, path: str) -> str:
    """Write a capture index of a directory as it was just restored; what went wrong, or an empty string.

    Waits until no later write can go unnoticed, at most some milliseconds more than `GRANULARITY_NS`. What
    was written to meanwhile, and so has another time or size than the tree says, is left out.
    """
    call = current()
    over = f"the capture index {path!r} is not written: the call was over before"
    try:
        call.sleep(GRANULARITY_NS / 1e9 * 1.1)
    except SnaploaderError:
        return over  # the directory stands, and the index is only a help
    looked_ns = time.time_ns()
    files: dict[tuple[str, FileIdentity], Content] = {}
    for name, entry in tree.items():
        if isinstance(entry, FileEntry | ChunkedEntry):
            content = entry.digest if isinstance(entry, FileEntry) else entry.table
            try:
                identity = FileIdentity.of(os.lstat(root / name))
            except OSError:
                continue
            if call.is_over:
                return over
            as_written = (identity.size_bytes, identity.mtime_ns) == (entry.size_bytes, entry.mtime_ns)
            if as_written and is_settled(identity, looked_ns):
                files[name, identity] = content
    return write_index(path, files, tree.function)
