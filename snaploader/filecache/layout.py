"""Where everything lies in a cache folder. Names only; nothing here touches the disk but `create`."""

from __future__ import annotations

import enum
import os
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from snaploader.digest import Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.files import Access, check_inner, open_inner, open_root

FORMAT = "v1"
"""The version of the layout. Another layout gets another name, beside this one."""

DEFAULT_GROUP_NAME = "_default"
"""Folder of the group "". No group id can be this, because ids begin with a letter or digit."""

_GROUP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{64}")
SHARDS = tuple(f"{number:02x}" for number in range(256))


class Space(enum.IntEnum):
    """The kinds of entries that a group holds, each in a folder of its own. The numbers are not stored."""

    SHA256 = 0
    BLAKE3 = 1
    REFS = 2

    @property
    def folder(self) -> str:
        """The space's folder inside that of a group."""
        return _FOLDERS[self]

    @property
    def function(self) -> DigestFunction | None:
        """The function that names the blobs of this space; None for refs."""
        return _FUNCTIONS.get(self)


_FOLDERS = ("blobs/sha256", "blobs/blake3", "refs")
_FUNCTIONS = {Space.SHA256: DigestFunction.SHA256, Space.BLAKE3: DigestFunction.BLAKE3}
_SPACES = {function: space for space, function in _FUNCTIONS.items()}


def space_of(function: DigestFunction) -> Space:
    """Return the space of the blobs of a digest function."""
    return _SPACES[function]


def check_hash(text: str) -> str:
    """Return `text`, which becomes a file name. InvalidArgument unless it is 64 lower-case hex digits."""
    if not _HASH.fullmatch(text):
        raise InvalidArgument(f"{text[:80]!r} is not 64 lower-case hexadecimal digits")
    return text


def group_folder(group_id: str) -> str:
    """Return the folder name of a group. InvalidArgument unless the id is well formed."""
    if not group_id:
        return DEFAULT_GROUP_NAME
    if not _GROUP_ID.fullmatch(group_id):
        raise InvalidArgument(
            f"group id {group_id[:140]!r} is not 1 to 128 letters, digits or any of . _ @ + - "
            "beginning with a letter or digit"
        )
    return group_id


@dataclass(frozen=True)
class Layout:
    """The paths of one cache folder, seen from one group."""

    root: str
    """The folder given by the user, absolute."""
    group: str
    """Folder name of the group."""

    @property
    def base(self) -> str:
        return f"{self.root}/{FORMAT}"

    @property
    def groups(self) -> str:
        return f"{self.base}/groups"

    @property
    def owners(self) -> str:
        return f"{self.base}/tmp"  # noqa: S108

    @property
    def trash(self) -> str:
        return f"{self.base}/trash"

    @property
    def quarantine(self) -> str:
        return f"{self.base}/quarantine"

    @property
    def leases(self) -> str:
        return f"{self.base}/leases"

    @property
    def usage(self) -> str:
        return f"{self.base}/usage"

    @property
    def state(self) -> str:
        return f"{self.base}/state"

    @property
    def uses(self) -> str:
        return f"{self.usage}/uses"

    def group_path(self, group: str | None = None) -> str:
        """Return the folder of a group, by folder name; this layout's own by default."""
        return f"{self.groups}/{group or self.group}"

    def trees(self, group: str) -> str:
        """Return where earlier releases kept tracked directories; see `scan.sweep_trees`."""
        return f"{self.group_path(group)}/trees"

    def pins(self, group: str | None = None) -> str:
        """Return the folder of a group's pins."""
        return f"{self.group_path(group)}/pins"

    def entry(self, space: Space, hash_: str, group: str | None = None) -> str:
        """Return the file of one entry."""
        return f"{self.groups}/{group or self.group}/{space.folder}/{hash_[:2]}/{hash_[2:]}"

    def blob(self, digest: Digest) -> str:
        """Return the file of a blob of this group. InvalidArgument when the digest is malformed."""
        return self.entry(_SPACES[digest.function], check_hash(digest.hash))

    def create(self, access: Access) -> int:
        """Make the folders that always exist, check those that are there, and return a descriptor of `base`.

        Those of the group's entries are made when something is stored. Errors as `open_root`.
        """
        with (
            translate_os_errors(f"cannot make the cache folder {self.root!r}", absent=FailedPrecondition),
            ExitStack() as opened,
        ):

            def inner(name: str, parent: int, path: str) -> int:
                fd = open_inner(name, parent, access, path)
                opened.callback(os.close, fd)
                return fd

            root = open_root(self.root, access, "the cache folder")
            opened.callback(os.close, root)
            base = open_inner(FORMAT, root, access, self.base)
            with ExitStack() as undo:
                undo.callback(os.close, base)
                for path in (self.owners, self.trash, self.quarantine, self.leases, self.usage):
                    inner(os.path.basename(path), base, path)
                group = inner(self.group, inner("groups", base, self.groups), self.group_path())
                for name in ("blobs", "refs", "trees", "pins"):
                    with suppress(FileNotFoundError):
                        check_inner(name, group, access, f"{self.group_path()}/{name}")
                undo.pop_all()
        return base
