"""Pins: blobs and refs that no process may evict until their name is unpinned, over restarts and crashes.

A pin is a file `pins/<name>` of its group, replaced in one step by rename(2) and flushed to disk:

    "snappin1"  sha256(rest)  rest
    rest = count of hashes (uint64)  count of refs (uint64)  hashes  sizes  keys of the refs

Hashes and keys are 32 bytes each, sorted and without repetitions; sizes are int64, -1 where unknown.
Numbers are little-endian.

What a damaged pin was to keep is not known any more, so that nothing of its group is evicted until it is
pinned again or unpinned. What pins mean for eviction is in `retention`.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snaploader.digest import HASH_BYTES, MAX_BLOB_BYTES, Digest
from snaploader.errors import DataLoss, InvalidArgument, NotFound, SnaploaderError, translate_os_errors
from snaploader.filecache.layout import check_hash
from snaploader.filecache.usage import CacheContext
from snaploader.files import OddEntry, flush_folder, open_regular, read_file
from snaploader.formats.digests import Words, to_hex, to_words
from snaploader.locks import is_odd

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
        """Tell whether a blob of this hash, or a ref of this key (64 hexadecimal digits), is kept."""
        row = np.frombuffer(bytes.fromhex(check_hash(key)), np.uint8)
        return key in self.refs or bool((self.hashes == row).all(axis=1).any())


def is_pin_name(text: str) -> bool:
    """Tell whether this may be a pin's name."""
    return _NAME.fullmatch(text) is not None


def check_pin_name(text: str) -> str:
    """Return `text`, which becomes a file name. InvalidArgument unless it may be a pin's name."""
    if not is_pin_name(text):
        raise InvalidArgument(
            f"pin name {text[:220]!r} is not 1 to {MAX_NAME_LENGTH} letters, digits or any of . _ @ - "
            "that do not begin with a dot"
        )
    return text


def encode_pin(words: Words, sizes_bytes: npt.NDArray[np.int64], refs: Words) -> bytes:
    """Return the file of a pin. The rows are sorted and without repetitions."""
    rest = b"".join(
        (
            _COUNTS.pack(len(words), len(refs)),
            words.astype(">u8").tobytes(),
            sizes_bytes.astype("<i8").tobytes(),
            refs.astype(">u8").tobytes(),
        )
    )
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def decode_pin(name: str, data: bytes) -> Pin | None:
    """Return the pin in a file; None when the file is damaged."""
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


def load_pin(path: str) -> tuple[os.stat_result, Pin | None]:
    """Read a pin's file; return its status and the pin, None when it is damaged. Raises OSError."""
    try:
        fd, status = open_regular(path)
    except OddEntry:
        return os.lstat(path), None
    try:
        is_sane = _HEADER_BYTES <= status.st_size <= _MAX_FILE_BYTES
        # Not even its beginning is read into memory with all the rest unless that fits its size.
        is_sane = is_sane and _has_size(os.pread(fd, _HEADER_BYTES, 0), status.st_size)
        data = read_file(fd, status.st_size) if is_sane else b""
        return status, decode_pin(os.path.basename(path), data)
    finally:
        os.close(fd)


