"""What can be asked about workspaces without touching them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from snaploader.filecache import FileCache
from snaploader.loader import SnapshotLoader
from snaploader.workspace import sizes
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.locks import WorkspaceLocks
from snaploader.workspace.manager import commits, listing
from snaploader.workspace.manager.commits import OrphanedUpload
from snaploader.workspace.manager.services import Services
from snaploader.workspace.manager.versions import check_number
from snaploader.workspace.model import (
    Event,
    OperationKind,
    SnapshotInfo,
    Version,
    Workspace,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecords
from snaploader.workspace.runtime.protocol import Runtime
from snaploader.workspace.slots import SlotPool

_BIRTHS = (OperationKind.CREATE, OperationKind.FORK)


class WorkspaceQueries:
    """The part of `WorkspaceManager` that changes nothing. Thread-safe.

    No lock is taken: what is shown is one consistent state of the catalog.
    """

    def __init__(self, services: Services, locks: WorkspaceLocks) -> None:
        self._services = services
        self._locks = locks

    def workspace(self, workspace_id: str) -> Workspace:
        """The workspace of that id, a deleted one too. NotFound when there is none."""
        with self.catalog.reading() as reader:
            return reader.workspace(workspace_id)

    def workspaces(
        self,
        *,
        host: str | None = None,
        state: WorkspaceState | None = None,
        owner: str | None = None,
        include_deleted: bool = False,
    ) -> list[Workspace]:
        """Workspaces by id, of all hosts unless one is named, without those that are still being made."""
        with self.catalog.reading() as reader:
            found = reader.workspaces(host=host, state=state, owner=owner, include_deleted=include_deleted)
        return [each for each in found if each.operation is None or each.operation.kind not in _BIRTHS]

    def list_snapshots(self, workspace_id: str) -> list[SnapshotInfo]:
        """All snapshots of a workspace, oldest first.

        What the caches hold is joined with what the catalog manages. A snapshot that only the file cache
        knows, because the catalog was lost or replaced, is listed last and marked as unmanaged.

        Raises:
            NotFound: there is no such workspace.
        """
        return listing.list_snapshots(self._services, workspace_id)

    def list_versions(self, workspace_id: str) -> list[Version]:
        """The numbered snapshots of a workspace, by number. NotFound when there is no such workspace."""
        with self.catalog.reading() as reader:
            reader.workspace(workspace_id)
            return reader.versions(workspace_id)

    def version_snapshot_name(self, workspace_id: str, version: int) -> str:
        """The runtime name behind a number: what the loader calls the snapshot.

        Raises:
            InvalidArgument: the number is not between 1 and 2**31 - 1.
            NotFound: there is no such workspace, or it has no such version.
        """
        check_number(version)
        with self.catalog.reading() as reader:
            reader.workspace(workspace_id)
            return reader.version(workspace_id, version).runtime_name

    def events(
        self,
        workspace_id: str = "",
        *,
        after: int = 0,
        types: Collection[str] = (),
        limit: int | None = 1000,
        newest: bool = False,
    ) -> list[Event]:
        """What happened, in order: to one workspace, or to all.

        Args:
            after: Only events behind the one of this id.
            types: Only events of these types; empty: all.
            limit: At most so many; None: all.
            newest: When there are more than `limit`, leave out the oldest and not the newest.
        """
        with self.catalog.reading() as reader:
            return reader.events(workspace_id, after=after, types=types, limit=limit, newest=newest)

    def sizes(self, workspace_ids: Iterable[str] | None = None) -> Mapping[str, sizes.WorkspaceSize]:
        """What the snapshots of this host's workspaces take, by id: exclusive and shared bytes.

        Args:
            workspace_ids: Of which; default: of all that have a snapshot here.
        """
        measured = sizes.measure(self.file_cache).workspaces
        if workspace_ids is None:
            return measured
        nothing = sizes.WorkspaceSize()
        return MappingProxyType({each: measured.get(each, nothing) for each in workspace_ids})

    def orphaned_uploads(self, workspace_id: str = "") -> list[OrphanedUpload]:
        """What commits of this host that failed have left in the remote cache; the next commit reuses it.

        Nothing of it is visible there. The next commit that succeeds clears the list. Asks the remote cache.

        Args:
            workspace_id: Of which workspace; empty: of all.

        Raises:
            NotFound: there is no such workspace.
            FailedPrecondition: there is no remote cache to ask.
        """
        return commits.orphaned_uploads(self._services, workspace_id)

    # The parts

    @property
    def catalog(self) -> Catalog:
        """Where workspaces are written down."""
        return self._services.catalog

    @property
    def loader(self) -> SnapshotLoader:
        """Saves and finds their snapshots."""
        return self._services.content.loader

    @property
    def file_cache(self) -> FileCache:
        """Keeps their snapshots on this host."""
        return self._services.content.file_cache

    @property
    def runtime(self) -> Runtime:
        """Runs the workspaces of this host."""
        return self._services.runtime

    @property
    def host(self) -> str:
        """Name of this host in the catalog."""
        return self._services.host

    @property
    def instance_name(self) -> str:
        """Of the remote cache."""
        return self._services.content.instance_name

    @property
    def locks(self) -> WorkspaceLocks:
        """One for each workspace."""
        return self._locks

    @property
    def records(self) -> PausedRecords:
        """Of paused workspaces."""
        return self._services.records

    @property
    def slots(self) -> SlotPool:
        """Of which each workspace holds one."""
        return self._services.slots
