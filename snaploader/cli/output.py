"""All that the command line prints: data on stdout; talk, bars and errors on stderr.

An error becomes one message and one exit code here; the codes are documented in docs/errors.md. Tables,
trees and bars are drawn by rich, which is imported when there is one to draw.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from snaploader import errors
from snaploader.cli.process import writing_to_stdout
from snaploader.cli.values import format_size, printable, time_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import TaskID

    from snaploader.loader import Progress

CHECK_FAILED = 13
"""`doctor` found something wrong, or a proof of `demo` failed."""
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

PIPE_WIDTH = 200
"""Columns of tables that go to no terminal; rows must not break where programs read them."""

_NARROWEST = 10
"""Columns of text are not folded to fewer characters than this; see `Output.table`."""

_LINES = "\n\t"
"""Messages may have several lines. Names in them are quoted."""

_STAGES = {"store": "storing", "upload": "uploading", "fetch": "fetching", "write": "writing"}

_COW_ERRORS = {
    "OutOfBounds": errors.InvalidArgument,
    "StoreInUse": errors.FailedPrecondition,
    "CheckpointConflict": errors.FailedPrecondition,
    "TruncatedFile": errors.DataLoss,
    "COWError": errors.Internal,
}
"""By name, because what has raised none has not imported `cow`; the nearest one counts."""

_EXTRAS = {
    "alembic": ("workspace", "workspaces need"),
    "cronsim": ("workspace", "workspaces need"),
    "sqlalchemy": ("workspace", "workspaces need"),
    "prometheus_client": ("metrics", "--metrics-listen needs"),
}
"""By package: the extra that installs it, and what needs it."""


class CheckFailed(Exception):
    """Checks ran to their end, and not all of them passed. What is wrong has been printed already."""


class ReaderLeft(Exception):
    """Whoever read the output has closed it, as `head` does."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command ends that did not succeed, by the names that --json has for it."""

    error: str
    message: str
    """Empty when there is nothing left to say."""
    exit_code: int
    transient: bool = False


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
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _EXTRAS:
        extra, what_needs = _EXTRAS[missing]
        message = f"{what_needs} the Python package {missing!r}, which is not installed: pip install"
        return explain(errors.FailedPrecondition(f"{message} 'snaploader[cli,{extra}]'"))
    if isinstance(error, CheckFailed):
        return Failure("CheckFailed", str(error), CHECK_FAILED)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        interrupt = error.__cause__ or error  # click raises Abort from it
        message = "\n".join(["interrupted", *getattr(interrupt, "__notes__", ())])
        return Failure("Interrupted", message, INTERRUPTED)
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
    return Failure("Internal", message, errors.Internal.exit_code)


Column = str | Callable[[Any], str]
Columns = Mapping[str, Column]
"""By heading, which ends in > where the column is aligned right: an attribute or key of the things that are
rows, or what makes the cell of one.

What ends in _bytes is a size, times are told to the minute, and None is a dash.
"""