class PinSpace:
    """The pins of one group. Thread-safe, process-safe."""

    def __init__(self, context: CacheContext) -> None:
        self._context = context
        self._folder = context.layout.pins()
        self._parents_flushed = False

    def pin(
        self,
        name: str,
        digests: Iterable[Digest],
        hashes: Iterable[npt.NDArray[np.uint8]],
        refs: Iterable[str],
    ) -> None:
        """See `FileCache.pin`."""
        path = self._path(name)
        words, sizes_bytes = _sorted_hashes(list(digests), hashes)
        keys = to_words(sorted(set(refs)))
        if max(len(words), len(keys)) > MAX_PIN_ENTRIES:
            raise InvalidArgument(
                f"pin {name!r} of {len(words)} blobs and {len(keys)} refs: {MAX_PIN_ENTRIES} of each at most"
            )
        with translate_os_errors(f"cannot pin {name!r}"):
            folder = self._context.folder
            with folder.staged(encode_pin(words, sizes_bytes, keys), flush=True) as temporary:
                self._context.host.after_step("pin.written")
                folder.make_folder(self._folder)
                # Evictions happen in sections too, so none is under way that has not seen this pin.
                with self._context.ledger.section() as section:
                    # First, so that a pin whose process is killed here is seen as well.
                    section.pins_changed()
                    self._context.host.after_step("pin.announced")
                    if is_odd(path):
                        folder.set_aside(path)
                    os.rename(temporary, path)
                self._context.host.after_step("pin.renamed")
                self._flush_folder()

    def unpin(self, name: str) -> bool:
        """See `FileCache.unpin`."""
        path = self._path(name)
        with translate_os_errors(f"cannot unpin {name!r}"):
            with self._context.ledger.section() as section:
                if not os.path.lexists(path):
                    return False
                section.pins_changed()
                self._context.host.after_step("unpin.announced")
                if is_odd(path):
                    self._context.folder.set_aside(path)
                else:
                    os.unlink(path)
            self._context.host.after_step("unpin.unlinked")
            self._flush_folder()
        return True

    def names(self, prefix: str) -> list[str]:
        """See `FileCache.pins`."""
        with translate_os_errors("cannot list pins"), suppress(FileNotFoundError):
            return sorted(
                name for name in os.listdir(self._folder) if name.startswith(prefix) and is_pin_name(name)
            )
        return []

    def get(self, name: str) -> Pin:
        """See `FileCache.pinned`."""
        path = self._path(name)
        with translate_os_errors(f"cannot read pin {name!r}"):
            try:
                pin = load_pin(path)[1]
            except FileNotFoundError:
                raise NotFound(f"nothing is pinned as {name!r} in the file cache") from None
        if pin is None:
            raise DataLoss(
                f"pin {name!r} is damaged ({path!r}), so that nothing of its group is evicted: "
                "pin again what it kept, or unpin it"
            )
        return pin

    def verify(self) -> tuple[int, list[str]]:
        """Read all pins; return how many there are, and the names of those that are damaged."""
        names = self.names("")
        bad = []
        for name in names:
            try:
                self.get(name)
            except NotFound:
                continue
            except SnaploaderError:
                bad.append(name)
        return len(names), bad

    def _path(self, name: str) -> str:
        return f"{self._folder}/{check_pin_name(name)}"

    def _flush_folder(self) -> None:
        """Make the names in the folder of pins survive a power failure."""
        flush_folder(self._folder)
        if not self._parents_flushed:
            # Whoever made these folders need not have flushed them yet.
            layout = self._context.layout
            for folder in (layout.group_path(), layout.groups, layout.base, layout.root):
                flush_folder(folder)
            self._parents_flushed = True


def _sorted_hashes(
    digests: list[Digest], hashes: Iterable[npt.NDArray[np.uint8]]
) -> tuple[Words, npt.NDArray[np.int64]]:
    """Return each hash once, sorted, and their sizes."""
    words = [to_words([digest.hash for digest in digests])]
    sizes = [np.array([digest.size_bytes for digest in digests], dtype=np.int64)]
    if len(digests) and not 0 <= int(sizes[0].min()) <= int(sizes[0].max()) <= MAX_BLOB_BYTES:
        raise InvalidArgument("a digest to be pinned has a size that no blob has")
    for rows in hashes:
        if rows.ndim != 2 or rows.shape[1] != HASH_BYTES or rows.dtype != np.uint8:
            raise InvalidArgument(f"hashes to be pinned are not rows of {HASH_BYTES} bytes (uint8)")
        words.append(np.ascontiguousarray(rows).view(">u8").astype(np.uint64))
        sizes.append(np.full(len(rows), UNKNOWN_SIZE, dtype=np.int64))
    all_words, all_sizes = np.concatenate(words), np.concatenate(sizes)
    order = np.lexsort((all_sizes, *all_words.T[::-1]))
    all_words, all_sizes = all_words[order], all_sizes[order]
    is_last = np.ones(len(all_words), dtype=np.bool_)
    is_last[:-1] = (all_words[1:] != all_words[:-1]).any(axis=1)
    clash = ~is_last[:-1] & (all_sizes[:-1] != UNKNOWN_SIZE) & (all_sizes[:-1] != all_sizes[1:])
    if clash.any():
        row = int(np.flatnonzero(clash)[0])
        raise InvalidArgument(f"hash {to_hex(all_words[row])} is to be pinned with two sizes")
    # Of equal hashes the last is the one whose size is known, if any is.
    return all_words[is_last], all_sizes[is_last]
