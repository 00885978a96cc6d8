"""A cache folder: where everything lies in it, and an open cache's hold on it.

An open cache, the owner, holds a lock on a file `tmp/<token>.lock`. Its staging files lie in `tmp/<token>/`,
its leases are called `leases/<token>.<number>`. What belongs to a token whose lock nobody holds is rubbish
and is swept; age plays no part.

The access time of an entry's file says when it was last used. It is set explicitly (mount options such as
noatime do not matter), and so it survives restarts.
"""

from __future__ import annotations

import enum
import itertools
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Self

from snaploader import files
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.files import (
    Access,
    NamelessFile,
    OddEntry,
    closing_fd,
    kind_of,
    make_inside,
    open_folder,
    open_new,
    open_written,
    remove_tree,
)

FORMAT = "v1"
"""The version of the layout. Another layout gets another name, beside this one."""
DEFAULT_GROUP_NAME = "_default"
"""Folder of the group "". No group id can be this, because ids begin with a letter or digit."""
MAX_QUARANTINED = 16
"""Bad files that are kept for inspection."""
GRANULARITY_NS = 1_000_000_000
"""Uses of a file closer together than this count as one: setting its time of use costs a write each time."""
BLOCK_BYTES = 512
"""Unit of st_blocks; see stat(2)."""
ENTRY_NAME_LENGTH = 62
SHARDS = tuple(f"{number:02x}" for number in range(256))

_GROUP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LOCK = ".lock"

_logger = logging.getLogger(__name__)


class Space(enum.IntEnum):
    """The kinds of entries that a group holds, each in a folder of its own. The numbers are not stored."""

    folder: str
    """The space's folder inside that of a group."""
    function: DigestFunction | None
    """The function that names the blobs of this space; None for refs and private files."""

    def __new__(cls, number: int, folder: str, function: DigestFunction | None) -> Self:
        """Make a member, whose value is the number."""
        space = int.__new__(cls, number)
        space._value_ = number
        space.folder = folder
        space.function = function
        return space

    SHA256 = 0, "blobs/sha256", DigestFunction.SHA256
    BLAKE3 = 1, "blobs/blake3", DigestFunction.BLAKE3
    REFS = 2, "refs", None
    PRIVATE = 3, "private", None


SPACE_OF = {space.function: space for space in Space if space.function}
"""Where the blobs of a digest function are."""


def check_hash(text: str) -> str:
    """Return `text`, which becomes a file name. InvalidArgument unless it is 64 lower-case hex digits."""
    if not _HASH.fullmatch(text):
        raise InvalidArgument(f"{text[:80]!r} is not 64 lower-case hexadecimal digits")
    return text


def group_folder(group_id: str) -> str:
    """Return the folder name of a group. InvalidArgument unless the id is well formed."""
    if group_id and not _GROUP_ID.fullmatch(group_id):
        raise InvalidArgument(
            f"group id {group_id[:140]!r} is not 1 to 128 letters, digits or any of . _ @ + - "
            "beginning with a letter or digit"
        )
    return group_id or DEFAULT_GROUP_NAME


def entry_name(group: str, space: Space, hash_: str) -> str:
    """Return the ledger's name of an entry: its path relative to the folder of all groups."""
    return f"{group}/{space.folder}/{hash_[:2]}/{hash_[2:]}"


def disk_bytes(status: os.stat_result) -> int:
    """Return the disk blocks of a file, in bytes."""
    return status.st_blocks * BLOCK_BYTES


def touch(path: str | int, status: os.stat_result, now_ns: int) -> None:
    """Record a use in a file of this status, unless it was used within GRANULARITY_NS before."""
    if not 0 <= now_ns - status.st_atime_ns < GRANULARITY_NS:
        set_used(path, status, now_ns)


def set_used(path: str | int, status: os.stat_result, now_ns: int) -> None:
    """Set when a file was last used. Its time of last write stays, for it is part of its identity."""
    # A cache shared with another user can be read without owning its files.
    with suppress(PermissionError):
        os.utime(path, ns=(now_ns, status.st_mtime_ns), follow_symlinks=isinstance(path, int))


