"""`snaploader restore`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from snaploader.cli.describe import check_there, checked_folder, file_size, served_line, snapshot_record
from snaploader.cli.find import find
from snaploader.cli.options import (
    Command,
    ReadOptions,
    TaskOptions,
    common,
    option,
    read_options,
    task_options,
)
from snaploader.cli.session import Session
from snaploader.cli.values import format_size, format_time


@click.command(short_help="Write the files of the best snapshot to a folder.", cls=Command)
@task_options
@read_options
@option(
    "--only",
    "names",
    scope="restore",
    multiple=True,
    metavar="NAME",
    help="Only this file or directory, or what stands in one, as in home/etc; repeatable.",
)
@click.argument("output_dir", type=click.Path(path_type=Path), metavar="OUTPUT_DIR")
@common
def restore(
    session: Session,
    task_options: TaskOptions,
    read_options: ReadOptions,
    names: tuple[str, ...],
    output_dir: Path,
) -> None:
    """Write the files and directories of the best snapshot to a folder, holes as holes.

    Looks for a snapshot of --ref, then of --base-ref, then of --default-ref, and says which of them served.
    All files appear, or none; only when it is killed, some may be there, and temporary files .snaploader-….
    """
    checked_folder(output_dir, "the output folder")
    output = session.output
    begin = time.monotonic()
    loader, snapshot = find(session, task_options, read_options)
    if names:
        for name in names:
            check_there(snapshot, name)
        snapshot = snapshot.only(names)
    record = snapshot_record(snapshot)
    with output.bars() as progress:
        result = loader.restore_snapshot(snapshot, output_dir, progress=progress)
    seconds = time.monotonic() - begin
    placed = sorted((*result.files.items(), *result.directories.items()))
    output.json(
        {
            **record,
            "output_directory": str(output_dir),
            "files": [
                {"name": name, "path": str(path), "size_bytes": file_size(snapshot, name)}
                for name, path in sorted(result.files.items())
            ],
            "directories": [
                {"name": name, "path": str(path), "size_bytes": file_size(snapshot, name)}
                for name, path in sorted(result.directories.items())
            ],
            "written_bytes": result.written_bytes,
            "hole_bytes": result.hole_bytes,
            "fetched_blobs": result.fetched_blobs,
            "fetched_bytes": result.fetched_bytes,
            "seconds": round(seconds, 6),
        }
    )
    output.text(f"restored  {served_line(snapshot)}")
    output.table(
        ["file", "size>", "path"],
        [[name, format_size(file_size(snapshot, name)), str(path)] for name, path in placed],
    )
    output.text(
        f"written   {format_size(result.written_bytes)}, holes {format_size(result.hole_bytes)}, "
        f"fetched {format_size(result.fetched_bytes)} in {result.fetched_blobs} blobs"
    )
    output.detail(f"restored in {format_time(seconds)}")
