from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import any_pb2 as google_any_pb2, descriptor_pb2, struct_pb2, timestamp_pb2
from google.protobuf.message import Message
from hypothesis import given, strategies as st

from snaploader._proto import any_pb2, remote_execution_pb2 as reapi, snaploader_pb2
from snaploader.digest import Digest, DigestFunction, empty_digest
from snaploader.errors import InvalidArgument
from snaploader.formats.chunktable import MAX_TREE_BYTES
from snaploader.formats.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_METADATA,
    Manifest,
    PlainFile,
    check_name,
    pack_any,
    unpack_any,
)

SHA256 = DigestFunction.SHA256
CONFIGURATION = pack_any(snaploader_pb2.VMConfiguration(cpu_count=2))
METADATA = pack_any(snaploader_pb2.VMMetadata(vm_id="vm"))
FOREIGN = any_pb2.Any(type_url="type.googleapis.com/someone.Else", value=b"\x01")


def digest(number: int, size: int = 10, function: DigestFunction = SHA256) -> Digest:
    return Digest(f"{number:064x}", size, function)


def manifest(**changes: Any) -> Manifest:
    plain = Manifest(
        CONFIGURATION,
        SHA256,
        {"kernel": PlainFile(digest(1)), "run": PlainFile(digest(2), is_executable=True, mode=0o755)},
        {"disk": digest(3), "memory": digest(4)},
        METADATA,
    )
    return replace(plain, **changes)


names = st.text("aäz0-. \n", min_size=1, max_size=8).filter(lambda name: name not in {".", ".."})
digests = st.builds(digest, st.integers(0, 2**256 - 1), st.integers(0, MAX_TREE_BYTES // 64))
plain_files = st.builds(PlainFile, digests, st.booleans(), st.none() | st.integers(0, 0o777))
messages = st.sampled_from([CONFIGURATION, METADATA, FOREIGN])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(names, plain_files, max_size=5))
    chunked_files = draw(st.dictionaries(names.filter(lambda name: name not in files), digests, max_size=5))
    vm_metadata = draw(st.sampled_from([None, METADATA]))
    others = draw(st.lists(st.sampled_from([CONFIGURATION, FOREIGN]), max_size=3))
    return Manifest(draw(messages), SHA256, files, chunked_files, vm_metadata, tuple(others))


@given(manifests())
def test_manifests_survive_the_wire(snapshot: Manifest) -> None:
    assert Manifest.parse(snapshot.serialize(), SHA256) == snapshot
    assert Manifest.parse_local(snapshot.serialize_local()) == snapshot
    assert Manifest.from_action_result(snapshot.to_action_result(), SHA256) == snapshot


@given(manifests(), st.randoms())
def test_the_same_snapshot_gives_the_same_bytes(snapshot: Manifest, random: Any) -> None:
    def shuffled(mapping: Any) -> dict[str, Any]:
        items = list(mapping.items())
        random.shuffle(items)
        return dict(items)

    other = replace(snapshot, files=shuffled(snapshot.files), chunked_files=shuffled(snapshot.chunked_files))
    assert other.serialize() == snapshot.serialize()


def test_golden_manifest_bytes() -> None:
    snapshot = Manifest(
        CONFIGURATION,
        SHA256,
        {"run": PlainFile(Digest("ab" * 32, 300, SHA256), is_executable=True, mode=0o644)},
        {"disk": Digest("cd" * 32, 7, SHA256)},
        METADATA,
    )
    type_url = b"type.googleapis.com/snaploader.v1.".hex()
    assert snapshot.serialize().hex() == (
        ("1255" + "0a0372756e" + "1245" + "0a40" + "6162" * 32 + "10ac02" + "2001" + "3a05" + "1a0308a403")
        + ("1a4c" + "0a046469736b" + "1a44" + "0a40" + "6364" * 32 + "1007")
        + "4a6f"
        + ("5a37" + "0a31" + type_url + b"VMConfiguration".hex() + "12020802")
        + ("5a34" + "0a2c" + type_url + b"VMMetadata".hex() + "12040a02766d")
    )
    local = "0801" + "129602" + snapshot.serialize().hex()
    assert snapshot.serialize_local().hex() == local


def test_blake3_is_kept_in_the_local_record() -> None:
    snapshot = Manifest(
        CONFIGURATION, DigestFunction.BLAKE3, {"a": PlainFile(digest(1, 5, DigestFunction.BLAKE3))}
    )
    assert Manifest.parse_local(snapshot.serialize_local()) == snapshot


def test_digests_are_named_once_and_the_empty_blob_never() -> None:
    snapshot = Manifest(
        CONFIGURATION,
        SHA256,
        {
            "a": PlainFile(digest(1)),
            "b": PlainFile(digest(1), is_executable=True),
            "c": PlainFile(empty_digest(SHA256)),
        },
        {"d": digest(2), "e": digest(2)},
    )
    assert snapshot.digests() == (digest(1), digest(2))


def test_other_metadata_is_kept_and_does_not_pass_for_ours() -> None:
    for vm_metadata in (None, METADATA):
        snapshot = manifest(vm_metadata=vm_metadata, other_metadata=(FOREIGN, FOREIGN))
        assert Manifest.parse(snapshot.serialize(), SHA256) == snapshot


def test_metadata_is_found_behind_what_a_server_put_before_it() -> None:
    result = manifest().to_action_result()
    metadata = result.execution_metadata.auxiliary_metadata
    del metadata[:]
    metadata.extend([CONFIGURATION, FOREIGN, METADATA])
    read = Manifest.from_action_result(result, SHA256)
    assert (read.vm_metadata, read.other_metadata) == (METADATA, (FOREIGN,))


def test_what_servers_add_to_an_action_result_is_passed_over() -> None:
    result = manifest().to_action_result()
    result.execution_metadata.worker = "cache-1"
    result.stdout_raw = b"x"
    result.stdout_digest.hash = "y"
    assert Manifest.from_action_result(result, SHA256) == manifest()


def test_later_changes_to_a_message_do_not_reach_the_manifest() -> None:
    result = manifest().to_action_result()
    read = Manifest.from_action_result(result, SHA256)
    again = read.to_action_result()
    for message in (result, again):
        message.execution_metadata.auxiliary_metadata[0].type_url = "changed"
    assert read == manifest()


def test_the_files_of_a_manifest_cannot_be_changed() -> None:
    files = {"a": PlainFile(digest(1))}
    snapshot = Manifest(CONFIGURATION, SHA256, files)
    files["b"] = PlainFile(digest(2))
    assert list(snapshot.files) == ["a"]
    with pytest.raises(TypeError):
        snapshot.files["b"] = PlainFile(digest(2))  # type: ignore[index]


BAD_NAMES = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "a/b",
    "../a",
    "a/",
    "a\0b",
    "x" * 256,
    "é" * 128,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)
    with pytest.raises(InvalidArgument):
        manifest(files={name: PlainFile(digest(1))})
    with pytest.raises(InvalidArgument):
        manifest(chunked_files={name: digest(1)})


