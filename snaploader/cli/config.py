"""The configuration file: TOML whose keys are the long names of options, as docs/cli.md shows.

Options that commands share stand at the top level; a table named after a command holds the options of
that command, and may repeat shared ones for it alone. Whatever is not an option is an error, and so is a
value of the wrong type: a misspelt key that is silently without effect costs hours.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from snaploader.cli.values import KEY_VALUE, Parsed, check_file
from snaploader.errors import InvalidArgument, translate_os_errors

MAX_CONFIG_BYTES = 1 << 20
ENVIRONMENT_PREFIX = "SNAPLOADER_"

_TOML_TYPES = {bool: "boolean", dict: "table", float: "float", int: "integer", list: "array", str: "string"}


def environment_variable(long_name: str, scope: str = "") -> str:
    """The environment variable of an option, given without dashes in front.

    Args:
        scope: The command, for an option that only one command has.
    """
    words = " ".join(part for part in (scope, long_name) if part)
    return ENVIRONMENT_PREFIX + words.upper().replace("-", "_").replace(" ", "_")


def default_path() -> Path:
    """Where the file is looked for when nobody says where: in the user's configuration folder."""
    import platformdirs

    return platformdirs.user_config_path("snaploader", appauthor=False) / "config.toml"


class ConfigFile:
    """What one file says. Of the commands only those that it has tables of are imported.

    Args:
        root: The command that all others are in.
        shared: The options that may stand at its top, and in every table, by long name.

    Raises:
        InvalidArgument: There is no such file, it is not TOML, or not all that it says is known and of the
            right type.
        PermissionDenied: It may not be read.
    """

    def __init__(self, path: Path, root: click.Group, shared: Mapping[str, click.Option]) -> None:
        self._path = path
        self._root = root
        self._shared = shared
        check_file("--config", path)
        what = f"the configuration file {str(path)!r}"
        with translate_os_errors(f"cannot read {what}"), path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise InvalidArgument(f"{what} is larger than {MAX_CONFIG_BYTES} bytes")
        try:
            self._content: dict[str, Any] = tomllib.loads(data.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{what} is not TOML: {error}") from error
        self._check(root, self._content, "")

    def _check(self, command: click.Command, table: Mapping[str, Any], prefix: str) -> None:
        commands = command.commands if isinstance(command, click.Group) else {}
        own = [key for key in table if key not in commands]
        known = self._known(command, is_root=not prefix) if own else {}
        for key in own:
            if _name(key) not in known:
                near = difflib.get_close_matches(_name(key), [*known, *commands], n=1)
                self._fail(prefix + key, "is no option" + (f"; did you mean {near[0]!r}?" if near else ""))
            self._value(known[_name(key)], table[key], prefix + key)
        for name in table:
            if name in commands:
                if not isinstance(table[name], dict):
                    self._fail(prefix + name, "is the name of a command, so it must be a table")
                self._check(commands[name], table[name], f"{prefix}{name}.")

    def defaults(self, path: Sequence[str]) -> dict[str, Any]:
        """The defaults of the options of a command, by the names of its parameters.

        Args:
            path: The names of the groups that the command is in, and its own; without any it is the root.
        """
        command: click.Command = self._root
        tables: list[tuple[click.Command, Mapping[str, Any]]] = [(command, self._content)]
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
            tables.append((command, tables[-1][1].get(name, {})))
        options = options_of(command)
        found: dict[str, Any] = {}
        for holder, table in tables:
            for key, value in table.items():
                name = _name(key)
                # By the parameter's own name, which differs from the option's in "--json" and the like.
                if name in options and (holder is command or _is_shared(name, options[name])):
                    found[str(options[name].name)] = self._value(options[name], value, key)
        return found

    def _known(self, command: click.Command, *, is_root: bool) -> dict[str, click.Option]:
        """What may stand in the table of a command; in that of a group, what its commands share."""
        known = options_of(command)
        if is_root:
            known.update(self._shared)
        elif isinstance(command, click.Group):
            for inner in command.commands.values():
                options = self._known(inner, is_root=False)
                known.update({name: option for name, option in options.items() if _is_shared(name, option)})
        return known

    def _value(self, option: click.Option, value: object, key: str) -> Any:
        """The value as click wants it, after a trial conversion, so that the message can name the file."""
        if isinstance(value, dict) and option.multiple and option.type is KEY_VALUE:
            for name, content in value.items():
                if not isinstance(content, str):
                    self._fail(f"{key}.{name}", _wrong_type(content, "a string"))
            value = [f"{name}={content}" for name, content in value.items()]
        if option.multiple:
            if not isinstance(value, list):
                value = [value]
        elif isinstance(value, list | dict):
            self._fail(key, "takes one value only")
        types, expected = _expected(option)
        for item in value if isinstance(value, list) else [value]:
            if type(item) not in types:  # not isinstance: true and false are integers to it
                self._fail(key, _wrong_type(item, expected))
            if "\0" in str(item):
                self._fail(key, "contains a NUL character")
            try:
                option.type.convert(item if option.is_flag or option.count else str(item), option, None)
            except click.BadParameter as error:
                self._fail(key, error.message)
        if option.is_flag or option.count:
            return value
        return [str(item) for item in value] if isinstance(value, list) else str(value)

    def _fail(self, key: str, problem: str) -> None:
        raise InvalidArgument(f"configuration file {str(self._path)!r}: {key!r} {problem}")


def _expected(option: click.Option) -> tuple[tuple[type, ...], str]:
    """The types of TOML that a value of an option may have, and how messages call them."""
    if option.is_flag:
        return (bool,), "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return (int,), "an integer"
    return option.type.toml if isinstance(option.type, Parsed) else ((str,), "a string")


def _wrong_type(value: object, expected: str) -> str:
    """What is wrong with a value, which is not quoted: it may be a secret."""
    return (
        f"has a value of the wrong type ({_TOML_TYPES.get(type(value), 'date or time')}): must be {expected}"
    )


def _name(key: str) -> str:
    return key.replace("_", "-")


def long_name(option: click.Option) -> str:
    """The name of an option that begins with two dashes, without them."""
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")


def options_of(command: click.Command) -> dict[str, click.Option]:
    found = [param for param in command.params if isinstance(param, click.Option)]
    return {long_name(each): each for each in found if each.name not in {"config", "help", "version"}}


def _is_shared(name: str, option: click.Option) -> bool:
    return option.envvar == environment_variable(name)
