"""`WorkspaceManager`: everything that can be done to workspaces, and asked about them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Self, Unpack

from snaploader._environment import HOST, HostEnvironment
from snaploader.context import CallContext
from snaploader.errors import Cancelled, FailedPrecondition, InvalidArgument, SnaploaderError
from snaploader.filecache import FileCache
from snaploader.loader import SnapshotLoader
from snaploader.workspace import sizes
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.host import HeldLock, HostHome, SlotPool, WorkspaceLocks
from snaploader.workspace.manager import lifetime, settings
from snaploader.workspace.manager.held_workspace import DEFAULT_WORKERS, CriticalSections, HeldWorkspace
from snaploader.workspace.manager.lifetime import MadeWith
from snaploader.workspace.manager.operation import ALIVE, Services, check_state, utc_now
from snaploader.workspace.manager.recovery import Note, RecoverySummary, recover
from snaploader.workspace.manager.snapshots import SnapshotContent
from snaploader.workspace.manager.templates import Templates
from snaploader.workspace.manager.undo import undo_failed
from snaploader.workspace.manager.unmanaged import adopt, list_snapshots
from snaploader.workspace.manager.versions import OrphanedUpload, check_number, find_commit, orphaned_uploads
from snaploader.workspace.model import (
    Event,
    OperationKind,
    Readiness,
    Resources,
    Scope,
    SnapshotInfo,
    SnapshotResult,
    SnapshotSource,
    Version,
    Volume,
    Workspace,
    WorkspaceState,
    new_workspace_id,
)
from snaploader.workspace.policy import Policy
from snaploader.workspace.records import PausedRecords
from snaploader.workspace.runtime.protocol import DEFAULT_STOP_TIMEOUT_S, Runtime

_MAKING = (OperationKind.CREATE, OperationKind.FORK)

_as_loaders_caller = CallContext().on_behalf()
"""Decorates what works with the loader or the cache on the caller's own thread: it is asked as it is on the
manager's threads, by the caller that the loader was made for and not by the one whose context is current."""

DEFAULT_LOCK_TIMEOUT_S = 600.0
"""How long an operation waits for the workspace's lock."""


