"""Sizes, durations, pairs."""

from __future__ import annotations

import click
import pytest

from snaploader.cli.values import (
    DURATION,
    KEY_VALUE,
    format_size,
    format_time,
    parse_size,
    printable,
    size_type,
)
from snaploader.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("1.5MiB", 3 << 19),
        ("0.5 GB", 500_000_000),
        ("2T", 2 << 40),
        (" 3M ", 3 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1X", "K", "1e3", "1.KiB", "one", "1 2", "9" * 90])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is no size"):
        parse_size(text)


def test_a_size_below_the_minimum_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="at least 5"):
        size_type(5).convert("4", None, None)


def test_durations() -> None:
    assert DURATION.convert("90m", None, None) == 5400
    assert DURATION.convert(2, None, None) == 2
    with pytest.raises(click.BadParameter, match="no duration"):
        DURATION.convert("soon", None, None)


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert KEY_VALUE.convert("a=b=c", None, None) == ("a", "b=c")
    assert KEY_VALUE.convert("a=", None, None) == ("a", "")


@pytest.mark.parametrize("text", ["secret", "=secret", " =secret"])
def test_a_message_about_a_pair_does_not_tell_it(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        KEY_VALUE.convert(text, None, None)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert format_size(count) == text


def test_times_for_people() -> None:
    assert format_time(0.0123) == "12.3 ms"
    assert format_time(12.345) == "12.35 s"


@pytest.mark.parametrize("text", ["99999999999999999999", "9223372036854775808", "9000000000000T"])
def test_a_size_beyond_any_file_is_too_big(text: str) -> None:
    with pytest.raises(InvalidArgument, match="too big"):
        parse_size(text)
    assert parse_size("9223372036854775807") == (1 << 63) - 1


def test_what_is_not_visible_is_made_so() -> None:
    assert printable("größe → 1.img") == "größe → 1.img"
    assert printable("a\x1b[31m\nb\x9b\u202ec\udc80") == r"a\x1b[31m\nb\x9b\u202ec\udc80"
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"
