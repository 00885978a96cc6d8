"""The state directory of a host: there is one for each host of a catalog, so that no host has two.

Locks, slots, records and folders lie on the host, and the catalog says what should be there. With another
directory the same workspaces would seem to have lost their processes and files, and be brought back a
second time from older snapshots. So a state directory has an id, in its file `state-id`, and the catalog
keeps the id of each host's. A copy has the same id: it is told apart by where that file lies, which the
catalog keeps too. See `is_same_place`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from snaploader._environment import read_boot_id
from snaploader.errors import FailedPrecondition, translate_os_errors
from snaploader.files import flush_folder
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.catalog.reader import HostState
from snaploader.workspace.records import write_new

_FILE = "state-id"


class HostHome:
    """Claims the host for its state directory, once. Thread-safe.

    Args:
        folder: The state directory; it exists.
    """

    def __init__(self, folder: str, catalog: Catalog, host: str) -> None:
        self._folder = folder
        self._catalog = catalog
        self._host = host
        self._mutex = threading.Lock()
        self._is_claimed = False

    def claim(self, *, replace: bool = False) -> None:
        """Make sure that this is the host's state directory; the first one that asks is.

        Args:
            replace: Take the place of another one, which is lost for good.

        Raises:
            FailedPrecondition: The host has another state directory; this one is another host's, or a copy.
        """
        with self._mutex:
            if self._is_claimed and not replace:
                return
            state_id = self._state_id()
            with translate_os_errors(f"cannot look at {self._folder!r}"):
                place = place_of(f"{self._folder}/{_FILE}")
            with self._catalog.reading() as reader:
                known = reader.host_state(self._host)
            if known is None or known.state_id != state_id or known.place != place:
                self._check_no_copy(known, state_id, place, replace=replace)
                with self._catalog.transaction() as tx:
                    tx.claim_host(self._host, state_id, os.path.abspath(self._folder), place, replace=replace)
            self._is_claimed = True

    def _check_no_copy(
        self, known: HostState | None, state_id: str, place: Mapping[str, Any], *, replace: bool
    ) -> None:
        if known is None or known.state_id != state_id or known.place is None or replace:
            return
        if not is_same_place(known.place, place):
            raise FailedPrecondition(
                f"state directory {os.path.abspath(self._folder)!r} is a copy of that of host "
                f"{self._host!r}, {known.state_directory!r}. On another machine, begin with an empty one and "
                "another name for the host. If it was moved to another disk, or brought back from a backup, "
                "and the other is gone for good, recover with --rebind-state (or recover(rebind_state=True))"
            )

    def _state_id(self) -> str:
        path = f"{self._folder}/{_FILE}"
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
    return {
        "machine": _machine(),
        "boot": read_boot_id(),
        "device": status.st_dev,
        "inode": status.st_ino,
    }


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