class WorkspaceManager:
    """Does things to workspaces. Thread-safe; several processes may manage one host's workspaces together.

    Every operation on a workspace runs under its lock, which holds between threads, processes and, where the
    catalog is on PostgreSQL, hosts. One that raises has changed nothing, unless its description says
    otherwise; one that was begun runs to its end on a thread of the manager, even when its caller is
    interrupted. If its process is killed, the next operation on the workspace, or `recover`, finishes it or
    takes it back.

    The loader is asked by the caller that its constructor's `context` makes it: headers, credentials and
    group of the `CallContext` that is current with the manager's caller do not count.

    What is given here is the caller's to close, after the manager. Call `recover` once at start-up.

    Whatever is asked of one workspace raises NotFound when there is none of that id, InvalidArgument when the
    id is malformed, FailedPrecondition when the workspace was deleted, is in a state that does not allow it,
    or lives on another host, DeadlineExceeded when others held its lock for too long, and Cancelled when the
    manager was closed meanwhile. What starts it raises DeadlineExceeded when it was not ready in time, and
    FailedPrecondition when its command cannot be started, or ended before it was ready. What takes a snapshot
    raises ResourceExhausted when the disk is full, or the file cache too small. Each raises whatever the
    runtime does. What else a method raises is said there.

    Args:
        catalog: Where workspaces are written down.
        loader: Saves and finds their snapshots. Without a remote cache nothing can be committed.
        file_cache: The loader's.
        runtime: Runs the workspaces of this host.
        state_directory: Holds locks, slots and records of paused workspaces; made if absent, for the user's
            eyes alone. One for all processes of the host: operations with another one are refused.
        host: Name of this host in the catalog. Default: the machine's host name.
        slots: The slots of this host; each workspace that is not deleted holds one. Default: as many as there
            are numbers of network ports, in the state directory.
        instance_name: The instance name of the remote cache; part of every snapshot's key.
        clock: Tells the time, aware, in UTC.
        workers: Most operations at one time.
        stop_timeout_s: How long a workspace may take to stop before it is forced to. Default: 10 s.
        lock_timeout_s: How long an operation waits for the workspace's lock. Default: 10 min.
    """

    def __init__(
        self,
        catalog: Catalog,
        loader: SnapshotLoader,
        file_cache: FileCache,
        runtime: Runtime,
        state_directory: str | os.PathLike[str],
        *,
        host: str = "",
        slots: SlotPool | None = None,
        instance_name: str = "",
        clock: Callable[[], datetime] = utc_now,
        workers: int = DEFAULT_WORKERS,
        stop_timeout_s: float = DEFAULT_STOP_TIMEOUT_S,
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
        _environment: HostEnvironment = HOST,
    ) -> None:
        folder = os.fspath(state_directory)
        self._services = Services(
            catalog,
            runtime,
            SnapshotContent(loader, file_cache, instance_name),
            PausedRecords(f"{folder}/paused"),
            slots or SlotPool(f"{folder}/slots"),
            host or os.uname().nodename,
            clock,
            _environment,
            stop_timeout_s,
            threading.Event(),
            undo_failed,
        )
        self.catalog: Final = catalog
        self.loader: Final = loader
        self.file_cache: Final = file_cache
        self.runtime: Final = runtime
        self.host: Final = self._services.host
        self.instance_name: Final = instance_name
        self.records: Final = self._services.records
        self.slots: Final = self._services.slots
        self.templates: Final = Templates(self._services)
        self.locks: Final = WorkspaceLocks(f"{folder}/locks", catalog)
        self._home = HostHome(folder, catalog, self.host)
        self._sections = CriticalSections(workers)
        self._lock_timeout_s = lock_timeout_s
        self._closing = self._services.closing

    def close(self) -> None:
        """Wait for the operations under way, and end the manager's threads. Idempotent.

        Workspaces go on running. Whoever waits for a lock or for readiness gets Cancelled.
        """
        self._closing.set()
        self._sections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Making workspaces

    def create(
        self,
        workspace_id: str = "",
        *,
        command: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        volumes: Iterable[Volume] = (),
        readiness: Readiness | None = None,
        image: str = "",
        devices: Iterable[str] = (),
        resources: Resources | None = None,
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        base: str = "",
        policy: str | None = None,
        autostart_schedule: str = "",
        ttl: timedelta | None = None,
        template: str = "",
        template_version: int | None = None,
        automatic_updates: bool = False,
        source: str | os.PathLike[str] | None = None,
        start: bool = True,
    ) -> Workspace:
        """Make a new workspace on this host, and start it. If that fails, nothing is left of it.

        Args:
            workspace_id: 1 to 64 lower-case letters, digits and inner hyphens, never used before. Default: a
                new one.
            command: What runs in it and its arguments; empty: nothing.
            environment: Added to what the runtime sets.
            volumes: Its durable directories.
            readiness: How to tell that it is ready, for all that starts its process afresh. Default: it is as
                soon as it runs.
            image: What the runtime makes it of, in the runtime's own terms, such as `debian:12`: up to 255
                printable characters without spaces. `ProcessRuntime` has no use for images, devices and
                resources.
            devices: Devices of the host that it gets, each bounded as the image is; up to 100.
            resources: Processors and memory that it gets. Default: what the runtime gives.
            labels: To find it by, up to 64. A name has 1 to 63 letters, digits and inner `.`, `_`, `-`, `/`;
                a value up to 255 printable characters.
            owner: Whose it is.
            base: What it is made from; workspaces of one base share chunks. Default: the template.
            policy: Name of its policy. Default: that of the template, else `default`.
            autostart_schedule: A cron expression with a time zone; empty: none.
            ttl: How long it runs after a start, up to 366 days. Default: as its template or policy says.
            template: A template whose version it is made from. What is given here besides takes the place of
                what the version says; single variables, labels and resources are added to it.
            template_version: Default: the active one.
            automatic_updates: Whether its next start takes the active version of the template.
            source: A folder whose content it begins with. It is kept as a snapshot of the whole, on which
                later Data snapshots are placed.
            start: Whether to start it; otherwise it is stopped.

        Raises:
            InvalidArgument: the id, a volume, the image, a device, a label, the schedule or the TTL is
                malformed; or the runtime cannot capture what the policy asks for.
            FailedPrecondition: the id was used before, or this host has files or a record of it that the
                catalog does not know, which are left alone.
            NotFound: there is no such policy, template or version of it, or no such source.
            ResourceExhausted: all slots of the host are taken.
        """
        workspace = lifetime.made_with(
            self._services,
            workspace_id or new_workspace_id(),
            command=command,
            environment=environment,
            volumes=volumes,
            readiness=readiness,
            image=image,
            devices=devices,
            resources=resources,
            labels=labels,
            owner=owner,
            base=base,
            policy=policy,
            autostart_schedule=autostart_schedule,
            ttl=ttl,
            template=template,
            template_version=template_version,
            automatic_updates=automatic_updates,
        )
        return self._make(lifetime.create, workspace, source=source, start=start)

    def fork(
        self,
        origin: str,
        workspace_id: str = "",
        *,
        environment: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        owner: str | None = None,
        policy: str | None = None,
        autostart_schedule: str = "",
        ttl: timedelta | None = None,
        start: bool = True,
    ) -> Workspace:
        """Make a new workspace on this host from a commit of any host, sharing all chunks with it.

        It runs the same command, of the same image, with the same devices, resources and labels, and lives on
        when its origin is deleted. What a Data commit does not hold is
        empty in it. If the fork fails, or is killed, nothing is left of it.

        Args:
            origin: Name of the commit's snapshot, or id of a workspace, for its latest commit.
            workspace_id: Default: a new one.
            environment: Changes to that of the origin.
            labels: Changes to those of the origin.
            owner: Whose it is. Default: the origin's.
            policy: Default: the origin's.
            autostart_schedule: Default: none.
            ttl: Default: the origin's.
            start: Whether to start it; otherwise it is stopped.

        Raises:
            NotFound: there is no such snapshot or workspace, it has no commit, or its content is gone.
            FailedPrecondition: the snapshot is no commit: a pause cannot be forked. Or as for `create`.
            InvalidArgument, ResourceExhausted: as for `create`.
        """
        new_id = workspace_id or new_workspace_id()
        with self.catalog.reading() as reader:
            origin_commit = find_commit(reader, origin)
            parent = reader.workspace(origin_commit.workspace_id)
        spec = replace(
            parent.spec,
            workspace_id=new_id,
            environment={**parent.spec.environment, **(environment or {})},
            labels={**parent.spec.labels, **(labels or {})},
        )
        workspace = lifetime.new_workspace(
            self._services,
            spec,
            parent.owner if owner is None else owner,
            parent.base,
            parent.policy if policy is None else policy,
            autostart_schedule,
            parent.ttl if ttl is None else ttl,
        )
        workspace = replace(
            workspace,
            template_version=parent.template_version,
            automatic_updates=parent.automatic_updates,
        )
        return self._make(lifetime.fork, workspace, origin=origin_commit, start=start)

    def adopt(self, workspace_id: str, **made_with: Unpack[MadeWith]) -> Workspace:
        """Take in a workspace that the runtime of this host holds, and the catalog does not know.

        It is neither stopped nor started nor changed: it is running or stopped, as it is found. The snapshots
        that the file cache keeps of it are taken in too: what it began as, commits that the remote cache has,
        and versions, which are numbered anew in the order in which they were taken. The event is
        `workspace_adopt`.

        Args:
            made_with: What it was made with, as for `create`; the catalog does not know. The next start, and
                every snapshot, goes by that.

        Raises:
            NotFound: the runtime holds nothing of it, or there is no such policy.
            FailedPrecondition: the catalog knows it, or there is a record of it as paused, which `recover`
                takes back.
            InvalidArgument, ResourceExhausted: as for `create`.
            Unavailable and the like: the remote cache, which may have commits of it, does not answer.
        """
        if not workspace_id:
            raise InvalidArgument("name the workspace that is to be adopted")
        return self._make(adopt, lifetime.made_with(self._services, workspace_id, **made_with))

    def _make(self, make: Callable[..., Workspace], workspace: Workspace, **how: Any) -> Workspace:
        lock = self._acquire(workspace.id)
        with self._releasing(lock):
            return self._sections.run_to_end(lock, partial(make, self._services, workspace, **how))

    # Versions

    def create_snapshot(
        self,
        workspace_id: str,
        name: str = "",
        source: str = SnapshotSource.MANUAL,
        *,
        scope: Scope | str | None = None,
    ) -> SnapshotResult:
        """Capture the workspace as its next version: stop, capture, continue, start, wait, record.

        A stopped one stays stopped; one that ran is waited for until it is ready again. The event is
        `snapshot_create`.

        Args:
            name: To show it under, up to 200 printable characters, without the white space around them;
                empty: "Version N".
            source: Why: "manual", "pre_exec", "rollback", or other words, bounded as the name is; empty means
                manual.
            scope: What it holds. Default: Full, or Data with a runtime that captures no more.

        Raises:
            FailedPrecondition: the runtime cannot capture that scope. Nothing was stopped then.
            InvalidArgument: the name, the source or the scope is malformed.
            DeadlineExceeded: it was not ready again in time: it runs then, and there is no version.
            SnaploaderError: with a note if the workspace could not be started again, and is stopped.
        """
        with self.hold(workspace_id) as held:
            return held.create_snapshot(name, source, scope=scope)

    def create_version(self, workspace_id: str) -> SnapshotResult:
        """Capture the workspace as `create_snapshot` does, before something is executed in it.

        Its source is `pre_exec`, it has no name, and the event is `version_create`.
        """
        with self.hold(workspace_id) as held:
            return held.create_version()

    def rollback(self, workspace_id: str, version: int, *, keep_current: bool = False) -> Workspace:
        """Put a version's state in the place of the present one: stop, replace, start, wait, record.

        History is never rewritten: the next version's number is above all earlier ones. A stopped workspace
        stays stopped. A Data version brings the durable directories back, and all else is as it was created
        or forked. The event is `version_rollback`.

        Args:
            keep_current: Keep the present state as a version first, of source `rollback`.

        Raises:
            InvalidArgument: `version` is not a whole number from 1 to 2**31 - 1.
            NotFound: there is no such version, or its content is gone. Nothing was stopped then.
            DeadlineExceeded, SnaploaderError: as for `create_snapshot`. If the workspace could not be started
                when its state was replaced, or was not ready in time, a note says that it is rolled back, and
                stopped.
        """
        with self.hold(workspace_id) as held:
            return held.rollback(version, keep_current=keep_current)

    # Pause, commit

    def pause(self, workspace_id: str) -> SnapshotResult:
        """Pause a running or stopped workspace: only its snapshot, its record and its slot stay on the host.

        Its policy's `onPause` says what is kept. All of it is local: the remote cache is not asked for
        anything. The snapshot is temporary: the next capture after a resume takes its place.
        """
        with self.hold(workspace_id) as held:
            return held.pause()

    def resume(self, workspace_id: str, *, ready_timeout_s: float | None = None) -> Workspace:
        """Bring a paused workspace back, start it, and wait until it is ready.

        From a Data snapshot it begins with the durable directories, on what it was created or forked from.
        Where the runtime brings its memory back from a Full snapshot, its readiness is not waited for. If
        anything fails, it is stopped and stays paused as it was.

        Args:
            ready_timeout_s: Instead of that of the readiness check.

        Raises:
            NotFound: content of its snapshot is gone.
        """
        with self.hold(workspace_id) as held:
            return held.resume(ready_timeout_s=ready_timeout_s)

    def commit(self, workspace_id: str, name: str = "") -> SnapshotResult:
        """Capture the workspace and put that into the remote cache, for any host to fork.

        Its policy's `onCommit` says what is kept. A running workspace is stopped while it is captured, and
        runs again while that is uploaded. A paused one is committed from its snapshot. If the commit fails,
        nothing is visible, here or remotely, and the next try sends only what is missing (see
        `orphaned_uploads`).

        Raises:
            FailedPrecondition: there is no remote cache, and nothing was stopped.
            Unavailable and the like: the remote cache failed.
        """
        with self.hold(workspace_id) as held:
            return held.commit(name)

    # Life

    def start(self, workspace_id: str, *, update: bool = False) -> Workspace:
        """Start a stopped workspace, and wait until it is ready; one that is not in time is stopped again.

        If its files are gone, its latest snapshot takes their place. With automatic updates it is started as
        the active version of its template says; if that fails, it stays as it was. The event of an update is
        `workspace_update`.

        Args:
            update: Take the active version also without automatic updates.

        Raises:
            FailedPrecondition: it is to be updated, and was not made from a template.
            NotFound: there are neither files nor a snapshot of it.
        """
        with self.hold(workspace_id) as held:
            return held.start(update=update)

    def stop(self, workspace_id: str) -> Workspace:
        """Stop a running workspace, by force when it takes too long; its files stay."""
        with self.hold(workspace_id) as held:
            return held.stop()

    def delete(self, workspace_id: str, *, forget_remote: bool = False) -> Workspace:
        """Delete a workspace, its snapshots here and its commits in the remote cache. Its events stay.

        It is deleted once that is recorded; what could not be removed then, `recover` removes. Workspaces
        that were forked from it are not touched.

        Args:
            forget_remote: Ask the remote cache for nothing, which may be gone for good: what it has of the
                commits stays there, and an event `remote_orphan` names each.

        Raises:
            FailedPrecondition: it has commits, and there is no remote cache.
            Unavailable and the like: the remote cache, which has commits of it, does not answer. Nothing
                changed.
        """
        with self.hold(workspace_id) as held:
            return held.delete(forget_remote=forget_remote)

    def touch(self, workspace_id: str) -> Workspace:
        """Note that the workspace is used, which ends its dormancy. Waits for nothing that is under way.

        If it runs, its deadline becomes later as `activityBumpSeconds` of its policy says.
        """
        with self.catalog.transaction() as tx:
            workspace = tx.lock_workspace(workspace_id)
            check_state(workspace, "use", ALIVE)
            if workspace.operation is not None and workspace.operation.kind is OperationKind.DELETE:
                raise FailedPrecondition(f"workspace {workspace_id!r} is being deleted: too late to use it")
            now = self._services.clock()
            return tx.update_workspace(workspace_id, last_used_at=now, dormant_at=None, deleting_at=None)

    def extend(self, workspace_id: str, until: datetime | timedelta) -> datetime:
        """Move the deadline of a running workspace to a later time, which is returned.

        That counts as a use. Waits for nothing that is under way. The event is `deadline_extend`.

        Args:
            until: The new deadline, aware; or by how much the present one is moved.

        Raises:
            InvalidArgument: the new one is not later than the present one, has passed, or is later than
                `maxTtlSeconds` of its policy, or 366 days from now, allows.
            FailedPrecondition: it does not run, has no deadline, or is being stopped.
        """
        return settings.extend(self._services, workspace_id, until)

    def change(
        self,
        workspace_id: str,
        *,
        owner: str | None = None,
        policy: str | None = None,
        autostart_schedule: str | None = None,
        ttl: timedelta | None = None,
        automatic_updates: bool | None = None,
    ) -> Workspace:
        """Change what the lifecycle goes by. All else of a workspace is as it was made.

        It holds from the next tick on; None leaves a thing as it is. The event is `workspace_change`.

        Args:
            owner: Whose it is; empty: nobody's.
            policy: Name of its policy.
            autostart_schedule: A cron expression with a time zone; empty: none.
            ttl: How long it runs after its next start; zero: as its policy says.
            automatic_updates: Whether its next start takes the active version of its template.

        Raises:
            InvalidArgument: the schedule or the TTL is malformed; or the runtime cannot capture what the
                policy asks for.
            NotFound: there is no such policy.
            FailedPrecondition: automatic updates are wanted, and it was not made from a template.
        """
        return settings.change(
            self._services,
            workspace_id,
            owner=owner,
            policy=policy,
            autostart_schedule=autostart_schedule,
            ttl=ttl,
            automatic_updates=automatic_updates,
        )

    # Policies

    def put_policy(self, policy: Policy) -> None:
        """Add a policy, or replace the one of its name, for all workspaces that follow it.

        Raises:
            InvalidArgument: the runtime of this host cannot capture what `onPause` or `onCommit` asks for.
        """
        settings.put_policy(self._services, policy)

    def change_policy(self, name: str, values: Mapping[str, Any]) -> Policy:
        """Change some fields of a policy, and return it as it is then. One that is not there is added.

        Args:
            values: As the user spells them, such as `{"onPause": "Data"}`; None goes back to the default.

        Raises:
            InvalidArgument: a field is unknown, its value is not one, or as for `put_policy`.
        """
        return settings.change_policy(self._services, name, values)

    # At start-up

    @_as_loaders_caller
    def recover(self, *, rebind_state: bool = False, forget_remote: bool = False) -> RecoverySummary:
        """Put everything of this host in order after a crash or a restart. Never raises, unless closed.

        To be called once at start-up, before the first request is served. Workspaces that other processes are
        working on are left alone. Nothing is done, and the summary says so, when the catalog knows the host
        with another state directory.

        Args:
            rebind_state: Go on with this state directory; the one the catalog knows is lost for good, and
                what was in it comes back from snapshots.
            forget_remote: Give up what the remote cache may have of commits that failed or were deleted, as
                `delete` does.
        """
        self._check_open()
        try:
            self._home.claim(replace=rebind_state)
        except SnaploaderError as error:
            return RecoverySummary(problems=(Note(f"host {self.host}", error.message),))
        return recover(self._services, self.locks, without_remote=forget_remote)

    # Asking: no lock is taken, and what is shown is one consistent state of the catalog

    def workspace(self, workspace_id: str) -> Workspace:
        """The workspace of that id, a deleted one too."""
        with self.catalog.reading() as reader:
            return reader.workspace(workspace_id)

    def workspaces(
        self,
        *,
        host: str | None = None,
        state: WorkspaceState | None = None,
        owner: str | None = None,
        labels: Mapping[str, str] = MappingProxyType({}),
        include_deleted: bool = False,
    ) -> list[Workspace]:
        """Workspaces by id, of all hosts unless one is named, without those that are still being made.

        Those with all of these `labels`, with these values.
        """
        with self.catalog.reading() as reader:
            found = reader.workspaces(
                host=host, state=state, owner=owner, labels=labels, include_deleted=include_deleted
            )
        return [each for each in found if each.operation is None or each.operation.kind not in _MAKING]

    @_as_loaders_caller
    def list_snapshots(self, workspace_id: str, *, unmanaged: bool = True) -> list[SnapshotInfo]:
        """The snapshots of a workspace, oldest first.

        What the file cache and the runtime hold is joined with what the catalog manages. A snapshot that the
        catalog does not manage, because it was lost or replaced, or others took the snapshot, is listed last
        and marked so. Such a one is found by its pin, by its manifest, if the metadata in that names the
        workspace (`vm_id`) and the snapshot (`snapshot_id`), or because the runtime tells of it.

        Args:
            unmanaged: Whether to look for those that the catalog does not manage. That reads every manifest
                in the file cache, some 0.1 ms each.
        """
        return list_snapshots(self._services, workspace_id, unmanaged=unmanaged)

    def list_versions(self, workspace_id: str) -> list[Version]:
        """The numbered snapshots of a workspace, by number."""
        with self.catalog.reading() as reader:
            reader.workspace(workspace_id)
            return reader.versions(workspace_id)

    def version_snapshot_name(self, workspace_id: str, version: int) -> str:
        """The runtime name behind a number: what the loader calls the snapshot.

        Raises:
            InvalidArgument: the number is not between 1 and 2**31 - 1.
            NotFound: it has no such version.
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

    @_as_loaders_caller
    def sizes(self, workspace_ids: Iterable[str] | None = None) -> Mapping[str, sizes.WorkspaceSize]:
        """What the snapshots of this host's workspaces take, by id: exclusive and shared bytes.

        Args:
            workspace_ids: Those to measure. Default: all that have a snapshot here.
        """
        measured = sizes.measure(self.file_cache).workspaces
        if workspace_ids is None:
            return measured
        nothing = sizes.WorkspaceSize()
        return MappingProxyType({each: measured.get(each, nothing) for each in workspace_ids})

    @_as_loaders_caller
    def orphaned_uploads(self, workspace_id: str = "") -> list[OrphanedUpload]:
        """What commits of this host that failed have left in the remote cache; the next commit reuses it.

        Nothing of it is visible there. The next commit that succeeds clears the list. Asks the remote cache.

        Args:
            workspace_id: The workspace to ask about; empty: all.

        Raises:
            FailedPrecondition: there is no remote cache to ask.
        """
        return orphaned_uploads(self._services, workspace_id)

    # Locks

    @contextmanager
    def hold(
        self, workspace_id: str, *, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> Iterator[HeldWorkspace]:
        """The workspace under its lock, for several operations in a row with nothing in between.

        An operation that is under way when the block is left goes on under the lock.

        Args:
            timeout_s: How long to wait for the lock, in seconds. Default: `lock_timeout_s`.
            cancelled: Set from elsewhere to call the waiting off, which raises Cancelled.
        """
        lock = self._acquire(workspace_id, timeout_s, cancelled)
        with self._releasing(lock):
            yield self._held(lock)

    @contextmanager
    def try_hold(self, workspace_id: str) -> Iterator[HeldWorkspace | None]:
        """The workspace under its lock, as `hold` gives it, but without waiting; None when others hold it."""
        self._check_usable()
        lock = self.locks.try_acquire(workspace_id)
        if lock is None:
            yield None
            return
        with self._releasing(lock):
            yield self._held(lock)

    def _acquire(
        self, workspace_id: str, timeout_s: float | None = None, cancelled: threading.Event | None = None
    ) -> HeldLock:
        self._check_usable()
        return self.locks.acquire(
            workspace_id,
            timeout_s=self._lock_timeout_s if timeout_s is None else timeout_s,
            cancelled=cancelled or self._closing,
        )

    @contextmanager
    def _releasing(self, lock: HeldLock) -> Iterator[None]:
        """Release a lock at the end. A workspace that turned out to be gone leaves no lock file.

        If only this catalog lacks the workspace, its lock file stays, like everything else of it.
        """
        try:
            yield
        except SnaploaderError:
            with suppress(SnaploaderError):
                workspace = self._services.find_workspace(lock.workspace_id)
                is_gone = workspace is None or workspace.state is WorkspaceState.DELETED
                if is_gone and not self._services.has_traces_of(lock.workspace_id):
                    lock.remove_file()
            raise
        finally:
            lock.release()

    def _held(self, lock: HeldLock) -> HeldWorkspace:
        workspace = self.workspace(lock.workspace_id)
        if workspace.state is WorkspaceState.DELETED:
            raise FailedPrecondition(f"workspace {workspace.id!r} was deleted")
        is_settled = workspace.operation is None
        return HeldWorkspace(self._services, self._sections, lock, is_settled=is_settled)

    def _check_usable(self) -> None:
        self._check_open()
        if not self._home.is_claimed:
            self._home.claim()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise Cancelled("the manager of the workspaces was closed")
