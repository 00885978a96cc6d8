"""The standard streams of a program that was started without some of them (`>&-`, `2>&-`)."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from snaploader.errors import FailedPrecondition, from_os_error


@contextlib.contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Errors say what could not be written to. That a reader has left is told apart elsewhere."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = "cannot write to stdout"
        if error.errno == errno.EBADF:
            raise FailedPrecondition(f"{what}: it is not open for writing") from error
        raise from_os_error(error, what) from error


def let_go(stream: TextIO) -> None:
    """Write out what is left, or drop it where that fails: Python would try again at its end and complain."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


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