@pytest.mark.parametrize("name", ["a", "...", ".hidden", "a b", "é" * 127, "x" * 255, "\\", "C:", "-rf"])
def test_plain_base_names_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_a_name_must_be_a_string() -> None:
    with pytest.raises(TypeError):
        check_name(b"a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"vm_configuration": any_pb2.Any()},
        {"files": {"disk": PlainFile(digest(1))}},
        {"files": {"a": PlainFile(digest(1, 5, DigestFunction.BLAKE3))}},
        {"chunked_files": {"a": digest(1, 5, DigestFunction.BLAKE3)}},
        {"digest_function": DigestFunction.BLAKE3},
        {"chunked_files": {"a": digest(1, MAX_TREE_BYTES + 1)}},
        {"files": {"a": PlainFile(digest(1), mode=0o1000)}},
        {"files": {"a": PlainFile(digest(1), mode=0o104755)}},
        {"files": {"a": PlainFile(digest(1), mode=-1)}},
        {"files": {str(n): PlainFile(digest(1)) for n in range(MAX_FILES)}},
        {"other_metadata": (FOREIGN,) * (MAX_METADATA - 1)},
    ],
)
def test_a_manifest_that_breaks_a_rule_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        manifest(**changes)


def test_a_manifest_that_is_too_large_is_not_written() -> None:
    huge = snaploader_pb2.VMConfiguration(boot_arguments="x" * MAX_MANIFEST_BYTES)
    with pytest.raises(InvalidArgument, match="metadata"):
        manifest(vm_configuration=pack_any(huge)).serialize()


def without_metadata(result: reapi.ActionResult) -> None:
    result.ClearField("execution_metadata")


def with_empty_configuration(result: reapi.ActionResult) -> None:
    result.execution_metadata.auxiliary_metadata[0].Clear()


def many_files(result: reapi.ActionResult) -> None:
    for _ in range(MAX_FILES):
        result.output_files.add()


def much_metadata(result: reapi.ActionResult) -> None:
    result.execution_metadata.auxiliary_metadata.extend([FOREIGN] * MAX_METADATA)


def much_data(result: reapi.ActionResult) -> None:
    result.stdout_raw = bytes(MAX_MANIFEST_BYTES)


def file_field(name: str, value: Any) -> Callable[[reapi.ActionResult], None]:
    return lambda result: setattr(result.output_files[0], name, value)


def digest_field(name: str, value: Any) -> Callable[[reapi.ActionResult], None]:
    return lambda result: setattr(result.output_files[0].digest, name, value)


def tree_field(name: str, value: Any) -> Callable[[reapi.ActionResult], None]:
    return lambda result: setattr(result.output_directories[0].tree_digest, name, value)


def mode_of(value: int) -> Callable[[reapi.ActionResult], None]:
    return lambda result: setattr(result.output_files[0].node_properties.unix_mode, "value", value)


