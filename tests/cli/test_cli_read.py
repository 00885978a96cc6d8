"""`read`: the bytes asked for, on stdout, and no chunk more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_runner import CommandLine, chunked_content

from snaploader.testing import EmbeddedServer

CONTENT = chunked_content(1, 0, 3, 4, 5, 6, 7, 8) + b"tail"


@pytest.fixture
def saved(cli: CommandLine, server: EmbeddedServer, tmp_path: Path) -> list[object]:
    """A host with an empty cache, and the options with which it finds the saved files."""
    (tmp_path / "disk").write_bytes(CONTENT)
    (tmp_path / "plain").write_bytes(b"0123456789")
    remote = ["--remote-cache", server.url]
    cli.ok(
        *remote,
        "save",
        "--ref",
        "main",
        "--chunk-threshold",
        4096,
        "--chunk-size",
        4096,
        tmp_path / "disk",
        tmp_path / "plain",
    )
    return [*remote, "--cache-dir", tmp_path / "other-host", "read", "--ref", "main"]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (4090, 20), (5000, 10), (4096 * 8, 4), (0, len(CONTENT)), (17, 0)]
)
def test_exactly_the_bytes_asked_for(cli: CommandLine, saved: list[object], offset: int, size: int) -> None:
    outcome = cli.ok(*saved, "disk", "--offset", offset, "--size", size)
    assert outcome.stdout == CONTENT[offset : offset + size]


def test_without_a_size_it_reads_to_the_end(cli: CommandLine, saved: list[object]) -> None:
    assert cli.ok(*saved, "disk", "--offset", 4096 * 7).stdout == CONTENT[4096 * 7 :]
    assert cli.ok(*saved, "plain").stdout == b"0123456789"


def test_a_file_kept_whole_can_be_read_in_part(cli: CommandLine, saved: list[object]) -> None:
    assert cli.ok(*saved, "plain", "--offset", 3, "--size", 4).stdout == b"3456"


def test_only_the_chunks_touched_are_fetched(
    cli: CommandLine, saved: list[object], server: EmbeddedServer
) -> None:
    outcome = cli.ok(*saved, "disk", "--offset", 4096 * 2 + 100, "--size", 4096, "--json")
    report = json.loads(outcome.stderr)
    assert report["origins"] == {"remote": {"chunks": 2, "bytes": 8192, "prefetched": 0}}
    assert report["ref"] == "main"
    assert report["size_bytes"] == 4096
    kept = cli.json("--cache-dir", saved[3], "cache", "ls", "--kind", "blob")
    sizes = [int(entry["digest"].partition("/")[2]) for entry in kept["entries"]]
    assert sizes.count(4096) == 2


def test_reading_a_hole_fetches_nothing(cli: CommandLine, saved: list[object]) -> None:
    outcome = cli.ok(*saved, "disk", "--offset", 4096, "--size", 4096, "--json")
    assert outcome.stdout == bytes(4096)
    assert "remote" not in json.loads(outcome.stderr)["origins"]


@pytest.mark.parametrize("name", ["disk", "plain"])
def test_a_range_past_the_end_is_an_error_and_prints_nothing(
    cli: CommandLine, saved: list[object], name: str
) -> None:
    outcome = cli(*saved, name, "--offset", 5, "--size", "1MiB")
    assert (outcome.exit_code, outcome.stdout) == (2, b"")
    assert "--size" in outcome.stderr


def test_a_name_that_is_not_there_is_not_found(cli: CommandLine, saved: list[object]) -> None:
    outcome = cli(*saved, "disc")
    assert outcome.exit_code == 3
    assert "'disk', 'plain'" in outcome.stderr


def test_without_local_chunks_nothing_is_kept(cli: CommandLine, saved: list[object]) -> None:
    outcome = cli.ok(*saved, "disk", "--without", "local-chunks", "--read-policy", "remote-only")
    assert outcome.stdout == CONTENT
    assert cli.json("--cache-dir", saved[3], "cache", "ls", "--kind", "blob")["entries"] == []


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--without", "remote-chunks"], 3, "incomplete"),
        (["--without", "remote-manifests"], 3, "no local manifest"),
        (["--without", "remote-manifests", "--read-policy", "remote-only"], 4, "no manifests could be read"),
        (["--without", "remote-chunks", "--without", "local-chunks"], 2, "no chunks could be read"),
    ],
)
def test_what_is_not_to_be_read_is_not_read(
    cli: CommandLine, saved: list[object], options: list[str], exit_code: int, words: str
) -> None:
    outcome = cli(*saved, "disk", *options)
    assert (outcome.exit_code, outcome.stdout) == (exit_code, b"")
    assert words in outcome.stderr


def test_details_are_told_when_asked_for(cli: CommandLine, saved: list[object]) -> None:
    assert "1 chunks from remote" in cli.ok(*saved, "disk", "--size", 1, "-v").stderr
    assert cli.ok(*saved, "disk", "--size", 1).stderr == ""


def test_readahead_does_not_leave_the_range(cli: CommandLine, saved: list[object], tmp_path: Path) -> None:
    content = os.urandom(4096 * 64)
    (tmp_path / "long").write_bytes(content)
    remote = saved[:2]
    cli.ok(*remote, "save", "--ref", "long", "--chunked", "--chunk-size", 4096, tmp_path / "long")
    host = [*remote, "--cache-dir", tmp_path / "reader"]
    outcome = cli.ok(*host, "read", "--ref", "long", "long", "--offset", 4096 * 5, "--size", 4096 * 9)
    assert outcome.stdout == content[4096 * 5 : 4096 * 14]
    blobs = cli.json(*host, "cache", "ls", "--kind", "blob")["entries"]
    assert sum(entry["digest"].endswith("/4096") for entry in blobs) == 9
