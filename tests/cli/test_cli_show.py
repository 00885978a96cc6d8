"""`show` and `invalidate`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_runner import CommandLine, chunked_content

from snaploader.testing import EmbeddedServer


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    disk, plain = tmp_path / "disk", tmp_path / "plain"
    disk.write_bytes(chunked_content(1, 0, 2, 2) + b"tail")
    plain.write_bytes(b"plain")
    return [disk, plain]


SAVE = ["save", "--chunk-threshold", "4KiB", "--chunk-size", "4KiB"]


def test_it_shows_keys_manifests_and_where_chunks_are(
    cli: CommandLine, server: EmbeddedServer, files: list[Path], tmp_path: Path
) -> None:
    remote = ["--remote-cache", server.url]
    saved = cli.json(
        *remote, *SAVE, "--ref", "main", "--configuration-hash", "c1", "--property", "os=linux", *files
    )
    other = ["--cache-dir", tmp_path / "other", *remote]
    shown = cli.json(*other, "show", "--ref", "topic", "--default-ref", "main", "--configuration-hash", "c1")

    assert shown["key_set"]["branch_key"]["ref"] == "topic"
    assert [key["ref"] for key in shown["key_set"]["fallback_keys"]] == ["main"]
    assert shown["key_set"]["write_key"]["configuration_hash"] == "c1"
    assert [(place["key"]["ref"], place["local"], place["remote"]) for place in shown["manifests"]] == [
        ("topic", False, False),
        ("main", False, True),
    ]
    snapshot = shown["snapshot"]
    assert (snapshot["ref"], snapshot["source"]) == ("main", "remote")
    assert snapshot["snapshot_id"] == saved["snapshot_id"]
    assert snapshot["vm_configuration"] == {
        "type": "snaploader.v1.VMConfiguration",
        "properties": {"os": "linux"},
    }
    disk, plain = snapshot["files"]
    expected = {
        "name": "disk",
        "chunked": True,
        "size_bytes": 4 * 4096 + 4,
        "hole_bytes": 4096,
        "chunk_size": 4096,
        "chunk_count": 5,
        "hole_chunks": 1,
        "stored_chunks": 4,
        "local_chunks": 0,
        "local_bytes": 0,
        "remote_chunks": 4,
        "remote_bytes": 3 * 4096 + 4,
    }
    assert {name: disk[name] for name in expected} == expected
    assert (plain["chunked"], plain["chunk_size"], plain["stored_chunks"], plain["remote_chunks"]) == (
        False,
        None,
        1,
        1,
    )


def test_without_a_remote_cache_its_share_is_unknown(cli: CommandLine, files: list[Path]) -> None:
    cli.ok(*SAVE, "--ref", "main", *files)
    shown = cli.json("show", "--ref", "main")
    assert shown["manifests"][0]["local"] is True
    assert shown["manifests"][0]["remote"] is None
    assert shown["snapshot"]["files"][0]["local_chunks"] == 4
    assert shown["snapshot"]["files"][0]["remote_chunks"] is None


def test_without_a_snapshot_it_shows_the_keys_and_ends_with_code_3(cli: CommandLine) -> None:
    outcome = cli("show", "--ref", "main", "--json")
    assert outcome.exit_code == 3
    assert outcome.json["key_set"]["branch_key"]["ref"] == "main"
    assert outcome.json["snapshot"] is None
    assert "ref 'main'" in cli("show", "--ref", "main").text


def test_it_keeps_no_manifest_and_mints_no_version(cli: CommandLine, server: EmbeddedServer) -> None:
    assert cli("--remote-cache", server.url, "show", "--ref", "main").exit_code == 3
    assert server.calls("UpdateActionResult") == 0
    assert cli.json("cache", "ls")["entries"] == []


def test_it_shows_one_snapshot_by_its_id(cli: CommandLine, files: list[Path]) -> None:
    cli.ok(*SAVE, "--ref", "main", "--snapshot-id", "run-1", *files)
    shown = cli.json("show", "--snapshot-id", "run-1")
    assert shown["key_set"] is None
    assert shown["manifests"] == [{"key": {"snapshot_id": "run-1"}, "local": True, "remote": None}]
    assert shown["snapshot"]["ref"] == "main"


def test_text_names_everything(cli: CommandLine, files: list[Path]) -> None:
    saved = cli.json(*SAVE, "--ref", "main", *files)
    text = cli.ok("show", "--ref", "x", "--base-ref", "main").text
    for part in (
        "ref 'x'",
        "ref 'main'",
        "disk",
        "plain",
        "4/4",
        "whole",
        "4.0 KiB",
        saved["snapshot_id"],
        "BLAKE3",
    ):
        assert part in text


@pytest.mark.parametrize("columns", [20, 60, 80, 100, 200])
def test_a_terminal_of_any_width_shows_all_of_names_and_digests(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    disk = tmp_path / "root-filesystem.ext4"
    disk.write_bytes(chunked_content(1, 0, 2, 2) + b"tail")
    cli.ok(*SAVE, "--ref", "main", disk)
    digest = cli.json("show", "--ref", "main")["snapshot"]["files"][0]["digest"][:16]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "25")
    monkeypatch.setenv("TERM", "dumb")
    lines = cli.ok("show", "--ref", "main").text.partition("digests ")[2].splitlines()
    assert max(map(len, lines)) <= columns
    assert _is_folded_in(disk.name, lines)
    assert _is_folded_in(digest, lines)
    assert _is_folded_in("4.0 KiB", lines)


def _is_folded_in(text: str, lines: list[str]) -> bool:
    """Whether `text` stands in the lines, on one, or on some below each other in pieces of 6 or more."""
    for number, line in enumerate(lines):
        for length in range(len(text), 5, -1):
            at = line.find(text[:length])
            if at >= 0 and (length == len(text) or _continues(text[length:], lines[number + 1 :], at)):
                return True
    return False


def _continues(rest: str, lines: list[str], at: int) -> bool:
    for line in lines:
        piece = line[at:].partition(" ")[0]
        if not piece or not rest.startswith(piece):
            return False
        rest = rest[len(piece) :]
        if not rest:
            return True
    return False


def test_missing_local_chunks_are_seen(cli: CommandLine, server: EmbeddedServer, files: list[Path]) -> None:
    remote = ["--remote-cache", server.url]
    cli.ok(*remote, *SAVE, "--ref", "main", *files)
    blobs = [
        entry
        for entry in cli.json("cache", "ls", "--kind", "blob")["entries"]
        if entry["digest"].endswith("/4")
    ]
    cli.ok("cache", "rm", blobs[0]["key"])
    disk = cli.json(*remote, "show", "--ref", "main")["snapshot"]["files"][0]
    assert (disk["local_chunks"], disk["remote_chunks"]) == (3, 4)


def test_invalidation_drops_all_branches_of_one_configuration(
    cli: CommandLine, files: list[Path], tmp_path: Path
) -> None:
    for ref in ("main", "topic"):
        cli.ok(*SAVE, "--ref", ref, *files)
    cli.ok(*SAVE, "--ref", "main", "--configuration-hash", "other", *files)
    kept = cli.json(*SAVE, "--ref", "main", *files)

    dry = cli.json("invalidate", "--dry-run")
    assert (dry["local"], dry["remote"]) == (True, None)
    assert "would invalidate" in cli.ok("invalidate", "--dry-run").text
    cli.ok("show", "--ref", "main")
    invalidated = cli.json("invalidate")
    assert invalidated["version_id"] == invalidated["key"]["version_id"] != kept["key"]["version_id"]
    assert cli("restore", "--ref", "topic", "--base-ref", "main", tmp_path / "o").exit_code == 3
    cli.ok("restore", "--ref", "main", "--configuration-hash", "other", tmp_path / "o1")
    cli.ok("restore", "--snapshot-id", kept["snapshot_id"], tmp_path / "o2")


def test_invalidation_reaches_other_hosts(
    cli: CommandLine, server: EmbeddedServer, files: list[Path], tmp_path: Path
) -> None:
    remote = ["--remote-cache", server.url]
    cli.ok(*remote, *SAVE, "--ref", "main", *files)
    assert "the version is now" in cli.ok(*remote, "--cache-dir", tmp_path / "b", "invalidate").text
    assert cli(*remote, "restore", "--ref", "main", tmp_path / "out").exit_code == 3


def test_local_only_works_while_the_server_is_away(
    cli: CommandLine, files: list[Path], tmp_path: Path
) -> None:
    with EmbeddedServer() as server:
        remote = ["--remote-cache", server.url, "--remote-retries", "0"]
        cli.ok(*remote, *SAVE, "--ref", "main", *files)
    assert cli(*remote, "restore", "--ref", "main", tmp_path / "out").exit_code == 6
    cli.ok(*remote, "restore", "--ref", "main", "--read-policy", "local-only", tmp_path / "out")


def test_an_outage_is_told_when_a_fallback_is_allowed_to_serve(
    cli: CommandLine, files: list[Path], tmp_path: Path
) -> None:
    with EmbeddedServer() as server:
        remote = ["--remote-cache", server.url, "--remote-retries", "0"]
        cli.ok(*remote, *SAVE, "--ref", "main", *files)
    restore = [*remote, "restore", "--ref", "topic", "--default-ref", "main", tmp_path / "out"]
    assert cli(*restore).exit_code == 6
    outcome = cli(*restore, "--allow-degraded", "--json")
    assert outcome.exit_code == 0
    assert outcome.json["degraded"] is True
    assert outcome.json["failures"][0]["error"] == "Unavailable"
    assert "warning: could not look at ref 'topic'" in outcome.stderr


def test_platform_properties_carry_policy_and_options_win(
    cli: CommandLine, server: EmbeddedServer, files: list[Path]
) -> None:
    remote = ["--remote-cache", server.url]
    save = [*remote, *SAVE, "--ref", "topic", "--default-ref", "main"]
    cli.ok(*save, *files)
    once = ["--platform", "Snapshot-Save-Policy=first-non-default-ref"]
    assert cli.json(*save, *once, *files)["saved_remotely"] is False
    assert cli.json(*save, *once, "--save-policy", "always", *files)["saved_remotely"] is True
    newest = ["--platform", "snapshot-read-policy=newest"]
    assert cli.json(*remote, "show", "--ref", "topic", *newest)["snapshot"]["source"] == "remote"
    local = cli.json(*remote, "show", "--ref", "topic", *newest, "--read-policy", "local-first")
    assert local["snapshot"]["source"] == "local"
    old = ["--platform", "snapshot-max-stale-fallback-age=0.000001s", "--read-policy", "local-only"]
    assert cli(*remote, "show", "--ref", "x", "--base-ref", "topic", *old).exit_code == 3
    alone = cli("show", "--platform", "snapshot-sharing=false", "--runner-id", "r", "--json")
    assert alone.json["key_set"]["branch_key"]["runner_id"] == "r"
    assert cli("show", "--ref", "x", "--platform", "snapshot-read-policy=odd").exit_code == 2