@pytest.mark.parametrize(
    "change",
    [
        without_metadata,
        with_empty_configuration,
        many_files,
        much_metadata,
        much_data,
        file_field("path", "../kernel"),
        file_field("path", "/kernel"),
        file_field("path", ""),
        file_field("path", "run"),
        file_field("path", "disk"),
        file_field("path", "a\0"),
        lambda result: result.output_files[0].ClearField("digest"),
        digest_field("hash", ""),
        digest_field("hash", "AB" * 32),
        digest_field("hash", "ab" * 20),
        digest_field("size_bytes", -1),
        digest_field("size_bytes", 1 << 62),
        mode_of(0o4755),
        mode_of(0xFFFFFFFF),
        lambda result: setattr(result.output_directories[0], "path", "memory"),
        lambda result: setattr(result.output_directories[0], "path", "a/b"),
        lambda result: result.output_directories[0].ClearField("tree_digest"),
        tree_field("hash", "x"),
        tree_field("size_bytes", MAX_TREE_BYTES + 1),
        lambda result: result.output_symlinks.add(path="a", target="/etc"),
        lambda result: result.output_file_symlinks.add(path="a", target="/etc"),
        lambda result: result.output_directory_symlinks.add(path="a", target="/etc"),
    ],
)
def test_hostile_action_results_are_refused(change: Callable[[reapi.ActionResult], object]) -> None:
    result = manifest().to_action_result()
    change(result)
    with pytest.raises(InvalidArgument):
        Manifest.from_action_result(result, SHA256)
    with pytest.raises(InvalidArgument):
        Manifest.parse(result.SerializeToString(), SHA256)


def test_a_local_record_of_an_unknown_digest_function_is_refused() -> None:
    record = snaploader_pb2.LocalManifest(digest_function=2, action_result=manifest().serialize())
    with pytest.raises(InvalidArgument, match="function 2"):
        Manifest.parse_local(record.SerializeToString())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_an_error(data: bytes) -> None:
    for parse in (Manifest.parse_local, lambda data: Manifest.parse(data, SHA256)):
        for prefix in (b"", manifest().serialize(), b"\x08\x01\x12"):
            try:
                parse(prefix + data)
            except InvalidArgument:
                pass


@given(st.data())
def test_damaged_manifests_are_read_whole_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(manifest().serialize_local())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Manifest.parse_local(bytes(damaged))
    except InvalidArgument:
        return
    assert Manifest.parse_local(read.serialize_local()) == read


@pytest.mark.parametrize(
    "message",
    [
        snaploader_pb2.VMConfiguration(cpu_count=3),
        timestamp_pb2.Timestamp(seconds=5),
        struct_pb2.Value(string_value="of another descriptor pool"),
    ],
)
def test_any_message_can_be_packed(message: Message) -> None:
    packed = pack_any(message)
    assert packed.type_url == f"type.googleapis.com/{message.DESCRIPTOR.full_name}"
    assert unpack_any(packed, type(message)) == message
    snapshot = manifest(vm_configuration=packed, vm_metadata=packed)
    assert Manifest.parse(snapshot.serialize(), SHA256) == snapshot


def test_an_any_stays_what_it_is() -> None:
    foreign = google_any_pb2.Any(type_url="example.com/x.Y", value=b"v")
    assert pack_any(foreign) == any_pb2.Any(type_url="example.com/x.Y", value=b"v")
    assert pack_any(pack_any(foreign)) == pack_any(foreign)


def test_packing_does_not_depend_on_the_order_of_map_entries() -> None:
    one, other = snaploader_pb2.VMConfiguration(), snaploader_pb2.VMConfiguration()
    keys = [str(number) for number in range(50)]
    for key in keys:
        one.properties[key] = "x"
    for key in reversed(keys):
        other.properties[key] = "x"
    assert pack_any(one) == pack_any(other)


@pytest.mark.parametrize("value", [None, b"bytes", {"cpu_count": 1}])
def test_only_messages_can_be_packed(value: Any) -> None:
    with pytest.raises(TypeError, match="protobuf message"):
        pack_any(value)


def test_a_message_that_lacks_a_required_field_cannot_be_packed() -> None:
    part = descriptor_pb2.UninterpretedOption.NamePart(name_part="x")
    with pytest.raises(InvalidArgument, match="NamePart"):
        pack_any(part)


def test_unpacking_gives_none_for_another_type_and_an_error_for_bad_bytes() -> None:
    assert unpack_any(None, snaploader_pb2.VMMetadata) is None
    assert unpack_any(CONFIGURATION, snaploader_pb2.VMMetadata) is None
    assert unpack_any(METADATA, snaploader_pb2.VMMetadata) == snaploader_pb2.VMMetadata(vm_id="vm")
    bad = any_pb2.Any(type_url=METADATA.type_url, value=b"\xff")
    with pytest.raises(InvalidArgument, match="VMMetadata"):
        unpack_any(bad, snaploader_pb2.VMMetadata)
