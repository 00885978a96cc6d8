"""Does operations in processes of their own, that are killed at a step.

As a program: forks a child for each request, a line of JSON on its standard input. It stays free of threads,
so that forking is safe. As a module: `Zygote` starts that program.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from typing import Any, Self

from chaos_world import DATA, Killer, Place, World, in_child, opened

from snaploader.errors import SnaploaderError


def operate(world: World, method: str, arguments: list[Any], options: dict[str, Any]) -> None:
    """Call a method of the manager."""
    if method == "create":
        options = {"volumes": [DATA], **options}
    getattr(world.manager, method)(*arguments, **options)


class Zygote:
    """A process that forks others. For one thread; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def kill_at(
        self, step: int, place: Place, method: str, arguments: list[Any], options: dict[str, Any]
    ) -> bool:
        """Do an operation in a process that is killed at a step; whether it came to its end before.

        What the operation raised is lost with the process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [step, asdict(place), method, arguments, options]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return bool(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


def _act(
    step: int, place: dict[str, Any], method: str, arguments: list[Any], options: dict[str, Any]
) -> None:
    killer = Killer(step, with_events=True)
    with opened(Place(**place), killer.step) as world:
        killer.is_armed = True
        try:
            operate(world, method, arguments, options)
        except SnaploaderError:
            pass
        finally:
            killer.is_armed = False


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(in_child(partial(_act, *request))), flush=True)


if __name__ == "__main__":
    main()
