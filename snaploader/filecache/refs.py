"""Refs: small mutable values under a key, such as the local manifest of a snapshot.

A ref's file is replaced in one step by rename(2). One whose checksum is wrong (a power failure, bit rot) is
removed and counts as absent.

It is not flushed to disk: fsync(2) takes some ten times as long as all the rest, and what a ref names is
not flushed either. After a power failure the last value, or on file systems other than ext4 and btrfs any
value set half a minute before, may be gone, which is a clean miss; `FileCache.sync` prevents that.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress

from snaploader import files
from snaploader.digest import DigestFunction
from snaploader.errors import DataLoss, InvalidArgument, NotFound, translate_os_errors
from snaploader.filecache.layout import Space, check_hash, disk_bytes, set_used, touch
from snaploader.filecache.usage import CacheContext, Section

_MAGIC = b"snapref1"
_HEADER_BYTES = len(_MAGIC) + 32
MAX_REF_BYTES = 64 << 20

_logger = logging.getLogger(__name__)


class RefSpace:
    """The refs of one group. Thread-safe, process-safe. `FileCache` says what the methods do."""

    def __init__(self, context: CacheContext) -> None:
        self._context = context

    def get(self, key: str, *, use: bool = True, mend: bool = True) -> bytes:
        """Without `use` its time of last use stays. Without `mend` a damaged one stays, and is DataLoss."""
        path = self._path(key)
        with translate_os_errors(f"cannot read ref {key}"):
            fd, status = self._context.open_entry(path, f"ref {key}")
            with files.closing_fd(fd):
                data = files.read_file(fd, MAX_REF_BYTES + _HEADER_BYTES)
                value = data[_HEADER_BYTES:]
                is_right = data[:_HEADER_BYTES] == _header(value)
                if is_right and use:
                    touch(fd, status, self._context.host.now_ns())
                elif is_right:
                    set_used(fd, status, status.st_atime_ns)
            if not is_right and not mend:
                raise DataLoss(f"ref {key} is damaged")
            if not is_right:
                self._context.remove_entry(Space.REFS, key, status.st_ino)
                _logger.warning("ref %s was damaged and was removed", key)
                raise NotFound(f"ref {key} is not in the file cache: it was damaged and was removed")
        return value

    def put(self, key: str, value: bytes, *, overwrite: bool) -> bool:
        path = self._path(key)
        if len(value) > MAX_REF_BYTES:
            raise InvalidArgument(f"ref {key} of {len(value)} bytes is bigger than {MAX_REF_BYTES}")
        if not overwrite:
            with suppress(NotFound):
                self.get(key)
                return False
        self._context.ledger.keep_bound()
        with (
            translate_os_errors(f"cannot write ref {key}"),
            self._context.folder.staged(_header(value) + value) as temporary,
        ):
            status = os.stat(temporary)
            set_used(temporary, status, self._context.host.now_ns())
            self._context.host.after_step("ref.written")
            size = disk_bytes(status)

            def publish(section: Section) -> bool:
                old = 0
                try:
                    found = os.stat(path, follow_symlinks=False)
                    if not stat.S_ISREG(found.st_mode):
                        self._context.folder.set_aside(path)
                    elif not overwrite:
                        return False
                    else:
                        old = disk_bytes(found)
                except (FileNotFoundError, NotADirectoryError):
                    self._context.folder.make_folder(os.path.dirname(path))
                section.change(self._context.name(Space.REFS, key), old, size)
                self._context.host.after_step("ref.counted")
                os.rename(temporary, path)
                self._context.host.after_step("ref.renamed")
                return True

            return self._context.ledger.add(size, publish)

    def delete(self, key: str) -> bool:
        with translate_os_errors(f"cannot remove ref {key}"):
            return self._context.remove_entry(Space.REFS, check_hash(key))

    def _path(self, key: str) -> str:
        return self._context.layout.entry(Space.REFS, check_hash(key))


def _header(value: bytes) -> bytes:
    return _MAGIC + bytes.fromhex(files.hash_bytes(value, DigestFunction.SHA256))
