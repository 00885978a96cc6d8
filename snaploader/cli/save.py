"""`snaploader save`."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import click

from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader.cli.lookup import key_record
from snaploader.cli.options import Command, TaskOptions, command, option, save_options, task_options
from snaploader.cli.output import record
from snaploader.cli.resources import Caches
from snaploader.cli.values import KEY_VALUE, SIZE, Parsed, format_size, format_time, parse_size
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.formats.chunktable import check_geometry
from snaploader.formats.manifest import check_name
from snaploader.keys import SnapshotKey
from snaploader.loader import (
    DEFAULT_CHUNK_THRESHOLD_BYTES,
    DirectorySource,
    SavedDirectory,
    SavedFile,
    SaveResult,
)
from snaploader.policy import SavePolicy
from snaploader.workspace.model import pin_name

WORKSPACE_PINS = pin_name("")
"""How the pins of workspaces begin. A save that took such a name would let go what the workspace needs."""


def _parse_chunk_size(text: str) -> int:
    size = parse_size(text)
    check_geometry(0, size)
    return size


CHUNK_SIZE = Parsed("size", _parse_chunk_size, SIZE.toml)


class SaveCommand(Command):
    """Refuses options that contradict each other. For click they are one, of which the last counts."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        if {"--chunked", "--plain"} <= {*options}:
            raise click.UsageError("--chunked and --plain exclude each other", ctx)
        return super().parse_args(ctx, args)


@command("save", cls=SaveCommand)
@task_options
@option("--chunked/--plain", "chunked", default=None, help="Keep all files in chunks, or all whole.")
@option(
    "--chunk-threshold",
    type=SIZE,
    default=f"{DEFAULT_CHUNK_THRESHOLD_BYTES >> 20}MiB",
    help="Files of this size or more are kept in chunks.",
)
@option("--chunk-size", type=CHUNK_SIZE, help="Size of a chunk: a power of two, 4KiB to 64MiB.")
@option("--snapshot-id", "new_snapshot_id", metavar="ID", help="Id of the snapshot.  [default: new UUID]")
@save_options
@option("--property", "properties", multiple=True, type=KEY_VALUE, help="Property kept with the snapshot.")
@option(
    "--pin", metavar="NAME", help="Keep the snapshot from eviction on this host until `cache unpin NAME`."
)
@option("--local/--no-local", default=True, help="Keep blobs in the local cache.")
@option(
    "--local-manifest/--no-local-manifest",
    default=None,
    help="Find the snapshot on this host without the remote cache.  [default: as --local]",
)
@option(
    "--link-files", is_flag=True, help="Take files that are kept whole by hard link: never write to them."
)
@click.argument("files", nargs=-1, required=True, metavar="FILE|DIR…")
def save(
    caches: Caches,
    task_options: TaskOptions,
    files: tuple[str, ...],
    chunked: bool | None,
    chunk_threshold: int,
    chunk_size: int | None,
    new_snapshot_id: str | None,
    save_policy: str | None,
    min_refresh_interval: float | None,
    properties: tuple[tuple[str, str], ...],
    pin: str | None,
    local: bool,
    local_manifest: bool | None,
    link_files: bool,
) -> None:
    """Save files and directories as the snapshot of a branch.

    A file is saved under its base name; NAME=PATH gives it another. A directory is saved with all that is in
    it. The snapshot goes to the local cache, then to the remote cache if there is one.
    """
    if pin is not None and pin.startswith(WORKSPACE_PINS):
        raise InvalidArgument(f"--pin {pin!r}: names that begin with {WORKSPACE_PINS!r} belong to workspaces")
    sources = _sources(named_files(files), chunked, chunk_threshold)
    output = caches.output
    loader = caches.loader(share_snapshots=task_options.share, universal_ref=task_options.universal_fallback)
    begin = time.monotonic()
    key_set = loader.snapshot_key_set(
        task_options.task(caches.settings), task_options.configuration_hash, task_options.runner_id
    )
    assert key_set.write_key is not None
    if min_refresh_interval is None:
        min_refresh_interval = task_options.wishes.refresh_interval_s
    snapshot_id = new_snapshot_id or str(uuid.uuid4())
    with output.bars() as progress:
        result = loader.cache_snapshot(
            key_set.write_key,
            **sources,
            vm_configuration=VMConfiguration(properties=dict(properties)),
            vm_metadata=_metadata(key_set.write_key, snapshot_id),
            snapshot_id=snapshot_id,
            save_policy=save_policy or task_options.wishes.save_policy or SavePolicy.ALWAYS,
            key_set=key_set,
            default_ref=task_options.default_ref,
            min_refresh_interval_s=min_refresh_interval or 0.0,
            local=local,
            local_manifest=local_manifest,
            link_files=link_files,
            chunk_size=chunk_size,
            pin=pin,
            progress=progress,
        )
    _print(caches, result, time.monotonic() - begin, pin)


