"""Where options come from: command line, environment, configuration file, default, in this order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import CommandLine

from snaploader.cli.options import Settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration file where it is looked for by default."""
    path = tmp_path / "config/snaploader/config.toml"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of every session that was made."""
    settings: list[Settings] = []

    class Seen:
        def __init__(self, value: Settings, _output: object) -> None:
            settings.append(value)
            raise KeyboardInterrupt

    monkeypatch.setattr("snaploader.cli.options.Caches", Seen)
    return settings


def max_size(cli: CommandLine, seen: list[Settings], *arguments: object) -> int:
    assert cli(*arguments).exit_code == 130
    return seen[-1].max_cache_size


def test_flag_beats_environment_beats_file_beats_default(
    cli: CommandLine, config: Path, seen: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max_size(cli, seen, "doctor") == 10 << 30
    config.write_text('max-cache-size = "1MiB"\n')
    assert max_size(cli, seen, "doctor") == 1 << 20
    monkeypatch.setenv("SNAPLOADER_MAX_CACHE_SIZE", "2MiB")
    assert max_size(cli, seen, "doctor") == 2 << 20
    assert max_size(cli, seen, "doctor", "--max-cache-size", "3MiB") == 3 << 20


def test_shared_options_may_stand_before_the_command(cli: CommandLine, seen: list[Settings]) -> None:
    assert max_size(cli, seen, "--max-cache-size", "3MiB", "doctor") == 3 << 20
    assert max_size(cli, seen, "--max-cache-size", "3MiB", "cache", "ls") == 3 << 20
    assert max_size(cli, seen, "--max-cache-size", "3MiB", "doctor", "--max-cache-size", "4MiB") == 4 << 20


def test_a_commands_table_beats_the_top_level_for_that_command(
    cli: CommandLine, config: Path, seen: list[Settings]
) -> None:
    config.write_text('max-cache-size = "1MiB"\n[cache.ls]\nmax-cache-size = "2MiB"\n')
    assert max_size(cli, seen, "doctor") == 1 << 20
    assert max_size(cli, seen, "cache", "ls") == 2 << 20
    assert max_size(cli, seen, "cache", "verify") == 1 << 20


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_another_file_can_be_named(
    cli: CommandLine,
    config: Path,
    tmp_path: Path,
    seen: list[Settings],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    config.write_text('max-cache-size = "1MiB"\n')
    other = tmp_path / "other.toml"
    other.write_text("max_cache_size = 77\n")
    if place == "environment":
        monkeypatch.setenv("SNAPLOADER_CONFIG", str(other))
        assert max_size(cli, seen, "doctor") == 77
    elif place == "before":
        assert max_size(cli, seen, "--config", other, "doctor") == 77
    else:
        assert max_size(cli, seen, "doctor", "--config", other) == 77


def test_every_kind_of_value_can_come_from_the_file(
    cli: CommandLine, config: Path, seen: list[Settings], tmp_path: Path
) -> None:
    config.write_text(
        """
        cache-dir = "/somewhere"
        remote-cache = "grpc://host:1"
        remote-timeout = 2.5
        remote-retries = 0
        remote-cache-compression = false
        json = true
        remote-header = { a = "b=c", d = "" }
        """
    )
    assert cli("doctor").exit_code == 130
    assert seen[-1].cache_dir == Path("/somewhere")
    assert seen[-1].remote_cache == "grpc://host:1"
    assert seen[-1].remote_timeout == 2.5
    assert seen[-1].remote_retries == 0
    assert seen[-1].remote_cache_compression is False
    assert seen[-1].remote_header == (("a", "b=c"), ("d", ""))


def test_repeated_values_come_from_lines_of_the_environment(
    cli: CommandLine, seen: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPLOADER_REMOTE_HEADER", "authorization=Bearer a, b\nx-team=t\n")
    assert cli("doctor").exit_code == 130
    assert seen[-1].remote_header == (("authorization", "Bearer a, b"), ("x-team", "t"))


def test_a_commands_own_options_come_from_its_table_and_variables(
    cli: CommandLine, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    config.write_text('ref = "from-file"\n[save]\nchunked = true\nchunk-size = "4KiB"\nproperty = ["a=b"]\n')
    saved = cli.json("save", path)
    assert saved["ref"] == "from-file"
    assert saved["files"][0]["chunks"] == 3
    shown = cli.json("show")
    assert shown["snapshot"]["vm_configuration"]["properties"] == {"a": "b"}
    monkeypatch.setenv("SNAPLOADER_SAVE_CHUNK_SIZE", "8KiB")
    monkeypatch.setenv("SNAPLOADER_REF", "from-environment")
    saved = cli.json("save", path)
    assert saved["ref"] == "from-environment"
    assert saved["files"][0]["chunks"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cache-dri = 'x'", "did you mean 'cache-dir'"),
        ("chunk-size = '1MiB'", "is no option"),
        ('cache-dir = "a\\u0000b"', "contains a NUL character"),
        ("max-cache-size = 'big'", "'max-cache-size'"),
        ("max-cache-size = [1, 2]", "takes one value only"),
        ("max-cache-size = true", "wrong type"),
        ("json = 'yes'", "must be true or false"),
        ("verbose = 'much'", "'verbose'"),
        ("remote-header = 'no equals sign'", "k=v"),
        ("read-policy = 'oldest'", "'read-policy'"),
        ("save = 3", "must be a table"),
        ("[save]\nnonsense = 1", "'save.nonsense'"),
        ("[cache.prune]\ntarget-size = 'x'", "'cache.prune.target-size'"),
        ("[nonsense]\n", "'nonsense' is no option"),
        ("config = 'other.toml'", "is no option"),
        ("this is not TOML", "is not TOML"),
        ("remote-cache = 1979-05-27", "wrong type"),
    ],
)
def test_a_wrong_file_is_a_clear_error(cli: CommandLine, config: Path, content: str, message: str) -> None:
    config.write_text(content)
    outcome = cli("cache", "ls")
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert str(config) in outcome.stderr


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ("ref = 3", "ref", "a string"),
        ("cache-dir = 1.5", "cache-dir", "a string"),
        ("cache-mode = 700", "cache-mode", "a string"),
        ("digest-function = true", "digest-function", "a string"),
        ("remote-retries = '5'", "remote-retries", "an integer"),
        ("remote-retries = 1.0", "remote-retries", "an integer"),
        ("verbose = 1.5", "verbose", "an integer"),
        ("max-cache-size = 1.5", "max-cache-size", "a size"),
        ("remote-timeout = true", "remote-timeout", "a duration"),
        ("share = 1", "share", "true or false"),
        ("remote-header = { a = 7654321 }", "remote-header.a", "a string"),
        ("remote-header = { a = { b = '7654321' } }", "remote-header.a", "a string"),
        ("platform = ['a=b', ['c=d']]", "platform", "a string"),
        ("[save]\nchunk-size = 1.5", "save.chunk-size", "a size"),
        ("[restore]\nonly = { a = 'b' }", "restore.only", "a string"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_key_and_what_is_expected(
    cli: CommandLine, config: Path, content: str, key: str, expected: str
) -> None:
    config.write_text(content)
    outcome = cli("cache", "ls", "--json")
    assert outcome.exit_code == 2
    error = json.loads(outcome.stderr)
    assert error["error"] == "InvalidArgument"
    assert f"{str(config)!r}: {key!r} has a value of the wrong type" in error["message"]
    assert f"must be {expected}" in error["message"]
    assert "7654321" not in error["message"]


def test_a_file_that_is_not_text_is_a_clear_error(cli: CommandLine, config: Path) -> None:
    config.write_bytes(b"\xff\xfe")
    assert cli("cache", "ls").exit_code == 2


def test_shared_options_may_stand_after_the_name_of_a_group(cli: CommandLine, tmp_path: Path) -> None:
    sizes = ["--max-cache-size", "3GiB", "cache", "--max-cache-size", "2GiB", "ls"]
    assert cli.json(*sizes)["max_cache_size_bytes"] == 2 << 30
    assert cli.json(*sizes, "--max-cache-size", "1GiB")["max_cache_size_bytes"] == 1 << 30
    path = tmp_path / "some.toml"
    path.write_text('max-cache-size = "4GiB"')
    assert cli.json("cache", "--config", path, "ls")["max_cache_size_bytes"] == 4 << 30


def test_a_file_that_is_named_must_exist(cli: CommandLine, tmp_path: Path) -> None:
    outcome = cli("--config", tmp_path / "none.toml", "cache", "ls")
    assert outcome.exit_code == 2
    assert "none.toml" in outcome.stderr


@pytest.mark.parametrize(
    "variable", ["SNAPLOADER_MAX_CACHE_SIZE", "SNAPLOADER_REMOTE_RETRIES", "SNAPLOADER_JSON"]
)
def test_a_wrong_variable_is_named(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "nonsense")
    outcome = cli("cache", "ls")
    assert outcome.exit_code == 2
    assert variable in outcome.stderr


def test_help_tells_what_the_default_of_an_on_off_option_means(cli: CommandLine, config: Path) -> None:
    text = " ".join(cli.ok("show", "--help").text.split())
    assert "SNAPLOADER_SHARE; default: yes]" in text
    assert "SNAPLOADER_UNIVERSAL_FALLBACK; default: no]" in text
    assert "SNAPLOADER_REMOTE_CACHE_COMPRESSION; default: yes]" in text
    config.write_text("share = false\n")
    assert "SNAPLOADER_SHARE; default: no]" in " ".join(cli.ok("show", "--help").text.split())
