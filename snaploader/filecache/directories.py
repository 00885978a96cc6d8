"""Tracked directories: whole folders in the cache, shared by their readers, removed when nobody reads.

An entry is a folder with

    data/    the tracked directory itself; while it is absent the entry does not exist
    size     the size in bytes of disk blocks, as text
    lock     readers hold it shared (flock), who adds or removes it exclusively; its access time is the last
             use, so nobody reads it
    doomed   present when the entry was removed while it was read: the last reader to leave removes it,
             and whoever asks for it before that revives it
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from snaploader import locks
from snaploader.errors import InvalidArgument, NotFound, translate_os_errors
from snaploader.filecache import recency
from snaploader.filecache.environment import Environment
from snaploader.filecache.layout import Layout, Space, check_hash
from snaploader.filecache.trash import TrashCan
from snaploader.files import remove_tree
from snaploader.folders import OddEntry, open_new, open_regular

_BLOCK_BYTES = 512
BUSY_S = 0.001
"""Pause between two tries to add an entry that another is adding or removing."""


class DirectoryHandle:
    """A tracked directory in use: it stays until the handle is released. A context manager. Thread-safe."""

    def __init__(self, path: str, fd: int, released: Callable[[], None]) -> None:
        self.path = path
        """The directory. Do not change what is in it."""
        self._fd = fd
        self._released = released

    def release(self) -> None:
        """End the use. Again is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._released()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class DirectoryStore:
    """The tracked directories of one group. Thread-safe, process-safe."""

    def __init__(self, environment: Environment, trash: TrashCan, make_room: Callable[[int], None]) -> None:
        self._env = environment
        self._layout = environment.layout
        self._trash = trash
        self._make_room = make_room

    def add(self, key: str, path: str) -> bool:
        """See `FileCache.add_directory`."""
        entry = self._entry(key)
        with translate_os_errors(f"cannot add directory {path!r} as {key}"):
            if not os.path.isdir(path) or os.path.islink(path):
                raise InvalidArgument(f"{path!r} is not a directory")
            size = measure_tree(path)
            source = path
            if os.stat(path).st_dev != os.stat(self._layout.base).st_dev:
                source = shutil.copytree(path, self._env.session.temp_path(), symlinks=True)
            added = self._publish(entry, source, size)
            if added and source != path:
                shutil.rmtree(path)
            return added

    def _publish(self, entry: str, source: str, size: int) -> bool:
        while True:
            if self._revive(entry):
                return False
            fd = self._lock_for_adding(entry)
            if fd is None:
                time.sleep(BUSY_S)
                continue
            try:
                if os.path.exists(f"{entry}/data"):
                    continue
                with self._env.session.staged(str(size).encode()) as temporary:
                    os.rename(temporary, f"{entry}/size")
                recency.touch(fd, os.fstat(fd), self._env.host.now_ns())
                with self._env.ledger.section() as section:
                    room = section.total_bytes is not None and (
                        section.total_bytes + size <= self._env.max_bytes
                    )
                    if room:
                        section.change(self._name(entry), 0, size)
                        self._env.host.after_step("directory.counted")
                        try:
                            os.rename(source, f"{entry}/data")
                        except OSError:
                            section.change(self._name(entry), size, 0)
                            raise
                        self._env.host.after_step("directory.renamed")
                        return True
            except BaseException:
                # Nobody else can have seen the entry: it has no directory yet.
                os.close(fd)
                fd = -1
                discard_unfinished(self._trash, entry)
                raise
            finally:
                if fd >= 0:
                    os.close(fd)
            self._make_room(size)

    def _lock_for_adding(self, entry: str) -> int | None:
        """The entry's lock, made if need be; None while another adds, reads or removes it."""
        self._env.session.make_folder(entry)
        # Another process may sweep the unfinished entry at any time before it is locked.
        with suppress(FileNotFoundError):
            os.close(self._env.session.open_written(f"{entry}/lock"))
        return locks.try_lock(f"{entry}/lock")

    def _revive(self, entry: str) -> bool:
        """Whether the entry exists; it is not doomed any more then, and this was a use of it."""
        fd = self._hold(entry)
        if fd is None:
            return False
        os.close(fd)
        return True

    def _hold(self, entry: str) -> int | None:
        """Lock an entry as a reader and take its doom away; None when it does not exist."""
        try:
            # Waits for who adds or removes it, which takes microseconds.
            fd = locks.lock_existing(f"{entry}/lock", shared=True)
        except (FileNotFoundError, NotADirectoryError, OddEntry):
            return None
        try:
            if is_folder(f"{entry}/data"):
                remove_tree(f"{entry}/doomed")
                recency.touch(fd, os.fstat(fd), self._env.host.now_ns())
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def acquire(self, key: str) -> DirectoryHandle:
        """See `FileCache.acquire_directory`."""
        entry = self._entry(key)
        with translate_os_errors(f"cannot use directory {key}"):
            fd = self._hold(entry)
        if fd is None:
            raise NotFound(f"directory {key} is not in the file cache")
        return DirectoryHandle(f"{entry}/data", fd, lambda: self._left(entry))

    def remove(self, key: str) -> bool:
        """See `FileCache.remove_directory`."""
        entry = self._entry(key)
        with translate_os_errors(f"cannot remove directory {key}"):
            if not is_folder(f"{entry}/data"):
                return False
            with suppress(FileNotFoundError, FileExistsError):
                os.close(open_new(f"{entry}/doomed", self._env.session.access.file_mode))
            self._left(entry)
            return True

    def _left(self, entry: str) -> None:
        """Somebody stopped using the entry: remove it if it is doomed and nobody else uses it."""
        with translate_os_errors("cannot remove a directory nobody uses any more"):
            if os.path.exists(f"{entry}/doomed"):
                discard_entry(self._env, self._trash, entry, only_doomed=True)

    def _entry(self, key: str) -> str:
        return self._layout.entry(Space.TREES, check_hash(key))

    def _name(self, entry: str) -> str:
        return os.path.relpath(entry, self._layout.groups)


