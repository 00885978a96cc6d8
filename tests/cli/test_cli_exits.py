"""Errors become one message and one documented exit code, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from pathlib import Path

import click
import pytest
from cli_runner import CommandLine

import cow
from snaploader import errors
from snaploader.cli.output import CheckFailed, explain
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions

ERRORS_PAGE = Path(__file__).parents[2] / "docs/errors.md"
DOCUMENTED = {
    int(code): name
    for code, name in re.findall(r"^\| (\d+) \| `?([A-Za-z]*)`? \|", ERRORS_PAGE.read_text(), re.MULTILINE)
}


def subclasses(base: type[BaseException]) -> list[type[BaseException]]:
    return [base, *(deeper for child in base.__subclasses__() for deeper in subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(errors.SnaploaderError)[1:], ids=lambda kind: kind.__name__)
def test_every_error_ends_with_its_documented_code(kind: type[errors.SnaploaderError]) -> None:
    failure = explain(kind("what happened"))
    assert failure.message == "what happened"
    assert DOCUMENTED[failure.exit_code] == failure.error
    assert issubclass(kind, getattr(errors, failure.error))
    assert kind.__module__ != errors.__name__ or failure.error == kind.__name__


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (cow.OutOfBounds("x"), 2),
        (cow.StoreInUse("x"), 4),
        (cow.CheckpointConflict("x"), 4),
        (cow.TruncatedFile("x"), 10),
        (cow.StoreClosed("x"), 1),
        (OSError(errno.ENOSPC, "full"), 5),
        (OSError(errno.EACCES, "no"), 8),
        (FileNotFoundError(errno.ENOENT, "gone", "name"), 4),
        (MemoryError(), 5),
        (click.UsageError("x"), 2),
        (click.Abort(), 130),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (CheckFailed("x"), 13),
        (RuntimeError("bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_other_errors_end_with_documented_codes(error: BaseException, code: int) -> None:
    assert explain(error).exit_code == code
    assert code in DOCUMENTED


def test_notes_are_part_of_the_message() -> None:
    error = errors.Unavailable("the server is away")
    error.add_note("the snapshot is saved in the local cache")
    assert explain(error).message.endswith("\nthe snapshot is saved in the local cache")


def test_a_defect_says_that_it_is_one() -> None:
    failure = explain(TypeError("odd"))
    assert (failure.error, failure.exit_code) == ("Internal", 1)
    assert "report" in failure.message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["save", "--ref", "main", "missing"], 2, "'missing'"),
        (["save", "--ref", "main", "."], 2, "'.'"),
        (["save", "--ref", "main", "/dev/null"], 2, "regular files"),
        (["save", "file"], 2, "--ref is missing"),
        (["save", "--ref", "main"], 2, "FILE"),
        (["save", "--ref", "main", "--chunk-size", "5000", "--chunked", "file"], 2, "5000"),
        (["save", "--ref", "main", "--chunk-size", "3000", "file"], 2, "chunk size 3000"),
        (["save", "--ref", "main", "--chunk-size", "128MiB", "file"], 2, "chunk size 134217728"),
        (["save", "--ref", "main", "--chunked", "--plain", "file"], 2, "--chunked and --plain"),
        (["read", "--ref", "main", "--offset", "9" * 20, "x"], 2, "too big"),
        (["save", "--ref", "main", "--chunk-size", "huge", "file"], 2, "no size"),
        (["save", "--ref", "~universal", "file"], 2, "~universal"),
        (["save", "--no-share", "file"], 2, "--runner-id"),
        (["save", "--ref", "main", "--group-id", "../up", "file"], 2, "group id"),
        (["restore", "--ref", "main", "file"], 2, "not a folder"),
        (["restore", "--ref", "main", "--snapshot-id", "x", "out"], 2, "exclude each other"),
        (
            ["restore", "--ref", "main", "--remote-timeout", "0", "--remote-cache", "grpc://h:1", "out"],
            2,
            "above 0",
        ),
        (["restore", "--ref", "main", "--remote-cache", "http://localhost", "out"], 2, "grpc://"),
        (["restore", "--ref", "main", "--remote-cache", "nonsense", "out"], 2, "nonsense"),
        (
            ["show", "--ref", "main", "--tls-client-key", "file", "--remote-cache", "grpcs://h:1"],
            2,
            "together",
        ),
        (
            ["show", "--ref", "main", "--tls-certificate", "file", "--remote-cache", "grpc://h:1"],
            2,
            "grpcs://",
        ),
        (
            ["show", "--ref", "main", "--bearer-token-file", "none", "--remote-cache", "grpc://h:1"],
            2,
            "--bearer-token-file: there is no file 'none'",
        ),
        (["--config", "none", "show", "--ref", "main"], 2, "--config: there is no file 'none'"),
        (["show", "--ref", "main", "--config", "."], 2, "--config: '.' is a folder"),
        (["--cache-dir", "file", "show", "--ref", "main", "--netrc", "none"], 2, "--netrc"),
        (["show", "--ref", "main", "--tls-certificate", "none"], 2, "--tls-certificate: there is no file"),
        (["save", "--ref", "main", "--tls-client-certificate", "none", "x"], 2, "--tls-client-certificate:"),
        (["--tls-client-key", "none", "cache", "ls"], 2, "--tls-client-key:"),
        (["cache", "--tls-client-key", "none", "ls"], 2, "--tls-client-key:"),
        (["show", "--ref", "main", "--credential-helper", "./none"], 2, "--credential-helper"),
        (["show", "--ref", "main", "--credential-helper", "./file"], 2, "--credential-helper"),
        (
            ["--netrc", "file", "--bearer-token-file", "file", "--remote-cache", "grpc://h:1", "invalidate"],
            2,
            "one of --bearer-token-file, --credential-helper and --netrc",
        ),
        (["serve", "--listen", "nowhere"], 2, "HOST:PORT"),
        (["serve", "--listen", "127.0.0.1:99999"], 2, "HOST:PORT"),
        (["cache", "rm", "abc"], 2, "too short"),
        (["cache", "rm", "abcdef12"], 3, "cache ls"),
        (["--cache-dir", "file", "cache", "ls"], 2, "file"),
        (["nonsense"], 2, "nonsense"),
        (["save", "--nonsense"], 2, "--nonsense"),
        (["read", "--ref", "main", "--offset", "-1", "x"], 2, "no size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_users_mistake_is_one_message(
    cli: CommandLine,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(file.parent)
    outcome = cli(*arguments)
    assert outcome.exit_code == code
    assert message in outcome.stderr
    assert outcome.stdout == b""
    assert outcome.stderr.startswith("snaploader: error: ")

    as_json = cli(*arguments, "--json")
    record = json.loads(as_json.stderr)
    assert record["exit_code"] == as_json.exit_code == code
    assert record["error"] == DOCUMENTED[code]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(cli: CommandLine, file: Path) -> None:
    file.chmod(0)
    outcome = cli("save", "--ref", "main", file)
    assert outcome.exit_code == 8
    assert str(file) in outcome.stderr


def test_a_file_that_cannot_be_opened(cli: CommandLine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made."""
    real = os.open

    def refuse(path: object, *arguments: object, **options: object) -> int:
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    outcome = cli("save", "--ref", "main", "--chunked", file)
    assert outcome.exit_code == 8
    assert str(file) in outcome.stderr


