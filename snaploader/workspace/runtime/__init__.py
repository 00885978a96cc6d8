"""Runtimes: what runs a workspace. `Runtime` is the interface, `ProcessRuntime` needs no hypervisor.

protocol      `Runtime`: what any runtime promises
folder        workspaces that are folders: made, captured, replaced and removed in one step each
contents      what lies where in such a folder, and in snapshots of it
attachments   disks and memory files beside a folder
process       `ProcessRuntime`: a folder with a command in it, and how that is launched
runs          what is written down of a command's run, its processes, and how it is ended
readiness     whether what was started can be used
supervisor    the program that stays beside a command; it runs without this library
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
