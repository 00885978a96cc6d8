"""A snapshot's manifest: what it was made of, its files, and the digest of each.

A manifest travels as a Remote Execution API ActionResult, so that any server's action cache keeps it
and checks that all it names exists; docs/formats/manifest.md describes the format. The same snapshot
gives the same bytes. What is read comes from outside: names, sizes and counts are all checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from google.protobuf.message import EncodeError, Message

from snaploader._proto import any_pb2, remote_execution_pb2 as reapi, snaploader_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.chunktable import MAX_TREE_BYTES, M, parse_message, set_mode

MAX_MANIFEST_BYTES = 4 << 20
"""Largest serialised ActionResult; gRPC servers take no larger message."""

MAX_TREES_BYTES = MAX_TREE_BYTES
"""Of all trees of a snapshot together, equal ones once: a million chunks, and room for names."""

MAX_FILES = 10_000
"""Most files of a snapshot, a directory counted as one."""

MAX_NAME_BYTES = 255
"""Longest name of a file, in UTF-8 bytes; that of Linux file systems."""

MAX_METADATA = 64
"""Most auxiliary metadata entries."""

_RECORD_BYTES = 64
"""More than the record around an ActionResult adds."""

_TYPE_URL_PREFIX = "type.googleapis.com/"


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file that is kept whole, as one blob."""

    digest: Digest
    is_executable: bool = False
    mode: int | None = None
    """Permission bits, at most 0o777; None when they were not recorded."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot consists of. Immutable: the messages in it must not be changed.

    Raises:
        InvalidArgument: A name is unsafe or there twice, a digest is of another function, a mode is
            not one, or a limit (`MAX_FILES`, …) is exceeded.
    """

    vm_configuration: any_pb2.Any
    """What the machine was made of; see `pack_any`."""
    digest_function: DigestFunction
    """Of every digest in the manifest."""
    files: Mapping[str, PlainFile] = field(default_factory=dict)
    """Plain files by name. A read-only copy, sorted by name."""
    chunked_files: Mapping[str, Digest] = field(default_factory=dict)
    """Digests of the trees of chunked files, by name. A read-only copy, sorted by name."""
    vm_metadata: any_pb2.Any | None = None
    """Where the snapshot came from."""
    other_metadata: tuple[any_pb2.Any, ...] = ()
    """Auxiliary metadata that others have put there, kept as it is."""
    directories: Mapping[str, Digest] = field(default_factory=dict)
    """Digests of the trees of directories, by name. A read-only copy, sorted by name."""

    def __post_init__(self) -> None:
        if not self.vm_configuration.type_url:
            raise InvalidArgument("a manifest needs a VM configuration: a message packed with its type")
        if len(self.other_metadata) + 2 + bool(self.directories) > MAX_METADATA:
            raise InvalidArgument(f"a manifest may hold no more than {MAX_METADATA} metadata entries")
        given = (entry for entry in (self.vm_metadata, *self.other_metadata) if entry is not None)
        if any(is_packed(entry, snaploader_pb2.DirectoryNames) for entry in given):
            raise InvalidArgument("the names of directories are given as directories, not as metadata")
        names = self.names
        if len(names) > MAX_FILES:
            raise InvalidArgument(f"a snapshot of {len(names)} files is refused: {MAX_FILES} are allowed")
        for name in names:
            check_name(name)
        _check_distinct(names)
        for name, file in self.files.items():
            self._check_digest(file.digest, name)
            if file.mode is not None and not 0 <= file.mode <= 0o777:
                raise InvalidArgument(f"the mode {file.mode:#o} of file {name!r} is not within 0o777")
        for name, digest in (*self.chunked_files.items(), *self.directories.items()):
            self._check_digest(digest, name)
            if digest.size_bytes > MAX_TREE_BYTES:
                raise InvalidArgument(
                    f"the tree {digest} of file {name!r} is larger than {MAX_TREE_BYTES} bytes"
                )
        trees_bytes = sum(digest.size_bytes for digest in self.trees)
        if trees_bytes > MAX_TREES_BYTES:
            raise InvalidArgument(
                f"a snapshot whose trees have {trees_bytes} bytes together is refused, {MAX_TREES_BYTES} are "
                "allowed: save it as several snapshots, or use larger chunks"
            )
        for attribute in ("files", "chunked_files", "directories"):
            by_name = dict(sorted(getattr(self, attribute).items()))
            object.__setattr__(self, attribute, MappingProxyType(by_name))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled.
        values = [getattr(self, entry.name) for entry in fields(self)]
        return Manifest, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    @property
    def names(self) -> list[str]:
        """Names of all files and directories."""
        return [*self.files, *self.chunked_files, *self.directories]

    @property
    def trees(self) -> frozenset[Digest]:
        """Digests of the trees of all chunked files and directories."""
        return frozenset((*self.chunked_files.values(), *self.directories.values()))

    def digests(self) -> tuple[Digest, ...]:
        """Blobs and trees that the manifest names, each once; not the empty blob, which exists everywhere."""
        files = (file.digest for file in self.files.values())
        named = (*files, *self.chunked_files.values(), *self.directories.values())
        return tuple(dict.fromkeys(digest for digest in named if digest.size_bytes))

    def to_action_result(self) -> reapi.ActionResult:
        """The manifest as REAPI's ActionResult. InvalidArgument when it is too large."""
        result = reapi.ActionResult()
        metadata = result.execution_metadata.auxiliary_metadata
        metadata.append(self.vm_configuration)
        if self.vm_metadata is not None:
            metadata.append(self.vm_metadata)
        elif self.other_metadata:
            metadata.append(any_pb2.Any())  # holds the second place free
        metadata.extend(self.other_metadata)
        if self.directories:
            metadata.append(pack_any(snaploader_pb2.DirectoryNames(names=self.directories)))
        for name, file in self.files.items():
            output = result.output_files.add(path=name, is_executable=file.is_executable)
            _set_digest(output.digest, file.digest)
            if file.mode is not None:
                set_mode(output.node_properties, file.mode)
        for name, digest in sorted((*self.chunked_files.items(), *self.directories.items())):
            directory = result.output_directories.add(path=name)
            _set_digest(directory.tree_digest, digest)
            directory.is_topologically_sorted = name in self.directories
        if result.ByteSize() > MAX_MANIFEST_BYTES:
            raise InvalidArgument(
                f"a manifest of {result.ByteSize()} bytes is refused, {MAX_MANIFEST_BYTES} are allowed: "
                "put less into its metadata"
            )
        return result

    @classmethod
    def from_action_result(cls, result: reapi.ActionResult, function: DigestFunction) -> Manifest:
        """The manifest in an ActionResult, whose digests are of `function`, all of it checked.

        InvalidArgument when it is no manifest, or one that could do harm.
        """
        _check_size(result.ByteSize())
        if result.output_symlinks or result.output_file_symlinks or result.output_directory_symlinks:
            raise InvalidArgument("a manifest must not hold symbolic links")
        if len(result.output_files) + len(result.output_directories) > MAX_FILES:
            raise InvalidArgument(f"a manifest of more than {MAX_FILES} files is refused")
        # Copies, so that later changes to the message do not reach the manifest.
        metadata = [pack_any(entry) for entry in result.execution_metadata.auxiliary_metadata]
        if not metadata or not metadata[0].type_url:
            raise InvalidArgument("a manifest must begin its auxiliary metadata with the VM configuration")
        directory_names, rest = _take_directory_names(metadata[1:])
        vm_metadata, others = _split_metadata(rest)
        trees = result.output_directories
        _check_distinct([*(file.path for file in result.output_files), *(tree.path for tree in trees)])
        files: dict[str, PlainFile] = {}
        for file in result.output_files:
            has_mode = file.node_properties.HasField("unix_mode")
            mode = file.node_properties.unix_mode.value if has_mode else None
            files[file.path] = PlainFile(_get_digest(file, "digest", function), file.is_executable, mode)
        chunked_files = {tree.path: _get_digest(tree, "tree_digest", function) for tree in trees}
        unknown = directory_names - chunked_files.keys()
        if unknown:
            raise InvalidArgument(f"directory {min(unknown)[:80]!r} has no tree in its manifest")
        directories = {name: chunked_files.pop(name) for name in directory_names}
        return cls(metadata[0], function, files, chunked_files, vm_metadata, others, directories)

    def serialize(self) -> bytes:
        """The ActionResult's deterministic bytes. InvalidArgument when there are too many."""
        return self.to_action_result().SerializeToString(deterministic=True)

    @classmethod
    def parse(cls, data: bytes, function: DigestFunction) -> Manifest:
        """The manifest in a serialised ActionResult, as `from_action_result` reads it."""
        _check_size(len(data), _RECORD_BYTES)
        result = parse_message(reapi.ActionResult, data, "a manifest is not a serialised ActionResult")
        return cls.from_action_result(result, function)

    def serialize_local(self) -> bytes:
        """The record that the local file cache keeps: the ActionResult, and the digest function beside it."""
        record = snaploader_pb2.LocalManifest(
            digest_function=int(self.digest_function), action_result=self.serialize()
        )
        return record.SerializeToString(deterministic=True)

    @classmethod
    def parse_local(cls, data: bytes) -> Manifest:
        """The manifest in a record of the local file cache."""
        _check_size(len(data), _RECORD_BYTES)
        what = "a local manifest is not a serialised record"
        record = parse_message(snaploader_pb2.LocalManifest, data, what)
        try:
            function = DigestFunction(record.digest_function)
        except ValueError:
            raise InvalidArgument(
                f"a local manifest has unknown digest function {record.digest_function}"
            ) from None
        return cls.parse(record.action_result, function)

    def _check_digest(self, digest: Digest, name: str) -> None:
        if digest.function is not self.digest_function:
            raise InvalidArgument(
                f"file {name!r} has a {digest.function.name} digest "
                f"in a manifest of {self.digest_function.name} digests"
            )


