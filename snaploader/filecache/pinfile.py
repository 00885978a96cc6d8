"""The file of a pin.

    "snappin1"  sha256(rest)  rest
    rest = count of hashes (uint64)  count of refs (uint64)  hashes  sizes  keys of the refs

Hashes and keys are 32 bytes each, sorted and without repetitions; sizes are int64, -1 where unknown.
Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snaploader.digest import HASH_BYTES
from snaploader.errors import InvalidArgument
from snaploader.filecache.hashes import Words
from snaploader.filecache.layout import check_hash
from snaploader.files import read_file
from snaploader.folders import OddEntry, open_regular

UNKNOWN_SIZE = -1
MAX_PIN_ENTRIES = 1 << 24
"""Hashes, and refs, of one pin: 8 TiB in chunks of 512 KiB."""
MAX_NAME_LENGTH = 200

_MAGIC = b"snappin1"
_CHECKED_FROM = len(_MAGIC) + HASH_BYTES
_COUNTS = struct.Struct("<QQ")
_HEADER_BYTES = _CHECKED_FROM + _COUNTS.size
_HASH_AND_SIZE_BYTES = HASH_BYTES + 8
_MAX_FILE_BYTES = _HEADER_BYTES + MAX_PIN_ENTRIES * (_HASH_AND_SIZE_BYTES + HASH_BYTES)
_NAME = re.compile(rf"[A-Za-z0-9_@-][A-Za-z0-9._@-]{{0,{MAX_NAME_LENGTH - 1}}}")


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """What one name keeps from eviction."""

    name: str
    hashes: npt.NDArray[np.uint8]
    """Of the blobs, one row of 32 bytes each, sorted, without repetitions. Read-only."""
    sizes_bytes: npt.NDArray[np.int64]
    """Of the blobs; -1 where the size was not given. Read-only."""
    refs: tuple[str, ...]
    """Keys of the refs, sorted."""

    def keeps(self, key: str) -> bool:
        """Whether a blob of this hash, or a ref of this key, is kept. 64 hexadecimal digits."""
        row = np.frombuffer(bytes.fromhex(check_hash(key)), np.uint8)
        return key in self.refs or bool((self.hashes == row).all(axis=1).any())


def is_name(text: str) -> bool:
    """Whether this may be a pin's name."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str) -> str:
    """`text` if it may be a pin's name, else InvalidArgument: it becomes a file name."""
    if not is_name(text):
        raise InvalidArgument(
            f"pin name {text[:220]!r} is not 1 to {MAX_NAME_LENGTH} letters, digits or any of . _ @ - "
            "that do not begin with a dot"
        )
    return text


def encode(words: Words, sizes_bytes: npt.NDArray[np.int64], refs: Words) -> bytes:
    """The file of a pin. Rows are sorted and without repetitions."""
    rest = b"".join(
        (
            _COUNTS.pack(len(words), len(refs)),
            words.astype(">u8").tobytes(),
            sizes_bytes.astype("<i8").tobytes(),
            refs.astype(">u8").tobytes(),
        )
    )
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def decode(name: str, data: bytes) -> Pin | None:
    """The pin in a file; None when the file is damaged."""
    if len(data) < _HEADER_BYTES or data[: len(_MAGIC)] != _MAGIC:
        return None
    rest = memoryview(data)[_CHECKED_FROM:]
    if hashlib.sha256(rest).digest() != data[len(_MAGIC) : _CHECKED_FROM]:
        return None
    hashes, refs = _COUNTS.unpack_from(rest)
    sizes_at = _HEADER_BYTES + hashes * HASH_BYTES
    refs_at = sizes_at + hashes * 8
    if len(data) != refs_at + refs * HASH_BYTES:
        return None
    return Pin(
        name,
        np.frombuffer(data, np.uint8, hashes * HASH_BYTES, _HEADER_BYTES).reshape(-1, HASH_BYTES),
        # On a big-endian machine this copies.
        np.frombuffer(data, "<i8", hashes, sizes_at).astype(np.int64, copy=False),
        tuple(data[at : at + HASH_BYTES].hex() for at in range(refs_at, len(data), HASH_BYTES)),
    )


def _has_size(header: bytes, size: int) -> bool:
    hashes, refs = _COUNTS.unpack_from(header, _CHECKED_FROM)
    return bool(size == _HEADER_BYTES + hashes * _HASH_AND_SIZE_BYTES + refs * HASH_BYTES)


def load(path: str) -> tuple[os.stat_result, Pin | None]:
    """What stands in a pin's file, and the file's status; None for a damaged one. Raises OSError."""
    try:
        fd, status = open_regular(path)
    except OddEntry:
        return os.lstat(path), None
    try:
        is_sane = _HEADER_BYTES <= status.st_size <= _MAX_FILE_BYTES
        # Not even its beginning is read into memory with all the rest unless that fits its size.
        is_sane = is_sane and _has_size(os.pread(fd, _HEADER_BYTES, 0), status.st_size)
        data = read_file(fd, status.st_size) if is_sane else b""
        return status, decode(os.path.basename(path), data)
    finally:
        os.close(fd)
