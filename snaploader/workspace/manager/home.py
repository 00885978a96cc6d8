"""Which state directory is a host's: one for each host of a catalog, so that no host has two.

Locks, slots, records and folders lie on the host, and the catalog says what should be there. With another
directory the same workspaces would seem to have lost their processes and files, and be brought back a
second time from older snapshots. So a state directory has an id, in its file `state-id`, and the catalog
keeps the id of each host's.
"""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress

from snaploader.errors import FailedPrecondition, translate_os_errors
from snaploader.filecache.flushing import flush_folder
from snaploader.workspace.catalog import Catalog
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
            FailedPrecondition: The host has another state directory, or this one is another host's.
        """
        with self._mutex:
            if self._is_claimed and not replace:
                return
            state_id = self._state_id()
            with self._catalog.reading() as reader:
                known = reader.host_state(self._host)
            if known is None or known.state_id != state_id:
                with self._catalog.transaction() as tx:
                    tx.claim_host(self._host, state_id, os.path.abspath(self._folder), replace=replace)
            self._is_claimed = True

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


def _checked(text: str, path: str) -> str:
    try:
        return uuid.UUID(hex=text.strip()).hex
    except ValueError:
        raise FailedPrecondition(
            f"{path!r} is damaged. If this is the right state directory, remove that file and recover with "
            "--rebind-state"
        ) from None
