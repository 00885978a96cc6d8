"""Tables, trees and progress bars, drawn by rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from snaploader.cli.process import writing_to_stdout
from snaploader.cli.values import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from snaploader.cli.output import Branch
    from snaploader.loader import Progress

PIPE_WIDTH = 200
"""Columns of tables that go to no terminal; rows must not break where programs read them."""

_NARROWEST = 10
"""Columns of text are not folded to fewer characters than this; see `Output.table`."""

_STAGES = {"store": "storing", "upload": "uploading", "fetch": "fetching", "write": "writing"}


def draw_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> None:
    """A table on stdout; see `Output.table`. All cells are printable."""
    names = [column.removesuffix(">") for column in columns]
    listed = sys.stdout.isatty() and _least_width(columns, rows) > Console(file=sys.stdout).width
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=not listed)
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
    _draw(table)


def draw_tree(root: Branch) -> None:
    """A tree on stdout."""
    tree = Tree(Text(printable(root.label)))
    waiting = [(tree, root)]
    while waiting:  # a history may be deeper than Python's stack
        above, branch = waiting.pop()
        waiting += [(above.add(Text(printable(below.label))), below) for below in branch.branches]
    _draw(tree, folded=True)


@contextlib.contextmanager
def drawn_bars() -> Iterator[Callable[[Progress], None]]:
    """A callback that draws a bar per stage on stderr while the block runs."""
    from rich import progress as rich_progress

    bars = rich_progress.Progress(
        rich_progress.TextColumn("{task.description:>9}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
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
        folded: Not to be wider than a terminal, even where it goes to a pager or a file.
    """
    width = None if folded or sys.stdout.isatty() else PIPE_WIDTH
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    # Written by ourselves, because rich ends the program when the reader has left. The end of the capture
    # flushes stdout, and with it what was printed before.
    with writing_to_stdout():
        with console.capture() as capture:
            console.print(what)
        sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())
