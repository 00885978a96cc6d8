"""`cache ls`, `rm`, `prune` and `verify`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_runner import CommandLine

from snaploader.filecache import FileCache
from snaploader.testing import EmbeddedServer


@pytest.fixture
def saved(cli: CommandLine, tmp_path: Path) -> Path:
    """The cache folder, with three plain files of 100,000 bytes under ref main."""
    paths = []
    for name in ("a", "b", "c"):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(os.urandom(100_000))
    cli.ok("save", "--ref", "main", *paths)
    return tmp_path / "xdg-cache/snaploader"


def test_it_lists_blobs_and_refs(cli: CommandLine, saved: Path) -> None:
    listed = cli.json("cache", "ls")
    kinds = [entry["kind"] for entry in listed["entries"]]
    # The manifest under the key and under the snapshot's id, and the version.
    assert sorted(kinds) == ["blob"] * 3 + ["ref"] * 3
    assert listed["disk_bytes"] == sum(entry["disk_bytes"] for entry in listed["entries"]) > 300_000
    assert listed["max_cache_size_bytes"] == 10 << 30
    blob = next(entry for entry in listed["entries"] if entry["kind"] == "blob")
    assert blob["digest"] == f"{blob['key']}/100000"
    assert blob["digest_function"] == "BLAKE3"
    assert cli.ok("cache", "ls").text.count("\n") == 6
    assert {entry["kind"] for entry in cli.json("cache", "ls", "--kind", "ref")["entries"]} == {"ref"}


def test_groups_do_not_see_each_other(cli: CommandLine, saved: Path) -> None:
    assert cli.json("cache", "ls", "--group-id", "tenant")["entries"] == []


def test_entries_are_removed_by_a_unique_beginning(cli: CommandLine, saved: Path, tmp_path: Path) -> None:
    keys = [entry["key"] for entry in cli.json("cache", "ls", "--kind", "blob")["entries"]]
    removed = cli.json("cache", "rm", keys[0][:12], f"{keys[1]}/100000")
    assert removed["removed"] == keys[:2]
    assert removed["freed_bytes"] > 200_000
    assert [entry["key"] for entry in cli.json("cache", "ls", "--kind", "blob")["entries"]] == keys[2:]
    assert cli("restore", "--ref", "main", tmp_path / "out").exit_code == 3
    assert cli("cache", "rm", keys[0]).exit_code == 3


def test_a_ref_is_removed_too(cli: CommandLine, saved: Path) -> None:
    for entry in cli.json("cache", "ls")["entries"]:
        if entry["kind"] != "blob":
            assert cli.ok("cache", "rm", entry["key"]).text == f"removed {entry['kind']} {entry['key']}\n"
    assert {entry["kind"] for entry in cli.json("cache", "ls")["entries"]} == {"blob"}


def test_what_is_pinned_is_removed_only_by_force(cli: CommandLine, saved: Path) -> None:
    first, second = (entry["key"] for entry in cli.json("cache", "ls", "--kind", "blob")["entries"][:2])
    with FileCache(saved) as cache:
        digest = next(entry.digest for entry in cache.entries() if entry.key == first)
        cache.pin("version-1", [digest])
    listed = cli.json("cache", "ls")["entries"]
    assert {entry["key"] for entry in listed if entry["pinned"]} == {first}
    assert cli.ok("cache", "ls").text.count("pinned") == 1
    outcome = cli("cache", "rm", second, first)
    assert outcome.exit_code == 4
    assert "pinned by 'version-1'" in outcome.stderr
    assert len(cli.json("cache", "ls")["entries"]) == 6
    assert cli.json("cache", "prune", "--target-size", "0")["disk_bytes"] > 0
    assert cli.json("cache", "rm", "--force", first)["removed"] == [first]


def test_a_beginning_that_means_two_entries_is_refused(cli: CommandLine, saved: Path) -> None:
    with FileCache(saved) as cache:
        for last in ("1", "2"):
            cache.put_ref("e" * 63 + last, b"x")
    outcome = cli("cache", "rm", "eeeeeeee")
    assert outcome.exit_code == 2
    assert "2 entries" in outcome.stderr


def test_pruning_comes_down_to_a_size(cli: CommandLine, saved: Path) -> None:
    before = cli.json("cache", "ls")["disk_bytes"]
    pruned = cli.json("cache", "prune", "--target-size", "150KiB")
    assert pruned["disk_bytes"] <= 150 << 10
    assert pruned["freed_bytes"] + pruned["disk_bytes"] == before
    assert cli.json("cache", "ls")["disk_bytes"] == pruned["disk_bytes"]


def test_pruning_obeys_the_configured_size_by_default(cli: CommandLine, saved: Path) -> None:
    assert cli.json("cache", "prune")["freed_bytes"] == 0
    assert cli.json("cache", "prune", "--max-cache-size", "150KiB")["disk_bytes"] <= 150 << 10


def test_an_intact_cache_is_verified(cli: CommandLine, saved: Path) -> None:
    report = cli.json("cache", "verify")
    assert report == {
        "blobs": 3,
        "content_bytes": 300_000,
        "bad_blobs": [],
        "refs": 3,
        "bad_refs": [],
        "pins": 0,
        "bad_pins": [],
    }


def test_damage_is_found_told_and_taken_out_of_use(cli: CommandLine, saved: Path) -> None:
    blob = next(path for path in saved.rglob("blobs/*/*/*") if path.is_file())
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.write(b"rot")
    outcome = cli("cache", "verify", "--json")
    assert outcome.exit_code == 10
    assert outcome.json["bad_blobs"] == [f"{blob.parent.name}{blob.name}/100000"]
    assert "out of use" in outcome.stderr
    assert cli.json("cache", "verify")["blobs"] == 2


def test_a_damaged_pin_is_named_and_stays(cli: CommandLine, saved: Path) -> None:
    with FileCache(saved) as cache:
        cache.pin("version-1")
    (pin,) = saved.rglob("pins/version-1")
    pin.write_bytes(b"rot")
    outcome = cli("cache", "verify", "--json")
    assert outcome.exit_code == 10
    assert (outcome.json["pins"], outcome.json["bad_pins"]) == (1, ["version-1"])
    assert "pins of the cache are damaged" in outcome.stderr
    assert pin.exists()


def test_pins_are_listed_and_let_go(cli: CommandLine, saved: Path) -> None:
    with FileCache(saved) as cache:
        digests = [entry.digest for entry in cache.entries() if entry.digest is not None]
        cache.pin("version-1", digests[:2], refs=["a" * 64])
        cache.pin("version-2")
    (pin,) = saved.rglob("pins/version-2")
    pin.write_bytes(b"rot")
    assert cli.json("cache", "pins")["pins"] == [
        {"name": "version-1", "blobs": 2, "content_bytes": 200_000, "refs": 1, "damaged": False},
        {"name": "version-2", "blobs": 0, "content_bytes": 0, "refs": 0, "damaged": True},
    ]
    text = cli.ok("cache", "pins").text
    assert "version-1  2 blobs" in text
    assert "version-2  damaged" in text
    outcome = cli("cache", "unpin", "version-1", "version-3")
    assert outcome.exit_code == 3
    assert "'version-3'" in outcome.stderr
    assert cli.json("cache", "unpin", "version-2", "version-1")["unpinned"] == ["version-2", "version-1"]
    assert cli.ok("cache", "pins").text == ""
    assert cli.json("cache", "prune", "--target-size", "0")["disk_bytes"] == 0


def test_a_dry_run_says_what_would_go_and_whether_the_server_has_it(
    cli: CommandLine, saved: Path, tmp_path: Path, server: EmbeddedServer
) -> None:
    shared = tmp_path / "shared"
    shared.write_bytes(os.urandom(100_000))
    remote = ["--remote-cache", server.url]
    cli.ok(*remote, "save", "--ref", "other", shared)
    before = cli.json("cache", "ls")["entries"]
    blobs = [entry["key"] for entry in before if entry["kind"] == "blob"]
    removing = cli.json(*remote, "cache", "rm", "--dry-run", *blobs)
    assert sorted(entry["remote"] for entry in removing["would_remove"]) == [False, False, False, True]
    assert removing["would_free_bytes"] >= 400_000
    pruning = cli.json(*remote, "cache", "prune", "--target-size", "0", "--dry-run")
    assert {entry["key"] for entry in pruning["would_remove"]} == {entry["key"] for entry in before}
    text = cli.ok("cache", "prune", "--target-size", "0", "--dry-run").text
    assert f"would remove {len(before)} entries" in text
    assert "no server was asked" in text
    assert cli.json("cache", "ls")["entries"] == before


def test_a_server_that_cannot_be_asked_is_told_in_a_dry_run(cli: CommandLine, saved: Path) -> None:
    outcome = cli(
        "--remote-cache", "grpc://127.0.0.1:1", "--remote-retries", "0",
        "cache", "prune", "--target-size", "0", "--dry-run", "--json",
    )  # fmt: skip
    assert outcome.exit_code == 0
    assert "cannot ask the remote cache" in outcome.stderr
    assert {entry["remote"] for entry in outcome.json["would_remove"]} == {None}


def test_a_snapshot_with_no_server_is_told_to_be_the_only_copy_and_can_be_pinned(
    cli: CommandLine, saved: Path, tmp_path: Path
) -> None:
    assert "only copy" in cli.ok("save", "--ref", "main", tmp_path / "a").text
    pinned = cli.ok("save", "--ref", "main", "--pin", "base", tmp_path / "a").text
    assert "only copy" not in pinned
    assert "cache unpin base" in pinned
    cli.ok("cache", "prune", "--target-size", "0")
    cli.ok("restore", "--ref", "main", tmp_path / "out")
    assert cli.json("cache", "unpin", "base")["unpinned"] == ["base"]


def test_pins_of_workspaces_cannot_be_taken_by_a_save(cli: CommandLine, saved: Path, tmp_path: Path) -> None:
    outcome = cli("save", "--ref", "main", "--pin", "workspace.web.1", tmp_path / "a")
    assert outcome.exit_code == 2
    assert "belong to workspaces" in outcome.stderr
