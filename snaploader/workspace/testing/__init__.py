"""Tools for testing what uses workspaces, and for testing runtimes.

    from snaploader.workspace.testing import FakeRuntime

    runtime = FakeRuntime(tmp_path)
    runtime.fail_next("capture", Unavailable("no disk"))
    gate = runtime.hold_next("place")

`FakeRuntime` is a runtime without processes, as quick as its folders.
"""

from snaploader.workspace.testing.fake import Call, FakeRuntime
from snaploader.workspace.testing.gate import Gate

__all__ = ["Call", "FakeRuntime", "Gate"]