def test_a_full_disk(cli: CommandLine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cli.ok("save", "--ref", "main", file)
    for name in ("write", "pwrite", "copy_file_range", "sendfile"):
        monkeypatch.setattr(os, name, full)
    file.write_bytes(b"other")
    outcome = cli("save", "--ref", "main", file)
    assert outcome.exit_code == 5
    assert "No space left" in outcome.stderr


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_a_group_of_commands_alone_tells_which_there_are(cli: CommandLine, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == b""
    assert outcome.stderr.startswith("Usage: snaploader")
    assert "Commands:" in outcome.stderr


def test_names_cannot_command_the_terminal(cli: CommandLine, tmp_path: Path) -> None:
    name = "a\x1b[31m\nb"
    (tmp_path / name).write_bytes(b"x")
    texts = [cli.ok("save", "--ref", "main", tmp_path / name).text, cli.ok("show", "--ref", "main").text]
    texts += [cli.ok("restore", "--ref", "main", tmp_path / "out").text]
    texts += [cli("read", "--ref", "main", "none").stderr]
    for text in texts:
        assert "\x1b" not in text
        assert r"a\x1b[31m\nb" in text
    assert cli.json("show", "--ref", "main")["snapshot"]["files"][0]["name"] == name


def test_a_cache_that_is_too_small(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    outcome = cli("--max-cache-size", "64KiB", "save", "--ref", "main", path)
    assert outcome.exit_code == 5
    assert "max_bytes" not in outcome.stderr
    assert "--max-cache-size" in outcome.stderr


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "command", [["save", "--ref", "main", "{file}"], ["restore", "--ref", "main", "out"], ["invalidate"]]
)
def test_a_dead_server_is_unavailable(cli: CommandLine, file: Path, command: list[str]) -> None:
    remote = ["--remote-cache", f"grpc://127.0.0.1:{unused_port()}", "--remote-retries", "0"]
    outcome = cli(*remote, *(part.format(file=file) for part in command))
    assert outcome.exit_code == 6


def test_a_server_that_hangs_is_a_deadline_exceeded(cli: CommandLine) -> None:
    faults = FaultScript(Fault("GetCapabilities", hang=True))
    with EmbeddedServer(faults=faults) as server:
        outcome = cli(
            "--remote-cache",
            server.url,
            "--remote-timeout",
            "0.2s",
            "--remote-retries",
            0,
            "show",
            "--ref",
            "main",
        )
    assert outcome.exit_code == 7


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (ServerOptions(bearer_token="right"), 9),
        (ServerOptions(update_enabled=False), 4),
        (ServerOptions(instance_names=frozenset({"other"})), 2),
    ],
    ids=["unauthenticated", "read-only", "unknown-instance"],
)
def test_what_a_server_refuses_has_its_code(
    cli: CommandLine, file: Path, options: ServerOptions, code: int
) -> None:
    with EmbeddedServer(options=options) as server:
        assert cli("--remote-cache", server.url, "save", "--ref", "main", file).exit_code == code


