from __future__ import annotations

import logging
from dataclasses import fields, replace

import pytest
from hypothesis import given, strategies as st

from snaploader._proto import snaploader_pb2
from snaploader.digest import DigestFunction, hash_strings
from snaploader.errors import InvalidArgument
from snaploader.keys import (
    MAX_FALLBACK_KEYS,
    MAX_TEXT_BYTES,
    UNIVERSAL_REF,
    SnapshotKey,
    SnapshotKeySet,
    SnapshotTask,
    base_key,
    is_universal,
    local_manifest_key,
    platform_hash,
    remote_manifest_digest,
    remote_version_digest,
    snapshot_id_key,
    snapshot_key_set,
    version_key,
    write_ref,
)
from snaploader.policy import POLICY_PROPERTIES

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
snapshot_keys = st.builds(SnapshotKey, *[texts] * 7)


def task(branch: str = "", base: str = "", default: str = "", **platform: str) -> SnapshotTask:
    environment = {"GIT_BRANCH": branch, "GIT_BASE_BRANCH": base, "GIT_REPO_DEFAULT_BRANCH": default}
    return SnapshotTask.from_mapping(platform, environment, instance_name="inst")


def refs(key_set: SnapshotKeySet) -> list[str]:
    return [key.ref for key in key_set]


@pytest.mark.parametrize(
    ("branch", "base", "default", "expected"),
    [
        ("feature", "", "", ["feature"]),
        ("feature", "", "main", ["feature", "main"]),
        ("feature", "parent", "main", ["feature", "parent", "main"]),
        ("feature", "main", "main", ["feature", "main"]),
        ("feature", "feature", "main", ["feature", "main"]),
        ("main", "main", "main", ["main"]),
        ("main", "parent", "main", ["main", "parent"]),
        ("", "parent", "main", [""]),
        ("", "", "", [""]),
        ("a/b", "A/b", "a/B", ["a/b", "A/b", "a/B"]),
    ],
)
def test_a_branch_falls_back_on_its_base_then_on_the_default_branch(
    branch: str, base: str, default: str, expected: list[str]
) -> None:
    key_set = snapshot_key_set(task(branch, base, default), "cfg", version_id="v")
    assert refs(key_set) == expected
    for key in key_set:
        assert key == replace(key_set.branch_key, ref=key.ref)
    assert key_set.write_key == key_set.branch_key


def test_variables_that_are_not_set_are_like_empty_ones() -> None:
    key_set = snapshot_key_set(SnapshotTask(), "cfg")
    assert (refs(key_set), key_set.write_key) == ([""], key_set.branch_key)


def test_keys_carry_instance_platform_configuration_and_version() -> None:
    key = snapshot_key_set(task("feature", OS="linux"), "cfg", "runner", "v").branch_key
    assert key == SnapshotKey("inst", platform_hash([("OS", "linux")]), "cfg", "", "feature", "", "v")
    assert base_key(task("feature", OS="linux"), "cfg") == replace(key, ref="", version_id="")


def test_without_sharing_the_only_key_is_the_runners() -> None:
    key_set = snapshot_key_set(
        task("feature", "b", "main"), "cfg", "runner", "v", share=False, universal=True
    )
    assert list(key_set) == [key_set.write_key]
    assert (key_set.branch_key.ref, key_set.branch_key.runner_id) == ("", "runner")


def test_without_sharing_a_runner_id_is_needed() -> None:
    with pytest.raises(InvalidArgument, match="runner_id"):
        snapshot_key_set(task("feature"), "cfg", share=False)


def test_the_universal_ref_is_the_last_fallback_and_every_save_updates_it() -> None:
    key_set = snapshot_key_set(task("feature", "", "main"), "cfg", universal=True)
    assert refs(key_set) == ["feature", "main", UNIVERSAL_REF]
    assert [key.ref for key in key_set.write_keys] == ["feature", UNIVERSAL_REF]
    assert [is_universal(key) for key in key_set] == [False, False, True]


def test_a_task_without_a_branch_has_no_fallbacks_not_even_the_universal_one() -> None:
    key_set = snapshot_key_set(task("", "parent", "main"), "cfg", universal=True)
    assert refs(key_set) == [""]
    assert key_set.write_keys == (key_set.branch_key,)


