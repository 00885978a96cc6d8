"""Run by test_interop_stubs.py: imports two sets of REAPI stubs in the order given, and uses both.

python coexist.py ours-first|theirs-first
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def import_ours() -> Any:
    """The messages of this library."""
    import snaploader  # noqa: F401 - all of it, as an executor would

    return importlib.import_module("snaploader._proto.remote_execution_pb2")


def import_theirs() -> Any:
    """The messages of BuildGrid, which live in protobuf's default pool."""
    return importlib.import_module("buildgrid._protos.build.bazel.remote.execution.v2.remote_execution_pb2")


def main(order: str) -> None:
    """Fail unless a message of either set reads the same in the other."""
    steps = [import_ours, import_theirs]
    if order == "theirs-first":
        steps.reverse()
    for step in steps:
        step()
    ours, theirs = import_ours(), import_theirs()
    assert ours.ActionResult.DESCRIPTOR.file.pool is not theirs.ActionResult.DESCRIPTOR.file.pool
    assert ours.ActionResult.DESCRIPTOR.full_name == theirs.ActionResult.DESCRIPTOR.full_name

    sent = ours.ActionResult(stdout_raw=b"hello", exit_code=3)
    sent.output_directories.add(path="disk.ext4").tree_digest.MergeFrom(
        ours.Digest(hash="ab" * 32, size_bytes=7)
    )
    sent.execution_metadata.worker = "host-a"
    sent.execution_metadata.auxiliary_metadata.add().Pack(ours.Digest(hash="cd" * 32, size_bytes=1))
    received = theirs.ActionResult.FromString(sent.SerializeToString(deterministic=True))
    assert received.output_directories[0].tree_digest.size_bytes == 7
    assert ours.ActionResult.FromString(received.SerializeToString(deterministic=True)) == sent


if __name__ == "__main__":
    main(sys.argv[1])