def check_name(name: str) -> str:
    """`name`, if a snapshot can hold a file of that name: a base name. InvalidArgument otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a file must be a str, not {type(name).__name__}")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"the file name {name[:80]!r} is not valid Unicode") from None
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise InvalidArgument(f"{name[:80]!r} cannot name a file of a snapshot: a plain base name is needed")
    if length > MAX_NAME_BYTES:
        raise InvalidArgument(
            f"the file name {name[:80]!r}… has {length} bytes, {MAX_NAME_BYTES} are allowed"
        )
    return name


def pack_any(message: Message) -> any_pb2.Any:
    """`message`, of any generated stubs, as an Any. Deterministic.

    Only the full name and the serialised bytes of the message are used, so it may come from another
    descriptor pool. One that is an Any already stays what it is.

    Raises:
        TypeError: It is no protobuf message.
        InvalidArgument: It cannot be serialised, because a required field is not set.
    """
    if not isinstance(message, Message):
        raise TypeError(f"a protobuf message is needed, not {type(message).__name__}")
    name = message.DESCRIPTOR.full_name
    try:
        data = message.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise InvalidArgument(f"the {name} message cannot be serialised: {error}") from error
    if name == "google.protobuf.Any":
        return any_pb2.Any.FromString(data)
    return any_pb2.Any(type_url=_TYPE_URL_PREFIX + name, value=data)


def unpack_any(packed: any_pb2.Any | None, kind: type[M]) -> M | None:
    """The message in `packed`, if that says it holds a `kind`; InvalidArgument when it then does not."""
    if packed is None or not is_packed(packed, kind):
        return None
    return parse_message(kind, packed.value, f"the packed {kind.DESCRIPTOR.full_name} cannot be parsed")


def is_packed(entry: any_pb2.Any, kind: type[Message]) -> bool:
    """Whether `entry` says that it holds a `kind`."""
    return entry.type_url.rpartition("/")[2] == kind.DESCRIPTOR.full_name


def _take_directory_names(entries: list[any_pb2.Any]) -> tuple[set[str], list[any_pb2.Any]]:
    """Which output directories are directories, and the entries that say something else."""
    names: list[str] = []
    rest = []
    for entry in entries:
        listed = unpack_any(entry, snaploader_pb2.DirectoryNames)
        if listed is None:
            rest.append(entry)
        else:
            names += listed.names
    if len(set(names)) != len(names):
        raise InvalidArgument("a manifest names a directory twice")
    return set(names), rest


def _split_metadata(rest: list[any_pb2.Any]) -> tuple[any_pb2.Any | None, tuple[any_pb2.Any, ...]]:
    """What follows the VM configuration: the VM metadata, and what others added.

    The metadata is the second entry, unless a server added its own before it; an empty entry stands
    for none.
    """
    ours = (place for place, entry in enumerate(rest) if is_packed(entry, snaploader_pb2.VMMetadata))
    place = next(ours, 0)
    vm_metadata = rest[place] if rest and rest[place].type_url else None
    return vm_metadata, tuple(rest[:place] + rest[place + 1 :])


def _set_digest(message: reapi.Digest, digest: Digest) -> None:
    message.hash = digest.hash
    message.size_bytes = digest.size_bytes


def _get_digest(
    output: reapi.OutputFile | reapi.OutputDirectory, name: str, function: DigestFunction
) -> Digest:
    if not output.HasField(name):
        raise InvalidArgument(f"file {output.path[:80]!r} has no {name} in its manifest")
    digest = getattr(output, name)
    return Digest.checked(digest.hash, digest.size_bytes, function)


def _check_distinct(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidArgument(f"file {name!r} is in a manifest twice")


def _check_size(size_bytes: int, spare_bytes: int = 0) -> None:
    if size_bytes > MAX_MANIFEST_BYTES + spare_bytes:
        raise InvalidArgument(
            f"a manifest of {size_bytes} bytes is refused: {MAX_MANIFEST_BYTES} are allowed"
        )
