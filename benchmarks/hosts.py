"""Hosts and servers to measure with."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from snaploader import FileCache, RemoteCache, SnapshotLoader, SnapshotTask, VMConfiguration
from snaploader.keys import SnapshotKeySet

GIB = 1 << 30
CONFIGURATION = VMConfiguration(cpu_count=2, memory_bytes=2 * GIB)
TASK = SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": "main"})


@contextlib.contextmanager
def host(folder: Path, url: str | None = None) -> Iterator[SnapshotLoader]:
    """A loader with a cache in `folder`, and a remote cache when there is a URL."""
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(FileCache(folder, max_bytes=64 * GIB))
        remote = stack.enter_context(RemoteCache(url)) if url else None
        yield stack.enter_context(SnapshotLoader(cache, remote))


def key_set(loader: SnapshotLoader) -> SnapshotKeySet:
    """The keys of the one task that is measured with."""
    return loader.snapshot_key_set(TASK, "benchmark")


@contextlib.contextmanager
def embedded() -> Iterator[str]:
    """The URL of the embedded server, in memory, in a process of its own."""
    code = (
        "import sys; from snaploader.testing import EmbeddedServer\n"
        "with EmbeddedServer() as server: print(server.url, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@contextlib.contextmanager
def casd(binary: str | None, folder: Path) -> Iterator[str | None]:
    """The URL of a running buildbox-casd, or None when there is no binary."""
    if binary is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([binary, f"--bind=127.0.0.1:{port}", "--log-level=error", str(folder)])
    try:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
