"""Tasks with contexts of their own on one loader: what they leave in the process, and how soon they end.

    python -m benchmarks.tasks [--rounds N] [--output FILE]

Each task saves, finds and reads in a group, with a token and an invocation id of its own. Threads,
descriptors and resident memory are those of this process, after a first round that fills pools and memories.
Then the server hangs, and save, find and restore are called off while they wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import hosts
from snaploader import BearerToken, CallContext, Cancellation, RequestMetadata, SnapshotLoader
from snaploader.errors import Cancelled
from snaploader.testing import CallGate, EmbeddedServer, Fault

GROUPS = 64


def held() -> dict[str, float]:
    """What this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {
        "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def one_task(loader: SnapshotLoader, folder: Path, number: int) -> None:
    """Save, find and read, as somebody who did none of that before."""
    name = f"g{number % GROUPS}"
    context = CallContext(
        group_id=name,
        credentials=BearerToken(f"token-{number}"),
        request_metadata=RequestMetadata(),
        cancellation=Cancellation(),
        timeout_s=600,
    )
    disk = folder / name
    disk.write_bytes(os.urandom(8192))
    with context.use():
        keys = hosts.key_set(loader)
        loader.cache_snapshot(
            keys.write_key, chunked_files={"disk": disk}, vm_configuration=hosts.CONFIGURATION
        )
        with loader.unpack_snapshot(loader.get_snapshot(keys), folder / f"out-{number}") as unpacked:
            unpacked.chunked_files["disk"].read_at(0, 4096)


def ending_ms(server: EmbeddedServer, call: Callable[[CallContext], object]) -> float:
    """Milliseconds from calling off to the return, while the server hangs."""
    gate, flag = CallGate(), Cancellation()
    server.faults.add(Fault(times=None, gate=gate))
    ended: list[float] = []

    def work() -> None:
        try:
            call(CallContext(cancellation=flag))
        except Cancelled:
            ended.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    if not gate.wait_reached(60):
        raise TimeoutError("the call asks the server nothing")
    began = time.perf_counter()
    flag.cancel()
    thread.join()
    gate.open()
    server.faults.clear()
    return 1000 * (ended[0] - began)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="calls to call off (default: 100)")
    parser.add_argument("--output", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    found: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory(prefix="snaploader-tasks-") as scratch,
        EmbeddedServer() as server,
        hosts.embedded() as url,
    ):
        folder = Path(scratch)
        with hosts.host(folder / "cache", url) as loader, ThreadPoolExecutor(64) as threads:
            for name in ("64 at once, first", "64 at once, again", "64 at once, third"):
                list(threads.map(lambda number: one_task(loader, folder, number), range(64)))
                found[name] = held()
            for number in range(1000):
                one_task(loader, folder, number)
            found["then 1,000 one after another"] = held()
        with hosts.host(folder / "cache-2", server.url) as loader:
            disk = folder / "disk"
            disk.write_bytes(os.urandom(1 << 20))
            keys = hosts.key_set(loader)

            def save(context: CallContext | None = None) -> object:
                return loader.cache_snapshot(
                    keys.write_key,
                    chunked_files={"disk": disk},
                    vm_configuration=hosts.CONFIGURATION,
                    context=context,
                )

            save()
            cold = hosts.host(folder / "cache-3", server.url)
            with cold as other:
                snapshot = other.get_snapshot(keys)
                calls: dict[str, Callable[[CallContext], object]] = {
                    "save": save,
                    "find": lambda context: loader.get_snapshot(keys, "newest", context=context),
                    "restore": lambda context: other.restore_snapshot(
                        snapshot, folder / "restored", context=context
                    ),
                }
                for name, call in calls.items():
                    times = sorted(ending_ms(server, call) for _ in range(options.rounds))
                    found[f"{name}, called off (ms)"] = {
                        "p50": round(times[len(times) // 2], 2),
                        "p99": round(times[len(times) * 99 // 100], 2),
                    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
