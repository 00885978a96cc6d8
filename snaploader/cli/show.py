"""`snaploader show` and `snaploader invalidate`: the keys of a task, and what stands under them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import click

from snaploader import keys
from snaploader.cli.commands import Command, destructive
from snaploader.cli.lookup import (
    Lookup,
    file_names,
    file_size,
    key_name,
    key_record,
    key_set_record,
    lookup,
    served_line,
    snapshot_record,
    vm_configuration_record,
)
from snaploader.cli.options import ReadOptions, TaskOptions, common, read_options, task_options
from snaploader.cli.resources import Caches
from snaploader.cli.values import format_size
from snaploader.digest import Digest
from snaploader.errors import NotFound, SnaploaderError
from snaploader.keys import SnapshotKey
from snaploader.loader import Snapshot
from snaploader.loader.manifests import Entry
from snaploader.policy import ReadPolicy


@click.command(cls=Command)
@task_options
@read_options
@common
def show(caches: Caches, task_options: TaskOptions, read_options: ReadOptions) -> None:
    """Show the key set, where its manifests are, and of what the snapshot that serves consists.

    Changes nothing in any cache, but for trees that are fetched. Ends as `restore` would when there is no
    snapshot, after showing the keys.
    """
    looking = lookup(caches, task_options, read_options, readonly=True)
    places = _manifest_places(caches, looking)
    error: SnaploaderError | None = None
    snapshot: Snapshot | None = None
    try:
        snapshot = looking.find()
    except SnaploaderError as failure:
        error = failure
    files = [] if snapshot is None else _files(caches, snapshot)
    _print_json(caches, looking, places, snapshot, files)
    _print_text(caches, places, snapshot, files)
    if error is not None:
        raise error


@dataclass(frozen=True, slots=True)
class Place:
    """A key, and which caches have a manifest under it."""

    key: SnapshotKey
    local: bool
    remote: bool | None
    """None when there is no remote cache, or it could not be asked."""


@dataclass(frozen=True, slots=True)
class ShownFile:
    """One file or directory of a snapshot, and how much of it is where.

    Chunks of a plain file: the one blob it is; of a directory: the blobs and chunks of all its files.
    """

    name: str
    kind: str
    """"file", "chunked" or "directory"."""
    chunked: bool
    digest: Digest
    size_bytes: int
    hole_bytes: int
    chunk_size: int | None
    chunk_count: int
    hole_chunks: int
    stored_chunks: int
    local_chunks: int
    local_bytes: int
    remote_chunks: int | None
    remote_bytes: int | None

    def record(self) -> dict[str, Any]:
        """For --json."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "digest": str(self.digest)}


def _manifest_places(caches: Caches, looking: Lookup) -> list[Place]:
    if looking.key_set is None:
        wanted = SnapshotKey(instance_name=looking.instance_name, snapshot_id=looking.options.snapshot_id)
        candidates = [wanted]
    else:
        candidates = list(looking.key_set)
    return [
        Place(key, _stands_locally(looking, key), _stands_remotely(caches, looking, key))
        for key in candidates
    ]


def _stands_locally(looking: Lookup, key: SnapshotKey) -> bool:
    return looking.loader.manifests.local_entry(key) is not Entry.NOTHING


def _stands_remotely(caches: Caches, looking: Lookup, key: SnapshotKey) -> bool | None:
    if caches.remote_cache is None or looking.read_policy is ReadPolicy.LOCAL_ONLY:
        return None
    try:
        return looking.loader.manifests.remote_entry(key) is not Entry.NOTHING
    except SnaploaderError as error:
        caches.output.warn(f"cannot ask the remote cache for {key_name(key)}: {error.message}")
        return None


def _files(caches: Caches, snapshot: Snapshot) -> list[ShownFile]:
    names = file_names(snapshot)
    digests = {name: _digests(snapshot, name) for name in names}
    everything = {digest for of_file in digests.values() for digest in of_file}
    missing_locally = caches.file_cache.find_missing(everything)
    missing_remotely = caches.missing_remotely(everything) if snapshot.allow_remote else None
    return [_shown(snapshot, name, digests[name], missing_locally, missing_remotely) for name in names]


def _digests(snapshot: Snapshot, name: str) -> list[Digest]:
    """The blobs a file's content lies in; the same one twice when it occurs twice."""
    if name in snapshot.tables:
        return list(snapshot.tables[name].digests())
    if name in snapshot.directories:
        return list(dict.fromkeys(snapshot.directories[name].digests()))
    digest = snapshot.manifest.files[name].digest
    return [digest] if digest.size_bytes else []


def _shown(
    snapshot: Snapshot,
    name: str,
    digests: list[Digest],
    missing_locally: set[Digest],
    missing_remotely: set[Digest] | None,
) -> ShownFile:
    local = _present(digests, missing_locally)
    remote = (None, None) if missing_remotely is None else _present(digests, missing_remotely)
    table, directory = snapshot.tables.get(name), snapshot.directories.get(name)
    manifest = snapshot.manifest
    trees = {**manifest.chunked_files, **manifest.directories}
    holes = table if table is not None else directory
    return ShownFile(
        name=name,
        kind="directory" if directory is not None else "file" if table is None else "chunked",
        chunked=table is not None,
        digest=trees[name] if name in trees else manifest.files[name].digest,
        size_bytes=file_size(snapshot, name),
        hole_bytes=holes.hole_bytes if holes is not None else 0,
        chunk_size=table.chunk_size if table is not None else None,
        chunk_count=table.chunk_count if table is not None else len(digests),
        hole_chunks=table.chunk_count - table.stored_count if table is not None else 0,
        stored_chunks=len(digests),
        local_chunks=local[0],
        local_bytes=local[1],
        remote_chunks=remote[0],
        remote_bytes=remote[1],
    )


