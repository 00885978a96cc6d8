"""Types of columns: the same values in and out on every database, checked on the way in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import BigInteger, Dialect, Text, TypeDecorator
from sqlalchemy.types import TypeEngine

from snaploader.errors import InvalidArgument

MAX_WORD_LENGTH = 255
"""Longest name, id or key, in characters; databases limit what an index takes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

E = TypeVar("E", bound=StrEnum)


class Moment(TypeDecorator[datetime]):
    """A time as whole microseconds since 1970 in UTC: sorts, compares and rounds alike everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Microseconds. InvalidArgument for a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise InvalidArgument(f"time {value} has no time zone: use aware ones")
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """An aware time in UTC."""
        return None if value is None else _EPOCH + value * _MICROSECOND


class Prose(TypeDecorator[str]):
    """Any text that every database can hold."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text. InvalidArgument for one with a zero byte or half a surrogate pair."""
        if value is None:
            return None
        _check_text(value)
        return value


class Word(TypeDecorator[str]):
    """A name, id or key of at most 255 characters. Sorts by code points, whatever a database's language."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text; PostgreSQL sorts it as people of the database's language do, unless told otherwise."""
        return Text(collation="C") if dialect.name == "postgresql" else Text()

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text. InvalidArgument as for `Prose`, and when it is too long."""
        if value is None:
            return None
        _check_text(value)
        if len(value) > MAX_WORD_LENGTH:
            raise InvalidArgument(
                f"{value[:40]!r}… has {len(value)} characters: a name may have no more than {MAX_WORD_LENGTH}"
            )
        return value


class OptionalWord(Word):
    """A `Word` whose absence is NULL in the database and empty text outside, so that keys can refer to it."""

    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """None for empty text."""
        return super().process_bind_param(value or None, dialect)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str:
        """Empty text for NULL."""
        return value or ""


class Choice(TypeDecorator[E], Generic[E]):
    """One value of an enumeration, as its text."""

    impl = Text
    cache_ok = True

    def __init__(self, enumeration: type[E]) -> None:
        super().__init__()
        self.enumeration = enumeration

    def process_bind_param(self, value: E | None, dialect: Dialect) -> str | None:
        """Its text. InvalidArgument when it is none of the enumeration."""
        if value is None:
            return None
        try:
            return self.enumeration(value).value
        except ValueError:
            raise InvalidArgument(f"{value!r} is no {self.enumeration.__name__}") from None

    def process_result_value(self, value: str | None, dialect: Dialect) -> E | None:
        """The value of that text."""
        return None if value is None else self.enumeration(value)


class Document(TypeDecorator[Mapping[str, Any]]):
    """A JSON object, in ASCII: what is escaped can be any text, also what no database holds otherwise."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Dialect) -> str | None:
        """JSON. InvalidArgument for what JSON does not know."""
        if value is None:
            return None
        try:
            return json.dumps(dict(value), separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"this cannot be written as JSON: {error}") from error

    def process_result_value(self, value: str | None, dialect: Dialect) -> Mapping[str, Any] | None:
        """The object as a dict."""
        return None if value is None else json.loads(value)


def _check_text(value: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"text is wanted, not {type(value).__name__}")
    if "\0" in value:
        raise InvalidArgument(f"text {value[:40]!r} has a zero byte, which no database holds")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"text {value[:40]!r} is no Unicode") from None
