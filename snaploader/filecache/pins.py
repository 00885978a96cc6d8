"""Pins: blobs and refs that no process may evict until their name is unpinned, over restarts and crashes.

A pin is a file `pins/<name>` of its group (`pinfile`), replaced in one step by rename(2) and flushed to
disk. What a damaged pin was to keep is not known any more, so that nothing of its group is evicted until
it is pinned again or unpinned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from snaploader.digest import HASH_BYTES, MAX_BLOB_BYTES, Digest
from snaploader.errors import DataLoss, InvalidArgument, NotFound, SnaploaderError, translate_os_errors
from snaploader.filecache import pinfile
from snaploader.filecache.environment import Environment
from snaploader.filecache.hashes import Words, to_hex, to_words
from snaploader.filecache.pinfile import MAX_PIN_ENTRIES, UNKNOWN_SIZE, Pin
from snaploader.files import flush_folder
from snaploader.locks import is_odd


class PinSpace:
    """The pins of one group. Thread-safe, process-safe."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._folder = environment.layout.pins()
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
            session = self._env.session
            with session.staged(pinfile.encode(words, sizes_bytes, keys), flush=True) as temporary:
                self._env.host.after_step("pin.written")
                session.make_folder(self._folder)
                # Evictions happen in sections too, so none is under way that has not seen this pin.
                with self._env.ledger.section() as section:
                    # First, so that a pin whose process is killed here is seen as well.
                    section.pins_changed()
                    self._env.host.after_step("pin.announced")
                    if is_odd(path):
                        session.set_aside(path)
                    os.rename(temporary, path)
                self._env.host.after_step("pin.renamed")
                self._flush_folder()

    def unpin(self, name: str) -> bool:
        """See `FileCache.unpin`."""
        path = self._path(name)
        with translate_os_errors(f"cannot unpin {name!r}"):
            with self._env.ledger.section() as section:
                if not os.path.lexists(path):
                    return False
                section.pins_changed()
                self._env.host.after_step("unpin.announced")
                if is_odd(path):
                    self._env.session.set_aside(path)
                else:
                    os.unlink(path)
            self._env.host.after_step("unpin.unlinked")
            self._flush_folder()
        return True

    def names(self, prefix: str) -> list[str]:
        """See `FileCache.pins`."""
        with translate_os_errors("cannot list pins"), suppress(FileNotFoundError):
            return sorted(
                name for name in os.listdir(self._folder) if name.startswith(prefix) and pinfile.is_name(name)
            )
        return []

    def get(self, name: str) -> Pin:
        """See `FileCache.pinned`."""
        path = self._path(name)
        with translate_os_errors(f"cannot read pin {name!r}"):
            try:
                pin = pinfile.load(path)[1]
            except FileNotFoundError:
                raise NotFound(f"nothing is pinned as {name!r} in the file cache") from None
        if pin is None:
            raise DataLoss(
                f"pin {name!r} is damaged ({path!r}), so that nothing of its group is evicted: "
                "pin again what it kept, or unpin it"
            )
        return pin

    def verify(self) -> tuple[int, list[str]]:
        """Read all pins; how many there are, and the names of those that are damaged."""
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
        return f"{self._folder}/{pinfile.check_name(name)}"

    def _flush_folder(self) -> None:
        """Make the names in the folder of pins survive a power failure."""
        flush_folder(self._folder)
        if not self._parents_flushed:
            # Whoever made these folders need not have flushed them yet.
            layout = self._env.layout
            for folder in (layout.group_path(), layout.groups, layout.base, layout.root):
                flush_folder(folder)
            self._parents_flushed = True


def _sorted_hashes(
    digests: list[Digest], hashes: Iterable[npt.NDArray[np.uint8]]
) -> tuple[Words, npt.NDArray[np.int64]]:
    """All hashes once, sorted, and their sizes."""
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