def test_without_the_universal_ref_only_the_write_key_is_updated() -> None:
    key_set = snapshot_key_set(task("feature", "", "main"), "cfg")
    assert key_set.write_keys == (key_set.write_key,)


@pytest.mark.parametrize("variable", ["branch", "base", "default"])
def test_no_branch_can_pass_for_the_universal_ref(variable: str) -> None:
    branches = {"branch": "feature", variable: UNIVERSAL_REF}
    with pytest.raises(InvalidArgument, match="no branch"):
        snapshot_key_set(task(**branches), "cfg")


@pytest.mark.parametrize(
    ("ref", "written"),
    [
        ("gh-readonly-queue/main/pr-12-abcdef", "main"),
        ("gh-readonly-queue/release/2.0/pr-12-abcdef", "release/2.0"),
        ("gh-readonly-queue/a/b/c/d", "a/b/c"),
        ("main", "main"),
        ("", ""),
        ("feature/gh-readonly-queue/main/pr-1", "feature/gh-readonly-queue/main/pr-1"),
    ],
)
def test_a_merge_queue_writes_to_its_base_branch(ref: str, written: str) -> None:
    assert write_ref(ref) == written
    key_set = snapshot_key_set(task(ref), "cfg")
    assert key_set.write_key == replace(key_set.branch_key, ref=written)
    assert key_set.branch_key.ref == ref


@pytest.mark.parametrize(
    "ref",
    [
        "gh-readonly-queue/",
        "gh-readonly-queue/main",
        "gh-readonly-queue/main/",
        "gh-readonly-queue//pr-1",
        "gh-readonly-queue/main//pr-1",
        "gh-readonly-queue//main/pr-1",
        f"gh-readonly-queue/{UNIVERSAL_REF}/pr-1",
    ],
)
def test_a_malformed_queue_ref_is_logged_and_stands_for_itself(
    ref: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "snaploader.keys"):
        assert write_ref(ref) == ref
    assert ref in caplog.text


def test_policy_properties_do_not_change_the_platform_hash() -> None:
    plain = [("OS", "linux")]
    for name in POLICY_PROPERTIES:
        assert platform_hash([*plain, (name.upper(), "x")]) == platform_hash(plain)
    assert platform_hash([*plain, ("snapshot-other", "x")]) != platform_hash(plain)


@given(st.lists(st.tuples(texts, texts), max_size=6))
def test_the_platform_hash_does_not_depend_on_order(pairs: list[tuple[str, str]]) -> None:
    assert platform_hash(pairs) == platform_hash(pairs[::-1])


@given(snapshot_keys)
def test_keys_survive_the_wire(key: SnapshotKey) -> None:
    assert SnapshotKey.parse(key.serialize()) == key
    assert SnapshotKey.from_proto(key.to_proto()) == key


@given(snapshot_keys, st.lists(snapshot_keys, max_size=3), snapshot_keys)
def test_key_sets_survive_the_wire(
    branch: SnapshotKey, fallbacks: list[SnapshotKey], write: SnapshotKey
) -> None:
    key_set = SnapshotKeySet(branch, tuple(fallbacks), write)
    assert SnapshotKeySet.parse(key_set.serialize()) == key_set


@given(st.binary(max_size=200))
def test_any_bytes_are_a_key_or_an_error(data: bytes) -> None:
    for kind in (SnapshotKey, SnapshotKeySet):
        try:
            kind.parse(data)
        except InvalidArgument:
            pass


def test_a_key_set_must_be_complete_and_of_reasonable_size() -> None:
    key = snaploader_pb2.SnapshotKey(ref="a")
    with pytest.raises(InvalidArgument):
        SnapshotKeySet.from_proto(snaploader_pb2.SnapshotKeySet(branch_key=key))
    with pytest.raises(InvalidArgument):
        SnapshotKeySet.from_proto(snaploader_pb2.SnapshotKeySet(write_key=key))
    with pytest.raises(InvalidArgument, match="fallback"):
        SnapshotKeySet(SnapshotKey(), (SnapshotKey(),) * (MAX_FALLBACK_KEYS + 1), SnapshotKey())