class Layout:
    """The paths of a cache folder, `root` (absolute), seen from one group (its folder name). Immutable."""

    def __init__(self, root: str, group: str) -> None:
        self.root = root
        self.group = group
        self.base = f"{root}/{FORMAT}"
        self.groups = f"{self.base}/groups"
        self.owners = f"{self.base}/tmp"  # noqa: S108
        self.trash = f"{self.base}/trash"
        self.quarantine = f"{self.base}/quarantine"
        self.leases = f"{self.base}/leases"
        self.usage = f"{self.base}/usage"

    def group_path(self, group: str | None = None) -> str:
        """Return the folder of a group, by folder name; this layout's own by default."""
        return f"{self.groups}/{group or self.group}"

    def pins(self, group: str | None = None) -> str:
        """Return the folder of a group's pins."""
        return f"{self.group_path(group)}/pins"

    def entry(self, space: Space, hash_: str, group: str | None = None) -> str:
        """Return the file of one entry."""
        return f"{self.groups}/{entry_name(group or self.group, space, hash_)}"

    def blob(self, digest: Digest) -> str:
        """Return the file of a blob of this group. InvalidArgument when the digest is malformed."""
        return self.entry(SPACE_OF[digest.function], check_hash(digest.hash))

    def private(self, digest: Digest) -> str:
        """Return the file of a private file of this group. Errors as `blob`."""
        return self.entry(Space.PRIVATE, check_hash(digest.hash))

    def create(self, access: Access) -> int:
        """Make the folders that always exist, check those that are there, and return a descriptor of `base`.

        Those of the group's entries are made when something is stored. Errors as `open_folder`.
        """
        with (
            translate_os_errors(f"cannot make the cache folder {self.root!r}", absent=FailedPrecondition),
            ExitStack() as opened,
        ):

            def inner(parent: int, path: str) -> int:
                fd = open_folder(path, access, parent=parent)
                opened.callback(os.close, fd)
                return fd

            root = open_folder(self.root, access, "the cache folder")
            opened.callback(os.close, root)
            base = inner(root, self.base)
            for path in (self.owners, self.trash, self.quarantine, self.leases, self.usage):
                inner(base, path)
            self.create_group(access, base)
            return os.dup(base)

    def create_group(self, access: Access, base: int) -> None:
        """Make the folder of the group, and check what is there of it. Errors as `open_folder`.

        Args:
            base: A descriptor of `base`, as `create` returns it.
        """
        with ExitStack() as opened:

            def inner(parent: int, path: str) -> int:
                fd = open_folder(path, access, parent=parent)
                opened.callback(os.close, fd)
                return fd

            group = inner(inner(base, self.groups), self.group_path())
            for name in ("blobs", "refs", "private", "trees", "pins"):
                with suppress(FileNotFoundError):
                    if not stat.S_ISREG(os.stat(name, dir_fd=group, follow_symlinks=False).st_mode):
                        inner(group, f"{self.group_path()}/{name}")


