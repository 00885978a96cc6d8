"""All that the command line prints: data on stdout, talk on stderr, bars on a terminal only."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from snaploader.cli.exits import Failure
from snaploader.cli.streams import writing_to_stdout
from snaploader.cli.values import printable
from snaploader.errors import Cancelled, FailedPrecondition
from snaploader.loader.results import Progress as Step
from snaploader.loader.results import ProgressCallback

PIPE_WIDTH = 200
"""Columns of tables that go to no terminal; rows must not break where programs read them."""

_NARROWEST = 10
"""Columns of text are not folded to fewer characters than this; see `Output.table`."""

_LINES = "\n\t"
"""Messages may have several lines. Names in them are quoted."""

_STAGES = {"store": "storing", "upload": "uploading", "fetch": "fetching", "write": "writing"}


class Output:
    """Where a command says things.

    Args:
        as_json: Data is one JSON object; errors are one too, on stderr.
        quiet: Say nothing on stderr but errors.
        verbose: 1 tells of details and of what the library logs at INFO, 2 of all it logs.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: int = 0) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def text(self, line: str = "") -> None:
        """A line of data for people; nothing with --json. Line breaks in it are made visible."""
        if not self.as_json:
            with writing_to_stdout():
                sys.stdout.write(printable(line) + "\n")

    def json(self, data: Mapping[str, Any]) -> None:
        """The data for programs; nothing without --json."""
        if self.as_json:
            with writing_to_stdout():
                sys.stdout.write(json.dumps(data, indent=2) + "\n")

    def line(self, data: Mapping[str, Any]) -> None:
        """One of many objects of data for programs, on a line of its own; nothing without --json."""
        if self.as_json:
            with writing_to_stdout():
                sys.stdout.write(json.dumps(data) + "\n")

    def flush(self) -> None:
        """Hand the data out now; a program that reads it may be waiting."""
        with writing_to_stdout():
            sys.stdout.flush()

    def report(self, data: Mapping[str, Any]) -> None:
        """What --json prints of a command whose stdout carries other data: it goes to stderr."""
        if self.as_json:
            sys.stderr.write(json.dumps(data) + "\n")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
    ) -> None:
        """A table for people; columns whose name ends in > are aligned right.

        On a terminal where the columns of text would be too narrow to be read, or the others be cut, each
        row is a list of its cells instead.
        """
        if self.as_json:
            return
        cells = [[printable(cell) for cell in row] for row in rows]
        names = [column.removesuffix(">") for column in columns]
        listed = sys.stdout.isatty() and _least_width(columns, cells) > Console(file=sys.stdout).width
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=not listed)
        if listed:
            table.add_column(no_wrap=True, style="bold")
            table.add_column(overflow="fold")
            for number, row in enumerate(cells):
                if number:
                    table.add_row()
                for name, cell in zip(names, row, strict=True):
                    table.add_row(name, cell)
        else:
            for column, name in zip(columns, names, strict=True):
                right = column.endswith(">")
                table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
            for row in cells:
                table.add_row(*row)
        _draw(table)

    def tree(self, root: Branch) -> None:
        """A tree for people, folded to the width of the terminal; 80 columns where there is none."""
        if not self.as_json:
            _draw(_tree(root), folded=True)

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
            raise FailedPrecondition(
                "stderr is no terminal, so nobody can be asked: give --yes, or --dry-run"
            )
        return True

    def confirm(self, question: str) -> None:
        """Ask on the terminal, also with --quiet. Cancelled unless the answer is yes."""
        sys.stderr.write(f"{printable(question, keep=_LINES)} [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise Cancelled("nothing was removed")

    def fail(self, failure: Failure) -> None:
        """The message of an error, which --quiet does not silence."""
        if self.as_json:
            record = {
                "error": failure.kind,
                "message": failure.message,
                "exit_code": failure.exit_code,
                "transient": failure.transient,
            }
            sys.stderr.write(json.dumps(record) + "\n")
        elif failure.message:
            sys.stderr.write(f"snaploader: error: {printable(failure.message, keep=_LINES)}\n")

    @contextlib.contextmanager
    def bars(self) -> Iterator[ProgressCallback | None]:
        """A callback that draws a bar per stage while the block runs; None where there is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        tasks: dict[str, TaskID] = {}

        def show(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = progress.add_task(
                    _STAGES.get(step.stage, step.stage), total=step.total_bytes
                )
            progress.update(tasks[step.stage], completed=step.done_bytes, total=step.total_bytes)

        with progress:
            yield show

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """What the library logs goes to stderr while the block runs, as much of it as was asked for."""
        handler = logging.StreamHandler(_CurrentStderr())
        formatter = logging.Formatter if self.verbose > 1 else _Brief
        handler.setFormatter(formatter("snaploader: %(levelname)s %(name)s: %(message)s"))
        loggers = [logging.getLogger("snaploader"), logging.getLogger("cow")]
        before = [(logger.level, logger.propagate) for logger in loggers]
        level = (
            logging.ERROR
            if self.quiet
            else (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbose, 2)]
        )
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(level)
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


def _tree(root: Branch) -> Tree:
    tree = Tree(Text(printable(root.label)))
    waiting = [(tree, root)]
    while waiting:  # a history may be deeper than Python's stack
        above, branch = waiting.pop()
        waiting += [(above.add(Text(printable(below.label))), below) for below in branch.branches]
    return tree


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """How many columns of a terminal a table needs to be readable."""
    widths = []
    for number, column in enumerate(columns):
        width = max(cell_len(text) for text in (column.removesuffix(">"), *(row[number] for row in rows)))
        widths.append(width if column.endswith(">") else min(width, _NARROWEST))
    return sum(widths) + 2 * (len(widths) - 1)


def _draw(what: RenderableType, *, folded: bool = False) -> None:
    """Print what rich draws.

    Args:
        folded: Not to be wider than a terminal, also where it goes to a pager or a file.
    """
    width = None if folded or sys.stdout.isatty() else PIPE_WIDTH
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
        """The error in a line."""
        return f"  {ei[0].__name__}: {ei[1]}"


class _CurrentStderr:
    """Looks sys.stderr up at every write, so that whoever replaces it gets the output."""

    def write(self, text: str) -> int:
        return self._stream().write(printable(text, keep=_LINES))

    def flush(self) -> None:
        self._stream().flush()

    @staticmethod
    def _stream() -> IO[str]:
        return sys.stderr
