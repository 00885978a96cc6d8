"""An asyncio service that restores snapshots on request, many at a time, each with a time limit of its own.

    python examples/restore_service.py

Listens on a Unix socket. A request is one line of JSON: the snapshot's id, where to restore it, and how many
seconds that may take. The answer is one line, too. A client that hangs up calls its restore off, and nothing
of it is left in the output folder. The program saves a snapshot, starts the service, restores it four times
at once, asks for one that does not exist, and hangs up on a restore.

Needs `pip install 'snaploader[aio]'`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from pathlib import Path

from snaploader import CallContext, FileCache, RemoteCache, SnaploaderError, SnapshotKey, SnapshotLoader, aio
from snaploader.testing import EmbeddedServer

CONTENT = b"the state of a machine\n" * 100_000


async def restore(loader: aio.SnapshotLoader, request: dict[str, str]) -> dict[str, object]:
    """Serve one request."""
    context = CallContext(timeout_s=float(request.get("timeout_s", 30)))
    try:
        snapshot = await loader.get_snapshot_by_id(request["snapshot_id"], context=context)
        result = await loader.restore_snapshot(snapshot, request["output"], context=context)
    except SnaploaderError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"files": sorted(result.files), "bytes": result.written_bytes}


async def serve_client(
    loader: aio.SnapshotLoader, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer the one request of a client, unless it hangs up before."""
    request = json.loads(await reader.readline())
    work = asyncio.create_task(restore(loader, request))
    hung_up = asyncio.create_task(reader.read())
    await asyncio.wait([work, hung_up], return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        writer.write(json.dumps(work.result()).encode() + b"\n")
    else:
        work.cancel()  # the call ends before the task does
    hung_up.cancel()
    await asyncio.gather(work, hung_up, return_exceptions=True)
    await close(writer)


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a connection, which the other side may have closed already."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def ask(socket: Path, **request: str) -> dict[str, object]:
    """What a client does."""
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(json.dumps(request).encode() + b"\n")
    answer: dict[str, object] = json.loads(await reader.readline())
    await close(writer)
    return answer


async def hang_up(socket: Path, **request: str) -> None:
    """What a client does that loses interest."""
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(json.dumps(request).encode() + b"\n")
    writer.write_eof()
    await reader.read()  # until the service is done with it
    await close(writer)


async def demonstrate(loader: aio.SnapshotLoader, folder: Path) -> None:
    """Save a snapshot and have it restored by the service."""
    (folder / "state").write_bytes(CONTENT)
    saved = await loader.cache_snapshot(SnapshotKey(ref="main"), chunked_files={"state": folder / "state"})
    socket = folder / "socket"

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_client(loader, reader, writer)

    async with await asyncio.start_unix_server(accept, socket):
        names = ["one", "two", "three", "four"]
        answers = await asyncio.gather(
            *(ask(socket, snapshot_id=saved.snapshot_id, output=str(folder / name)) for name in names)
        )
        print("restored", [answer["bytes"] for answer in answers])
        print("absent", (await ask(socket, snapshot_id="nobody", output=str(folder / "none")))["error"])
        await hang_up(socket, snapshot_id=saved.snapshot_id, output=str(folder / "five"))
    same = all((folder / name / "state").read_bytes() == CONTENT for name in names)
    print("checked", same, "left behind:", (folder / "none").exists())


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (
            EmbeddedServer() as server,
            RemoteCache(server.url) as remote_cache,
            FileCache(folder / "cache") as file_cache,
            SnapshotLoader(file_cache, remote_cache) as loader,
        ):
            asyncio.run(demonstrate(aio.SnapshotLoader(loader), folder))


if __name__ == "__main__":
    main()
