"""Ids and names: bounded, safe as file names, and unique within one tick of the clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snaploader import FileCache
from snaploader.errors import InvalidArgument
from snaploader.workspace.model import (
    HTTPTarget,
    Readiness,
    WorkspaceSpec,
    check_display_name,
    check_workspace_id,
    new_snapshot_name,
    new_workspace_id,
    parse_address,
    parse_url,
    pin_name,
    runtime_name,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("text", ["a", "7", "a-b", "ws-0123", "x" * 64])
def test_ids_of_lower_case_letters_digits_and_inner_hyphens_are_ids(text: str) -> None:
    assert check_workspace_id(text) == text


@pytest.mark.parametrize(
    "text", ["", "A", "a_b", "a.b", "-a", "a-", "x" * 65, "a/b", "..", "a\n", "ä", "a b", None, 5]
)
def test_anything_else_is_no_id(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="no workspace id"):
        check_workspace_id(text)


def test_new_ids_are_ids_and_differ() -> None:
    ids = {check_workspace_id(new_workspace_id()) for _ in range(100)}
    assert len(ids) == 100


def test_names_made_within_one_tick_differ() -> None:
    assert len({new_snapshot_name("one", NOW) for _ in range(1000)}) == 1000


def test_names_sort_by_time() -> None:
    later = new_snapshot_name("one", NOW + timedelta(seconds=1))
    assert new_snapshot_name("one", NOW) < later


def test_the_longest_name_is_still_the_name_of_a_pin(tmp_path: Path) -> None:
    name = new_snapshot_name("x" * 64, NOW)
    with FileCache(tmp_path) as cache:
        cache.pin(pin_name(name))
        assert cache.pins() == [f"workspace.{name}"]
    assert runtime_name("x" * 64, name).endswith(name)


@pytest.mark.parametrize("name", ["", "before the update", "ü" * 200])
def test_printable_names_can_be_shown(name: str) -> None:
    assert check_display_name(name) == name


def test_white_space_around_a_name_is_cut_off() -> None:
    assert check_display_name("  before the upgrade\n") == "before the upgrade"
    assert check_display_name(" " * 300) == ""


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 201, None, 3])
def test_other_names_cannot(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="no name for a snapshot"):
        check_display_name(name)


@pytest.mark.parametrize("kind", ["tcp", "http", "command"])
def test_a_readiness_check_needs_a_target(kind: str) -> None:
    with pytest.raises(InvalidArgument, match="needs a target"):
        Readiness(kind)


@pytest.mark.parametrize(
    "target",
    ["80", "host", "host:", "host:port", "host:0", "host:65536", "host:-1", "host:\u0663", "h:" + "9" * 5000],
)
def test_what_is_no_address_cannot_be_connected_to(target: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is no address.*host:port") as caught:
        Readiness("tcp", target)
    assert repr(target) in caught.value.message


@pytest.mark.parametrize(
    "target", ["localhost", "host:80", "ftp://host/", "http://", "http://host:99999/", "http://[::"]
)
def test_what_is_no_url_cannot_be_got(target: str) -> None:
    with pytest.raises(InvalidArgument, match="is no URL") as caught:
        Readiness("http", target)
    assert repr(target) in caught.value.message


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("host:65535", ("host", 65535)),
        ("[::1]:80", ("::1", 80)),
        (":80", ("localhost", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(target: str, address: tuple[str, int]) -> None:
    assert Readiness("tcp", target).target == target
    assert parse_address(target) == address


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("http://host", HTTPTarget(False, "host", None, "/")),
        ("https://[::1]:8443/health?full=1", HTTPTarget(True, "::1", 8443, "/health?full=1")),
    ],
)
def test_a_url_is_taken_apart(target: str, parts: HTTPTarget) -> None:
    assert Readiness("http", target).target == target
    assert parse_url(target) == parts


def test_a_check_of_ones_own_may_have_any_target() -> None:
    assert Readiness("mine", "anything").target == "anything"


@pytest.mark.parametrize("times", [{"interval_s": 0}, {"timeout_s": 0}, {"interval_s": float("nan")}])
def test_the_times_of_a_readiness_check_are_above_zero(times: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match="above 0 s"):
        Readiness(**times)  # type: ignore[arg-type]


def test_a_spec_keeps_its_own_environment() -> None:
    environment = {"A": "1"}
    spec = WorkspaceSpec("one", environment=environment)
    environment["A"] = "2"
    assert spec.environment["A"] == "1"
    with pytest.raises(TypeError):
        spec.environment["A"] = "3"  # type: ignore[index]
