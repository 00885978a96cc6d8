"""`snaploader show` and `snaploader invalidate`: the keys of a task, and what stands under them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from snaploader import keys
from snaploader.cli.lookup import (
    Lookup,
    file_size,
    key_name,
    key_record,
    served_line,
    snapshot_record,
    vm_configuration_record,
)
from snaploader.cli.options import ReadOptions, TaskOptions, command, destructive, read_options, task_options
from snaploader.cli.output import Output
from snaploader.cli.resources import Caches
from snaploader.cli.values import format_size
from snaploader.digest import Digest
from snaploader.errors import NotFound, SnaploaderError
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader import Snapshot
from snaploader.loader.manifests import Entry
from snaploader.policy import ReadPolicy


@command("show")
@read_options
def show(caches: Caches, read_options: ReadOptions) -> None:
    """Show the key set, where its manifests are, and of what the snapshot that serves consists.

    Changes nothing in any cache, but for trees that are fetched. Ends as `restore` would when there is no
    snapshot, after showing the keys.
    """
    output = caches.output
    looking = Lookup(caches, read_options, readonly=True)
    places = _manifest_places(caches, looking)
    error: SnaploaderError | None = None
    snapshot: Snapshot | None = None
    try:
        snapshot = looking.find()
    except SnaploaderError as failure:
        error = failure
    shown = None if snapshot is None else _snapshot_record(caches, snapshot)
    output.data(
        {
            "key_set": None if looking.key_set is None else _key_set_record(looking.key_set),
            "manifests": [{**place, "key": key_record(place["key"])} for place in places],
            "snapshot": shown,
        },
        "keys, best first",
    )
    output.table(
        {
            "key": lambda place: key_name(place["key"]),
            "platform": lambda place: place["key"].platform_hash[:12],
            "configuration": lambda place: place["key"].configuration_hash[:12],
            "version": lambda place: place["key"].version_id,
            "local manifest": lambda place: _WORDS[place["local"]],
            "remote manifest": lambda place: _WORDS[place["remote"]],
        },
        places,
    )
    if snapshot is not None and shown is not None:
        _print_snapshot(output, served_line(snapshot), shown)
    if error is not None:
        raise error


def _key_set_record(key_set: SnapshotKeySet) -> dict[str, Any]:
    assert key_set.write_key is not None
    return {
        "branch_key": key_record(key_set.branch_key),
        "fallback_keys": [key_record(key) for key in key_set.fallback_keys],
        "write_key": key_record(key_set.write_key),
    }


_WORDS = {None: "-", True: "yes", False: "no"}


def _manifest_places(caches: Caches, looking: Lookup) -> list[dict[str, Any]]:
    """The keys, and which caches have a manifest under each; None where the remote cache was not asked."""
    manifests = looking.loader.manifests
    is_remote_asked = caches.remote_cache is not None and looking.read_policy is not ReadPolicy.LOCAL_ONLY
    by_id = SnapshotKey(instance_name=looking.instance_name, snapshot_id=looking.options.snapshot_id)
    places = []
    for key in [by_id] if looking.key_set is None else looking.key_set:
        local, remote = manifests.local_entry(key) is not Entry.NOTHING, None
        if is_remote_asked:
            try:
                remote = manifests.remote_entry(key) is not Entry.NOTHING
            except SnaploaderError as error:
                caches.output.warn(f"cannot ask the remote cache for {key_name(key)}: {error.message}")
        places.append({"key": key, "local": local, "remote": remote})
    return places


def _snapshot_record(caches: Caches, snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot, and how much of each of its files and directories is where."""
    digests = {name: _digests(snapshot, name) for name in sorted(snapshot.manifest.names)}
    everything = {digest for of_file in digests.values() for digest in of_file}
    missing_locally = caches.file_cache.find_missing(everything)
    missing_remotely = caches.missing_remotely(everything) if snapshot.allow_remote else None
    files = [
        _file_record(snapshot, name, of_file, missing_locally, missing_remotely)
        for name, of_file in digests.items()
    ]
    return {
        **snapshot_record(snapshot),
        "vm_configuration": vm_configuration_record(snapshot),
        "files": files,
        "size_bytes": sum(file["size_bytes"] for file in files),
        "hole_bytes": sum(file["hole_bytes"] for file in files),
    }


def _digests(snapshot: Snapshot, name: str) -> list[Digest]:
    """The blobs a file's content lies in; the same one twice when it occurs twice."""
    if name in snapshot.tables:
        return list(snapshot.tables[name].digests())
    if name in snapshot.directories:
        return list(dict.fromkeys(snapshot.directories[name].digests()))
    digest = snapshot.manifest.files[name].digest
    return [digest] if digest.size_bytes else []


