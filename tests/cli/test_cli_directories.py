"""Directories on the command line: saved, shown, restored."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_runner import CommandLine

from snaploader.testing import EmbeddedServer


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


@pytest.fixture
def deep(home: Path) -> Path:
    """The same with files further down, one of them with a name that is not Unicode."""
    (home / "etc/conf.d").mkdir(parents=True)
    (home / "etc/conf.d/one").write_bytes(b"one")
    (home / "etc/conf.d/large").write_bytes(b"a" * 4096 + bytes(8192) + b"d" * 4096)
    (home / "etc/hosts").write_bytes(b"hosts")
    (home / os.fsdecode(b"caf\xe9")).write_bytes(b"latin")
    return home


def _below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_stands_in_a_directory_is_restored_alone(cli: CommandLine, deep: Path, tmp_path: Path) -> None:
    cli.json("save", "--ref", "main", deep, f"file={deep}/small")
    restored = cli.json("restore", "--ref", "main", "--only", "home/etc/hosts", tmp_path / "a")
    assert restored["directories"] == [{"name": "home", "path": str(tmp_path / "a/home"), "size_bytes": 5}]
    assert restored["files"] == []
    assert _below(tmp_path / "a") == ["home", "home/etc", "home/etc/hosts"]
    assert (tmp_path / "a/home/etc/hosts").read_bytes() == b"hosts"

    cli.json("restore", "--ref", "main", "--only", "home/etc/conf.d/", "--only", "file", tmp_path / "b")
    inside = ["home/etc/conf.d", "home/etc/conf.d/large", "home/etc/conf.d/one"]
    assert _below(tmp_path / "b") == ["file", "home", "home/etc", *inside]
    assert (tmp_path / "b/home/etc/conf.d/large").read_bytes() == (deep / "etc/conf.d/large").read_bytes()

    cli.json("restore", "--ref", "main", "--only", "home/etc", "--only", "home/link", tmp_path / "c")
    assert _below(tmp_path / "c") == ["home", "home/etc", *inside, "home/etc/hosts", "home/link"]

    cli.json("restore", "--ref", "main", "--only", "home/etc", "--only", "home/", tmp_path / "d")
    assert (tmp_path / "d/home/big").exists()


@pytest.mark.parametrize(
    "name", ["home/nothing", "home/etc/nothing/deep", "home/../home", "home//etc", "file/"]
)
@pytest.mark.parametrize("command", ["restore", "read"])
def test_what_a_directory_does_not_have_is_not_found(
    cli: CommandLine, deep: Path, tmp_path: Path, command: str, name: str
) -> None:
    cli.json("save", "--ref", "main", deep, f"file={deep}/small")
    what = ["--only", name, tmp_path / "out"] if command == "restore" else [name]
    failed = cli(command, "--ref", "main", *what)
    assert failed.exit_code == 3
    assert repr(name) in failed.stderr
    if "etc/nothing" in name:
        assert "'home/etc' has 'conf.d', 'hosts'" in failed.stderr


@pytest.mark.parametrize("options", [[], ["--chunked", "--chunk-size", "4KiB"]])
def test_a_file_in_a_directory_is_read(cli: CommandLine, deep: Path, options: list[str]) -> None:
    cli.json("save", "--ref", "main", *options, deep)
    assert cli.ok("read", "--ref", "main", "home/etc/hosts").stdout == b"hosts"
    assert cli.ok("read", "--ref", "main", os.fsdecode(b"home/caf\xe9")).stdout == b"latin"
    at = ["--offset", "4090", "--size", "8210"]
    content = (deep / "etc/conf.d/large").read_bytes()
    assert cli.ok("read", "--ref", "main", "home/etc/conf.d/large", *at).stdout == content[4090:12300]
    beyond = cli("read", "--ref", "main", "home/etc/hosts", "--offset", "6")
    assert beyond.exit_code == 2


def test_only_the_chunks_of_the_range_are_fetched_from_a_directory(
    cli: CommandLine, deep: Path, tmp_path: Path, server: EmbeddedServer
) -> None:
    where = ["--ref", "main", "--remote-cache", server.url]
    cli.json("save", *where, "--chunked", "--chunk-size", "4KiB", deep)
    other = ["--cache-dir", tmp_path / "other", "--json"]
    done = cli.ok("read", *where, *other, "home/etc/conf.d/large", "--offset", "12288")
    assert done.stdout == b"d" * 4096
    report = json.loads(done.stderr)
    assert report["name"] == "home/etc/conf.d/large"
    assert report["origins"]["remote"]["bytes"] == 4096


def test_what_is_no_file_in_a_directory_is_not_read(cli: CommandLine, deep: Path) -> None:
    cli.json("save", "--ref", "main", deep)
    link = cli("read", "--ref", "main", "home/link")
    assert (link.exit_code, "a symbolic link to 'small'" in link.stderr) == (2, True)
    folder = cli("read", "--ref", "main", "home/etc")
    assert (folder.exit_code, "`restore --only home/etc`" in folder.stderr) == (2, True)


def test_a_directory_is_not_read_as_a_file(cli: CommandLine, home: Path) -> None:
    cli.json("save", "--ref", "main", home)
    failed = cli("read", "--ref", "main", "home")
    assert failed.exit_code == 2
    assert "is a directory" in failed.stderr


def test_the_working_directory_needs_a_name(cli: CommandLine) -> None:
    failed = cli("save", "--ref", "main", ".")
    assert failed.exit_code == 2
    assert "NAME=." in failed.stderr
