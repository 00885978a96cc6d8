"""Manifests with directories."""

from __future__ import annotations

import pytest

from snaploader._proto import any_pb2, remote_execution_pb2 as reapi, snaploader_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.manifest import MAX_FILES, MAX_METADATA, Manifest, PlainFile, pack_any

SHA256 = DigestFunction.SHA256
CONFIGURATION = pack_any(snaploader_pb2.VMConfiguration(cpu_count=1))
METADATA = pack_any(snaploader_pb2.VMMetadata(vm_id="vm"))
OTHER = any_pb2.Any(type_url="type.googleapis.com/example.Other", value=b"x")


def digest(text: str) -> Digest:
    return Digest.of(text.encode(), SHA256)


def names(*values: str) -> any_pb2.Any:
    return pack_any(snaploader_pb2.DirectoryNames(names=values))


def manifest(**kwargs: object) -> Manifest:
    content = {
        "files": {"f": PlainFile(digest("f"))},
        "chunked_files": {"disk": digest("disk"), "z": digest("z")},
        "directories": {"work": digest("work"), "home": digest("home")},
    }
    return Manifest(CONFIGURATION, SHA256, **{**content, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("metadata", [None, METADATA, OTHER])
@pytest.mark.parametrize("others", [(), (OTHER,), (OTHER, OTHER)])
def test_directories_survive_the_wire(metadata: any_pb2.Any | None, others: tuple[any_pb2.Any, ...]) -> None:
    before = manifest(vm_metadata=metadata, other_metadata=others)
    after = Manifest.parse(before.serialize(), SHA256)
    assert after == before
    assert list(after.directories) == ["home", "work"]
    assert Manifest.parse_local(before.serialize_local()) == before


def test_directories_are_output_directories_told_apart_by_their_names() -> None:
    result = manifest(vm_metadata=METADATA).to_action_result()
    assert [one.path for one in result.output_directories] == ["disk", "home", "work", "z"]
    assert [one.is_topologically_sorted for one in result.output_directories] == [False, True, True, False]
    entries = result.execution_metadata.auxiliary_metadata
    assert entries[2] == names("home", "work")
    assert entries[2].type_url == "type.googleapis.com/snaploader.v1.DirectoryNames"


def test_without_directories_there_is_no_entry_of_names() -> None:
    result = manifest(directories={}).to_action_result()
    assert len(result.execution_metadata.auxiliary_metadata) == 1


@pytest.mark.parametrize("place", [1, 2, 3])
def test_the_names_may_stand_anywhere_after_the_configuration(place: int) -> None:
    before = manifest(vm_metadata=METADATA, other_metadata=(OTHER,))
    result = before.to_action_result()
    entries = list(result.execution_metadata.auxiliary_metadata)
    entries.insert(place, entries.pop())
    del result.execution_metadata.auxiliary_metadata[:]
    result.execution_metadata.auxiliary_metadata.extend(entries)
    assert Manifest.from_action_result(result, SHA256) == before


def test_digests_and_names_cover_everything() -> None:
    one = manifest()
    assert set(one.digests()) == {digest(name) for name in ("f", "disk", "z", "work", "home")}
    assert one.trees == {digest(name) for name in ("disk", "z", "work", "home")}
    assert one.names == ["f", "disk", "z", "home", "work"]


def changed(*extra: any_pb2.Any) -> reapi.ActionResult:
    result = manifest(directories={}).to_action_result()
    result.execution_metadata.auxiliary_metadata.extend(extra)
    return result


def test_a_name_without_a_tree_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'nowhere' has no tree"):
        Manifest.from_action_result(changed(names("disk", "nowhere")), SHA256)
    with pytest.raises(InvalidArgument, match="'f' has no tree"):
        Manifest.from_action_result(changed(names("f")), SHA256)


@pytest.mark.parametrize("entries", [[names("disk", "disk")], [names("disk"), names("disk")]])
def test_a_name_that_stands_twice_is_refused(entries: list[any_pb2.Any]) -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        Manifest.from_action_result(changed(*entries), SHA256)


def test_names_in_several_entries_count_together() -> None:
    found = Manifest.from_action_result(changed(names("z"), names("disk")), SHA256)
    assert list(found.directories) == ["disk", "z"]
    assert found.chunked_files == {}


def test_names_that_cannot_be_parsed_are_refused() -> None:
    broken = names()
    broken.value = b"\xff"
    with pytest.raises(InvalidArgument, match="DirectoryNames"):
        Manifest.from_action_result(changed(broken), SHA256)


@pytest.mark.parametrize("name", ["f", "disk"])
def test_a_name_stands_for_one_thing(name: str) -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        manifest(directories={name: digest("x")})


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 256])
def test_directories_have_the_names_of_files(name: str) -> None:
    with pytest.raises(InvalidArgument):
        manifest(directories={name: digest("x")})


def test_directories_count_as_files_and_their_names_as_metadata() -> None:
    with pytest.raises(InvalidArgument, match="files is refused"):
        manifest(directories={str(number): digest("x") for number in range(MAX_FILES)})
    with pytest.raises(InvalidArgument, match="metadata entries"):
        manifest(other_metadata=(OTHER,) * (MAX_METADATA - 2))
    manifest(other_metadata=(OTHER,) * (MAX_METADATA - 3))


def test_a_tree_of_a_directory_is_checked_like_others() -> None:
    with pytest.raises(InvalidArgument, match="BLAKE3"):
        manifest(directories={"d": Digest.of(b"x", DigestFunction.BLAKE3)})
    with pytest.raises(InvalidArgument, match="larger"):
        manifest(directories={"d": Digest("a" * 64, 1 << 30, SHA256)})


def test_names_are_not_given_as_metadata() -> None:
    with pytest.raises(InvalidArgument, match="as directories"):
        manifest(other_metadata=(names("x"),))
    with pytest.raises(InvalidArgument, match="as directories"):
        manifest(vm_metadata=names("x"))