def discard_entry(
    environment: Environment, trash: TrashCan, entry: str, *, only_doomed: bool = False
) -> int | None:
    """Take an entry out of the cache unless it is in use; its size, or None when it was not done."""
    fd = locks.try_lock(f"{entry}/lock")
    if fd is None:
        return None
    try:
        if only_doomed and not os.path.exists(f"{entry}/doomed"):
            return None
        size = _recorded_size(entry) if is_folder(f"{entry}/data") else 0
        target = trash.new_path()
        with environment.ledger.section() as section:
            os.rename(entry, target)
            environment.host.after_step("evict.trashed")
            section.change(os.path.relpath(entry, environment.layout.groups), size, 0)
        # Whoever waits for this lock must see that the entry is gone.
        with suppress(FileNotFoundError):
            os.unlink(f"{target}/lock")
    finally:
        os.close(fd)
    trash.empty(target)
    return size


def measure_entry(entry: str) -> tuple[int, int]:
    """Size and last use of an entry, for a scan.

    Raises:
        FileNotFoundError: It is not whole.
        NotADirectoryError, OddEntry: It is no entry at all.
    """
    if not stat.S_ISDIR(os.lstat(f"{entry}/data").st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), entry)
    lock = os.lstat(f"{entry}/lock")
    if not stat.S_ISREG(lock.st_mode):
        raise OddEntry(f"{entry!r} has no lock file: move it away")
    return _recorded_size(entry), lock.st_atime_ns


def is_folder(path: str) -> bool:
    """Whether a folder is there, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def measure_tree(path: str) -> int:
    """Disk blocks of a directory and all in it, in bytes; files with several links count once."""
    seen: set[int] = set()
    total = os.lstat(path).st_blocks * _BLOCK_BYTES
    for folder, names, files in os.walk(path):
        for name in (*names, *files):
            status = os.lstat(f"{folder}/{name}")
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * _BLOCK_BYTES
    return total


def _recorded_size(entry: str) -> int:
    with os.fdopen(open_regular(f"{entry}/size")[0], "rb") as file:
        text = file.read(32)
    # A power failure may have emptied it.
    return int(text) if text.isdigit() else measure_tree(f"{entry}/data")


def sweep_doomed(environment: Environment, trash: TrashCan, layout: Layout, group: str) -> None:
    """Remove what was doomed or never finished and whose users died."""
    folder = f"{layout.group_path(group)}/{Space.TREES.folder}"
    for shard in _folders(folder):
        for entry in _folders(shard):
            # What is odd in an entry is set aside by the scan that follows.
            with suppress(FileNotFoundError, NotADirectoryError, OddEntry):
                if os.path.exists(f"{entry}/doomed"):
                    discard_entry(environment, trash, entry, only_doomed=True)
                elif not os.path.exists(f"{entry}/data"):
                    discard_unfinished(trash, entry)


def _folders(path: str) -> list[str]:
    """The paths of the folders in a folder; none when it is not there."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as found:
        return [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    return []


def discard_unfinished(trash: TrashCan, entry: str) -> None:
    """Remove an entry whose adder died before it was one."""
    fd = locks.try_lock(f"{entry}/lock")
    if fd is None:
        return
    try:
        if not os.path.exists(f"{entry}/data"):
            target = trash.new_path()
            os.rename(entry, target)
            with suppress(FileNotFoundError):
                os.unlink(f"{target}/lock")
            trash.empty(target)
    finally:
        os.close(fd)