def _file_record(
    snapshot: Snapshot,
    name: str,
    digests: Collection[Digest],
    missing_locally: set[Digest],
    missing_remotely: set[Digest] | None,
) -> dict[str, Any]:
    """Chunks of a plain file: the one blob it is; of a directory: the blobs and chunks of all its files."""
    local = _present(digests, missing_locally)
    remote = (None, None) if missing_remotely is None else _present(digests, missing_remotely)
    table, directory = snapshot.tables.get(name), snapshot.directories.get(name)
    manifest = snapshot.manifest
    trees = {**manifest.chunked_files, **manifest.directories}
    holes = table if table is not None else directory
    return {
        "name": name,
        "kind": "directory" if directory is not None else "file" if table is None else "chunked",
        "chunked": table is not None,
        "digest": str(trees[name] if name in trees else manifest.files[name].digest),
        "size_bytes": file_size(snapshot, name),
        "hole_bytes": holes.hole_bytes if holes is not None else 0,
        "chunk_size": table.chunk_size if table is not None else None,
        "chunk_count": table.chunk_count if table is not None else len(digests),
        "hole_chunks": table.chunk_count - table.stored_count if table is not None else 0,
        "stored_chunks": len(digests),
        "local_chunks": local[0],
        "local_bytes": local[1],
        "remote_chunks": remote[0],
        "remote_bytes": remote[1],
    }


def _present(digests: Iterable[Digest], missing: set[Digest]) -> tuple[int, int]:
    present = [digest.size_bytes for digest in digests if digest not in missing]
    return len(present), sum(present)


def _print_snapshot(output: Output, served: str, shown: dict[str, Any]) -> None:
    output.text()
    output.text(f"served by {served}")
    output.text(f"snapshot  {shown['snapshot_id'] or '(unknown)'}, created {shown['created'] or '(unknown)'}")
    task = shown["last_executed_task"] or {}
    ran = ", ".join(
        f"{name} {task[name]}" for name in ("task_id", "invocation_id", "action_digest") if task.get(name)
    )
    if ran:
        output.text(f"ran       {ran}")
    output.text(f"digests   {shown['digest_function']}")
    output.table(
        {
            "file": "name",
            "size>": "size_bytes",
            "holes>": "hole_bytes",
            "chunk size>": _chunk_size,
            "chunks>": "stored_chunks",
            "hole chunks>": "hole_chunks",
            "local>": lambda file: f"{file['local_chunks']}/{file['stored_chunks']}",
            "remote>": lambda file: (
                "?" if file["remote_chunks"] is None else f"{file['remote_chunks']}/{file['stored_chunks']}"
            ),
            "digest": lambda file: file["digest"][:16],
        },
        shown["files"],
    )


def _chunk_size(file: dict[str, Any]) -> str:
    if file["chunk_size"] is not None:
        return format_size(file["chunk_size"])
    return "whole" if file["kind"] == "file" else "directory"


@command("invalidate")
@task_options
@destructive
def invalidate(caches: Caches, task_options: TaskOptions, yes: bool, dry_run: bool) -> None:
    """Drop all snapshots of a platform and configuration, those of all branches together.

    The branch does not matter here. Snapshots are still found by their --snapshot-id.
    """
    output = caches.output
    task = task_options.task(caches.settings, need_ref=False)
    key = keys.base_key(task, task_options.configuration_hash)
    if dry_run or output.must_ask(yes=yes):
        # Where a version of the platform and configuration is known, there may be snapshots.
        is_local = _is_there(lambda: caches.file_cache.get_ref(keys.version_key(key)))
        places: dict[str, bool | None] = {"local": is_local, "remote": None}
        remote = caches.remote_cache
        if remote is not None:
            digest = keys.remote_version_digest(key, remote.digest_function)
            places["remote"] = _is_there(lambda: remote.get_action_result(digest))
        words = {True: "known", False: "unknown", None: "not asked for"}
        what = (
            f"the snapshots of all branches of platform {key.platform_hash[:12]} and configuration "
            f"{key.configuration_hash[:12] or '(none)'}; their version is {words[places['local']]} on this "
            f"host, {words[places['remote']]} on the server"
        )
        if dry_run:
            output.data({"would_invalidate": key_record(key), **places}, f"would invalidate {what}")
            return
        output.confirm(f"Invalidate {what}?")
    version = caches.loader().invalidate_snapshot(key)
    output.data(
        {"version_id": version, "key": key_record(replace(key, version_id=version))},
        f"invalidated; the version is now {version}",
    )


def _is_there(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except NotFound:
        return False
    return True
