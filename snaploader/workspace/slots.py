"""Slots: a scarce resource of a host, such as a network index, of which each workspace holds one.

A slot is a number from 0. It is taken by a symbolic link of that name whose target is its owner's id:
symlink(2) makes it whole or not at all, and for one of two processes only. A slot belongs to its owner
until it is released, over restarts and crashes; recovery releases those whose owners are gone.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from snaploader.errors import InvalidArgument, ResourceExhausted, translate_os_errors
from snaploader.files import flush_folder, open_private
from snaploader.workspace.names import check_workspace_id

DEFAULT_SLOTS = 1 << 16


class SlotPool:
    """The slots of a host. Thread-safe; processes share them through the folder.

    Args:
        folder: Made if absent.
        count: How many slots there are: 0 to count - 1.

    Raises:
        InvalidArgument: `count` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], count: int = DEFAULT_SLOTS) -> None:
        if count <= 0:
            raise InvalidArgument(f"a pool of {count} slots can serve no workspace")
        self._folder = os.fspath(folder)
        self._count = count
        with translate_os_errors(f"cannot make {self._folder!r}"):
            parent, name = os.path.split(os.path.abspath(self._folder))
            open_private(parent, "the state directory", name)

    @property
    def count(self) -> int:
        """How many slots there are."""
        return self._count

    def acquire(self, owner: str) -> int:
        """A free slot, the lowest, for `owner`, a workspace's id.

        Raises:
            ResourceExhausted: All slots are taken.
        """
        taken = self._taken()
        for slot in range(self._count):
            if slot not in taken and self.reserve(slot, owner):
                return slot
        raise ResourceExhausted(
            f"all {self._count} slots of this host are taken: delete a workspace, or raise their number"
        )

    def reserve(self, slot: int, owner: str) -> bool:
        """Take one slot for `owner`; whether it has it now. False when it is another's, or no slot."""
        check_workspace_id(owner)
        if not self.is_slot(slot):
            return False
        with translate_os_errors(f"cannot take slot {slot} for workspace {owner!r}"):
            try:
                os.symlink(owner, self._path(slot))
            except FileExistsError:
                return self.owner(slot) == owner
            flush_folder(self._folder)
            return True

    def release(self, slot: int, owner: str) -> bool:
        """Free a slot that `owner` has; whether it had it. To be called under the owner's lock."""
        if self.owner(slot) != owner:
            return False
        with translate_os_errors(f"cannot free slot {slot}"), suppress(FileNotFoundError):
            os.unlink(self._path(slot))
        return True

    def release_all(self, owner: str) -> None:
        """Free whatever slots `owner` has. To be called under the owner's lock."""
        for slot, holder in self.owners().items():
            if holder == owner:
                self.release(slot, owner)

    def owner(self, slot: int) -> str | None:
        """Who has a slot; None when it is free, or something else lies in its place."""
        if not self.is_slot(slot):
            return None
        with translate_os_errors(f"cannot read slot {slot}"):
            try:
                return os.readlink(self._path(slot))
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return None  # it is no link: nobody has it, and nobody can get it

    def owners(self) -> dict[int, str]:
        """All slots that are taken, in order, and by whom."""
        owners = {slot: self.owner(slot) for slot in sorted(self._taken())}
        return {slot: owner for slot, owner in owners.items() if owner is not None}

    def is_slot(self, slot: object) -> bool:
        """Whether this is the number of a slot of the pool."""
        return isinstance(slot, int) and not isinstance(slot, bool) and 0 <= slot < self._count

    def _taken(self) -> set[int]:
        with translate_os_errors("cannot list the slots"):
            return {int(name) for name in os.listdir(self._folder) if name.isascii() and name.isdigit()}

    def _path(self, slot: int) -> str:
        return f"{self._folder}/{slot}"
