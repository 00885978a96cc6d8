"""The root command, and running it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from snaploader._version import __version__
from snaploader.cli import end_interrupted
from snaploader.cli.options import CommandsOnDemand, Group, NoCommand, shared_options, workspace_options
from snaploader.cli.output import TERMINATED, Output, ReaderLeft, explain
from snaploader.cli.process import let_go, writing_to_stdout

COMMANDS = {
    "save": ("save:save", "Save files and directories as the snapshot of a branch."),
    "restore": ("load:restore", "Write the files of the best snapshot to a folder."),
    "read": ("load:read", "Write a part of one file to stdout, loading only what it needs."),
    "show": ("show:show", "Show keys, manifests, files, and where their chunks are."),
    "explain": ("explain:explain", "Tell why a task gets the snapshot that it gets, or none."),
    "invalidate": ("show:invalidate", "Drop all snapshots of a platform and configuration."),
    "cache": (
        "cache:cache",
        "Look at the local cache (ls, pins), remove from it (rm, prune, unpin), check it (verify).",
    ),
    "workspace": (
        "workspace:workspace",
        "Long-lived sandboxes: versions, rollback, pause, commit, fork, lifecycle.",
    ),
    "doctor": ("doctor:doctor", "Exercise the caches and say what is wrong."),
    "serve": ("serve:serve", "Run a small REAPI cache server."),
    "demo": ("demo:demo", "A snapshot's life on real input, with every claim checked."),
}


class Root(Group):
    """Tells apart that the reader of the output left, which click ends with an exit code of its own."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderLeft from error


@click.group(
    cls=Root,
    on_demand=CommandsOnDemand("snaploader.cli", COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="snaploader")
@workspace_options
@shared_options
def app(**_shared: object) -> None:
    """Bring a machine's state back in milliseconds: lazy snapshots over the Remote Execution API.

    Every option can also be given as an environment variable, SNAPLOADER_… (shown with the option), and in
    the configuration file. The command line wins over the environment, that over the file.
    """


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # Until the options are parsed; usage errors come before that.
    output = Output(as_json="--json" in own, verbose=2 if "-vv" in own else 0)
    with _ending_on_sigterm():
        try:
            with _raising_interrupts():
                code = app.main(
                    args=list(arguments), prog_name="snaploader", standalone_mode=False, obj=output
                )
                with writing_to_stdout():
                    sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # noqa: BLE001  every error ends here, as a message
            return _report(error, output)
        finally:
            let_go(sys.stdout)
            let_go(sys.stderr)


def _report(error: BaseException, output: Output) -> int:
    failure = explain(error)
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        if isinstance(error, NoCommand) and error.ctx is not None and not output.as_json:
            sys.stderr.write(error.ctx.get_help() + "\n")
            return failure.exit_code
        output.fail(failure)
        if isinstance(error, click.UsageError) and error.ctx is not None and not output.as_json:
            sys.stderr.write(f"Try '{error.ctx.command_path} --help' for help.\n")
        if output.verbose > 1:
            sys.stderr.write("".join(traceback.format_exception(error)))
        sys.stderr.flush()
    return failure.exit_code


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that temporary files go and servers stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _raising_interrupts() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt in the block where it would end the process at once."""
    if signal.getsignal(signal.SIGINT) is not end_interrupted:
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, end_interrupted)