def _present(digests: Iterable[Digest], missing: set[Digest]) -> tuple[int, int]:
    present = [digest.size_bytes for digest in digests if digest not in missing]
    return len(present), sum(present)


def _print_json(
    caches: Caches, looking: Lookup, places: list[Place], snapshot: Snapshot | None, files: list[ShownFile]
) -> None:
    found = None
    if snapshot is not None:
        found = {
            **snapshot_record(snapshot),
            "vm_configuration": vm_configuration_record(snapshot),
            "files": [file.record() for file in files],
            "size_bytes": sum(file.size_bytes for file in files),
            "hole_bytes": sum(file.hole_bytes for file in files),
        }
    caches.output.json(
        {
            "key_set": None if looking.key_set is None else key_set_record(looking.key_set),
            "manifests": [
                {"key": key_record(place.key), "local": place.local, "remote": place.remote}
                for place in places
            ],
            "snapshot": found,
        }
    )


def _print_text(
    caches: Caches, places: list[Place], snapshot: Snapshot | None, files: list[ShownFile]
) -> None:
    output = caches.output
    output.text("keys, best first")
    output.table(
        ["key", "platform", "configuration", "version", "local manifest", "remote manifest"],
        [
            [
                key_name(place.key),
                place.key.platform_hash[:12],
                place.key.configuration_hash[:12],
                place.key.version_id,
                _word(place.local),
                _word(place.remote),
            ]
            for place in places
        ],
    )
    if snapshot is None:
        return
    record = snapshot_record(snapshot)
    output.text()
    output.text(f"served by {served_line(snapshot)}")
    output.text(
        f"snapshot  {record['snapshot_id'] or '(unknown)'}, created {record['created'] or '(unknown)'}"
    )
    task = record["last_executed_task"] or {}
    ran = ", ".join(
        f"{name} {task[name]}" for name in ("task_id", "invocation_id", "action_digest") if task.get(name)
    )
    if ran:
        output.text(f"ran       {ran}")
    output.text(f"digests   {record['digest_function']}")
    output.table(
        ["file", "size>", "holes>", "chunk size>", "chunks>", "hole chunks>", "local>", "remote>", "digest"],
        [
            [
                file.name,
                format_size(file.size_bytes),
                format_size(file.hole_bytes),
                format_size(file.chunk_size) if file.chunk_size is not None else _WORDS[file.kind],
                str(file.stored_chunks),
                str(file.hole_chunks),
                f"{file.local_chunks}/{file.stored_chunks}",
                "?" if file.remote_chunks is None else f"{file.remote_chunks}/{file.stored_chunks}",
                file.digest.hash[:16],
            ]
            for file in files
        ],
    )


_WORDS = {"file": "whole", "directory": "directory"}


def _word(stands: bool | None) -> str:
    return "-" if stands is None else "yes" if stands else "no"


@click.command(cls=Command)
@task_options
@destructive("invalidate")
@common
def invalidate(caches: Caches, task_options: TaskOptions, yes: bool, dry_run: bool) -> None:
    """Drop all snapshots of a platform and configuration, those of all branches together.

    The branch does not matter here. Snapshots are still found by their --snapshot-id.
    """
    task = task_options.task(caches.settings, need_ref=False)
    key = keys.base_key(task, task_options.configuration_hash)
    if dry_run or caches.output.must_ask(yes=yes):
        places = {"local": _has_version(caches, key), "remote": _has_remote_version(caches, key)}
        words = {True: "known", False: "unknown", None: "not asked for"}
        what = (
            f"the snapshots of all branches of platform {key.platform_hash[:12]} and configuration "
            f"{key.configuration_hash[:12] or '(none)'}; their version is {words[places['local']]} on this "
            f"host, {words[places['remote']]} on the server"
        )
        if dry_run:
            caches.output.json({"would_invalidate": key_record(key), **places})
            caches.output.text(f"would invalidate {what}")
            return
        caches.output.confirm(f"Invalidate {what}?")
    version = caches.loader().invalidate_snapshot(key)
    caches.output.json({"version_id": version, "key": key_record(replace(key, version_id=version))})
    caches.output.text(f"invalidated; the version is now {version}")


def _has_version(caches: Caches, key: SnapshotKey) -> bool:
    """Whether this host knows a version of the platform and configuration, so that there may be snapshots."""
    try:
        caches.file_cache.get_ref(keys.version_key(key))
    except NotFound:
        return False
    return True


def _has_remote_version(caches: Caches, key: SnapshotKey) -> bool | None:
    """Whether the server has one; None without a server."""
    remote = caches.remote_cache
    if remote is None:
        return None
    try:
        remote.get_action_result(keys.remote_version_digest(key, remote.digest_function))
    except NotFound:
        return False
    return True
