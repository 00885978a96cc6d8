"""Runtimes: what runs a workspace. `Runtime` is the interface, `ProcessRuntime` needs no hypervisor."""

from snaploader.workspace.runtime.protocol import Attachment, Capture, Runtime, RuntimeStatus, StopOutcome

__all__ = ["Attachment", "Capture", "Runtime", "RuntimeStatus", "StopOutcome"]
