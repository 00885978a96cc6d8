"""The command line. Needs the `cli` extra (click, platformdirs, rich); no other part imports it.

    app                   the root command, and running it
    options               commands, groups of them, and the options that they share
    config, values        what the environment and a configuration file may say; types of options
    resources             caches, a loader, a catalog: made from the options when a command asks for them
    output                all that is printed; errors as messages and exit codes
    process               standard streams, signals, libraries
    save, load, show      snapshots: `save`; `restore` and `read`; `show` and `invalidate`
    lookup                which snapshot is meant, and how it is described
    cache, doctor, serve  the commands of these names
    demo, demo_image      `demo` and the story it plays; the disk image that it is about
    workspace             the commands of workspaces, a package

A command's module is imported when the command is chosen, and what takes long to import (numpy, gRPC,
SQLAlchemy, rich) by the function that needs it: `snaploader --version` needs none of it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

MISSING_EXTRA_EXIT_CODE = 4
"""That of errors.FailedPrecondition, spelt out because nothing may be imported to say it."""
INTERRUPTED_EXIT_CODE = 130
"""`output.INTERRUPTED`, for the same reason."""


def main() -> None:
    """Entry point of the console script. Ends the process."""
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
            signal.signal(signal.SIGINT, end_interrupted)
        code = _run()
    except KeyboardInterrupt:
        end_interrupted()
    sys.exit(code)


def end_interrupted(_number: int = 0, _frame: FrameType | None = None) -> NoReturn:
    """End the process at once. It handles SIGINT while nothing has begun that must be cleaned up.

    An exception would not do: what is being imported may turn it into another, or Python may drop it.
    """
    try:
        os.write(2, b"snaploader: error: interrupted\n")
    finally:
        os._exit(INTERRUPTED_EXIT_CODE)


def _run() -> int:
    import importlib.util

    from snaploader.cli.process import complete_standard_streams, start_lightly

    complete_standard_streams()
    start_lightly()
    for package in ("click", "platformdirs", "rich"):
        if importlib.util.find_spec(package) is None:
            sys.stderr.write(
                f"snaploader: the command line needs the Python package {package!r}, "
                "which is not installed.\nInstall it with: pip install 'snaploader[cli]'\n"
            )
            return MISSING_EXTRA_EXIT_CODE
    from snaploader.cli.app import run_command

    return run_command(sys.argv[1:])
