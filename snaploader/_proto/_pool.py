"""A descriptor pool of our own for every message this library speaks.

An executor that imports snaploader brings Remote Execution API stubs of its own, often of another
version. protobuf refuses two different copies of one .proto file in one pool, so ours never enter
the default pool. Nothing here depends on the version of protoc that made the descriptors: classes
are made from plain serialised descriptors by the installed runtime.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from snaploader._proto._descriptors import FILE_DESCRIPTOR_SET


def new_pool() -> DescriptorPool:
    """A pool with all of our files."""
    pool = DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(FILE_DESCRIPTOR_SET)
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = new_pool()


def install(proto_path: str, namespace: dict[str, Any]) -> FileDescriptor:
    """Put the top-level messages and enums of one .proto file into a module's namespace."""
    file: FileDescriptor = POOL.FindFileByName(proto_path)
    for name, descriptor in file.message_types_by_name.items():
        namespace[name] = message_factory.GetMessageClass(descriptor)
    for name, enum in file.enum_types_by_name.items():
        namespace[name] = EnumTypeWrapper(enum)
        for value in enum.values:
            namespace[value.name] = value.number
    return file
