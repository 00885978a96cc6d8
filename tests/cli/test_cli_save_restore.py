"""`save` and `restore`, with the local cache alone and with a remote cache."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cli_runner import CommandLine, chunked_content

from snaploader.testing import EmbeddedServer

SAVE_FIELDS = {
    "remote_manifest",
    "pin",
    "snapshot_id",
    "ref",
    "key",
    "files",
    "directories",
    "size_bytes",
    "hashed_bytes",
    "hole_bytes",
    "stored_bytes",
    "deduplicated_bytes",
    "uploaded_blobs",
    "uploaded_bytes",
    "uploaded_wire_bytes",
    "saved_locally",
    "saved_remotely",
    "remote_skipped",
    "warnings",
    "seconds",
}
RESTORE_FIELDS = {
    "ref",
    "source",
    "key",
    "snapshot_id",
    "created",
    "last_executed_task",
    "digest_function",
    "degraded",
    "failures",
    "output_directory",
    "files",
    "directories",
    "written_bytes",
    "hole_bytes",
    "fetched_blobs",
    "fetched_bytes",
    "seconds",
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Five chunks of 4 KiB: data, hole, data, the same data, short data."""
    path = tmp_path / "disk.img"
    path.write_bytes(chunked_content(1, 0, 2, 2) + b"tail")
    return path


