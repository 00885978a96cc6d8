"""`snaploader invalidate`."""

from __future__ import annotations

from dataclasses import replace

import click

from snaploader.cli.describe import key_record
from snaploader.cli.options import Command, TaskOptions, common, destructive, task_options
from snaploader.cli.session import Session
from snaploader.errors import NotFound
from snaploader.keys import SnapshotKey, base_key, remote_version_digest, version_key


@click.command(short_help="Drop all snapshots of a platform and configuration.", cls=Command)
@task_options
@destructive("invalidate")
@common
def invalidate(session: Session, task_options: TaskOptions, yes: bool, dry_run: bool) -> None:
    """Drop all snapshots of a platform and configuration, those of all branches together.

    The branch does not matter here. Snapshots are still found by their --snapshot-id.
    """
    task = task_options.task(session.settings, need_ref=False)
    key = base_key(task, task_options.configuration_hash)
    if dry_run or session.output.must_ask(yes=yes):
        places = {"local": _stands_locally(session, key), "remote": _stands_remotely(session, key)}
        words = {True: "known", False: "unknown", None: "not asked for"}
        what = (
            f"the snapshots of all branches of platform {key.platform_hash[:12]} and configuration "
            f"{key.configuration_hash[:12] or '(none)'}; their version is {words[places['local']]} on this "
            f"host, {words[places['remote']]} on the server"
        )
        if dry_run:
            session.output.json({"would_invalidate": key_record(key), **places})
            session.output.text(f"would invalidate {what}")
            return
        session.output.confirm(f"Invalidate {what}?")
    version = session.loader().invalidate_snapshot(key)
    session.output.json({"version_id": version, "key": key_record(replace(key, version_id=version))})
    session.output.text(f"invalidated; the version is now {version}")


def _stands_locally(session: Session, key: SnapshotKey) -> bool:
    """Whether this host knows a version of the platform and configuration, so that there may be snapshots."""
    try:
        session.file_cache.get_ref(version_key(key))
    except NotFound:
        return False
    return True


def _stands_remotely(session: Session, key: SnapshotKey) -> bool | None:
    """Whether the server has one; None without a server."""
    remote = session.remote_cache
    if remote is None:
        return None
    try:
        remote.get_action_result(remote_version_digest(key, remote.digest_function))
    except NotFound:
        return False
    return True
