"""Refs: small mutable values under a key, such as the local manifest of a snapshot.

A ref file is a magic of eight bytes, the SHA-256 of the value, and the value. It is replaced in one step by
rename(2). A file whose checksum is wrong (a power failure, bit rot) is removed and counts as absent.

It is not flushed to disk: fsync(2) takes some ten times as long as all the rest, and what a ref names is
not flushed either. After a power failure the last value, or on file systems other than ext4 and btrfs any
value set half a minute before, may be gone, which is a clean miss; `FileCache.sync` prevents that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator

from snaploader import files
from snaploader.errors import InvalidArgument, NotFound, translate_os_errors
from snaploader.filecache import recency
from snaploader.filecache.evict import Evictor
from snaploader.filecache.layout import Space, check_hash
from snaploader.filecache.scan import disk_bytes, entries, entry_name, set_aside_odd
from snaploader.filecache.usage import CacheContext, Section
from snaploader.files import OddEntry, open_regular

_MAGIC = b"snapref1"
_HEADER_BYTES = len(_MAGIC) + 32
MAX_REF_BYTES = 64 << 20

_logger = logging.getLogger(__name__)


def encode(value: bytes) -> bytes:
    """Return the file that holds a value."""
    return _MAGIC + hashlib.sha256(value).digest() + value


def decode(data: bytes) -> bytes | None:
    """Return the value in a file; None when the file is damaged."""
    value = data[_HEADER_BYTES:]
    header = _MAGIC + hashlib.sha256(value).digest()
    return value if data[:_HEADER_BYTES] == header else None


class RefSpace:
    """The refs of one group. Thread-safe, process-safe."""

    def __init__(self, context: CacheContext, evictor: Evictor) -> None:
        self._context = context
        self._evictor = evictor

    def get(self, key: str, *, use: bool = True) -> bytes:
        """See `FileCache.get_ref`. Without `use` its time of last use stays."""
        path = self._path(key)
        absent = f"ref {key} is not in the file cache"
        with translate_os_errors(f"cannot read ref {key}"):
            try:
                fd, status = open_regular(path)
            except (FileNotFoundError, NotADirectoryError):
                raise NotFound(absent) from None
            except OddEntry as error:
                set_aside_odd(self._context, path)
                raise NotFound(f"{absent}: {error}") from error
            try:
                value = decode(files.read_file(fd, MAX_REF_BYTES + _HEADER_BYTES))
                if value is not None:
                    if use:
                        recency.touch(fd, status, self._context.host.now_ns())
                    else:
                        recency.set_used(fd, status, status.st_atime_ns)
            finally:
                os.close(fd)
            if value is None:
                self._remove(key, status.st_ino)
                _logger.warning("ref %s was damaged and was removed", key)
                raise NotFound(f"{absent}: it was damaged and was removed")
        return value

    def put(self, key: str, value: bytes, *, overwrite: bool) -> bool:
        """See `FileCache.put_ref`."""
        path = self._path(key)
        if len(value) > MAX_REF_BYTES:
            raise InvalidArgument(f"ref {key} of {len(value)} bytes is bigger than {MAX_REF_BYTES}")
        if not overwrite and self._stands(key):
            return False
        with (
            translate_os_errors(f"cannot write ref {key}"),
            self._context.folder.staged(encode(value)) as temporary,
        ):
            status = os.stat(temporary)
            recency.set_used(temporary, status, self._context.host.now_ns())
            self._context.host.after_step("ref.written")
            size = disk_bytes(status)
            return self._evictor.add(
                size, lambda section: self._publish(section, key, temporary, path, size, overwrite)
            )

    def _publish(
        self, section: Section, key: str, temporary: str, path: str, size: int, overwrite: bool
    ) -> bool:
        try:
            found = os.stat(path, follow_symlinks=False)
            old = disk_bytes(found)
            if not stat.S_ISREG(found.st_mode):
                self._context.folder.set_aside(path)
            elif not overwrite:
                return False
        except (FileNotFoundError, NotADirectoryError):
            old = 0
            self._context.folder.make_folder(os.path.dirname(path))
        section.change(self._name(key), old, size)
        self._context.host.after_step("ref.counted")
        os.rename(temporary, path)
        self._context.host.after_step("ref.renamed")
        return True

    def delete(self, key: str) -> bool:
        """See `FileCache.delete_ref`."""
        with translate_os_errors(f"cannot remove ref {key}"):
            return self._remove(key, None)

    def keys(self) -> Iterator[str]:
        """Yield the keys of all refs."""
        layout = self._context.layout
        return (found.hash for found in entries(layout, layout.group) if found.space is Space.REFS)

    def _stands(self, key: str) -> bool:
        try:
            self.get(key)
        except NotFound:
            return False
        return True

    def _remove(self, key: str, inode: int | None) -> bool:
        """Remove a ref; if `inode` is given, only that very file."""
        path = self._path(key)
        with self._context.ledger.section() as section:
            try:
                status = os.stat(path, follow_symlinks=False)
                if inode is not None and status.st_ino != inode:
                    return False
                if not stat.S_ISREG(status.st_mode):
                    self._context.folder.set_aside(path)
                else:
                    os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            section.change(self._name(key), disk_bytes(status), 0)
        return True

    def _path(self, key: str) -> str:
        return self._context.layout.entry(Space.REFS, check_hash(key))

    def _name(self, key: str) -> str:
        return entry_name(self._context.layout.group, Space.REFS, key)
