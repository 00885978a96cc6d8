"""What the last capture of a directory found, so that the next one reads only what changed.

A capture index is a file beside the snapshots, and only a help: when it is missing, damaged, of another
version or of another digest function, everything is read. docs/formats/directories.md describes it.

A file counts as unchanged while its size, time of last write, inode and time of last status change are
what they were. A file written twice within one tick of the kernel's clock can keep all four, so what was
written shortly before it was looked at is not remembered at all (git's documentation calls such entries
"racily clean").
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from snaploader.digest import HASH_BYTES, Digest, DigestFunction
from snaploader.errors import SnaploaderError, translate_os_errors
from snaploader.files import replace_file
from snaploader.formats.chunktable import ChunkTable, decode_tree, encode_tree
from snaploader.formats.dirtree import ChunkedEntry, DirectoryTree, FileEntry
from snaploader.loader.scan import FileIdentity

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

Content = Digest | ChunkTable


class CaptureIndex:
    """The content of files, by their paths and identities. Immutable."""

    def __init__(self, files: Iterable[tuple[str, FileIdentity, Content]] = ()) -> None:
        self._files = {path: (identity, content) for path, identity, content in files}

    def get(self, path: str, identity: FileIdentity) -> Content | None:
        """What the file holds, if it is still the one that was remembered."""
        known = self._files.get(path)
        return known[1] if known is not None and known[0] == identity else None

    def __len__(self) -> int:
        return len(self._files)


def is_settled(identity: FileIdentity, looked_ns: int) -> bool:
    """Whether any later change to the file will show in its identity.

    Args:
        looked_ns: When the file was looked at, or any time before.
    """
    # Whoever may set a time of last write cannot set that of the last status change.
    is_coarse = identity.ctime_ns % 1_000_000_000 == 0
    granularity_ns = WHOLE_SECONDS_NS if is_coarse else GRANULARITY_NS
    return max(identity.mtime_ns, identity.ctime_ns) < looked_ns - granularity_ns


def read_index(path: str, function: DigestFunction) -> CaptureIndex:
    """The index in a file; an empty one when there is none that is any good."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return CaptureIndex()
    except OSError as error:
        log.warning("the capture index %r cannot be read, so all files are read again: %s", path, error)
        return CaptureIndex()
    try:
        return CaptureIndex(_decode(data, function))
    except (ValueError, OverflowError, struct.error) as error:
        log.warning("the capture index %r is not used, so all files are read again: %s", path, error)
        return CaptureIndex()


def write_index(
    path: str, files: Iterable[tuple[str, FileIdentity, Content]], function: DigestFunction
) -> None:
    """Replace the index in one step. Errors as `translate_os_errors`; the old one then stands."""
    data = _encode(files, function)
    with translate_os_errors(f"cannot write the capture index {path!r}"):
        # Not flushed: after a power failure the checksum tells whether it was written in time.
        replace_file(path, data)


def _encode(files: Iterable[tuple[str, FileIdentity, Content]], function: DigestFunction) -> bytes:
    kept = [row for row in files if row[1].mtime_ns in _INT64 and row[1].ctime_ns in _INT64]
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


def _decode(data: bytes, function: DigestFunction) -> Iterable[tuple[str, FileIdentity, Content]]:
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
    found: list[tuple[str, FileIdentity, Content]] = []
    for row, (path, (size, mtime_ns, ctime_ns), inode) in enumerate(zip(paths, numbers, inodes, strict=True)):
        digest = Digest(hashes[64 * row : 64 * row + 64], size, function)
        identity = FileIdentity(size, mtime_ns, inode, ctime_ns)
        found.append((path, identity, tables.get(row, digest)))
    return found


def try_write_index(
    path: str, files: Iterable[tuple[str, FileIdentity, Content]], function: DigestFunction
) -> str:
    """Replace the index, and return what went wrong; empty when nothing did."""
    try:
        write_index(path, files, function)
    except SnaploaderError as error:
        return f"{error.message}; the next capture will read all files again"
    return ""


def write_restored_index(tree: DirectoryTree, root: Path, path: str) -> str:
    """Write a capture index of a directory as it was just restored; what went wrong, or an empty string.

    Waits until no later write can go unnoticed, at most some milliseconds more than `GRANULARITY_NS`. What
    was written to meanwhile, and so has another time or size than the tree says, is left out.
    """
    time.sleep(GRANULARITY_NS / 1e9 * 1.1)
    looked_ns = time.time_ns()
    files = []
    for name, entry in tree.items():
        if isinstance(entry, FileEntry | ChunkedEntry):
            content = entry.digest if isinstance(entry, FileEntry) else entry.table
            try:
                identity = FileIdentity.of(os.lstat(root / name))
            except OSError:
                continue
            as_written = (identity.size_bytes, identity.mtime_ns) == (entry.size_bytes, entry.mtime_ns)
            if as_written and is_settled(identity, looked_ns):
                files.append((name, identity, content))
    return try_write_index(path, files, tree.function)
