"""The configuration file: TOML whose keys are the long names of options.

Options that commands share stand at the top level; a table named after a command holds the options of
that command, and may repeat shared ones for it alone:

    remote-cache = "grpc://cache.example:8980"
    remote-header = { authorization = "Bearer …" }

    [save]
    chunk-size = "1MiB"

    [cache.prune]
    target-size = "5GiB"

Whatever is not an option is an error, and so is a value of the wrong type: a misspelt key that is
silently without effect costs hours.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from snaploader.cli.values import Duration, KeyValue, Size, check_file
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
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base, "snaploader", "config.toml")


def default_map(path: Path, root: click.Group) -> dict[str, Any]:
    """The file's values as defaults for `root` and all its commands, in the form click wants.

    Raises:
        InvalidArgument: There is no such file, it is not TOML, or a key or a value in it is not known.
        PermissionDenied: It may not be read.
    """
    check_file("--config", path)
    with translate_os_errors(f"cannot read the configuration file {str(path)!r}"), path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidArgument(f"the configuration file {str(path)!r} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        content = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the configuration file {str(path)!r} is not TOML: {error}") from error
    return _Reader(path).group(root, content, shared={}, prefix="")


class _Reader:
    """Turns the tables of one file into defaults."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def group(
        self, group: click.Group, table: Mapping[str, Any], shared: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        """The defaults of a group of commands: its options by name, and one dict for each command."""
        own = {key: value for key, value in table.items() if key not in group.commands}
        shareable = _shareable(group)
        self._check_known(own, [*shareable, *group.commands], prefix)
        shared = {
            **shared,
            **{_name(key): self._value(shareable[_name(key)], own[key], prefix + key) for key in own},
        }
        defaults: dict[str, Any] = dict(shared)
        for name, command in group.commands.items():
            inner = table.get(name, {})
            if not isinstance(inner, dict):
                self._fail(prefix + name, "is the name of a command, so it must be a table")
            defaults[name] = self._command(command, inner, shared, f"{prefix}{name}.")
        return defaults

    def _command(
        self, command: click.Command, table: Mapping[str, Any], shared: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        if isinstance(command, click.Group):
            return self.group(command, table, shared, prefix)
        options = _options(command)
        self._check_known(table, list(options), prefix)
        own = {
            _name(key): self._value(options[_name(key)], value, prefix + key) for key, value in table.items()
        }
        # By the parameter's own name, which differs from the option's in "--json" and the like.
        values = {**shared, **own}
        return {
            str(options[key].name): value
            for key, value in values.items()
            if key in own or (key in options and _is_shared(key, options[key]))
        }

    def _check_known(self, table: Mapping[str, Any], known: list[str], prefix: str) -> None:
        for key in table:
            if _name(key) not in known:
                near = difflib.get_close_matches(_name(key), known, n=1)
                self._fail(prefix + key, "is no option" + (f"; did you mean {near[0]!r}?" if near else ""))

    def _value(self, option: click.Option, value: object, key: str) -> Any:
        """The value as click wants it, after a trial conversion, so that the message can name the file."""
        if isinstance(value, dict) and option.multiple and isinstance(option.type, KeyValue):
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
    if isinstance(option.type, Size):
        return (int, str), "a size: bytes, or a string such as '512KiB'"
    if isinstance(option.type, Duration):
        return (int, float, str), "a duration: seconds, or a string such as '24h'"
    # Modes too: 0700 is no TOML, and the integer 700 is another mode than the string.
    return (str,), "a string"


def _wrong_type(value: object, expected: str) -> str:
    """What is wrong with a value, which is not quoted: it may be a secret."""
    return (
        f"has a value of the wrong type ({_TOML_TYPES.get(type(value), 'date or time')}): must be {expected}"
    )


def _name(key: str) -> str:
    return key.replace("_", "-")


def _options(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their long names, without dashes in front."""
    found = {}
    for param in command.params:
        if isinstance(param, click.Option) and param.name not in {"config", "help", "version"}:
            long = next(name for name in param.opts if name.startswith("--"))
            found[long.removeprefix("--")] = param
    return found


def _shareable(group: click.Group) -> dict[str, click.Option]:
    """The options that may stand at the top level: those that are not of one command only."""
    found = _options(group)
    for command in group.commands.values():
        inner = _shareable(command) if isinstance(command, click.Group) else _options(command)
        found.update({name: option for name, option in inner.items() if _is_shared(name, option)})
    return found


def _is_shared(name: str, option: click.Option) -> bool:
    return option.envvar == environment_variable(name)