def test_a_token_from_a_file_is_sent(cli: CommandLine, file: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("right\n")
    with EmbeddedServer(options=ServerOptions(bearer_token="right")) as server:
        cli.ok("--remote-cache", server.url, "--bearer-token-file", token, "save", "--ref", "main", file)


@pytest.mark.parametrize("content", ["", "\n", "two\nlines"])
def test_a_token_file_holds_one_line(cli: CommandLine, tmp_path: Path, content: str) -> None:
    token = tmp_path / "token"
    token.write_text(content)
    outcome = cli("--remote-cache", "grpc://h:1", "--bearer-token-file", token, "invalidate")
    assert outcome.exit_code == 2
    assert "one line" in outcome.stderr


def test_a_save_whose_upload_fails_says_that_it_stands_locally(cli: CommandLine, file: Path) -> None:
    with EmbeddedServer(
        faults=FaultScript(Fault("BatchUpdateBlobs", status="UNAVAILABLE", times=100))
    ) as server:
        outcome = cli("--remote-cache", server.url, "--remote-retries", 0, "save", "--ref", "main", file)
        assert outcome.exit_code == 6
        assert "saved in the local cache" in outcome.stderr
        cli.ok("--remote-cache", server.url, "show", "--ref", "main", "--read-policy", "local-only")
