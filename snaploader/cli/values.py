"""Values of options: sizes, durations, key=value pairs."""

from __future__ import annotations

import os
import re
import stat
from datetime import datetime
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


def parse_address(text: str, option: str = "--listen") -> tuple[str, int]:
    """Host and port, from HOST:PORT or [IPv6]:PORT, which `option` was given as."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"{option} {text[:80]!r} is not HOST:PORT, such as 127.0.0.1:8980")
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


class _Parsed(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in recent versions only
    """A type of options whose values a function reads; what it refuses is a usage error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, which has been converted already where it is no string."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except InvalidArgument as error:
            self.fail(error.message, param, ctx)

    def parse(self, text: str) -> Any:
        """The value that a text stands for."""
        raise NotImplementedError


class Size(_Parsed):
    """A number of bytes."""

    name = "size"

    def __init__(self, minimum: int = 0) -> None:
        self._minimum = minimum

    def parse(self, text: str) -> int:
        """The bytes; see `parse_size`."""
        size = parse_size(text)
        if size < self._minimum:
            raise InvalidArgument(f"{size} is too small: at least {self._minimum} is needed")
        return size


class ChunkSize(Size):
    """The size of a chunk."""

    def parse(self, text: str) -> int:
        """The bytes, where chunks can be of this size."""
        from snaploader.formats.chunktable import check_geometry

        size = super().parse(text)
        check_geometry(0, size)
        return size


class Duration(_Parsed):
    """A number of seconds."""

    name = "duration"

    def parse(self, text: str) -> float:
        """The seconds, from a number with an optional unit: s, m, h or d."""
        return parse_duration_s(text)


class Mode(_Parsed):
    """Permission bits, octal as for chmod(1)."""

    name = "mode"

    def parse(self, text: str) -> int:
        """The number."""
        if not re.fullmatch(r"[0-7]{3,4}", text):
            raise InvalidArgument(f"{text[:20]!r} is not an octal mode such as 0700 or 2770")
        return int(text, 8)


class KeyValue(_Parsed):
    """A pair written as k=v. In an environment variable there is one pair on each line."""

    name = "k=v"

    def parse(self, text: str) -> tuple[str, str]:
        """The pair, split at the first equals sign. Messages never quote it: it may be a secret."""
        key, equals, content = text.partition("=")
        if not equals or not key.strip():
            raise InvalidArgument("an option of this kind is written as k=v, with a key that is not empty")
        return key.strip(), content

    def split_envvar_value(self, rv: str) -> list[str]:
        """One pair per line, because values may hold spaces and commas."""
        return [line for line in rv.splitlines() if line.strip()]


SIZE = Size()
DURATION = Duration()
MODE = Mode()
KEY_VALUE = KeyValue()


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


def time_words(time: datetime | None) -> str:
    """A time to the minute, in UTC."""
    return "-" if time is None else f"{time:%Y-%m-%d %H:%M}"
