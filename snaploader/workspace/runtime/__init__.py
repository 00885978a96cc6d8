"""Runtimes: what runs a workspace. `Runtime` is the interface, `ProcessRuntime` needs no hypervisor.

`folder` and `contents` keep a workspace's files, with `attachments` beside them; `process` and `runs` its
command, under a `supervisor` that runs without this library; `readiness` tells whether it can be used.
"""

from snaploader.workspace.runtime.process import ProcessRuntime
from snaploader.workspace.runtime.protocol import Attachment, Capture, Runtime, RuntimeStatus, StopOutcome
from snaploader.workspace.runtime.readiness import ProbedWorkspace, ReadinessProbe

__all__ = [
    "Attachment",
    "Capture",
    "ProbedWorkspace",
    "ProcessRuntime",
    "ReadinessProbe",
    "Runtime",
    "RuntimeStatus",
    "StopOutcome",
]