class OpenFolder:
    """The folder of one open cache, made if absent: its staging files, the quarantine. Thread-safe."""

    def __init__(self, layout: Layout, access: Access) -> None:
        self.layout = layout
        self.access = access
        self.pid = os.getpid()
        self.token = f"{self.pid}-{secrets.token_hex(8)}"
        self._numbers = itertools.count()
        self._staging = f"{layout.owners}/{self.token}"
        self._fd = -1
        self._base = layout.create(access)
        try:
            self._fd = files.lock_new(self._staging + _LOCK, mode=access.file_mode)
            with self.folder(layout.owners) as owners:
                os.close(open_folder(self._staging, access, parent=owners))
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
        return f"{self._staging}/{next(self._numbers)}"

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
        """Make a file in the staging folder; give its path. It goes at the end unless it was renamed."""
        path = self.temp_path()
        try:
            with closing_fd(open_new(path, self.access.file_mode, os.O_WRONLY)) as fd:
                files.write_all(fd, data)
                if flush:
                    os.fsync(fd)
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def add_group(self, layout: Layout) -> None:
        """Make the folder of another group, that of `layout`, and check it."""
        with translate_os_errors(f"cannot make the folder of group {layout.group!r}"):
            layout.create_group(self.access, self._base)

    def folder(self, path: str) -> AbstractContextManager[int]:
        """Open a folder in the layout's base, and check it again: others may have replaced it."""
        return closing_fd(open_folder(path, self.access, parent=self._base))

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
                make_inside(self.layout.base, path, self.access)
                break
            except NotADirectoryError as error:
                self.set_aside(os.fsdecode(error.filename))

    def set_aside(self, path: str, *, known: os.stat_result | None = None) -> os.stat_result | None:
        """Move what is out of place to quarantine; return its status. None when it (or `known`) is gone."""
        try:
            status = os.lstat(path)
            if known is not None and (known.st_dev, known.st_ino) != (status.st_dev, status.st_ino):
                return None
            folder, name = os.path.split(path)
            kept_name = (os.path.basename(folder) + name)[-120:]
            target = f"{self.layout.quarantine}/{kept_name}.{self.unique_name()}"
            os.rename(path, target)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            _logger.warning("%r was %s and was moved to %r", path, kind_of(status), target)
        with self.folder(self.layout.quarantine) as quarantine:
            _keep_newest(quarantine, MAX_QUARANTINED)
        return status

    def close(self) -> None:
        """Remove this owner's files. A forked child only drops the descriptors."""
        if self._base < 0:
            return
        try:
            # The whole folder may have been removed while it was in use.
            if self._fd >= 0 and self.is_own and os.path.isdir(self.layout.leases):
                with self._owned() as (owners, leases):
                    _remove_owned(owners, leases, self.token)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
            os.close(self._base)
            self._fd = self._base = -1

    def sweep(self) -> None:
        """Remove what dead owners left, and all in the trash. Any number of processes may do so."""
        with self._owned() as (owners, leases):
            names = set(os.listdir(owners))
            for name in names:
                if name.endswith(_LOCK):
                    fd = files.try_lock(name, dir_fd=owners)
                    try:
                        if fd is not None or files.is_odd(name, dir_fd=owners):
                            _remove_owned(owners, leases, name.removesuffix(_LOCK))
                    finally:
                        if fd is not None:
                            os.close(fd)
            for name in os.listdir(leases):
                lock = name.partition(".")[0] + _LOCK
                if lock not in names and files.is_dead(lock, dir_fd=owners):
                    remove_tree(name, dir_fd=leases)
        with self.folder(self.layout.trash) as trash:
            for name in os.listdir(trash):
                remove_tree(name, dir_fd=trash)

    @contextmanager
    def _owned(self) -> Iterator[tuple[int, int]]:
        """Open the folders of what owners have."""
        with self.folder(self.layout.owners) as owners, self.folder(self.layout.leases) as leases:
            yield owners, leases


def is_alive(layout: Layout, token: str) -> bool:
    """Tell whether the owner of this token still has its cache open."""
    return not files.is_dead(f"{layout.owners}/{token}{_LOCK}")


def _remove_owned(owners: int, leases: int, token: str) -> None:
    """Remove the files of an owner, its lock last so that they stay findable. The caller holds the lock.

    What only the user who made it may remove is left, with the lock, to a cache opened by that user.
    """
    remove_tree(token, dir_fd=owners)
    for name in os.listdir(leases):
        if name.partition(".")[0] == token:
            remove_tree(name, dir_fd=leases)
    if files.lstat(token, dir_fd=owners) is None:
        remove_tree(token + _LOCK, dir_fd=owners)


def _keep_newest(folder: int, count: int) -> None:
    found = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            found.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime_ns, name))
    for _, name in sorted(found)[:-count]:
        remove_tree(name, dir_fd=folder)
