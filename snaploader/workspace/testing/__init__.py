"""Tools for testing what uses workspaces, and for testing runtimes.

    from snaploader.workspace.testing import FakeRuntime

    runtime = FakeRuntime(tmp_path)
    runtime.fail_next("capture", Unavailable("no disk"))
    gate = runtime.hold_next("place")

`FakeRuntime` is a runtime without processes, as quick as its folders. `RUNTIME_CHECKS` are what every runtime
must do; `snaploader.workspace.testing.contract` shows how to run them from pytest.
"""

from snaploader.workspace.testing.contract import RUNTIME_CHECKS, Harness, RuntimeCheck
from snaploader.workspace.testing.fake import FakeRuntime, RuntimeCall, RuntimeGate

__all__ = ["RUNTIME_CHECKS", "FakeRuntime", "Harness", "RuntimeCall", "RuntimeCheck", "RuntimeGate"]