def named_files(arguments: tuple[str, ...]) -> dict[str, Path]:
    """The files by the names they get in the snapshot; InvalidArgument when two get the same one."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or os.path.lexists(argument):
            name, path = os.path.basename(argument.rstrip("/")), argument
        if name in {"", ".", ".."}:
            raise InvalidArgument(f"{argument!r} has no name of its own: give it one, as in NAME={argument}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"{name!r} is not UTF-8, as names in a snapshot must be: give another, as in NAME={path!r}"
            ) from error
        check_name(name)
        if name in named:
            raise InvalidArgument(
                f"{str(named[name])!r} and {path!r} would both be saved as {name!r}: write NAME=PATH for one"
            )
        named[name] = Path(path)
    return named


def _sources(paths: dict[str, Path], chunked: bool | None, threshold: int) -> dict[str, Any]:
    """What is to be saved, by the argument of `cache_snapshot` that takes it."""
    sources: dict[str, Any] = {"files": {}, "chunked_files": {}, "directories": {}}
    # In chunks means all but files without bytes, which have none; whole means none, however big.
    from_size = threshold if chunked is None else 1 if chunked else sys.maxsize
    for name, path in paths.items():
        with translate_os_errors(f"cannot save {str(path)!r}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                raise InvalidArgument(f"cannot save {str(path)!r}: there is no such file") from None
        if stat.S_ISDIR(status.st_mode):
            sources["directories"][name] = DirectorySource(path, chunk_threshold_bytes=max(1, from_size))
        elif not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(
                f"cannot save {str(path)!r}: only regular files and directories can be saved"
            )
        elif status.st_size and status.st_size >= from_size:
            sources["chunked_files"][name] = path
        else:
            sources["files"][name] = path
    return sources


def _metadata(key: SnapshotKey, snapshot_id: str) -> VMMetadata:
    """Where the snapshot comes from. As a fallback it is as old as this moment."""
    metadata = VMMetadata(snapshot_id=snapshot_id, snapshot_key=key.to_proto())
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    metadata.created_timestamp.seconds = seconds
    metadata.created_timestamp.nanos = nanoseconds
    metadata.last_executed_task.completed_timestamp.CopyFrom(metadata.created_timestamp)
    return metadata


def _print(caches: Caches, result: SaveResult, seconds: float, pin: str | None) -> None:
    output = caches.output
    for warning in result.warnings:
        output.warn(warning)
    for directory in result.directories:
        for path in directory.skipped:
            output.warn(f"{path!r} in {directory.name!r} is a socket, FIFO or device and was not saved")
    sizes = ("size_bytes", "hashed_bytes", "hole_bytes", "stored_bytes", "deduplicated_bytes")
    uploads = ("uploaded_blobs", "uploaded_bytes", "uploaded_wire_bytes")
    stands = result.remote_manifest
    output.data(
        {
            "snapshot_id": result.snapshot_id,
            "ref": result.key.ref,
            "key": key_record(result.key),
            "files": [_record(file) for file in result.files],
            "directories": [_record(directory) for directory in result.directories],
            **record(result, *sizes, *uploads, "saved_locally", "saved_remotely", "remote_skipped"),
            "remote_manifest": stands and {"digest": str(stands.digest), "is_ours": stands.is_ours},
            "pin": pin,
            "warnings": result.warnings,
            "seconds": round(seconds, 6),
        },
        f"snapshot  {result.snapshot_id}",
        f"ref       {result.key.ref or '(none)'}",
    )
    output.table(
        {
            "file": "name",
            "kept": _kept,
            "size>": "size_bytes",
            "holes>": "hole_bytes",
            "stored>": "stored_bytes",
            "deduplicated>": "deduplicated_bytes",
        },
        [*result.files, *result.directories],
    )
    if result.saved_remotely:
        output.text(f"uploaded  {format_size(result.uploaded_bytes)} in {result.uploaded_blobs} blobs")
    elif result.remote_skipped:
        output.text(f"uploaded  nothing: {result.remote_skipped}")
    if pin is not None:
        output.text(f"pinned    as {pin}: never evicted here, until `snaploader cache unpin {pin}`")
    elif not result.saved_remotely and not result.remote_skipped:
        output.text(
            "uploaded  nothing: without --remote-cache this is the only copy, and it is evicted once it is "
            "unused for long. Save with --pin NAME to keep it on this host"
        )
    output.detail(f"saved in {format_time(seconds)}")


def _record(saved: SavedFile | SavedDirectory) -> dict[str, Any]:
    return {**dataclasses.asdict(saved), "digest": str(saved.digest)}


def _kept(saved: SavedFile | SavedDirectory) -> str:
    if isinstance(saved, SavedDirectory):
        return f"{saved.files} files"
    return f"{saved.chunks} chunks" if saved.chunked else "whole"
