"""Exclusive and shared bytes, against sets and dicts."""

from __future__ import annotations

import hashlib
import logging
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader.digest import Digest, DigestFunction
from snaploader.filecache import FileCache
from snaploader.workspace import sizes
from snaploader.workspace.model import pin_name
from snaploader.workspace.sizes import HostSizes, WorkspaceSize, measure, workspace_id_of


@pytest.fixture
def file_cache(tmp_path: Path) -> Iterator[FileCache]:
    with FileCache(tmp_path / "cache") as cache:
        yield cache


def blob(number: int) -> Digest:
    """A blob whose size tells which it is in every sum."""
    return Digest(hashlib.sha256(b"%d" % number).hexdigest(), 1 << number, DigestFunction.SHA256)


def pin(file_cache: FileCache, snapshot_name: str, *numbers: int) -> None:
    file_cache.pin(pin_name(snapshot_name), [blob(number) for number in numbers])


def test_a_blob_that_only_one_workspace_refers_to_is_exclusive(file_cache: FileCache) -> None:
    pin(file_cache, "one.1", 0, 1, 2)
    pin(file_cache, "two.1", 2, 3)
    assert measure(file_cache) == HostSizes(
        {"one": WorkspaceSize(0b0011, 0b0100, 1), "two": WorkspaceSize(0b1000, 0b0100, 1)}, 0b1111
    )


def test_a_blob_in_several_snapshots_of_one_workspace_counts_once_and_is_exclusive(
    file_cache: FileCache,
) -> None:
    pin(file_cache, "one.1", 0, 1)
    pin(file_cache, "one.2", 1, 2)
    assert measure(file_cache).workspaces == {"one": WorkspaceSize(0b111, 0, 2)}
    assert measure(file_cache).workspaces["one"].total_bytes == 0b111


def test_what_the_only_other_user_lets_go_becomes_exclusive(file_cache: FileCache) -> None:
    pin(file_cache, "one.1", 0)
    pin(file_cache, "two.1", 0)
    assert measure(file_cache).workspaces["one"] == WorkspaceSize(0, 1, 1)
    file_cache.unpin(pin_name("two.1"))
    assert measure(file_cache).workspaces == {"one": WorkspaceSize(1, 0, 1)}


def test_ids_of_which_one_begins_as_another_are_told_apart(file_cache: FileCache) -> None:
    for name in ("a.1", "a-b.1", "a.2", "a-b.2", "ab.1"):
        pin(file_cache, name, 4)
    pin(file_cache, "a.3", 5)
    found = measure(file_cache).workspaces
    assert {workspace_id: size.snapshots for workspace_id, size in found.items()} == {
        "a": 3,
        "a-b": 2,
        "ab": 1,
    }
    assert found["a"] == WorkspaceSize(0b100000, 0b10000, 3)


def test_pins_of_others_count_for_nothing(file_cache: FileCache) -> None:
    pin(file_cache, "one.1", 0)
    file_cache.pin("mine", [blob(0)])
    file_cache.pin("workspace.nodot", [blob(0)])
    assert measure(file_cache) == HostSizes({"one": WorkspaceSize(1, 0, 1)}, 1)


def test_a_host_without_workspaces_has_no_sizes(file_cache: FileCache) -> None:
    assert measure(file_cache) == HostSizes()


def test_a_snapshot_without_blobs_is_counted(file_cache: FileCache) -> None:
    pin(file_cache, "one.1")
    assert measure(file_cache) == HostSizes({"one": WorkspaceSize(0, 0, 1)}, 0)


def test_a_damaged_pin_is_left_out_and_logged(
    file_cache: FileCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pin(file_cache, "one.1", 0)
    pin(file_cache, "one.2", 1)
    (damaged,) = tmp_path.rglob(pin_name("one.2"))
    damaged.write_bytes(b"rot")
    with caplog.at_level(logging.WARNING):
        assert measure(file_cache) == HostSizes({"one": WorkspaceSize(1, 0, 1)}, 1)
    assert pin_name("one.2") in caplog.text


def test_a_pin_that_goes_meanwhile_is_left_out(
    file_cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(file_cache, "one.1", 0)
    monkeypatch.setattr(file_cache, "pins", lambda _prefix: [pin_name("one.0"), pin_name("one.1")])
    assert measure(file_cache) == HostSizes({"one": WorkspaceSize(1, 0, 1)}, 1)


def test_the_names_of_pins_tell_the_workspace() -> None:
    assert workspace_id_of(pin_name("ws-1.20260101T000000.abc")) == "ws-1"
    assert workspace_id_of("workspace.nodot") == ""
    assert workspace_id_of("other.ws-1.x") == ""


Pinned = Mapping[str, Mapping[int, frozenset[int]]]
"""Blobs, by workspace and snapshot."""


def modelled(pinned: Pinned) -> HostSizes:
    """The same from sets."""
    unions = {
        workspace_id: frozenset().union(*snapshots.values()) for workspace_id, snapshots in pinned.items()
    }
    users = Counter(number for union in unions.values() for number in union)
    return HostSizes(
        {
            workspace_id: WorkspaceSize(
                sum(1 << number for number in union if users[number] == 1),
                sum(1 << number for number in union if users[number] > 1),
                len(pinned[workspace_id]),
            )
            for workspace_id, union in unions.items()
        },
        sum(1 << number for number in users),
    )


@pytest.mark.slow
@given(
    pinned=st.dictionaries(
        st.sampled_from(["a", "a-b", "ab", "b", "c"]),
        st.dictionaries(st.integers(0, 3), st.frozensets(st.integers(0, 30), max_size=12), min_size=1),
    ),
    merge_blobs=st.sampled_from([1, 7, 1 << 18]),
)
def test_sizes_are_those_of_a_plain_model(
    pinned: Pinned, merge_blobs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        FileCache(tmp_path_factory.mktemp("cache")) as file_cache,
    ):
        patch.setattr(sizes, "MERGE_BLOBS", merge_blobs)
        for workspace_id, snapshots in pinned.items():
            for snapshot, numbers in snapshots.items():
                pin(file_cache, f"{workspace_id}.{snapshot}", *numbers)
        assert measure(file_cache) == modelled(pinned)


@pytest.mark.slow
def test_memory_grows_with_the_distinct_blobs_and_not_with_the_snapshots_that_name_them(
    file_cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MERGE_BLOBS", 1 << 12)
    hashes = np.random.default_rng(0).integers(0, 256, (20_000, 32), dtype=np.uint8)
    for number in range(60):
        file_cache.pin(pin_name(f"ws-{number}.1"), hashes=[hashes])
    tracemalloc.start()
    try:
        found = measure(file_cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.workspaces) == 60
    # The hashes of all pins alone would be 38 MB, their keys, sizes and owners 24 MB.
    assert peak < 200 * len(hashes)
