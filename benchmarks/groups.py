"""Groups and contexts in the file cache: what they cost, and how soon calls end that are called off.

    python -m benchmarks.groups [--parts groups,calls,ends] [--scratch DIR] [--json FILE]

`groups`: 100 groups in one file cache, beside 100 file caches of one group each. `calls`: what the argument
`context` costs a call of the file cache that is not given one, beside the same work without it. `ends`: how
long calls of the file cache go on after they are called off, at a random moment of their work; what a call
has written of a big file by then is removed first, which the file system does in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.floors import Cost, timed
from snaploader import CallContext, Cancellation, DigestFunction, FileCache
from snaploader.digest import Digest
from snaploader.errors import Cancelled

GROUPS = 100
CALLS = 20_000
ROUNDS = 7
ENDINGS = 40
MIB = 1 << 20
BIG = 512 * MIB
MANY = 100_000
LATEST_S = 0.15
"""Calls are called off so long after their beginning at the latest."""


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def rounded(cost: Cost) -> dict[str, float]:
    """A cost for the report."""
    return {"wall_s": round(cost.wall_s, 4), "cpu_s": round(cost.cpu_s, 4)}


def groups(scratch: Path) -> dict[str, Any]:
    """The first blob of each of 100 groups, through one cache and through a hundred."""
    data = b"x" * 4096
    digest = Digest.of(data, DigestFunction.BLAKE3)
    names = [f"group-{number}" for number in range(GROUPS)]
    with FileCache(scratch / "one") as cache:
        before = descriptors()

        def through_one() -> None:
            for name in names:
                cache.put_verified(digest, data, context=CallContext(group_id=name))

        one, _ = timed(through_one)
        again, _ = timed(through_one)
        one_descriptors = descriptors() - before
    with ExitStack() as stack:
        before = descriptors()

        def through_many() -> None:
            for name in names:
                other = stack.enter_context(FileCache(scratch / "many", group_id=name))
                other.put_verified(digest, data)

        many, _ = timed(through_many)
        many_descriptors = descriptors() - before
    return {
        "groups": GROUPS,
        "one cache": {**rounded(one), "descriptors": one_descriptors},
        "one cache, again": rounded(again),
        "a cache for each": {**rounded(many), "descriptors": many_descriptors},
        "ratio": round(many.wall_s / one.wall_s, 1),
    }


def calls(scratch: Path) -> dict[str, Any]:
    """Nanoseconds of a thread's processor time that a call takes with the argument `context`, and without."""
    data = b"x" * 4096
    digest = Digest.of(data, DigestFunction.BLAKE3)
    digests = [digest]
    context = CallContext(group_id="team", timeout_s=60, cancellation=Cancellation())
    with FileCache(scratch / "calls") as cache:
        cache.put_verified(digest, data)
        cache.put_verified(digest, data, context=context)
        # What `in_context` wraps.
        plain = {
            name: getattr(FileCache, name).__wrapped__ for name in ("open", "find_missing", "put_verified")
        }
        kinds: dict[str, dict[str, Callable[[], object]]] = {
            "open": {
                "plain": lambda: os.close(plain["open"](cache, digest)),
                "none given": lambda: os.close(cache.open(digest)),
                "given": lambda: os.close(cache.open(digest, context=context)),
            },
            "find_missing": {
                "plain": lambda: plain["find_missing"](cache, digests),
                "none given": lambda: cache.find_missing(digests),
                "given": lambda: cache.find_missing(digests, context=context),
            },
            "put_verified": {
                "plain": lambda: plain["put_verified"](cache, digest, data),
                "none given": lambda: cache.put_verified(digest, data),
                "given": lambda: cache.put_verified(digest, data, context=context),
            },
        }
        return {name: nanoseconds(functions) for name, functions in kinds.items()}


def nanoseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """What each function takes, the best of several rounds that take turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begun = time.thread_time()
            for _ in range(CALLS // ROUNDS):
                function()
            best[name] = min(best[name], (time.thread_time() - begun) / (CALLS // ROUNDS))
    return {name: round(value * 1e9) for name, value in best.items()}


def ends(scratch: Path) -> dict[str, Any]:
    """How long calls go on after they are called off."""
    scratch.mkdir()
    big = scratch / "big"
    with open(big, "wb") as file:
        file.writelines(os.urandom(MIB) for _ in range(BIG // MIB))
    absent = [Digest(f"{number:064x}", 1, DigestFunction.BLAKE3) for number in range(MANY)]
    with FileCache(scratch / "cache") as cache, FileCache(scratch / "cache") as other:
        digest, _ = cache.add_file(big, DigestFunction.BLAKE3)
        for number in range(2000):
            data = b"%d" % number
            cache.put_verified(Digest.of(data, DigestFunction.BLAKE3), data)

        def locked(context: CallContext) -> None:
            with other._context.ledger.lock.held():
                cache.put_ref("0" * 64, b"value", context=context)

        def copied(context: CallContext) -> None:
            cache.materialize(digest, scratch / "out", writable=True, context=context)
            os.unlink(scratch / "out")

        work: dict[str, Callable[[CallContext], object]] = {
            "add_file, 512 MiB": lambda context: cache.add_file(big, DigestFunction.SHA256, context=context),
            "verify, 512 MiB": lambda context: cache.verify(context=context),
            "read, 512 MiB": lambda context: cache.read(digest, context=context),
            "materialize a copy, 512 MiB": copied,
            "find_missing, 100,000 digests": lambda context: cache.find_missing(absent, context=context),
            "entries, 2,000": lambda context: cache.entries(context=context),
            "pin, 100,000 blobs": lambda context: cache.pin("pin", absent, context=context),
            "a lock that another process holds": locked,
        }
        return {name: ending(function) for name, function in work.items()}


def ending(function: Callable[[CallContext], object]) -> dict[str, Any]:
    """Milliseconds from `cancel` to the return of a call, over many calls."""
    moments = random.Random(7)
    took = []
    for _ in range(ENDINGS):
        flag = Cancellation()
        told = [0.0]

        def tell(flag: Cancellation = flag, told: list[float] = told) -> None:
            told[0] = time.perf_counter()
            flag.cancel()

        timer = threading.Timer(moments.uniform(0, LATEST_S), tell)
        timer.start()
        with suppress(Cancelled):
            function(CallContext(cancellation=flag))
        if told[0]:
            took.append(time.perf_counter() - told[0])
        timer.cancel()
        timer.join()
    took.sort()
    return {
        "called off": len(took),
        "median_ms": round(statistics.median(took) * 1e3, 2) if took else None,
        "p99_ms": round(took[int(0.99 * (len(took) - 1))] * 1e3, 2) if took else None,
        "most_ms": round(took[-1] * 1e3, 2) if took else None,
    }


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"groups": groups, "calls": calls, "ends": ends}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas (default: all)")
    parser.add_argument("--scratch", help="a folder for about 3 GiB (default: a temporary one)")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="snaploader-groups-", dir=options.scratch) as scratch:
        found = {name: PARTS[name](Path(scratch) / name) for name in options.parts.split(",")}
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
