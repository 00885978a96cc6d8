"""How soon a call ends that is called off or late, and what a context costs.

    python -m benchmarks.contexts [--rounds N] [--against DIR] [--json] [--output FILE]

The server falls silent, each time at another place, and a thread that waits there is called off: measured is
the time from `Cancellation.cancel` to the return of the call. Beside it, the same with gRPC alone: a future,
and its `cancel`. Deadlines are those of calls into the same silences. The cost is the processor time of
reading a blob of 1 KiB, of this process only; `--against` measures an earlier checkout in turns with it.
Exits with 1 when a bound is passed: 100 ms from calling off to the return, 99 times of 100, or a tenth of the
deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from benchmarks import hosts
from snaploader import BearerToken, CallContext, Cancellation, Digest, DigestFunction, RemoteCache
from snaploader.context import RequestMetadata
from snaploader.errors import Cancelled, DeadlineExceeded
from snaploader.remote import Limits, RetryPolicy
from snaploader.testing import CallGate, EmbeddedServer, Fault, FaultScript, ServerOptions

HERE = Path(__file__).resolve().parent.parent
MOST_S = 0.1
"""How long a call that was called off may take to return, 99 times of 100."""
DEADLINE_S = 0.5
ALONE = "gRPC alone: one request"
SMALL, BIG = random.Random(1).randbytes(1024), random.Random(2).randbytes(1 << 20)
KEY = Digest.of(SMALL, DigestFunction.BLAKE3)
BIG_KEY = Digest.of(BIG, DigestFunction.BLAKE3)
NEW = random.Random(3).randbytes(1 << 20)
NEW_KEY = Digest.of(NEW, DigestFunction.BLAKE3)
FRAMES = Limits(stream_frame_bytes=64 << 10, batch_bytes=256 << 10)

Call = Callable[[RemoteCache, CallContext], object]

SILENCES: dict[str, tuple[Fault, Call]] = {
    "negotiation": (Fault("GetCapabilities"), lambda remote, context: remote.capabilities(context=context)),
    "one request": (Fault("BatchReadBlobs"), lambda remote, context: remote.read(KEY, context=context)),
    "read stream": (
        Fault("Read", stall_after_bytes=200_000),
        lambda remote, context: remote.read_to(BIG_KEY, lambda _: None, context=context),
    ),
    "write stream": (
        Fault("Write", stall_after_bytes=200_000),
        lambda remote, context: remote.write(NEW_KEY, NEW, context=context),
    ),
    "bulk read": (
        Fault("*", matches=lambda call: call.method in ("BatchReadBlobs", "Read")),
        lambda remote, context: remote.read_many([KEY, BIG_KEY], lambda *_: None, context=context),
    ),
}
"""Where the server falls silent, and what is called."""


@contextmanager
def silent(name: str) -> Iterator[tuple[RemoteCache, CallGate, Call]]:
    """A cache whose server falls silent, the gate that says that it has, and what to call."""
    fault, call = SILENCES[name]
    gate = CallGate()
    rule = Fault(
        fault.method, stall_after_bytes=fault.stall_after_bytes, matches=fault.matches, gate=gate, times=None
    )
    options = ServerOptions(read_chunk_bytes=64 << 10)
    with (
        EmbeddedServer(options=options, faults=FaultScript(rule)) as server,
        RemoteCache(server.url, limits=FRAMES, compression=False) as remote,
    ):
        for data in (SMALL, BIG):
            server.put_blob(data, DigestFunction.BLAKE3)
        if fault.method != "GetCapabilities":
            remote.capabilities()
        yield remote, gate, call


def ending(call: Callable[[CallContext], object], is_waiting: Callable[[], object]) -> float:
    """Seconds from calling a call off, once it waits, to its return."""
    flag, ended = Cancellation(), []

    def work() -> None:
        try:
            call(CallContext(cancellation=flag))
        except Cancelled:
            ended.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    is_waiting()
    begin = time.perf_counter()
    flag.cancel()
    thread.join()
    return ended[0] - begin


def endings(rounds: int) -> dict[str, list[float]]:
    """Seconds from calling off to the return, by where the call waited."""
    found: dict[str, list[float]] = {}
    for name in SILENCES:
        with silent(name) as (remote, gate, call):
            found[name] = [
                ending(
                    lambda context: call(remote, context),
                    partial(gate.wait_reached, 60, number * (2 if name == "bulk read" else 1)),
                )
                for number in range(1, rounds + 1)
            ]
    with EmbeddedServer(faults=FaultScript(Fault(status="UNAVAILABLE", times=None))) as server:
        asleep = threading.Semaphore(0)
        patient = RetryPolicy(initial_delay_s=60, max_delay_s=60, budget_s=3600)
        with RemoteCache(server.url, retry=patient, on_retry=lambda _: asleep.release()) as remote:
            found["wait for another try"] = [
                ending(lambda context: remote.capabilities(context=context), asleep.acquire)
                for _ in range(rounds)
            ]
    with silent_host() as host:
        for scheme in ("grpc", "grpcs"):
            with RemoteCache(f"{scheme}://{host}") as remote:
                found[f"connecting, {scheme}"] = [
                    ending(lambda context: remote.capabilities(context=context), lambda: time.sleep(0.02))
                    for _ in range(rounds)
                ]
    found[ALONE] = alone(rounds)
    return found


@contextmanager
def silent_host() -> Iterator[str]:
    """A port where connections are taken, and nobody says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def hanging(gate: CallGate | None = None) -> Iterator[Any]:
    """A method of a server that never answers, on a channel of gRPC's."""
    faults = FaultScript(Fault(gate=gate, hang=gate is None, times=None))
    with EmbeddedServer(faults=faults) as server, grpc.insecure_channel(server.address) as channel:
        yield channel.unary_unary("/build.bazel.remote.execution.v2.Capabilities/GetCapabilities")


