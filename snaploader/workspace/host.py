"""What a host keeps for its workspaces in its state directory: the id of that directory, locks and slots.

There is one state directory for each host of a catalog: with another one the same workspaces would seem to
have lost their processes and files, and be brought back a second time from older snapshots. So it has an id,
in its file `state-id`, and the catalog keeps the id of each host's. A copy has the same id: it is told apart
by where that file lies, which the catalog keeps too. See `is_same_place`.

Records of paused workspaces, which lie there too, are in `records`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Final

from snaploader._environment import read_boot_id
from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    translate_os_errors,
)
from snaploader.files import closing_fd, flush_folder, lock_new, open_new, open_private, unlock
from snaploader.workspace.catalog import Catalog, HostState
from snaploader.workspace.model import check_workspace_id

FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.05

DEFAULT_SLOTS = 1 << 16

_LOCK = ".lock"
_STATE_ID = "state-id"


def state_folder(folder: str | os.PathLike[str]) -> str:
    """The path of a folder in the state directory, both made if absent, for this user alone."""
    path = os.fspath(folder)
    with translate_os_errors(f"cannot make {path!r}"):
        parent, name = os.path.split(os.path.abspath(path))
        open_private(parent, "the state directory", name)
    return path


def write_new(path: str, data: bytes) -> None:
    """Write a new file and flush it. Raises OSError, FileExistsError when there is one."""
    with os.fdopen(open_new(path, 0o600, os.O_WRONLY), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class HostHome:
    """Claims the host for its state directory, once. Thread-safe."""

    def __init__(self, folder: str, catalog: Catalog, host: str) -> None:
        self._folder = folder
        self._catalog = catalog
        self._host = host
        self._mutex = threading.Lock()
        self.is_claimed = False

    def claim(self, *, replace: bool = False) -> None:
        """Make sure that this is the host's state directory; the first directory to ask becomes it.

        FailedPrecondition when the host has another one, unless that is to be replaced because it is lost for
        good, or when this one is another host's, or a copy.
        """
        with self._mutex:
            if self.is_claimed and not replace:
                return
            state_id = self._state_id()
            folder = os.path.abspath(self._folder)
            with translate_os_errors(f"cannot look at {self._folder!r}"):
                place = place_of(f"{self._folder}/{_STATE_ID}")
            with self._catalog.reading() as reader:
                known = reader.host_state(self._host)
            ours = None if known is None or known.state_id != state_id else known
            if ours is None or ours.place != place:
                if ours is not None and ours.place and not replace and not is_same_place(ours.place, place):
                    raise FailedPrecondition(
                        f"state directory {folder!r} is a copy of that of host {self._host!r}, "
                        f"{ours.state_directory!r}. On another machine, begin with an empty one and another "
                        "name for the host. If it was moved to another disk, or brought back from a backup, "
                        "and the other is gone for good, recover with --rebind-state (or "
                        "recover(rebind_state=True))"
                    )
                with self._catalog.transaction() as tx:
                    tx.claim_host(HostState(self._host, state_id, folder, place), replace=replace)
            self.is_claimed = True

    def _state_id(self) -> str:
        path = f"{self._folder}/{_STATE_ID}"
        with translate_os_errors(f"cannot read {path!r}"):
            for _ in range(2):
                with suppress(FileNotFoundError), open(path, encoding="ascii", errors="replace") as file:
                    return _checked(file.read(100), path)
                self._make(path)
        raise FailedPrecondition(f"{path!r} is being removed: leave it alone")

    def _make(self, path: str) -> None:
        """Another process may do so too; one of them wins."""
        temporary = f"{path}.{uuid.uuid4().hex}"
        try:
            write_new(temporary, f"{uuid.uuid4().hex}\n".encode())
            with suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        flush_folder(self._folder)


def place_of(path: str) -> dict[str, Any]:
    """What tells a file from a copy of it: machine, boot, device and inode. Raises OSError."""
    status = os.stat(path)
    return {"machine": _machine(), "boot": read_boot_id(), "device": status.st_dev, "inode": status.st_ino}


def is_same_place(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tells whether a file is the one that was known, and no copy. Pure.

    Devices are numbered anew at each boot, so they count within one boot only. Another machine has another
    boot; after a reboot it is told by its machine id, where both are known (a container may have none).
    """
    if known.get("inode") != now["inode"]:
        return False
    if known.get("boot") == now["boot"]:
        return bool(known.get("device") == now["device"])
    machines = {known.get("machine", ""), now["machine"]}
    return "" in machines or len(machines) == 1


def _machine() -> str:
    """An id of this machine, made from machine-id(5), which itself is not to be given away; empty: none."""
    with suppress(OSError), open("/etc/machine-id", "rb") as file:
        machine_id = file.read(100).strip()
        if machine_id:
            return hashlib.blake2b(machine_id, digest_size=16, person=b"snaploader state").hexdigest()
    return ""


def _checked(text: str, path: str) -> str:
    try:
        return uuid.UUID(hex=text.strip()).hex
    except ValueError:
        raise FailedPrecondition(
            f"{path!r} is damaged. If this is the right state directory, remove that file and recover with "
            "--rebind-state"
        ) from None


