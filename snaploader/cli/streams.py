"""The standard streams of a program that was started without some of them (`>&-`, `2>&-`)."""

from __future__ import annotations

import io
import os
import sys


class Nowhere(io.TextIOWrapper):
    """Stands in for a stream that was closed from the start. What is written is gone."""

    def __init__(self) -> None:
        super().__init__(io.BufferedWriter(io.FileIO(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), "w")))


def complete_standard_streams() -> None:
    """Open the null device in place of the standard streams that are closed.

    To be called before other files are opened: such a file would get the number of a closed stream, and
    what a library or another program says there would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
            if descriptor == number:
                os.set_inheritable(descriptor, True)
            else:
                os.dup2(descriptor, number)
                os.close(descriptor)
    # Python has None in place of a stream that was closed.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Nowhere())
