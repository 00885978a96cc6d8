"""Directories on the command line: saved, shown, restored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_runner import CommandLine


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a small file, a big one, a link, an empty directory and a FIFO."""
    root = tmp_path / "home"
    (root / "empty").mkdir(parents=True)
    (root / "small").write_bytes(b"small")
    (root / "small").chmod(0o600)
    (root / "big").write_bytes(b"x" * 20_000)
    (root / "link").symlink_to("small")
    os.mkfifo(root / "fifo")
    return root


def test_a_saved_directory_is_shown_and_comes_back(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    saved = cli.json("save", "--ref", "main", "--chunk-threshold", "10KB", "--chunk-size", "4KiB", f"{home}/")
    (directory,) = saved["directories"]
    assert saved["files"] == []
    assert directory["name"] == "home"
    assert (directory["files"], directory["directories"], directory["symlinks"]) == (2, 1, 1)
    assert directory["size_bytes"] == saved["size_bytes"] == 20_005
    assert directory["skipped"] == ["fifo"]

    (shown,) = cli.json("show", "--ref", "main")["snapshot"]["files"]
    assert (shown["name"], shown["kind"], shown["digest"]) == ("home", "directory", directory["digest"])
    assert shown["size_bytes"] == 20_005
    # One whole file, and the big one's two different chunks.
    assert shown["local_chunks"] == shown["stored_chunks"] == 3

    restored = cli.json("restore", "--ref", "main", tmp_path / "out")
    out = tmp_path / "out/home"
    assert restored["directories"] == [{"name": "home", "path": str(out), "size_bytes": 20_005}]
    assert (out / "small").read_bytes() == b"small"
    assert (out / "small").stat().st_mode & 0o777 == 0o600
    assert (out / "big").read_bytes() == b"x" * 20_000
    assert (out / "link").readlink() == Path("small")
    assert list((out / "empty").iterdir()) == []
    assert not (out / "fifo").exists()


def test_text_for_people_names_directories_and_what_was_skipped(
    cli: CommandLine, home: Path, tmp_path: Path
) -> None:
    saved = cli.ok("save", "--ref", "main", f"state={home}")
    assert "state" in saved.text
    assert "2 files" in saved.text
    assert "'fifo' in 'state'" in saved.stderr
    assert "directory" in cli.ok("show", "--ref", "main").text
    assert str(tmp_path / "out/state") in cli.ok("restore", "--ref", "main", tmp_path / "out").text


@pytest.mark.parametrize(("option", "chunks"), [("--chunked", 3), ("--plain", 2)])
def test_how_files_are_kept_holds_in_directories_too(
    cli: CommandLine, home: Path, option: str, chunks: int
) -> None:
    cli.json("save", "--ref", "main", option, "--chunk-size", "4KiB", home)
    (shown,) = cli.json("show", "--ref", "main")["snapshot"]["files"]
    assert shown["stored_chunks"] == chunks


def test_only_some_are_restored(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    cli.json("save", "--ref", "main", home, f"copy={home}", f"file={home}/small")
    restored = cli.json("restore", "--ref", "main", "--only", "copy", tmp_path / "out")
    assert [one["name"] for one in restored["directories"]] == ["copy"]
    assert restored["files"] == []
    assert os.listdir(tmp_path / "out") == ["copy"]


def test_a_directory_is_not_read_as_a_file(cli: CommandLine, home: Path) -> None:
    cli.json("save", "--ref", "main", home)
    failed = cli("read", "--ref", "main", "home")
    assert failed.exit_code == 2
    assert "is a directory" in failed.stderr


def test_the_working_directory_needs_a_name(cli: CommandLine) -> None:
    failed = cli("save", "--ref", "main", ".")
    assert failed.exit_code == 2
    assert "NAME=." in failed.stderr
