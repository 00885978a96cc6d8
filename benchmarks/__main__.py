"""Runs all benchmarks with their defaults: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import sys

from benchmarks import (
    contexts,
    groups,
    lifecycle,
    opening,
    paths,
    run,
    scale,
    startup,
    store,
    tasks,
    telemetry,
)

if __name__ == "__main__":
    run.main()
    store.main(["--json", "benchmarks/results/store.json"])
    opening.main(["--json", "benchmarks/results/opening.json"])
    paths.main(["--output", "benchmarks/results/paths.json"])
    groups.main(["--json", "benchmarks/results/groups.json"])
    tasks.main(["--output", "benchmarks/results/tasks.json"])
    startup.main(["--output", "benchmarks/results/startup.json"])
    telemetry.main(["--output", "benchmarks/results/telemetry.json"])
    ended = contexts.main(["--output", "benchmarks/results/contexts.json"])
    sys.exit(max(ended, scale.main(), lifecycle.main()))
