"""Values of options: sizes, durations, key=value pairs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.policy import parse_duration_s

MAX_SIZE = (1 << 63) - 1
"""The largest file offset there is."""

_SIZE = re.compile(r"([0-9]{1,80})(?:\.([0-9]{1,6}))?\s*([A-Za-z]*)")
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1 << 10 * _power, _letter + "ib": 1 << 10 * _power, _letter + "b": 1000**_power}


def parse_size(text: str) -> int:
    """Bytes, from a number with an optional unit: K or KiB is 1024, KB is 1000; likewise M, G, T."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3].lower() not in _UNITS:
        raise InvalidArgument(
            f"{text[:80]!r} is no size: write bytes, or a number and a unit as in 512KiB, 10G"
        )
    factor = _UNITS[match[3].lower()]
    fraction = match[2] or ""
    tail = int(fraction or 0) * factor // int("1" + "0" * len(fraction))
    size = int(match[1]) * factor + tail
    if size > MAX_SIZE:
        raise InvalidArgument(f"{text[:80]!r} is too big: no more than {MAX_SIZE} bytes can be asked for")
    return size


def check_file(option: str, path: Path) -> None:
    """InvalidArgument, naming the option, unless `path` is there and no folder. It is not opened.

    That it is missing is a mistake in the command line, not the answer that something was not found.
    """
    with translate_os_errors(f"{option}: cannot read {str(path)!r}"):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise InvalidArgument(f"{option}: there is no file {str(path)!r}") from None
    if stat.S_ISDIR(status.st_mode):
        raise InvalidArgument(f"{option}: {str(path)!r} is a folder, not a file")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port, from HOST:PORT or [IPv6]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"{text[:80]!r} is not HOST:PORT, such as 127.0.0.1:8980")
    return host.removeprefix("[").removesuffix("]"), int(port)


def printable(text: str, keep: str = "") -> str:
    r"""The text with `\x1b` and the like in place of characters that are no visible ones.

    Names come from manifests that others have written; a terminal must not take them for commands, nor a
    program for more lines than there are.

    Args:
        keep: Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1]
        for character in text
    )


class Parsed(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in recent versions only
    """A type of options whose values a function reads; what it refuses is a usage error.

    Args:
        toml: The types that a value may have in a configuration file, and what messages call them.
    """

    def __init__(
        self,
        name: str,
        parse: Callable[[str], object],
        toml: tuple[tuple[type, ...], str] = ((str,), "a string"),
    ) -> None:
        self.name = name
        self.toml = toml
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, which has been converted already where it is no string."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except InvalidArgument as error:
            self.fail(error.message, param, ctx)

    def split_envvar_value(self, rv: str) -> list[str]:
        """One value on each line of an environment variable, because they may hold spaces and commas."""
        return [line for line in rv.splitlines() if line.strip()]


def size_type(minimum: int = 0) -> Parsed:

    def parse(text: str) -> int:
        size = parse_size(text)
        if size < minimum:
            raise InvalidArgument(f"{size} is too small: at least {minimum} is needed")
        return size

    return Parsed("size", parse, ((int, str), "a size: bytes, or a string such as '512KiB'"))


def _parse_mode(text: str) -> int:
    if not re.fullmatch(r"[0-7]{3,4}", text):
        raise InvalidArgument(f"{text[:20]!r} is not an octal mode such as 0700 or 2770")
    return int(text, 8)


def _parse_pair(text: str) -> tuple[str, str]:
    """A key and its value. Messages never quote them: they may be a secret."""
    key, equals, content = text.partition("=")
    if not equals or not key.strip():
        raise InvalidArgument("an option of this kind is written as k=v, with a key that is not empty")
    return key.strip(), content


ADDRESS = Parsed("address", parse_address)
SIZE = size_type()
DURATION = Parsed(
    "duration", parse_duration_s, ((int, float, str), "a duration: seconds, or a string such as '24h'")
)
# In a file a string: 0700 is no TOML, and the integer 700 is another mode than the string.
MODE = Parsed("mode", _parse_mode)
KEY_VALUE = Parsed("k=v", _parse_pair)


def parse_time(text: str, option: str) -> datetime:
    """A time in ISO 8601; in UTC where it names no zone. InvalidArgument names the option."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"{option} {text[:80]!r} is no time: write it as 2026-01-31T09:30") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def format_size(count: float) -> str:
    """Bytes as a person reads them: `512 B`, `1.5 MiB`."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1023.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def format_time(seconds: float) -> str:
    """A span of time as a person reads it: `3.2 ms`, `1.25 s`."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def time_words(time: datetime) -> str:
    """A time to the minute, in UTC."""
    return f"{time:%Y-%m-%d %H:%M}"
