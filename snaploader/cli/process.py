"""This process: its standard streams, the signals that stop it, what it tells libraries that it imports."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
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


def start_lightly() -> None:
    """Spare what would only make the start of the program slower. To be called before anything is imported.

    numpy's linear algebra, which nothing here uses, starts no thread for each processor; OPENBLAS_NUM_THREADS
    in the environment wins, and the programs that this one starts see it too. Garbage is looked for less
    often: imports make many objects and hardly any garbage.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(10_000)


def load_grpc() -> None:
    """Import gRPC as a command wants it: to be called before anything else imports it.

    Its core writes no lines of its own to stderr, unless GRPC_VERBOSITY says what it should: it reads that
    variable once, when it is imported, and the programs that this one starts do not get to see it. The C
    library keeps the buffers of messages, which halves what transfers cost.
    """
    name = "GRPC_VERBOSITY"
    is_set = name in os.environ
    os.environ.setdefault(name, "NONE")
    try:
        import grpc  # noqa: F401
    finally:
        if not is_set:
            del os.environ[name]
    from snaploader.remote import tune_malloc

    tune_malloc()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Whether the program was told to stop since the block of `stop_signal` began."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing

    def wait(self) -> None:
        """Return when a signal to stop has arrived, or `wake` was called."""
        while os.read(self._reading, 1)[0] not in STOP_SIGNALS:
            pass

    def wake(self) -> None:
        """End the wait of another thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of signals, so the wait ends anyway
            os.write(self._writing, bytes([signal.SIGTERM]))


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Heed SIGINT and SIGTERM in the block by nothing but the end of `wait`. In the main thread only.

    They come through a pipe that the interpreter itself writes to. A Python handler could not wake the main
    thread safely, because it runs in that thread, which may hold the lock it would need.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    old_descriptor = signal.set_wakeup_fd(writing)
    try:
        yield StopSignal(reading, writing)
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