def alone(rounds: int) -> list[float]:
    """The same for a future of gRPC's and its own `cancel`."""
    gate, found = CallGate(), []
    with hanging(gate=gate) as method:
        for number in range(1, rounds + 1):
            call = method.future(b"")
            ended: list[float] = []

            def work(call: Any = call, ended: list[float] = ended) -> None:
                try:
                    call.result()
                except grpc.FutureCancelledError:
                    ended.append(time.perf_counter())

            thread = threading.Thread(target=work)
            thread.start()
            gate.wait_reached(60, number)
            begin = time.perf_counter()
            call.cancel()
            thread.join()
            found.append(ended[0] - begin)
    return found


def lateness(rounds: int) -> dict[str, list[float]]:
    """How much longer than their deadline calls took, as a share of it."""
    found: dict[str, list[float]] = {}

    def late(call: Callable[[CallContext], object]) -> float:
        begin = time.perf_counter()
        try:
            call(CallContext(timeout_s=DEADLINE_S))
        except DeadlineExceeded:
            return (time.perf_counter() - begin) / DEADLINE_S - 1
        raise SystemExit("a call with a deadline ended otherwise")

    for name in SILENCES:
        with silent(name) as (remote, _, call):
            found[name] = [late(lambda context: call(remote, context)) for _ in range(rounds)]
    with silent_host() as host:

        def connect(context: CallContext) -> None:
            with RemoteCache(f"grpc://{host}") as remote:
                remote.capabilities(context=context)

        found["connecting, grpc"] = [late(connect) for _ in range(rounds)]
    with hanging() as method:

        def unary(context: CallContext) -> None:
            try:
                method(b"", timeout=context.timeout_s)
            except grpc.RpcError as error:
                raise DeadlineExceeded(str(error)) from error

        found[ALONE] = [late(unary) for _ in range(rounds)]
    return found


READS = 2000

PLAIN = f"""
import sys, time
from snaploader import Digest, DigestFunction, RemoteCache
digest = Digest(sys.argv[2], 1024, DigestFunction.BLAKE3)
with RemoteCache(sys.argv[1], compression=False) as remote:
    for _ in range(200):
        remote.read(digest)
    begin = time.process_time()
    for _ in range({READS}):
        remote.read(digest)
    print((time.process_time() - begin) / {READS})
"""
"""Prints the processor time of a read without a context; runs with any checkout."""


def plain_cost(root: Path, url: str) -> float:
    """Processor seconds of a read without a context, with the packages in `root`."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, url, KEY.hash],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def costs(against: Path | None) -> dict[str, float]:
    """Processor seconds of a read of 1 KiB by what its context has; the best of five runs each, in turns."""
    contexts = {
        "no context": None,
        "request metadata": CallContext(request_metadata=RequestMetadata(action_id="an action")),
        "headers and a token": CallContext(headers={"x-key": "k"}, credentials=BearerToken("t")),
        "a deadline": CallContext(timeout_s=60),
        "a cancellation": CallContext(cancellation=Cancellation()),
    }
    contexts["all of them"] = CallContext(
        request_metadata=RequestMetadata(action_id="an action"),
        headers={"x-key": "k"},
        credentials=BearerToken("t"),
        timeout_s=60,
        cancellation=Cancellation(),
    )
    runs: dict[str, list[float]] = {}
    with hosts.embedded() as url, RemoteCache(url, compression=False) as remote:
        remote.write(KEY, SMALL)
        for _ in range(5):
            for name, context in contexts.items():
                begin = time.process_time()
                for _ in range(READS):
                    remote.read(KEY, context=context)
                runs.setdefault(name, []).append((time.process_time() - begin) / READS)
            for name, root in (("no context, this checkout", HERE), ("no context, the other", against)):
                if against is not None and root is not None:
                    runs.setdefault(name, []).append(plain_cost(root.resolve(), url))
    return {name: min(times) for name, times in runs.items()}


def quantiles(values: list[float], factor: float) -> dict[str, float]:
    """The median, the 99th percentile, and the most."""
    ordered = sorted(value * factor for value in values)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return {"p50": round(ordered[len(ordered) // 2], 3), "p99": round(p99, 3), "most": round(ordered[-1], 3)}


def main(argv: list[str] | None = None) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="calls for each place (default: 300)")
    parser.add_argument("--against", type=Path, help="measure this checkout's cost too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON to this file")
    arguments = parser.parse_args(argv)
    ended = {name: quantiles(values, 1000) for name, values in endings(arguments.rounds).items()}
    late = {name: quantiles(values, 100) for name, values in lateness(max(1, arguments.rounds // 15)).items()}
    cost = {name: round(seconds * 1e6, 1) for name, seconds in costs(arguments.against).items()}
    found = {"called_off_ms": ended, "late_percent": late, "read_cpu_us": cost}
    text = json.dumps(found, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        print(f"{'from calling off to the return':34}{'p50':>12}{'p99':>12}{'most':>12}")
        for name, row in ended.items():
            print(f"{name:34}" + "".join(f"{value:9.2f} ms" for value in row.values()))
        print(f"{f'past a deadline of {DEADLINE_S:g} s':34}")
        for name, row in late.items():
            print(f"{name:34}" + "".join(f"{value:10.2f} %" for value in row.values()))
        print("processor time of a read of 1 KiB")
        for name, value in cost.items():
            print(f"{name:34}{value:9.1f} µs  × {value / cost['no context']:.3f}")
    is_kept = all(row["p99"] <= 1000 * MOST_S for row in ended.values())
    return 0 if is_kept and all(row["p99"] <= 10 for row in late.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
