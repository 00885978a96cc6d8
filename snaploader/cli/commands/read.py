"""`snaploader read`."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable

import click

from snaploader.cli.describe import check_there, file_names, file_size, snapshot_record
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
from snaploader.cli.streams import Nowhere, writing_to_stdout
from snaploader.cli.values import SIZE, format_size
from snaploader.errors import FailedPrecondition, InvalidArgument, translate_os_errors
from snaploader.formats.chunktable import ChunkTable
from snaploader.loader.unpack import UnpackedSnapshot

PIECE_BYTES = 1 << 20
"""Bytes held in memory at a time."""

ReadAt = Callable[[int, int], bytes]


@click.command(short_help="Write a part of one file to stdout, loading only what it needs.", cls=Command)
@task_options
@read_options
@option("--offset", scope="read", type=SIZE, default="0", show_default=True, help="Where to begin.")
@option("--size", scope="read", type=SIZE, help="How many bytes.  [default: to the end]")
@click.argument("name", metavar="NAME")
@common
def read(
    session: Session,
    task_options: TaskOptions,
    read_options: ReadOptions,
    offset: int,
    size: int | None,
    name: str,
) -> None:
    """Write a part of one file of the best snapshot to stdout, loading only the chunks it lies in.

    A file in a directory is named by its path: home/etc/hosts.

    With --json the report goes to stderr, because stdout carries the bytes.
    """
    if isinstance(sys.stdout, Nowhere):
        raise FailedPrecondition("stdout is closed, and the bytes would be lost: send it to a file or a pipe")
    loader, snapshot = find(session, task_options, read_options)
    check_there(snapshot, name)
    try:
        snapshot = snapshot.file(name)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error.message}: write it out with `restore --only {name}`") from error
    (file,) = file_names(snapshot)
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
        _copy_out(_reader(unpacked, file), offset, size)
        _report(session, unpacked, name, size)


def _narrowed(table: ChunkTable, offset: int, size: int) -> ChunkTable:
    """The table without the chunks outside of a range, so that readahead does not fetch them."""
    first, end = offset // table.chunk_size, -(-(offset + size) // table.chunk_size)
    kept = (table.indices >= first) & (table.indices < end)
    return dataclasses.replace(table, indices=table.indices[kept], hashes=table.hashes[kept])


def _reader(unpacked: UnpackedSnapshot, name: str) -> ReadAt:
    """How to read from the file."""
    store = unpacked.chunked_files.get(name)
    if store is not None:
        return store.read_at
    path = unpacked.files[name]

    def read_at(offset: int, size: int) -> bytes:
        with translate_os_errors(f"cannot read {name!r}"), path.open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    return read_at


def _copy_out(read_at: ReadAt, offset: int, size: int) -> None:
    end = offset + size
    while offset < end:
        data = read_at(offset, min(PIECE_BYTES, end - offset))
        with writing_to_stdout():
            sys.stdout.buffer.write(data)
        offset += len(data)
    with writing_to_stdout():
        sys.stdout.buffer.flush()


def _report(session: Session, unpacked: UnpackedSnapshot, name: str, size: int) -> None:
    """What was loaded. On stderr in any case."""
    output = session.output
    statistics = next(iter(unpacked.statistics().values()), None)
    origins = {} if statistics is None else dict(sorted(statistics.origins.items()))
    output.report(
        {
            **snapshot_record(unpacked.snapshot),
            "name": name,
            "size_bytes": size,
            "origins": {
                origin: {"chunks": count.chunks, "bytes": count.bytes, "prefetched": count.prefetched}
                for origin, count in origins.items()
            },
        }
    )
    parts = ", ".join(f"{count.chunks} chunks from {origin}" for origin, count in origins.items())
    kept = "kept whole" if statistics is None else parts or "no chunk touched"
    output.detail(f"read {format_size(size)} of {name!r}: {kept}")
