"""Looking through a directory: what stands where, and nothing read but symbolic links.

The walk goes from descriptor to descriptor and follows no symbolic link, so it stays in the directory
whatever is in there, and whatever is exchanged there meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.formats.dirtree import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_MTIME_NS,
    MIN_MTIME_NS,
    MODE_BITS,
    DirectoryEntry,
    SymlinkEntry,
)

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


@dataclass(slots=True)
class Scan:
    """What a directory holds, by relative paths."""

    directories: dict[str, DirectoryEntry] = field(default_factory=dict)
    symlinks: dict[str, SymlinkEntry] = field(default_factory=dict)
    files: list[FoundFile] = field(default_factory=list)
    """In the order of the walk: those of one directory together, sorted by name."""
    skipped: list[str] = field(default_factory=list)
    """Sockets, FIFOs and devices, which no snapshot holds."""
    listed: dict[str, FileIdentity] = field(default_factory=dict)
    """Directories that were listed, that is, all but the excluded ones."""

    @property
    def entry_count(self) -> int:
        """How many entries a tree of it will hold."""
        return len(self.directories) + len(self.symlinks) + len(self.files)


def open_directory(path: str) -> int:
    """A descriptor of the directory at `path`, which may be a symbolic link to one."""
    with translate_os_errors(f"cannot read the directory {path!r}"):
        return os.open(path, _DIRECTORY)


def scan(root: int, where: str, exclude: Collection[str] = ()) -> Scan:
    """Look through a directory.

    Args:
        root: A descriptor of it; stays open.
        where: Its path, for messages.
        exclude: Relative paths: of a directory only the directory is found, of anything else nothing.

    Raises:
        InvalidArgument: There is more than a tree can hold.
        PermissionDenied: A directory may not be read.
        FailedPrecondition: A directory changed while it was read.
    """
    walk = _Walk(where, frozenset(exclude))
    walk.visit(root, "", 0)
    return walk.found


def check_directories(root: int, where: str, found: Scan) -> None:
    """FailedPrecondition when anything was added, removed or renamed in a directory since the scan."""
    for path, identity in found.listed.items():
        with translate_os_errors(
            f"cannot look at {shown_path(where, path)} again", absent=FailedPrecondition
        ):
            status = os.stat(path, dir_fd=root, follow_symlinks=False) if path else os.fstat(root)
        if FileIdentity.of(status) != identity:
            raise changed(where, path)


def changed(where: str, path: str) -> FailedPrecondition:
    """The error for what did not hold still."""
    return FailedPrecondition(
        f"{shown_path(where, path)} was changed while it was saved, so no consistent snapshot of it was "
        "taken: stop what writes to it and save again"
    )


class _Walk:
    def __init__(self, where: str, exclude: frozenset[str]) -> None:
        self._where = where
        self._exclude = exclude
        self.found = Scan()

    def visit(self, fd: int, path: str, depth: int) -> None:
        """Take in the directory behind `fd`, and all below."""
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{shown_path(self._where, path)} is deeper than {MAX_DEPTH} directories")
        with translate_os_errors(f"cannot read the directory {shown_path(self._where, path)}"):
            before = os.fstat(fd)
            self.found.directories[path] = DirectoryEntry(before.st_mode & MODE_BITS, _mtime_ns(before))
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
        self.found.listed[path] = identity

    def _take(self, fd: int, entry: os.DirEntry[str], path: str, depth: int) -> None:
        with self._appeared(path):
            status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            with self._appeared(path):
                child = os.open(entry.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            try:
                self.visit(child, path, depth + 1)
            finally:
                os.close(child)
        elif path in self._exclude:
            return
        elif stat.S_ISREG(status.st_mode):
            mode = status.st_mode & MODE_BITS
            self.found.files.append(FoundFile(path, FileIdentity.of(status), mode, _mtime_ns(status)))
        elif stat.S_ISLNK(status.st_mode):
            with self._appeared(path):
                target = os.readlink(entry.name, dir_fd=fd)
            self.found.symlinks[path] = SymlinkEntry(target, _mtime_ns(status))
        else:
            self.found.skipped.append(path)
        if self.found.entry_count > MAX_ENTRIES:
            raise InvalidArgument(
                f"{self._where!r} holds more than {MAX_ENTRIES} entries: save its subdirectories one by one, "
                "or exclude some"
            )

    @contextmanager
    def _appeared(self, path: str) -> Iterator[None]:
        """Errors about something that a listing has just named."""
        try:
            with translate_os_errors(f"cannot read {shown_path(self._where, path)}"):
                yield
        except (LookupError, InvalidArgument) as error:
            # Gone, or of another kind than a moment ago.
            raise changed(self._where, path) from error


def _mtime_ns(status: os.stat_result) -> int:
    return min(max(status.st_mtime_ns, MIN_MTIME_NS), MAX_MTIME_NS)


def shown_path(where: str, path: str) -> str:
    """The path of something in a directory, for messages."""
    return repr(os.path.join(where, path) if path else where)