def test_a_saved_file_comes_back_with_its_holes(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    saved = cli.json("save", "--ref", "main", "--chunked", "--chunk-size", "4KiB", disk)
    assert saved.keys() == SAVE_FIELDS
    assert saved["ref"] == "main"
    assert saved["hole_bytes"] == 4096
    assert saved["stored_bytes"] == 2 * 4096 + 4
    assert saved["deduplicated_bytes"] == 4096
    assert saved["uploaded_bytes"] == 0
    assert saved["saved_remotely"] is False
    assert saved["files"][0]["name"] == "disk.img"
    assert saved["files"][0]["chunks"] == 4

    restored = cli.json("restore", "--ref", "main", tmp_path / "out")
    assert restored.keys() == RESTORE_FIELDS
    assert restored["ref"] == "main"
    assert restored["source"] == "local"
    assert restored["snapshot_id"] == saved["snapshot_id"]
    assert restored["fetched_bytes"] == 0
    assert restored["hole_bytes"] == 4096
    assert restored["files"] == [
        {"name": "disk.img", "path": str(tmp_path / "out/disk.img"), "size_bytes": disk.stat().st_size}
    ]
    assert (tmp_path / "out/disk.img").read_bytes() == disk.read_bytes()
    assert (tmp_path / "out/disk.img").stat().st_blocks * 512 < disk.stat().st_size


def test_big_files_are_chunked_and_small_ones_kept_whole(cli: CommandLine, tmp_path: Path) -> None:
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(b"x" * 1000)
    with big.open("wb") as file:
        file.truncate(4 << 20)
    saved = cli.json("save", "--ref", "main", small, big)
    assert {file["name"]: file["chunked"] for file in saved["files"]} == {"small": False, "big": True}


@pytest.mark.parametrize(
    ("options", "chunked"),
    [(["--chunked"], True), (["--plain"], False), ([], False), (["--chunk-threshold", "1000"], True)],
)
def test_options_say_what_is_chunked(
    cli: CommandLine, tmp_path: Path, options: list[str], chunked: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    saved = cli.json("save", "--ref", "main", *options, path)
    assert [file["chunked"] for file in saved["files"]] == [chunked]


def test_an_empty_file_is_saved_whole_even_when_all_shall_be_chunked(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "empty"
    path.touch()
    cli.ok("save", "--ref", "main", "--chunked", path)
    cli.ok("restore", "--ref", "main", tmp_path / "out")
    assert (tmp_path / "out/empty").read_bytes() == b""


def test_an_executable_stays_executable(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"#!/bin/sh\n")
    path.chmod(0o755)
    cli.ok("save", "--ref", "main", path)
    cli.ok("restore", "--ref", "main", tmp_path / "out")
    assert (tmp_path / "out/program").stat().st_mode & stat.S_IXUSR


def test_saving_again_stores_nothing_new(cli: CommandLine, disk: Path) -> None:
    first = cli.json("save", "--ref", "main", "--chunked", disk)
    again = cli.json("save", "--ref", "main", "--chunked", disk)
    assert again["stored_bytes"] == 0
    assert again["deduplicated_bytes"] == first["stored_bytes"] + first["deduplicated_bytes"]
    assert again["snapshot_id"] != first["snapshot_id"]


def test_a_name_can_be_given(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", f"root={disk}", f"copy={disk}")
    cli.ok("restore", "--ref", "main", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["copy", "root"]


def test_a_path_with_an_equals_sign_is_a_path(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").write_bytes(b"x")
    saved = cli.json("save", "--ref", "main", "a=b")
    assert [file["name"] for file in saved["files"]] == ["a=b"]


def test_two_files_of_one_name_are_refused(cli: CommandLine, disk: Path) -> None:
    outcome = cli("save", "--ref", "main", disk, disk)
    assert outcome.exit_code == 2
    assert "NAME=PATH" in outcome.stderr


def test_a_folder_whose_own_name_is_not_utf8_is_given_another(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(b"caf\xe9")
    os.mkdir(folder)
    outcome = cli("save", "--ref", "main", folder)
    assert outcome.exit_code == 2
    assert "not UTF-8, as names in a snapshot must be" in outcome.stderr
    assert "NAME='caf\\udce9'" in outcome.stderr
    saved = cli.json("save", "--ref", "main", f"cafe={folder}")
    assert [directory["name"] for directory in saved["directories"]] == ["cafe"]


def test_a_folder_without_a_name_of_its_own_is_given_one(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    outcome = cli("save", "--ref", "main", ".")
    assert outcome.exit_code == 2
    assert "NAME=." in outcome.stderr
    saved = cli.json("save", "--ref", "main", "home=.")
    assert [directory["name"] for directory in saved["directories"]] == ["home"]


def test_a_merge_queue_saves_for_its_base(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    saved = cli.json("save", "--ref", "gh-readonly-queue/release/1.0/pr-7", disk)
    assert saved["ref"] == "release/1.0"
    restored = cli.json("restore", "--ref", "topic", "--base-ref", "release/1.0", tmp_path / "out")
    assert restored["ref"] == "release/1.0"


def test_the_first_fallback_with_a_snapshot_serves(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", disk)
    restored = cli.json("restore", "--ref", "c", "--base-ref", "b", "--default-ref", "main", tmp_path / "out")
    assert restored["ref"] == "main"
    assert [failure["key"]["ref"] for failure in restored["failures"]] == ["c", "b"]
    assert restored["degraded"] is False


def test_text_says_which_ref_served(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    assert "ref       main" in cli.ok("save", "--ref", "main", disk).text
    assert (
        "ref 'main' from the local cache"
        in cli.ok("restore", "--ref", "x", "--base-ref", "main", tmp_path / "o").text
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--ref", "other"],
        ["--ref", "main", "--platform", "arch=arm64"],
        ["--ref", "main", "--configuration-hash", "c2"],
        ["--ref", "main", "--remote-instance-name", "team"],
        ["--ref", "main", "--group-id", "tenant"],
        ["--ref", "main", "--no-share", "--runner-id", "r1"],
        ["--snapshot-id", "no-such-id"],
    ],
)
def test_another_key_has_no_snapshot_and_exit_code_3(
    cli: CommandLine, disk: Path, tmp_path: Path, options: list[str]
) -> None:
    cli.ok("save", "--ref", "main", disk)
    outcome = cli("restore", *options, tmp_path / "out")
    assert outcome.exit_code == 3
    assert outcome.stdout == b""
    assert "no local manifest" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_a_snapshot_is_found_by_its_id(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", "--snapshot-id", "first", disk)
    content = disk.read_bytes()
    disk.write_bytes(b"changed")
    cli.ok("save", "--ref", "main", disk)
    restored = cli.json("restore", "--snapshot-id", "first", tmp_path / "out")
    assert (tmp_path / "out/disk.img").read_bytes() == content
    assert restored["snapshot_id"] == "first"
    assert restored["ref"] == "main"


def test_a_snapshot_id_that_is_taken_is_refused(cli: CommandLine, disk: Path) -> None:
    cli.ok("save", "--ref", "main", "--snapshot-id", "first", disk)
    assert cli("save", "--ref", "main", "--snapshot-id", "first", disk).exit_code == 4


def test_a_runner_of_its_own_shares_nothing(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--no-share", "--runner-id", "r1", disk)
    assert cli("restore", "--no-share", "--runner-id", "r2", tmp_path / "out").exit_code == 3
    cli.ok("restore", "--no-share", "--runner-id", "r1", tmp_path / "out")


def test_the_universal_fallback_serves_any_branch(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "one", "--universal-fallback", disk)
    assert cli("restore", "--ref", "two", tmp_path / "out").exit_code == 3
    outcome = cli.ok("restore", "--ref", "two", "--universal-fallback", tmp_path / "out")
    assert "the universal fallback" in outcome.text


def test_an_old_fallback_is_passed_over(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", disk)
    command = ["restore", "--ref", "x", "--base-ref", "main", tmp_path / "out"]
    assert cli(*command, "--max-stale-fallback-age", "0.000001s").exit_code == 3
    cli.ok(*command)


def test_only_some_files_are_restored(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", disk, f"b={disk}", f"c={disk}")
    cli.ok("restore", "--ref", "main", "--only", "b", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["b"]
    outcome = cli("restore", "--ref", "main", "--only", "nothing", tmp_path / "out")
    assert outcome.exit_code == 3
    assert "'b', 'c', 'disk.img'" in outcome.stderr


def test_a_file_in_the_way_is_left_alone(cli: CommandLine, disk: Path, tmp_path: Path) -> None:
    cli.ok("save", "--ref", "main", disk, f"other={disk}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "disk.img").write_bytes(b"mine")
    assert cli("restore", "--ref", "main", out).exit_code == 4
    assert os.listdir(out) == ["disk.img"]
    assert (out / "disk.img").read_bytes() == b"mine"


def test_another_host_gets_it_from_the_remote_cache(
    cli: CommandLine, server: EmbeddedServer, disk: Path, tmp_path: Path
) -> None:
    remote = ["--remote-cache", server.url]
    saved = cli.json(
        *remote,
        "--cache-dir",
        tmp_path / "a",
        "save",
        "--ref",
        "main",
        "--chunked",
        "--chunk-size",
        4096,
        disk,
    )
    assert saved["saved_remotely"] is True
    # Three different chunks and the tree.
    assert saved["uploaded_blobs"] == 4
    assert saved["uploaded_bytes"] > 2 * 4096

    restore = [*remote, "--cache-dir", tmp_path / "b", "restore", "--ref", "x", "--default-ref", "main"]
    first = cli.json(*restore, tmp_path / "out1")
    assert first["ref"] == "main"
    assert first["source"] == "remote"
    assert first["fetched_bytes"] == 2 * 4096 + 4
    assert (tmp_path / "out1/disk.img").read_bytes() == disk.read_bytes()

    second = cli.json(*restore, tmp_path / "out2")
    assert second["source"] == "local"
    assert second["fetched_bytes"] == 0


def test_a_change_costs_only_itself(cli: CommandLine, server: EmbeddedServer, disk: Path) -> None:
    save = ["--remote-cache", server.url, "save", "--chunked", "--chunk-size", 4096]
    cli.ok(*save, "--ref", "main", disk)
    with disk.open("r+b") as file:
        file.write(b"changed")
    again = cli.json(*save, "--ref", "feature", disk)
    assert again["stored_bytes"] == 4096
    assert again["uploaded_blobs"] == 2


def test_a_save_policy_that_skips_the_remote_is_told(
    cli: CommandLine, server: EmbeddedServer, disk: Path
) -> None:
    save = ["--remote-cache", server.url, "save", "--default-ref", "main", "--ref", "topic"]
    cli.ok(*save, disk)
    again = cli.json(*save, "--save-policy", "first-non-default-ref", disk)
    assert again["saved_remotely"] is False
    assert again["remote_skipped"]
    assert again["saved_locally"] is True


def test_a_save_past_the_local_cache_keeps_nothing_here(
    cli: CommandLine, server: EmbeddedServer, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    remote = ["--remote-cache", server.url]
    saved = cli.json(*remote, "save", "--ref", "main", "--no-local", tmp_path / "disk")
    assert (saved["saved_locally"], saved["saved_remotely"]) == (False, True)
    assert cli.json("cache", "ls", "--kind", "blob")["entries"] == []
    assert cli.ok(*remote, "read", "--ref", "main", "disk").stdout == b"disk"
    assert cli("save", "--ref", "main", "--no-local", tmp_path / "disk").exit_code == 2


def test_a_file_is_taken_by_link(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    cli.ok("save", "--ref", "main", "--link-files", tmp_path / "disk")
    assert (tmp_path / "disk").stat().st_nlink == 2