@pytest.mark.parametrize("name", [field.name for field in fields(SnapshotKey)])
@pytest.mark.parametrize("value", ["a\0", "x" * (MAX_TEXT_BYTES + 1), "\udfff"])
def test_every_field_of_a_key_is_checked(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        SnapshotKey(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(SnapshotKey)])
def test_every_field_of_a_key_changes_where_its_manifest_lies(name: str) -> None:
    key = SnapshotKey(**{name: "x"})
    assert local_manifest_key("g", key) != local_manifest_key("g", SnapshotKey())
    assert remote_manifest_digest(key, DigestFunction.SHA256).hash != local_manifest_key("g", key)


def test_groups_keep_their_manifests_apart() -> None:
    key = SnapshotKey(ref="main")
    assert local_manifest_key("a", key) != local_manifest_key("b", key)


def test_one_version_holds_for_all_refs_and_runners_of_a_configuration() -> None:
    key = SnapshotKey("inst", "p", "c", ref="main")
    same = [replace(key, ref="x"), replace(key, version_id="v"), replace(key, runner_id="r")]
    assert {version_key(other) for other in same} == {version_key(key)}
    others = [
        replace(key, instance_name="x"),
        replace(key, platform_hash="x"),
        replace(key, configuration_hash="x"),
    ]
    assert version_key(key) not in {version_key(other) for other in others}


def test_a_snapshot_id_key_names_nothing_else() -> None:
    key = SnapshotKey("inst", "p", "c", "r", "main", "id", "v")
    assert snapshot_id_key(key) == SnapshotKey(instance_name="inst", snapshot_id="id")
    with pytest.raises(InvalidArgument, match="snapshot_id"):
        snapshot_id_key(replace(key, snapshot_id=""))


def test_a_key_shows_what_is_set() -> None:
    assert (
        str(SnapshotKey(ref="main", platform_hash="a" * 64)) == "{platform_hash='aaaaaaaaaaaa…', ref='main'}"
    )


# What follows was computed by hand, with hashlib, and can never change: caches are full of it.

GOLDEN_KEY = SnapshotKey("inst", "aa" * 32, "cfg", "runner", "main", "snap-1", "v-1")


def test_golden_key_bytes() -> None:
    assert (
        GOLDEN_KEY.serialize().hex()
        == (
            "0a04696e7374"  # 1: inst
            "1240" + "6161" * 32 + "1a03636667"  # 3: cfg
            "220672756e6e6572"  # 4: runner
            "2a046d61696e"  # 5: main
            "3206736e61702d31"  # 6: snap-1
            "3a03762d31"  # 7: v-1
        )
    )
    assert SnapshotKey().serialize() == b""


def test_golden_key_set_bytes() -> None:
    a, b = SnapshotKey(ref="a"), SnapshotKey(ref="b")
    assert SnapshotKeySet(a, (b,), a).serialize().hex() == "0a032a016112032a01621a032a0161"


def test_golden_cache_names() -> None:
    assert (
        local_manifest_key("grp", GOLDEN_KEY)
        == "cab5d1ef6a6e5c5234652b4f9b7007b0965265d278b26dd156ed780118405819"
    )
    for function in DigestFunction:
        digest = remote_manifest_digest(GOLDEN_KEY, function)
        assert digest.hash == "e2bbe1ca772929ba1bf431f6e3327d0dd5207b254b1be146e24ab871ef4afc10"
        assert (digest.size_bytes, digest.function) == (1, function)
        version = remote_version_digest(GOLDEN_KEY, function)
        assert (version.hash, version.size_bytes) == (version_key(GOLDEN_KEY), 1)
    assert version_key(GOLDEN_KEY) == "fd698a57f9de423980d3627b4997dce5d10825837bcc62f4e027f57928a8adfa"


def test_golden_platform_hash() -> None:
    pairs = [("OSFamily", "linux"), ("Pool", "b"), ("Arch", "amd64"), ("Pool", "a")]
    assert platform_hash(pairs) == "8182f5712d1d5fcf2839a7d859595f5394a8d05e19dc9fcdcff539b46af89ea3"
    assert platform_hash([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_golden_hash_of_strings() -> None:
    assert hash_strings("ab", "c") != hash_strings("a", "bc")
    assert hash_strings() == platform_hash([])