class HeldLock:
    """A workspace's lock that is held, by everyone who shares it together. Thread-safe."""

    def __init__(self, workspace_id: str, path: str, let_go: Callable[[], None]) -> None:
        self.workspace_id = workspace_id
        self._path = path
        self._let_go = let_go
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._holders = 1
        self.turn = threading.Lock()
        """Held by whoever of those who share it works on the workspace: one after the other."""

    def share(self) -> HeldLock:
        """Hold it once more: it is let go when everyone has released it."""
        with self._mutex:
            if not self._holders:
                raise Cancelled(f"the lock of workspace {self.workspace_id!r} was released already")
            self._holders += 1
        return self

    def release(self) -> None:
        """Give up one share; the last one lets the lock go."""
        with self._mutex:
            self._holders -= 1
            is_last = self._holders == 0
        if is_last:
            self._let_go()

    def remove_file(self) -> None:
        """Remove the lock's file, for a workspace that is gone. Others that wait for it notice.

        In a forked child it does nothing: its parent holds the lock.
        """
        if os.getpid() != self._pid:
            return
        with suppress(FileNotFoundError), translate_os_errors(f"cannot remove {self._path!r}"):
            os.unlink(self._path)


class WorkspaceLocks:
    """One lock per workspace: between threads and processes of a host, and between hosts. Thread-safe.

    On a host it is flock(2) on a small file, which a process that dies gives up; between hosts it is whatever
    `Catalog.lock` takes, on a connection of its own. Whoever waits looks again after short, growing pauses,
    so that waiting can be called off, and at once when the lock is released within this process.

    Args:
        folder: Holds the lock files; made if absent. The same for all processes of the host.
        catalog: Locks between the hosts that share it; None where the host's own lock suffices.
    """

    def __init__(self, folder: str | os.PathLike[str], catalog: Catalog | None = None) -> None:
        self._folder = state_folder(folder)
        self._catalog = catalog
        self._released = threading.Condition()

    def acquire(
        self, workspace_id: str, *, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> HeldLock:
        """The lock of a workspace, after waiting for it. DeadlineExceeded when others held it all the time.

        Setting `cancelled` calls the waiting off, which raises Cancelled.
        """
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        path = f"{self._folder}/{check_workspace_id(workspace_id)}{_LOCK}"
        with ExitStack() as undo, translate_os_errors(f"cannot lock workspace {workspace_id!r}"):
            undo.callback(self._wake)
            undo.callback(_release, self._wait(workspace_id, path, give_up_at, cancelled), os.getpid())
            if self._catalog is not None:
                wait_s = None if give_up_at is None else max(0.0, give_up_at - time.monotonic())
                got = undo.enter_context(self._catalog.lock(workspace_id, wait_s=wait_s, cancelled=cancelled))
                if not got:
                    _raise_if(cancelled, workspace_id)
                    raise _late(workspace_id, "another host")
            return HeldLock(workspace_id, path, undo.pop_all().close)

    def try_acquire(self, workspace_id: str) -> HeldLock | None:
        """The lock of a workspace if it can be had without waiting."""
        with suppress(DeadlineExceeded):
            return self.acquire(workspace_id, timeout_s=0)
        return None

    def ids(self) -> list[str]:
        with translate_os_errors(f"cannot list {self._folder!r}"):
            names = os.listdir(self._folder)
        return sorted(name.removesuffix(_LOCK) for name in names if name.endswith(_LOCK))

    def _wait(
        self, workspace_id: str, path: str, give_up_at: float | None, cancelled: threading.Event | None
    ) -> int:
        pause_s = FIRST_PAUSE_S
        while True:
            _raise_if(cancelled, workspace_id)
            # The condition is held while looking, so that no release in between goes unheard.
            with self._released:
                with suppress(BlockingIOError):
                    return lock_new(path, wait=False)
                left_s = pause_s if give_up_at is None else give_up_at - time.monotonic()
                if left_s <= 0:
                    raise _late(workspace_id, "another operation")
                self._released.wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _wake(self) -> None:
        with self._released:
            self._released.notify_all()


def _release(fd: int, pid: int) -> None:
    with closing_fd(fd):
        unlock(fd, pid)


def _late(workspace_id: str, holder: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"workspace {workspace_id!r} is still locked by {holder}: try again later")


def _raise_if(cancelled: threading.Event | None, workspace_id: str) -> None:
    if cancelled is not None and cancelled.is_set():
        raise Cancelled(f"waiting for the lock of workspace {workspace_id!r} was called off")


class SlotPool:
    """A scarce resource of a host, such as a network index, of which each workspace holds one. Thread-safe.

    A slot is a number from 0. It is taken by a symbolic link of that name whose target is its owner's id:
    symlink(2) makes it whole or not at all, and for one of two processes only. A slot belongs to its owner
    until it is released, over restarts and crashes; recovery releases those whose owners are gone.

    Args:
        folder: Made if absent; processes share the slots through it.
        count: How many slots there are: 0 to count - 1.

    Raises:
        InvalidArgument: `count` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], count: int = DEFAULT_SLOTS) -> None:
        if count <= 0:
            raise InvalidArgument(f"a pool of {count} slots can serve no workspace")
        self._folder = state_folder(folder)
        self.count: Final = count

    def acquire(self, owner: str) -> int:
        """A free slot, the lowest, for `owner`, a workspace's id.

        Raises:
            ResourceExhausted: All slots are taken.
        """
        taken = self._taken()
        for slot in range(self.count):
            if slot not in taken and self.reserve(slot, owner):
                return slot
        raise ResourceExhausted(
            f"all {self.count} slots of this host are taken: delete a workspace, or raise their number"
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
        return {slot: owner for slot in sorted(self._taken()) if (owner := self.owner(slot)) is not None}

    def is_slot(self, slot: object) -> bool:
        return isinstance(slot, int) and not isinstance(slot, bool) and 0 <= slot < self.count

    def _taken(self) -> set[int]:
        with translate_os_errors("cannot list the slots"):
            return {int(name) for name in os.listdir(self._folder) if name.isascii() and name.isdigit()}

    def _path(self, slot: int) -> str:
        return f"{self._folder}/{slot}"
