"""A descriptor pool of our own for every message this library speaks.

An executor that imports snaploader brings Remote Execution API stubs of its own, often of another
version. protobuf refuses two different copies of one .proto file in one pool, so ours never enter
the default pool. Nothing here depends on the version of protoc that made the descriptors: classes
are made from plain serialised descriptors by the installed runtime.
"""

from __future__ import annotations

import copyreg
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

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
        _make_picklable(descriptor)
    for name, enum in file.enum_types_by_name.items():
        namespace[name] = EnumTypeWrapper(enum)
        for value in enum.values:
            namespace[value.name] = value.number
    return file


def unpickled(full_name: str, data: bytes) -> Message:
    """The message of this pool that was pickled."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name)).FromString(data)


def _make_picklable(descriptor: Descriptor) -> None:
    # protobuf's own way looks a class up by its module, which those of a pool of its own do not have, and a
    # nested one in the default pool.
    copyreg.pickle(message_factory.GetMessageClass(descriptor), _reduced)
    for nested in descriptor.nested_types:
        _make_picklable(nested)


def _reduced(message: Message) -> tuple[Any, ...]:
    return unpickled, (message.DESCRIPTOR.full_name, message.SerializeToString(deterministic=True))
