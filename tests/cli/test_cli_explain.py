"""`explain`: why a task gets the snapshot that it gets."""

from __future__ import annotations

from pathlib import Path

from cli_runner import CommandLine

from snaploader.testing import EmbeddedServer


def test_it_tells_what_is_under_every_key(cli: CommandLine, server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    remote = ["--remote-cache", server.url]
    cli.ok(*remote, "save", "--ref", "main", tmp_path / "disk")
    topic = ["--ref", "topic", "--default-ref", "main", "--cache-dir", tmp_path / "other"]
    found = cli.json(*remote, "explain", *topic)
    rules = [(m["source"], m["rule"]) for key in found["keys"] for m in key["manifests"]]
    assert rules == [("local", "absent"), ("remote", "absent"), ("local", "absent"), ("remote", "whole")]
    assert [key["is_chosen"] for key in found["keys"]] == [False, True]
    assert found["chosen"]["source"] == "remote"
    text = cli.ok(*remote, "explain", *topic).stdout.decode()
    assert "chosen    ref 'main' from the remote cache" in text
    assert "whole (chosen)" in text


def test_a_snapshot_is_explained_by_its_id(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"disk")
    cli.ok("save", "--ref", "main", "--snapshot-id", "one", tmp_path / "disk")
    assert cli.json("explain", "--snapshot-id", "one")["chosen"]["snapshot_id"] == "one"
    text = cli.ok("explain", "--snapshot-id", "one").stdout.decode()
    assert "chosen    snapshot one from the local cache" in text
    assert "version   (none): these keys have none" in text


def test_no_snapshot_and_no_server_are_no_errors(cli: CommandLine, tmp_path: Path) -> None:
    assert "chosen    none" in cli.ok("explain", "--ref", "main").stdout.decode()
    (tmp_path / "disk").write_bytes(b"disk")
    with EmbeddedServer() as server:
        remote = ["--remote-cache", server.url, "--remote-retries", 0]
        cli.ok(*remote, "save", "--ref", "main", tmp_path / "disk")
    found = cli.json(*remote, "explain", "--ref", "main")
    assert [m["rule"] for m in found["keys"][0]["manifests"]] == ["whole", "failed"]
    assert found["chosen"]["source"] == "local"
