"""The command line. Needs the `cli` extra (click and rich); nothing else of the library imports it.

`app.py` is the root command, `options.py` the options that commands share, `config.py` the configuration
file, `session.py` makes caches and a loader from them, `output.py` is all that prints, `exits.py` turns
errors into messages and exit codes. Each command has a module in `commands/`.
"""

from __future__ import annotations

import os
import sys

from snaploader.cli.streams import complete_standard_streams

MISSING_EXTRA_EXIT_CODE = 4
"""That of errors.FailedPrecondition, spelt out because nothing may be imported to say it."""
INTERRUPTED_EXIT_CODE = 130
"""`exits.INTERRUPTED`, for the same reason."""


def main() -> None:
    """Entry point of the console script. Ends the process."""
    complete_standard_streams()
    _silence_grpc()
    try:
        from snaploader.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"click", "rich"}:
            raise
        sys.stderr.write(
            f"snaploader: the command line needs the Python package {missing!r}, which is not installed.\n"
            "Install it with: pip install 'snaploader[cli]'\n"
        )
        sys.exit(MISSING_EXTRA_EXIT_CODE)
    except KeyboardInterrupt:
        sys.stderr.write("snaploader: error: interrupted\n")
        sys.exit(INTERRUPTED_EXIT_CODE)
    sys.exit(run(sys.argv[1:]))


def _silence_grpc() -> None:
    """Keep gRPC's core from writing lines of its own to stderr, unless GRPC_VERBOSITY says what it should.

    It reads that variable once, when it is imported; the programs that this one starts do not get to see it.
    """
    name = "GRPC_VERBOSITY"
    if name in os.environ:
        return
    os.environ[name] = "NONE"
    try:
        import grpc  # noqa: F401
    finally:
        del os.environ[name]
