from __future__ import annotations

import math

import pytest

from snaploader._proto.snaploader_pb2 import VMMetadata
from snaploader.errors import InvalidArgument
from snaploader.keys import SnapshotKey
from snaploader.policy import (
    POLICY_PROPERTIES,
    PolicyOverrides,
    ReadPolicy,
    SavePolicy,
    is_stale,
    parse_duration_s,
    should_save_remotely,
)

FEATURE = SnapshotKey(ref="feature")
MAIN = SnapshotKey(ref="main")
NO_REF = SnapshotKey(runner_id="r")


@pytest.mark.parametrize("name", ["local-first", "LOCAL_FIRST", " Local-First "])
def test_policies_are_parsed_in_any_case(name: str) -> None:
    assert ReadPolicy.parse(name) is ReadPolicy.LOCAL_FIRST


@pytest.mark.parametrize("name", ["", "localfirst", "always"])
def test_an_unknown_policy_is_an_error_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidArgument, match="newest, local-first, local-only"):
        ReadPolicy.parse(name)


@pytest.mark.parametrize(
    ("policy", "branch_exists", "any_exists", "saves"),
    [
        (SavePolicy.ALWAYS, False, False, True),
        (SavePolicy.ALWAYS, True, True, True),
        (SavePolicy.FIRST_NON_DEFAULT_REF, False, False, True),
        (SavePolicy.FIRST_NON_DEFAULT_REF, False, True, True),
        (SavePolicy.FIRST_NON_DEFAULT_REF, True, True, False),
        (SavePolicy.NONE_AVAILABLE, False, False, True),
        (SavePolicy.NONE_AVAILABLE, False, True, False),
        (SavePolicy.NONE_AVAILABLE, True, False, False),
    ],
)
def test_save_policies(policy: SavePolicy, branch_exists: bool, any_exists: bool, saves: bool) -> None:
    for default_ref in ("main", ""):
        assert saves == should_save_remotely(
            policy, FEATURE, default_ref=default_ref, branch_exists=branch_exists, any_exists=any_exists
        )


@pytest.mark.parametrize("policy", list(SavePolicy))
@pytest.mark.parametrize("key", [MAIN, NO_REF])
def test_the_default_branch_and_keys_without_a_ref_always_save(policy: SavePolicy, key: SnapshotKey) -> None:
    assert should_save_remotely(policy, key, default_ref="main", branch_exists=True, any_exists=True)


@pytest.mark.parametrize(
    ("last_save_s", "saves"),
    [(None, True), (900.0, True), (900.1, False), (1000.0, False), (1000.1, True)],
)
def test_saves_of_the_default_branch_are_held_off_for_the_refresh_interval(
    last_save_s: float | None, saves: bool
) -> None:
    for policy in SavePolicy:
        assert saves == should_save_remotely(
            policy, MAIN, default_ref="main", last_save_s=last_save_s, refresh_interval_s=100.0, now_s=1000.0
        )


def test_the_refresh_interval_does_not_touch_other_branches() -> None:
    assert should_save_remotely(
        SavePolicy.ALWAYS,
        FEATURE,
        default_ref="main",
        last_save_s=999.0,
        refresh_interval_s=100.0,
        now_s=1000.0,
    )


def metadata(completed_s: float | None) -> VMMetadata:
    message = VMMetadata(vm_id="vm")
    if completed_s is not None:
        message.last_executed_task.completed_timestamp.seconds = int(completed_s)
        message.last_executed_task.completed_timestamp.nanos = int(completed_s % 1 * 1e9)
    return message


@pytest.mark.parametrize(
    ("completed_s", "stale"),
    [
        (900.0, False),
        (899.5, True),
        (1000.0, False),
        (1050.0, False),
        (1100.5, True),
        (0.0, True),
        (None, True),
    ],
)
def test_a_snapshot_is_stale_when_its_last_task_is_too_far_away(
    completed_s: float | None, stale: bool
) -> None:
    assert is_stale(metadata(completed_s), now_s=1000.0, max_age_s=100.0) is stale


def test_a_snapshot_without_metadata_is_stale_whatever_the_limit() -> None:
    assert is_stale(None, now_s=1000.0, max_age_s=math.inf)
    assert is_stale(metadata(None), now_s=1000.0, max_age_s=math.inf)
    assert not is_stale(metadata(1.0), now_s=1000.0, max_age_s=math.inf)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1.5", 1.5), ("90s", 90), ("90m", 5400), ("24H", 86400), (" 2d ", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1w", "1h30m", "nan", "inf", "1e9", "1 h", "٣", "9" * 13])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="duration"):
        parse_duration_s(text)


def test_policies_come_from_platform_properties_in_any_case() -> None:
    overrides = PolicyOverrides.from_platform(
        [
            ("OSFamily", "linux"),
            ("Snapshot-Read-Policy", "newest"),
            ("snapshot-save-policy", "none-available"),
            ("snapshot-max-stale-fallback-age", "1h"),
            ("snapshot-refresh-interval", "60"),
            ("snapshot-sharing", "False"),
            ("snapshot-universal-fallback", "yes"),
        ]
    )
    assert overrides == PolicyOverrides(
        ReadPolicy.NEWEST, SavePolicy.NONE_AVAILABLE, 3600.0, 60.0, share=False, universal=True
    )


def test_properties_that_are_absent_override_nothing() -> None:
    assert PolicyOverrides.from_platform([("OSFamily", "linux")]) == PolicyOverrides()


@pytest.mark.parametrize("name", sorted(POLICY_PROPERTIES))
def test_a_policy_property_with_a_bad_value_is_an_error(name: str) -> None:
    with pytest.raises(InvalidArgument):
        PolicyOverrides.from_platform([(name, "perhaps")])


def test_a_policy_property_with_two_values_is_an_error() -> None:
    pairs = [("snapshot-sharing", "true"), ("Snapshot-Sharing", "true")]
    assert PolicyOverrides.from_platform(pairs).share is True
    with pytest.raises(InvalidArgument, match="twice"):
        PolicyOverrides.from_platform([*pairs, ("SNAPSHOT-SHARING", "false")])
