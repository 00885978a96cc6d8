"""Runs all benchmarks with their defaults: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import sys

from benchmarks import cow, lifecycle, paths, run, scale

if __name__ == "__main__":
    run.main()
    cow.main(["--json", "benchmarks/results/cow.json"])
    paths.main(["--output", "benchmarks/results/paths.json"])
    sys.exit(max(scale.main(), lifecycle.main()))
