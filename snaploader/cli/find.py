"""Looking a snapshot up as the options say."""

from __future__ import annotations

from dataclasses import dataclass

from snaploader.cli.describe import served_line
from snaploader.cli.options import ReadOptions, TaskOptions, first_given
from snaploader.cli.session import Session
from snaploader.errors import InvalidArgument
from snaploader.keys import SnapshotKeySet
from snaploader.loader.loader import SnapshotLoader
from snaploader.loader.results import Snapshot
from snaploader.policy import DEFAULT_MAX_STALE_FALLBACK_AGE_S, ReadPolicy


@dataclass(frozen=True, slots=True)
class Lookup:
    """A loader, and what it is to look for."""

    loader: SnapshotLoader
    key_set: SnapshotKeySet | None
    """None when a snapshot is looked for by its id."""
    options: ReadOptions
    read_policy: ReadPolicy
    instance_name: str

    def find(self) -> Snapshot:
        """The snapshot. NotFound when there is none."""
        if self.key_set is None:
            return self.loader.get_snapshot_by_id(
                self.options.snapshot_id,
                instance_name=self.instance_name,
                read_policy=self.read_policy,
            )
        return self.loader.get_snapshot(
            self.key_set, self.read_policy, allow_degraded=self.options.allow_degraded
        )


def lookup(
    session: Session, task_options: TaskOptions, read_options: ReadOptions, *, readonly: bool = False
) -> Lookup:
    """A loader made as the options say, and the keys they name.

    Args:
        readonly: Keep no manifest that is found and mint no version.
    """
    by_id = bool(read_options.snapshot_id)
    if by_id and task_options.ref:
        raise InvalidArgument("--snapshot-id and --ref exclude each other: an id names one snapshot exactly")
    task = None if by_id else task_options.task(session.settings)
    wishes = task_options.wishes
    policy = ReadPolicy.parse(read_options.read_policy or wishes.read_policy or ReadPolicy.LOCAL_FIRST)
    loader = session.loader(
        share_snapshots=task_options.share,
        universal_ref=task_options.universal_fallback,
        max_stale_fallback_age_s=first_given(
            read_options.max_stale_fallback_age,
            wishes.max_stale_fallback_age_s,
            DEFAULT_MAX_STALE_FALLBACK_AGE_S,
        ),
        readonly=readonly,
    )
    key_set = None
    if task is not None:
        key_set = loader.snapshot_key_set(
            task,
            task_options.configuration_hash,
            task_options.runner_id,
            # Who wants what this host has gets it also when the server is away.
            allow_stale_version=read_options.allow_degraded or policy is ReadPolicy.LOCAL_ONLY,
        )
    return Lookup(loader, key_set, read_options, policy, session.settings.remote_instance_name)


def find(
    session: Session, task_options: TaskOptions, read_options: ReadOptions
) -> tuple[SnapshotLoader, Snapshot]:
    """The loader and the snapshot that the options name. Tells of keys that could not be asked."""
    looking = lookup(session, task_options, read_options)
    snapshot = looking.find()
    for failure in snapshot.failures:
        if not isinstance(failure.error, LookupError):
            session.output.warn(f"could not look at ref {failure.key.ref!r}: {failure.error.message}")
    session.output.detail(f"found {served_line(snapshot)}")
    return looking.loader, snapshot
