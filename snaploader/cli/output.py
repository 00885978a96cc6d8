"""All that the command line prints: data on stdout, talk on stderr, bars on a terminal only.

What needs rich is in `drawing`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

from snaploader.cli.exits import Failure
from snaploader.cli.process import writing_to_stdout
from snaploader.cli.values import printable
from snaploader.errors import Cancelled, FailedPrecondition

if TYPE_CHECKING:
    from snaploader.loader import Progress

_LINES = "\n\t"
"""Messages may have several lines. Names in them are quoted."""


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
                sys.stdout.write(json.dumps(data, indent=2, default=_for_json) + "\n")

    def line(self, data: Mapping[str, Any]) -> None:
        """One of many objects of data for programs, on a line of its own; nothing without --json."""
        if self.as_json:
            with writing_to_stdout():
                sys.stdout.write(json.dumps(data, default=_for_json) + "\n")

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
        if not self.as_json:
            from snaploader.cli.drawing import draw_table

            draw_table(columns, [[printable(cell) for cell in row] for row in rows], title)

    def tree(self, root: Branch) -> None:
        """A tree for people, folded to the width of the terminal; 80 columns where there is none."""
        if not self.as_json:
            from snaploader.cli.drawing import draw_tree

            draw_tree(root)

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
    def bars(self) -> Iterator[Callable[[Progress], None] | None]:
        """A callback that draws a bar per stage while the block runs; None where there is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from snaploader.cli.drawing import drawn_bars

        with drawn_bars() as show:
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


def record(thing: object, *names: str) -> dict[str, Any]:
    """Some attributes of a thing, for `Output.json`."""
    return {name: getattr(thing, name) for name in names}


def _for_json(value: object) -> Any:
    """What JSON has no word for: times in ISO 8601, read-only mappings as objects."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


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
