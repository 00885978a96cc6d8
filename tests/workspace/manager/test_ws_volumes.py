"""Durable directories: several, absolute, apart from one another, with any name that is one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import MAX_VOLUMES, Volume, check_volumes


def volumes(*paths: str) -> list[Volume]:
    return [Volume(f"v{number}", path) for number, path in enumerate(paths)]


def test_a_workspace_may_have_several_or_none() -> None:
    assert check_volumes([]) == ()
    several = volumes("/home", "/var/lib/data", "/var/lib/other")
    assert check_volumes(several) == tuple(several)


@pytest.mark.parametrize(
    "path",
    [
        "/..config",
        "/x..y",
        "/a/..config/b",
        "/...",
        "/with space",
        "/with\ttab",
        "/ leading",
        "/trailing ",
        "/a/.hidden",
        "/ünï",
        "/a..",
    ],
)
def test_unusual_names_are_legal(path: str) -> None:
    assert check_volumes(volumes(path)) == tuple(volumes(path))


@pytest.mark.parametrize("path", ["/..", "/a/..", "/../a", "/a/../b", "/a/.././b", "//..//"])
def test_a_component_that_leads_up_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"has a component '\.\.'"):
        check_volumes(volumes(path))


@pytest.mark.parametrize("path", ["", "a", "a/b", "./a", "~/a", " /a"])
def test_a_path_that_is_not_absolute_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="not absolute"):
        check_volumes(volumes(path))


@pytest.mark.parametrize("path", ["/", "//", "/.", "/./."])
def test_the_root_itself_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="the root itself"):
        check_volumes(volumes(path))


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 4095, "/" + "x" * 256])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        check_volumes(volumes(path))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/a", "/a/b"),
        ("/a/b", "/a"),
        ("/a", "/a/b/c"),
        ("/a/", "/a//b"),
        ("/a/./b", "/a/b/c"),
        ("/x..y", "/x..y/z"),
    ],
)
def test_durable_directories_may_not_overlap(first: str, second: str) -> None:
    with pytest.raises(InvalidArgument, match="may not overlap") as failure:
        check_volumes(volumes(first, second))
    assert "'v0'" in str(failure.value)
    assert "'v1'" in str(failure.value)


@pytest.mark.parametrize(
    ("first", "second"), [("/a", "/ab"), ("/a/b", "/a/bc"), ("/a", "/b/a"), ("/a b", "/a")]
)
def test_directories_whose_names_only_begin_alike_do_not_overlap(first: str, second: str) -> None:
    assert len(check_volumes(volumes(first, second))) == 2


@pytest.mark.parametrize(("first", "second"), [("/a", "/a"), ("/a", "/a/"), ("/a/b", "//a/./b")])
def test_a_path_may_not_be_repeated(first: str, second: str) -> None:
    with pytest.raises(InvalidArgument, match="have one durable directory"):
        check_volumes(volumes(first, second))


def test_a_name_may_not_be_repeated() -> None:
    with pytest.raises(InvalidArgument, match="two volumes are named 'v'"):
        check_volumes([Volume("v", "/a"), Volume("v", "/b")])


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a\0", "x" * 256])
def test_a_name_must_be_one(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_volumes([Volume(name, "/a")])


def test_a_path_of_another_type_is_refused() -> None:
    path: Any = b"/a"
    with pytest.raises(TypeError, match="must be a str"):
        check_volumes([Volume("v", path)])


def test_there_may_be_many_and_not_too_many() -> None:
    paths = [f"/v{number}" for number in range(MAX_VOLUMES + 1)]
    assert len(check_volumes(volumes(*paths[:-1]))) == MAX_VOLUMES
    with pytest.raises(InvalidArgument, match=str(MAX_VOLUMES)):
        check_volumes(volumes(*paths))


COMPONENTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda part: part not in {".", ".."}
)


@given(st.lists(st.lists(COMPONENTS, min_size=1, max_size=4), max_size=4))
def test_volumes_are_accepted_exactly_when_they_are_apart(paths: list[list[str]]) -> None:
    apart = not any(
        one[: len(other)] == other for i, one in enumerate(paths) for j, other in enumerate(paths) if i != j
    )
    given_volumes = volumes(*("//".join(["", *path, ""]) for path in paths))
    if apart:
        checked = check_volumes(given_volumes)
        assert [volume.durable_dir for volume in checked] == ["/" + "/".join(path) for path in paths]
    else:
        with pytest.raises(InvalidArgument):
            check_volumes(given_volumes)
