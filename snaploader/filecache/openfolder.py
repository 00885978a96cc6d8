"""One open cache's hold on its folder: the sign that it lives, its staging files, the quarantine.

An open cache, the owner, holds a lock on a file `tmp/<token>.lock`. Its staging files lie in `tmp/<token>/`,
its leases are called `leases/<token>.<number>`. What belongs to a token whose lock nobody holds is rubbish
and is swept; age plays no part.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snaploader import files, locks
from snaploader.digest import Buffer
from snaploader.filecache.layout import Layout
from snaploader.files import (
    Access,
    NamelessFile,
    OddEntry,
    kind_of,
    make_inside,
    open_inner,
    open_new,
    open_written,
    remove_tree,
)

_LOCK = ".lock"
MAX_QUARANTINED = 16
"""Bad files that are kept for inspection."""

_logger = logging.getLogger(__name__)


class OpenFolder:
    """The folder of one open cache. Thread-safe.

    Args:
        base: A descriptor of the layout's base, which is closed with this.
    """

    def __init__(self, layout: Layout, access: Access, base: int) -> None:
        self._layout = layout
        self.access = access
        self._base = base
        self.pid = os.getpid()
        self.token = f"{self.pid}-{secrets.token_hex(8)}"
        self._numbers = itertools.count()
        self.staging = f"{layout.owners}/{self.token}"
        self._fd = -1
        try:
            self._fd = locks.lock_new(self.staging + _LOCK, mode=access.file_mode)
            with self.folder(layout.owners) as owners:
                os.close(open_inner(self.token, owners, access, self.staging))
        except BaseException:
            self.close()
            raise

    @property
    def is_own(self) -> bool:
        """Whether this is the process that opened the folder, not a forked child of it."""
        return os.getpid() == self.pid

    def unique_name(self) -> str:
        """Return a name that nothing else has, also not after a crash."""
        return f"{self.token}.{next(self._numbers)}"

    def temp_path(self) -> str:
        """Return a new path in the staging folder."""
        return f"{self.staging}/{next(self._numbers)}"

    def nameless_file(self, folder: str) -> NamelessFile:
        """Make an empty file without a name in a folder of the layout, which is made if absent.

        The folder matters: ext4 puts a new file's inode near its folder's, and making all files in one folder
        to move them out crowds one place of the disk (2.5 times slower over 30,000 files).
        """
        try:
            return NamelessFile(folder, self.temp_path)
        except (FileNotFoundError, NotADirectoryError):
            self.make_folder(folder)
            return NamelessFile(folder, self.temp_path)

    @contextmanager
    def staged(self, data: Buffer, *, flush: bool = False) -> Iterator[str]:
        """Make a file in the staging folder; give its path. It is removed at the end unless it was renamed.

        Args:
            flush: Have the bytes on disk first.
        """
        path = self.temp_path()
        try:
            fd = open_new(path, self.access.file_mode, os.O_WRONLY)
            try:
                files.write_all(fd, data)
                if flush:
                    os.fsync(fd)
            finally:
                os.close(fd)
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    @contextmanager
    def folder(self, path: str) -> Iterator[int]:
        """Open a folder in the layout's base, and check it again: others may have replaced it."""
        name = os.path.basename(path)
        fd = open_inner(name, self._base, self.access, path)
        try:
            yield fd
        finally:
            os.close(fd)

    def open_written(self, path: str, flags: int = os.O_RDWR) -> int:
        """Open a file that is written in place, made if absent. What is no file is set aside."""
        with suppress(OddEntry):
            return open_written(path, flags, self.access)
        self.set_aside(path)
        return open_written(path, flags, self.access)

    def make_folder(self, path: str) -> None:
        """Make a folder of the layout and those above it. What is in the way, and no folder, is set aside."""
        while True:
            try:
                make_inside(self._layout.base, path, self.access)
                break
            except NotADirectoryError as error:
                self.set_aside(os.fsdecode(error.filename))

    def set_aside(self, path: str, *, known: os.stat_result | None = None) -> os.stat_result | None:
        """Move what should not be where it is to the quarantine; return its status, None when it is gone.

        Args:
            known: Only if it is still that very file.
        """
        try:
            status = os.lstat(path)
            if known is not None and (known.st_dev, known.st_ino) != (status.st_dev, status.st_ino):
                return None
            target = f"{self._layout.quarantine}/{_kept_name(path)}.{self.unique_name()}"
            os.rename(path, target)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            _logger.warning("%r was %s and was moved to %r", path, kind_of(status), target)
        with self.folder(self._layout.quarantine) as folder:
            _keep_newest(folder, MAX_QUARANTINED)
        return status

    def close(self) -> None:
        """Remove this owner's files. A forked child only drops the descriptors."""
        if self._base < 0:
            return
        try:
            # The whole folder may have been removed while it was in use.
            if self._fd >= 0 and self.is_own and os.path.isdir(self._layout.leases):
                with (
                    self.folder(self._layout.owners) as owners,
                    self.folder(self._layout.leases) as leases,
                ):
                    _remove_owned(owners, leases, self.token)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
            os.close(self._base)
            self._fd = self._base = -1

    def sweep(self) -> None:
        """Remove what dead owners left, and all in the trash. Any number of processes may do so."""
        with self.folder(self._layout.owners) as owners, self.folder(self._layout.leases) as leases:
            _sweep(owners, leases)
        with self.folder(self._layout.trash) as trash:
            for name in os.listdir(trash):
                remove_tree(name, dir_fd=trash)


def is_alive(layout: Layout, token: str) -> bool:
    """Tell whether the owner of this token still has its cache open."""
    return not locks.is_dead(f"{layout.owners}/{token}{_LOCK}")


def _sweep(owners: int, leases: int) -> None:
    names = set(os.listdir(owners))
    for name in names:
        if name.endswith(_LOCK):
            token = name.removesuffix(_LOCK)
            fd = locks.try_lock(name, dir_fd=owners)
            if fd is not None:
                try:
                    _remove_owned(owners, leases, token)
                finally:
                    os.close(fd)
            elif locks.is_odd(name, dir_fd=owners):
                _remove_owned(owners, leases, token)
    for name in os.listdir(leases):
        token = name.partition(".")[0]
        if f"{token}{_LOCK}" not in names and locks.is_dead(f"{token}{_LOCK}", dir_fd=owners):
            remove_tree(name, dir_fd=leases)


def _remove_owned(owners: int, leases: int, token: str) -> None:
    """Remove the files of an owner, its lock last so that they stay findable. The caller holds the lock.

    What only the user who made it may remove is left, with the lock, to a cache opened by that user.
    """
    remove_tree(token, dir_fd=owners)
    for name in os.listdir(leases):
        if name.partition(".")[0] == token:
            remove_tree(name, dir_fd=leases)
    if not locks.exists(token, dir_fd=owners):
        remove_tree(token + _LOCK, dir_fd=owners)


def _kept_name(path: str) -> str:
    """Return what a path below the base is called in the quarantine."""
    folder, name = os.path.split(path)
    return (os.path.basename(folder) + name)[-120:]


def _keep_newest(folder: int, count: int) -> None:
    found = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            found.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime_ns, name))
    for _, name in sorted(found)[:-count]:
        remove_tree(name, dir_fd=folder)
