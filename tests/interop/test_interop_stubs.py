"""This library's REAPI messages beside those of the program that imports it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from thirdparty import buildgrid_packages, buildgrid_python

pytestmark = [pytest.mark.interop, pytest.mark.xdist_group("buildgrid")]

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent


def run(command: list[str], path: list[Path]) -> bytes:
    """Run a script with warnings as errors; what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("order", ["ours-first", "theirs-first"])
def test_both_stubs_work_in_one_process_with_our_protobuf(order: str) -> None:
    # BuildGrid's packages come last, so that only what this environment lacks is taken from there.
    script = f"import runpy, sys; sys.path.append({str(buildgrid_packages())!r}); sys.argv = ['', {order!r}];"
    script += f"runpy.run_path({str(HERE / 'coexist.py')!r}, run_name='__main__')"
    run([sys.executable, "-c", script], [CHECKOUT])


@pytest.mark.parametrize("order", ["ours-first", "theirs-first"])
def test_both_stubs_work_in_one_process_with_the_newest_protobuf(order: str) -> None:
    run([str(buildgrid_python()), str(HERE / "coexist.py"), order], [CHECKOUT])


def descriptors(module: str, path: list[Path], python: Path) -> dict[str, descriptor_pb2.DescriptorProto]:
    """The messages of a stub module, by name, nested ones as Outer.Inner."""
    script = f"import sys; import {module} as m; sys.stdout.buffer.write(m.DESCRIPTOR.serialized_pb)"
    file = descriptor_pb2.FileDescriptorProto.FromString(run([str(python), "-c", script], path))
    found: dict[str, descriptor_pb2.DescriptorProto] = {}

    def add(prefix: str, messages: list[descriptor_pb2.DescriptorProto]) -> None:
        for message in messages:
            found[prefix + message.name] = message
            add(f"{prefix}{message.name}.", list(message.nested_type))

    add("", list(file.message_type))
    return found


THEIRS = "buildgrid._protos"
STUBS = {
    "snaploader._proto.remote_execution_pb2": [
        f"{THEIRS}.build.bazel.remote.execution.v2.remote_execution_pb2"
    ],
    "snaploader._proto.semver_pb2": [f"{THEIRS}.build.bazel.semver.semver_pb2"],
    "snaploader._proto.bytestream_pb2": [f"{THEIRS}.google.bytestream.bytestream_pb2"],
    "snaploader._proto.status_pb2": [
        f"{THEIRS}.google.rpc.status_pb2",
        f"{THEIRS}.google.rpc.error_details_pb2",
    ],
}
NEWER_THAN_THEIRS = {"CacheCapabilities.max_cas_blob_size_bytes"}
"""Of the API, but not yet in the version that BuildGrid was built from."""


@pytest.mark.parametrize("our_module", STUBS)
def test_each_of_our_fields_has_the_number_type_and_label_of_theirs(our_module: str) -> None:
    ours = fields(descriptors(our_module, [CHECKOUT], Path(sys.executable)))
    theirs: dict[str, tuple[object, ...]] = {}
    for module in STUBS[our_module]:
        theirs |= fields(descriptors(module, [], buildgrid_python()))
    assert ours
    assert {name: ours[name] for name in ours.keys() & theirs.keys()} == {
        name: theirs[name] for name in ours.keys() & theirs.keys()
    }
    assert ours.keys() - theirs.keys() <= NEWER_THAN_THEIRS


def fields(messages: dict[str, descriptor_pb2.DescriptorProto]) -> dict[str, tuple[object, ...]]:
    """What decides the bytes of each field, by Message.field, and the number of each Message.Enum.VALUE."""
    found: dict[str, tuple[object, ...]] = {}
    for name, message in messages.items():
        for field in message.field:
            in_oneof = field.HasField("oneof_index")
            found[f"{name}.{field.name}"] = (field.number, field.type, field.label, field.type_name, in_oneof)
        for enum in message.enum_type:
            found |= {f"{name}.{enum.name}.{value.name}": (value.number,) for value in enum.value}
    return found
