"""The pages of the command line and of exit codes say what there is, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from snaploader.cli.app import app
from snaploader.cli.config import environment_variable
from snaploader.cli.serve import LIKE
from snaploader.testing import PRESETS

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()
BUILT_IN = {"--help", "--version"}


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


COMMANDS = dict(commands(app))


def test_serve_offers_every_preset() -> None:
    assert sorted(PRESETS) == list(LIKE)


def long_names(command: click.Command) -> set[str]:
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return {name for name in names if name.startswith("--")} - BUILT_IN


def test_every_option_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - BUILT_IN
    assert documented == set().union(*(long_names(command) for command in COMMANDS.values()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"snaploader {name}[ `]", PAGE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_a_variable(name: str) -> None:
    for param in COMMANDS[name].params:
        if isinstance(param, click.Option):
            assert param.help, param
            long = next(option for option in param.opts if option.startswith("--")).removeprefix("--")
            assert param.envvar in {environment_variable(long), environment_variable(long, name)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    with click.Context(command, info_name=name) as ctx:
        text = command.get_help(ctx)
    assert "Options of all commands:" in text
    assert "--cache-dir" in text


def test_no_variable_means_two_different_options() -> None:
    meanings: dict[object, set[tuple[str, str]]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            if isinstance(param, click.Option):
                meanings.setdefault(param.envvar, set()).add((param.opts[-1], str(param.help)))
    assert [variable for variable, options in meanings.items() if len(options) > 1] == []