@dataclass
class Output:
    """Where a command says things.

    Args:
        as_json: Data is one JSON object; errors are one too, on stderr.
        quiet: Say nothing on stderr but errors.
        verbose: 1 tells of details and of what the library logs at INFO, 2 of all it logs.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0

    def data(self, record: Mapping[str, Any], *lines: str) -> None:
        """An object for programs, with --json; or lines for people."""
        if self.as_json:
            self._write(json.dumps(record, indent=2, default=_for_json))
        for line in lines:
            self.text(line)

    def text(self, line: str = "") -> None:
        """A line of data for people; nothing with --json. Line breaks in it are made visible."""
        if not self.as_json:
            self._write(printable(line))

    def json_line(self, record: Mapping[str, Any]) -> None:
        """One of many objects of data for programs, on a line of its own; nothing without --json."""
        if self.as_json:
            self._write(json.dumps(record, default=_for_json))

    def _write(self, line: str) -> None:
        with writing_to_stdout():
            sys.stdout.write(line + "\n")

    def flush(self) -> None:
        """Hand the data out now; a program that reads it may be waiting."""
        with writing_to_stdout():
            sys.stdout.flush()

    def report(self, record: Mapping[str, Any]) -> None:
        """What --json prints of a command whose stdout carries other data: it goes to stderr."""
        if self.as_json:
            sys.stderr.write(json.dumps(record) + "\n")

    def table(self, columns: Columns, things: Iterable[Any]) -> None:
        """A table for people, with a row for each thing.

        On a terminal where the columns of text would be too narrow to be read, or the others be cut, each
        row is a list of its cells instead.
        """
        if self.as_json:
            return
        from rich.console import Console
        from rich.table import Table

        rows = [[printable(_cell(thing, what)) for what in columns.values()] for thing in things]
        names = [column.removesuffix(">") for column in columns]
        listed = sys.stdout.isatty() and _least_width(columns, rows) > Console(file=sys.stdout).width
        table = Table(box=None, pad_edge=False, show_header=not listed)
        if listed:
            table.add_column(no_wrap=True, style="bold")
            table.add_column(overflow="fold")
            for number, row in enumerate(rows):
                if number:
                    table.add_row()
                for name, cell in zip(names, row, strict=True):
                    table.add_row(name, cell)
        else:
            for column, name in zip(columns, names, strict=True):
                right = column.endswith(">")
                table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
            for row in rows:
                table.add_row(*row)
        _draw(table, width=None if sys.stdout.isatty() else PIPE_WIDTH)

    def tree(self, root: Branch) -> None:
        """A tree for people, folded to the width of the terminal; 80 columns where there is none."""
        if self.as_json:
            return
        from rich.text import Text
        from rich.tree import Tree

        tree = Tree(Text(printable(root.label)))
        waiting = [(tree, root)]
        while waiting:  # a history may be deeper than Python's stack
            above, branch = waiting.pop()
            waiting += [(above.add(Text(printable(below.label))), below) for below in branch.branches]
        _draw(tree, width=None)

    def talk(self, message: str) -> None:
        """Something for the person who watches; not with --quiet."""
        if not self.quiet:
            sys.stderr.write(f"snaploader: {printable(message, keep=_LINES)}\n")

    def warn(self, message: str) -> None:
        """Something that is not as it should be, without being an error; not with --quiet."""
        self.talk(f"warning: {message}")

    def detail(self, message: str) -> None:
        """Something for -v only."""
        if self.verbose:
            self.talk(message)

    def wait(self, message: str) -> None:
        """Why nothing happens: told to those who watch a terminal, and with -v."""
        if self.verbose or sys.stderr.isatty():
            self.talk(message)

    def must_ask(self, *, yes: bool) -> bool:
        """Whether a command that removes things has to ask first: at a terminal, without --yes.

        A script is not asked: its stdin is no terminal, and it would wait for ever.
        """
        if yes or sys.stdin is None or not sys.stdin.isatty():
            return False
        if not sys.stderr.isatty():
            raise errors.FailedPrecondition(
                "stderr is no terminal, so nobody can be asked: give --yes, or --dry-run"
            )
        return True

    def confirm(self, question: str) -> None:
        """Ask on the terminal, also with --quiet. Cancelled unless the answer is yes."""
        sys.stderr.write(f"{printable(question, keep=_LINES)} [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise errors.Cancelled("nothing was removed")

    def fail(self, failure: Failure) -> None:
        """The message of an error, which --quiet does not silence."""
        if self.as_json:
            self.report(asdict(failure))
        elif failure.message:
            sys.stderr.write(f"snaploader: error: {printable(failure.message, keep=_LINES)}\n")

    @contextlib.contextmanager
    def bars(self) -> Iterator[Callable[[Progress], None] | None]:
        """A callback that draws a bar per stage while the block runs; None where there is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich import progress
        from rich.console import Console

        bars = progress.Progress(
            progress.TextColumn("{task.description:>9}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        tasks: dict[str, TaskID] = {}

        def show(step: Progress) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(_STAGES.get(step.stage, step.stage), total=step.total_bytes)
            bars.update(tasks[step.stage], completed=step.done_bytes, total=step.total_bytes)

        with bars:
            yield show

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """What the library logs goes to stderr while the block runs, as much of it as was asked for."""
        handler = logging.StreamHandler(_CurrentStderr())
        formatter = logging.Formatter if self.verbose > 1 else _Brief
        handler.setFormatter(formatter("snaploader: %(levelname)s %(name)s: %(message)s"))
        level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbose, 2)]
        loggers = [logging.getLogger("snaploader"), logging.getLogger("cow")]
        before = [(logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.ERROR if self.quiet else level)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, (old_level, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(old_level)
                logger.propagate = propagate


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of a tree, and what hangs from it."""

    label: str
    branches: Sequence[Branch] = ()


def record(thing: object, *names: str) -> dict[str, Any]:
    """Some attributes of a thing, for `Output.data`."""
    return {name: getattr(thing, name) for name in names}


def _for_json(value: object) -> Any:
    """What JSON has no word for: times in ISO 8601, read-only mappings as objects."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _cell(thing: object, what: str | Callable[[Any], str]) -> str:
    if callable(what):
        return what(thing)
    value = thing[what] if isinstance(thing, Mapping) else getattr(thing, what)
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return time_words(value)
    return format_size(value) if what.endswith("_bytes") else str(value)


def _least_width(columns: Iterable[str], rows: Sequence[Sequence[str]]) -> int:
    """How many columns of a terminal a table needs to be readable."""
    from rich.cells import cell_len

    widths = []
    for number, column in enumerate(columns):
        width = max(cell_len(text) for text in (column.removesuffix(">"), *(row[number] for row in rows)))
        widths.append(width if column.endswith(">") else min(width, _NARROWEST))
    return sum(widths) + 2 * (len(widths) - 1)


def _draw(what: RenderableType, width: int | None) -> None:
    """Print what rich draws; as wide as the terminal if no width is given."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    # Written by ourselves, because rich ends the program when the reader has left. The end of the capture
    # flushes stdout, and with it what was printed before.
    with writing_to_stdout():
        with console.capture() as capture:
            console.print(what)
        sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


class _Brief(logging.Formatter):
    """Tells of an error what it is, and not where it came from."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  the name is logging's
        return f"  {ei[0].__name__}: {ei[1]}"


class _CurrentStderr:
    """Looks sys.stderr up at every write, so that whoever replaces it gets the output."""

    def write(self, text: str) -> int:
        return sys.stderr.write(printable(text, keep=_LINES))

    def flush(self) -> None:
        sys.stderr.flush()
