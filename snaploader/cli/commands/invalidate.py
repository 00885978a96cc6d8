"""`snaploader invalidate`."""

from __future__ import annotations

from dataclasses import replace

import click

from snaploader.cli.describe import key_record
from snaploader.cli.options import Command, TaskOptions, common, task_options
from snaploader.cli.session import Session
from snaploader.keys import base_key


@click.command(short_help="Drop all snapshots of a platform and configuration.", cls=Command)
@task_options
@common
def invalidate(session: Session, task_options: TaskOptions) -> None:
    """Drop all snapshots of a platform and configuration, those of all branches together.

    The branch does not matter here. Snapshots are still found by their --snapshot-id.
    """
    task = task_options.task(session.settings, need_ref=False)
    key = base_key(task, task_options.configuration_hash)
    version = session.loader().invalidate_snapshot(key)
    session.output.json({"version_id": version, "key": key_record(replace(key, version_id=version))})
    session.output.text(f"invalidated; the version is now {version}")
