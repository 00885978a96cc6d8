"""Errors become one message and one exit code, in one place. The codes are documented in docs/errors.md."""

from __future__ import annotations

from dataclasses import dataclass

import click

from snaploader import errors

CHECK_FAILED = 13
"""`doctor` found something wrong, or a proof of `demo` failed."""
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

_COW_ERRORS = {
    "OutOfBounds": errors.InvalidArgument,
    "StoreInUse": errors.FailedPrecondition,
    "CheckpointConflict": errors.FailedPrecondition,
    "TruncatedFile": errors.DataLoss,
    "COWError": errors.Internal,
}
"""By name, because what has raised none has not imported `cow`; the nearest one counts."""


class CheckFailed(Exception):
    """Checks ran to their end, and not all of them passed. What is wrong has been printed already."""


class ReaderLeft(Exception):
    """Whoever read the output has closed it, as `head` does."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command ends that did not succeed."""

    kind: str
    message: str
    """Empty when there is nothing left to say."""
    exit_code: int
    transient: bool = False
    unexpected: bool = False
    """Whether it is a defect of this program, for which a traceback is of use."""


def explain(error: BaseException) -> Failure:
    """What to tell the user about `error`."""
    if isinstance(error, errors.SnaploaderError):
        # Parts of the library have finer kinds of their own.
        kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
        message = "\n".join([error.message, *getattr(error, "__notes__", ())])
        if isinstance(error, errors.ResourceExhausted):
            message = message.replace("its max_bytes", "--max-cache-size")
            message = message.replace("max_bytes", "--max-cache-size")
        return Failure(kind, message, error.exit_code, error.transient)
    if isinstance(error, click.ClickException):
        # Usage errors have exit code 2, which is InvalidArgument's too.
        return Failure("InvalidArgument", error.format_message(), error.exit_code)
    if isinstance(error, CheckFailed):
        return Failure("CheckFailed", str(error), CHECK_FAILED)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        interrupt = error.__cause__ or error  # click raises Abort from it
        return Failure(
            "Interrupted", "\n".join(["interrupted", *getattr(interrupt, "__notes__", ())]), INTERRUPTED
        )
    if isinstance(error, BrokenPipeError | ReaderLeft):
        return Failure("BrokenPipe", "", BROKEN_PIPE)
    names = [each.__name__ for each in type(error).__mro__ if each.__module__.partition(".")[0] == "cow"]
    if "COWError" in names:
        ours = next(_COW_ERRORS[name] for name in names if name in _COW_ERRORS)
        return Failure(type(error).__name__, str(error), ours.exit_code)
    if isinstance(error, OSError):
        translated = errors.from_os_error(error, "the system refused")
        if isinstance(translated, errors.NotFound):
            # That code says of a snapshot, name or entry that there is none.
            return explain(errors.FailedPrecondition(translated.message))
        return explain(translated)
    if isinstance(error, MemoryError):
        return Failure("ResourceExhausted", "out of memory", errors.ResourceExhausted.exit_code)
    message = f"internal error: {type(error).__name__}: {error}. Please report it, with the output of -vv"
    return Failure("Internal", message, errors.Internal.exit_code, unexpected=True)
