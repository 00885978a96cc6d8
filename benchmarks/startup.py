"""How long the command line and the library take to start, beside an empty Python.

    python -m benchmarks.startup [--against DIR] [--runs N] [--json] [--output FILE]

Each program runs several times in processes of its own, and the best is taken: of the time that passes, and
of the processor time (user and system), which holds on a busy machine too. `cache ls` lists an empty cache,
`workspace ls` a catalog with one stopped workspace. `--against` measures an earlier checkout in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
CLI = "import sys; sys.argv[0] = 'snaploader'; from snaploader.cli import main; main()"
PROGRAMS = {
    "python -c pass": ["-c", "pass"],
    "import snaploader": ["-c", "import snaploader"],
    "import snaploader, all of it": ["-c", "from snaploader import *"],
    "snaploader --version": ["-c", CLI, "--version"],
    "snaploader --help": ["-c", CLI, "--help"],
    "snaploader cache ls": ["-c", CLI, "cache", "ls"],
    "snaploader workspace ls": ["-c", CLI, "workspace", "ls"],
}
AIMS_S = {
    "import snaploader": 0.15,
    "snaploader --version": 0.08,
    "snaploader cache ls": 0.2,
    "snaploader workspace ls": 0.35,
}
"""What these are to take at most, on a quiet machine with processors like those of docs/benchmarks.md."""


def measured(root: Path, runs: int) -> dict[str, dict[str, float]]:
    """Seconds of each program, best of `runs`, with the packages in `root`."""
    with tempfile.TemporaryDirectory(prefix="snaploader-startup-") as folder:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        make = [sys.executable, "-c", CLI, "workspace", "create", "--no-start", "one"]
        subprocess.run(make, env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        found = {}
        for name, arguments in PROGRAMS.items():
            times = [timed([sys.executable, *arguments], environment, folder) for _ in range(runs)]
            found[name] = {"wall_s": min(wall for wall, _ in times), "cpu_s": min(cpu for _, cpu in times)}
    return found


def timed(command: list[str], environment: dict[str, str], folder: str) -> tuple[float, float]:
    """How long a program takes, and how much of the processor."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit code {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def show(columns: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a table with two columns for each checkout."""
    print(f"{'':32}" + "".join(f"{name + ' wall':>24}{'CPU':>8}" for name in columns) + f"{'aim':>8}")
    for name in PROGRAMS:
        cells = [each[name] for each in columns.values()]
        text = "".join(f"{cell['wall_s'] * 1000:21.0f} ms{cell['cpu_s'] * 1000:5.0f} ms" for cell in cells)
        aim = f"{AIMS_S[name] * 1000:5.0f} ms" if name in AIMS_S else ""
        print(f"{name:32}{text}{aim:>8}")


def main(argv: list[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--against", type=Path, help="measure this checkout too")
    parser.add_argument("--runs", type=int, default=7, help="the best of so many (default: 7)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON to this file")
    arguments = parser.parse_args(argv)
    columns = {"this": measured(HERE, arguments.runs)}
    if arguments.against:
        columns[arguments.against.name] = measured(arguments.against.resolve(), arguments.runs)
    found: dict[str, Any] = {"python": sys.version.split()[0], "programs": columns}
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(columns)


if __name__ == "__main__":
    main()
