"""Looking a snapshot up as the options say, and describing what was found, for people and for programs."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

from snaploader._proto import timestamp_pb2
from snaploader.cli.options import ReadOptions
from snaploader.cli.output import record
from snaploader.cli.resources import Caches
from snaploader.errors import InvalidArgument, NotFound
from snaploader.keys import SnapshotKey, SnapshotKeySet, is_universal
from snaploader.loader import Snapshot, SnapshotLoader
from snaploader.policy import DEFAULT_MAX_STALE_FALLBACK_AGE_S, ReadPolicy


class Lookup:
    """A loader made as the options say, and the keys that they name.

    Args:
        readonly: Keep no manifest that is found and mint no version.
        allow_stale_version: Take the version last seen here when the server is away, in any case.
    """

    key_set: SnapshotKeySet | None = None
    """None when a snapshot is looked for by its id."""

    def __init__(
        self,
        caches: Caches,
        options: ReadOptions,
        *,
        readonly: bool = False,
        allow_stale_version: bool = False,
    ) -> None:
        if options.snapshot_id and options.ref:
            raise InvalidArgument(
                "--snapshot-id and --ref exclude each other: an id names one snapshot exactly"
            )
        task = None if options.snapshot_id else options.task(caches.settings)
        wishes = options.wishes
        max_age_s = options.max_stale_fallback_age
        if max_age_s is None:
            max_age_s = wishes.max_stale_fallback_age_s
        self.options = options
        self.read_policy = ReadPolicy.parse(
            options.read_policy or wishes.read_policy or ReadPolicy.LOCAL_FIRST
        )
        self.instance_name = caches.settings.remote_instance_name
        self.loader = caches.loader(
            share_snapshots=options.share,
            universal_ref=options.universal_fallback,
            max_stale_fallback_age_s=DEFAULT_MAX_STALE_FALLBACK_AGE_S if max_age_s is None else max_age_s,
            readonly=readonly,
        )
        if task is not None:
            self.key_set = self.loader.snapshot_key_set(
                task,
                options.configuration_hash,
                options.runner_id,
                # Who wants what this host has gets it even when the server is away.
                allow_stale_version=allow_stale_version
                or options.allow_degraded
                or self.read_policy is ReadPolicy.LOCAL_ONLY,
            )

    def find(self) -> Snapshot:
        """The snapshot. NotFound when there is none."""
        if self.key_set is None:
            return self.loader.get_snapshot_by_id(
                self.options.snapshot_id,
                instance_name=self.instance_name,
                read_policy=self.read_policy,
                sources=self.options.sources,
            )
        return self.loader.get_snapshot(
            self.key_set,
            self.read_policy,
            sources=self.options.sources,
            allow_degraded=self.options.allow_degraded,
        )


def find(caches: Caches, options: ReadOptions) -> tuple[SnapshotLoader, Snapshot]:
    """The loader and the snapshot that the options name. Tells of keys that could not be asked."""
    looking = Lookup(caches, options)
    snapshot = looking.find()
    for failure in snapshot.failures:
        if not isinstance(failure.error, LookupError):
            caches.output.warn(f"could not look at ref {failure.key.ref!r}: {failure.error.message}")
    caches.output.detail(f"found {served_line(snapshot)}")
    return looking.loader, snapshot


def key_name(key: SnapshotKey) -> str:
    """The key as a person calls it."""
    if key.snapshot_id:
        return f"snapshot {key.snapshot_id}"
    if is_universal(key):
        return "the universal fallback"
    if key.ref:
        return f"ref {key.ref!r}"
    return f"runner {key.runner_id!r}" if key.runner_id else "the key without a ref"


def key_record(key: SnapshotKey) -> dict[str, str]:
    """The fields of a key that are set."""
    return {name: value for name, value in dataclasses.asdict(key).items() if value}


def vm_configuration_record(snapshot: Snapshot) -> dict[str, Any]:
    """What the machine was made of: the fields that are set, or only the type of a foreign message."""
    packed = snapshot.manifest.vm_configuration
    known: dict[str, Any] = {"type": packed.type_url.rpartition("/")[2]}
    if snapshot.vm_configuration is not None:
        for field, value in snapshot.vm_configuration.ListFields():
            known[field.name] = dict(value) if field.name == "properties" else value
    return known


def served_ref(snapshot: Snapshot) -> str:
    """The branch whose state this is; for a snapshot found by its id, the branch it was saved for."""
    if snapshot.key.ref or not snapshot.key.snapshot_id:
        return snapshot.key.ref
    metadata = snapshot.vm_metadata
    return str(metadata.snapshot_key.ref) if metadata is not None else ""


def snapshot_record(snapshot: Snapshot) -> dict[str, Any]:
    """What served, and what was tried before."""
    metadata = snapshot.vm_metadata
    task: dict[str, Any] | None = None
    if metadata is not None:
        task = record(metadata.last_executed_task, "task_id", "invocation_id", "action_digest")
        task["completed"] = time_record(metadata.last_executed_task.completed_timestamp)
    return {
        "ref": served_ref(snapshot),
        "source": str(snapshot.source),
        "key": key_record(snapshot.key),
        "snapshot_id": str(metadata.snapshot_id) if metadata is not None else snapshot.key.snapshot_id,
        "created": None if metadata is None else time_record(metadata.created_timestamp),
        "last_executed_task": task,
        "digest_function": snapshot.manifest.digest_function.name,
        "degraded": snapshot.degraded,
        "failures": [
            {
                "key": key_record(failure.key),
                "error": type(failure.error).__name__,
                "message": failure.error.message,
            }
            for failure in snapshot.failures
        ],
    }


def time_record(timestamp: timestamp_pb2.Timestamp) -> str | None:
    """A time in ISO 8601, to the second; None when there is none, or one that no calendar has."""
    try:
        return datetime.fromtimestamp(timestamp.seconds, UTC).isoformat() if timestamp.seconds else None
    except (ValueError, OverflowError, OSError):
        return None


def served_line(snapshot: Snapshot) -> str:
    ref = served_ref(snapshot)
    name = f"ref {ref!r}" if ref and snapshot.key.snapshot_id else key_name(snapshot.key)
    return f"{name} from the {snapshot.source} cache"


def file_size(snapshot: Snapshot, name: str) -> int:
    if name in snapshot.directories:
        return snapshot.directories[name].size_bytes
    table = snapshot.tables.get(name)
    return table.size if table is not None else snapshot.manifest.files[name].digest.size_bytes


def check_there(snapshot: Snapshot, name: str) -> None:
    """NotFound, with what there is instead, unless `name` is of a file or directory, or a path in one."""
    top, slash, inside = name.partition("/")
    inside = inside.rstrip("/")
    known, where = sorted(snapshot.manifest.names), "the snapshot"
    if top in known and not inside and (not slash or top in snapshot.directories):
        return
    if top in snapshot.directories:
        tree = snapshot.directories[top]
        if inside in tree:
            return
        above = inside.rpartition("/")[0]
        while above not in tree:
            above = above.rpartition("/")[0]
        known = sorted(path.rpartition("/")[2] for path in tree if path and path.rpartition("/")[0] == above)
        where = repr(f"{top}/{above}".rstrip("/"))
    shown = ", ".join(repr(other) for other in known[:20]) + (", …" if len(known) > 20 else "")
    raise NotFound(f"the snapshot has no file {name!r}; {where} has {shown or 'none'}")
