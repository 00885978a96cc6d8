"""`snaploader restore` and `snaploader read`: what a snapshot holds, in full and in part."""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from snaploader.cli.lookup import check_there, file_size, find, served_line, snapshot_record
from snaploader.cli.options import ReadOptions, command, option, read_options
from snaploader.cli.output import Output, record
from snaploader.cli.process import Nowhere, writing_to_stdout
from snaploader.cli.resources import Caches
from snaploader.cli.values import SIZE, format_size, format_time
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.formats.chunktable import ChunkTable
from snaploader.loader import Snapshot, UnpackedSnapshot

PIECE_BYTES = 1 << 20
"""Bytes of `read` that are held in memory at a time."""


@command("restore")
@read_options
@option(
    "--only",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this file or directory, or what stands in one, as in home/etc; repeatable.",
)
@click.argument("output_dir", type=click.Path(path_type=Path), metavar="OUTPUT_DIR")
def restore(caches: Caches, read_options: ReadOptions, names: tuple[str, ...], output_dir: Path) -> None:
    """Write the files and directories of the best snapshot to a folder, holes as holes.

    Looks for a snapshot of --ref, then of --base-ref, then of --default-ref, and says which of them served.
    All files appear, or none; only when it is killed, some may be there, and temporary files .snaploader-….
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InvalidArgument(f"the output folder {str(output_dir)!r} is not a folder")
    output = caches.output
    begin = time.monotonic()
    loader, snapshot = find(caches, read_options)
    if names:
        for name in names:
            check_there(snapshot, name)
        snapshot = snapshot.only(names)
    with output.bars() as progress:
        result = loader.restore_snapshot(snapshot, output_dir, progress=progress)
    seconds = time.monotonic() - begin
    files, directories = _placed(snapshot, result.files), _placed(snapshot, result.directories)
    output.data(
        {
            **snapshot_record(snapshot),
            "output_directory": str(output_dir),
            "files": files,
            "directories": directories,
            **record(result, "written_bytes", "hole_bytes", "fetched_blobs", "fetched_bytes"),
            "seconds": round(seconds, 6),
        },
        f"restored  {served_line(snapshot)}",
    )
    output.table(
        {"file": "name", "size>": "size_bytes", "path": "path"},
        sorted((*files, *directories), key=operator.itemgetter("name")),
    )
    output.text(
        f"written   {format_size(result.written_bytes)}, holes {format_size(result.hole_bytes)}, "
        f"fetched {format_size(result.fetched_bytes)} in {result.fetched_blobs} blobs"
    )
    output.detail(f"restored in {format_time(seconds)}")


def _placed(snapshot: Snapshot, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    return [
        {"name": name, "path": str(path), "size_bytes": file_size(snapshot, name)}
        for name, path in sorted(paths.items())
    ]


@command("read")
@read_options
@option("--offset", type=SIZE, default="0", help="Where to begin.")
@option("--size", type=SIZE, help="How many bytes.  [default: to the end]")
@click.argument("name", metavar="NAME")
def read(caches: Caches, read_options: ReadOptions, offset: int, size: int | None, name: str) -> None:
    """Write a part of one file of the best snapshot to stdout, loading only the chunks it lies in.

    A file in a directory is named by its path: home/etc/hosts.

    With --json the report goes to stderr, because stdout carries the bytes.
    """
    if isinstance(sys.stdout, Nowhere):
        raise FailedPrecondition("stdout is closed, and the bytes would be lost: send it to a file or a pipe")
    loader, snapshot = find(caches, read_options)
    check_there(snapshot, name)
    try:
        snapshot = snapshot.file(name)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error.message}: write it out with `restore --only {name}`") from error
    (file,) = snapshot.manifest.names
    length = file_size(snapshot, file)
    if size is None:
        size = max(length - offset, 0)
    if offset + size > length:
        raise InvalidArgument(
            f"bytes {offset} to {offset + size} are not all in {name!r}, which has {length}: "
            "choose another --offset or --size"
        )
    if file in snapshot.tables:
        table = _narrowed(snapshot.tables[file], offset, size)
        snapshot = dataclasses.replace(snapshot, tables={file: table})
    with (
        tempfile.TemporaryDirectory(prefix="snaploader-read-") as folder,
        loader.unpack_snapshot(snapshot, folder) as unpacked,
    ):
        _copy_out(caches.output, unpacked, file, offset, size)
        _report(caches.output, unpacked, name, size)


def _narrowed(table: ChunkTable, offset: int, size: int) -> ChunkTable:
    """The table without the chunks outside of a range, so that readahead does not fetch them."""
    first, end = offset // table.chunk_size, -(-(offset + size) // table.chunk_size)
    kept = (table.indices >= first) & (table.indices < end)
    return dataclasses.replace(table, indices=table.indices[kept], hashes=table.hashes[kept])


def _copy_out(output: Output, unpacked: UnpackedSnapshot, name: str, offset: int, size: int) -> None:
    store = unpacked.chunked_files.get(name)
    end = offset + size
    while offset < end:
        length = min(PIECE_BYTES, end - offset)
        if store is not None:
            data = store.read_at(offset, length)
        else:
            with translate_os_errors(f"cannot read {name!r}"), unpacked.files[name].open("rb") as file:
                data = os.pread(file.fileno(), length, offset)
        with writing_to_stdout():
            sys.stdout.buffer.write(data)
        offset += len(data)
    output.flush()


def _report(output: Output, unpacked: UnpackedSnapshot, name: str, size: int) -> None:
    """What was loaded. On stderr in any case."""
    statistics = next(iter(unpacked.statistics().values()), None)
    origins = {} if statistics is None else dict(sorted(statistics.origins.items()))
    output.report(
        {
            **snapshot_record(unpacked.snapshot),
            "name": name,
            "size_bytes": size,
            "origins": {
                origin: record(count, "chunks", "bytes", "prefetched") for origin, count in origins.items()
            },
        }
    )
    parts = ", ".join(f"{count.chunks} chunks from {origin}" for origin, count in origins.items())
    kept = "kept whole" if statistics is None else parts or "no chunk touched"
    output.detail(f"read {format_size(size)} of {name!r}: {kept}")
