"""The page for those who come from BuildBuddy: every option has its row, and what the row names exists."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import snaploader
from snaploader import SnapshotLoader, keys

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs/coming-from-buildbuddy.md"

OPTIONS = [
    "SnapshotKeySet",
    "GetSnapshot",
    "UnpackSnapshot",
    "CacheSnapshot",
    "InvalidateSnapshot",
    "UnpackContainerImage",
    "SnapshotDebugString",
    "KeysetDebugString",
    "LocalManifestKey",
    "RemoteManifestKey",
    "SnapshotVersionKey",
    "SupportsRemoteManifest",
    "SupportsRemoteChunks",
    "ReadPolicy",
    "MaxStaleFallbackSnapshotAge",
    "VMMetadata",
    "VMConfiguration",
    "VMStateSnapshotPath",
    "KernelImagePath",
    "InitrdImagePath",
    "MemSnapshotPath",
    "ContainerFSPath",
    "ScratchFSPath",
    "ChunkedFiles",
    "Recycled",
    "CacheSnapshotRemotely",
    "CacheSnapshotLocally",
    "WriteManifestLocally",
    "EnableLocalSnapshotSharing",
    "EnableRemoteSnapshotSharing",
    "RemoteSnapshotReadonly",
]

ROWS = re.findall(r"^\| (?!there|-)(.+?) \| (.+?) \| ?(.*?) ?\|$", PAGE.read_text(), re.MULTILINE)


@cache
def known_tests() -> frozenset[str]:
    sources = (path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    return frozenset(name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_its_row(option: str) -> None:
    assert f"`{option}`" in [there for there, _, _ in ROWS]


@pytest.mark.parametrize("row", [row for row in ROWS if "`" in row[1]], ids=lambda row: row[0].strip("`"))
def test_what_a_row_names_exists(row: tuple[str, str, str]) -> None:
    _, here, test = row
    found = re.fullmatch(r"`([\w.]+)(?:\((\w+)\))?`", here)
    assert found is not None, here
    *owners, last = found[1].split(".")
    thing: object = snaploader if last[0].isupper() else SnapshotLoader
    if owners:
        thing = {"keys": keys}.get(owners[0]) or getattr(snaploader, owners[0])
    # A dataclass's field without a default is no attribute of the class.
    is_field = last in getattr(thing, "__dataclass_fields__", {})
    assert is_field or hasattr(thing, last), here
    if found[2]:
        assert found[2] in inspect.signature(getattr(thing, last)).parameters
    assert test.strip("`") in known_tests()
