"""When workspaces are started by themselves: schedules, and the days of the week that are allowed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta, tzinfo
from enum import StrEnum
from functools import lru_cache
from itertools import count
from typing import Any, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from snaploader.errors import InvalidArgument

MAX_SCHEDULE_LENGTH = 256
"""Longest schedule, in characters."""

_PREFIX = "CRON_TZ="
_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)
_RESOLUTION = timedelta(microseconds=1)
_SOME_DAY = datetime(2000, 1, 1)
"""A schedule that has no time within fifty years of this day has none at all."""
_DAYS_TRIED = 100
"""A schedule whose first so many days since then are none of certain days of the week never is on one.

Each day of the week is among them for schedules of every week, and of certain days of each month or year.
"""


class Weekday(StrEnum):
    """A day of the week, Monday first."""

    MON = "mon"
    TUE = "tue"
    WED = "wed"
    THU = "thu"
    FRI = "fri"
    SAT = "sat"
    SUN = "sun"

    @classmethod
    def of(cls, day: datetime) -> Weekday:
        """The day of the week on the clock of the zone that `day` is in."""
        return _WEEK[day.weekday()]


_WEEK = tuple(Weekday)


def parse_weekdays(value: Any) -> frozenset[Weekday]:
    """The days that a text such as "mon-fri" or "mon,wed,sat" names, or a list of such names.

    Names may be written out, in any case; a range may go over the end of the week, as "sat-mon" does.
    InvalidArgument when one is no day, or there is none.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, bytes | dict):
        raise InvalidArgument(f"{value!r} names no days of the week: write mon-fri, or mon,wed,sat")
    days: set[Weekday] = set()
    for part in parts:
        first, dash, last = str(part).partition("-")
        start = _WEEK.index(_weekday(first))
        more = (_WEEK.index(_weekday(last)) - start) % len(_WEEK) if dash else 0
        days.update(_WEEK[(start + each) % len(_WEEK)] for each in range(more + 1))
    if not days:
        raise InvalidArgument("at least one day of the week must be named")
    return frozenset(days)


def weekdays_text(days: Collection[Weekday]) -> str:
    """The text that `parse_weekdays` takes: the names in the order of the week."""
    return ",".join(day.value for day in _WEEK if day in days)


def _weekday(name: str) -> Weekday:
    name = name.strip().lower()
    for day, written_out in zip(_WEEK, _WRITTEN_OUT, strict=True):
        if name in {day.value, written_out}:
            return day
    raise InvalidArgument(f"{name[:40]!r} is no day of the week: the days are {', '.join(_WEEK)}")


_WRITTEN_OUT = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times that come again and again, written as cron does: `CRON_TZ=Europe/Berlin 30 9 * * 1-5`.

    Immutable; make one with `parse`.

    Five fields: minute, hour, day of month, month, day of week (0 and 7 are Sunday; names such as MON and JAN
    are understood, and so are lists, ranges, steps, `L` and `MON#2`). As in Debian's cron, both day fields
    must match when one of them begins with a star, else one suffices. Without `CRON_TZ=` the zone is UTC.

    When clocks are put forward, a time that is skipped counts at the end of the gap. When they are put back,
    a time that comes twice counts at its first; of a schedule whose minute or hour begins with a star, which
    repeats through the day, it counts both times.
    """

    text: str
    """The schedule as it was given."""
    _fields: str = field(repr=False)
    _zone: tzinfo = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The schedule that `text` describes.

        Raises:
            InvalidArgument: it is no schedule, its time never comes, or its zone is not known on this host.
        """
        if not isinstance(text, str) or len(text) > MAX_SCHEDULE_LENGTH:
            raise InvalidArgument(f"a schedule is a text of at most {MAX_SCHEDULE_LENGTH} characters")
        fields = text.split()
        zone: tzinfo = UTC
        if fields and fields[0].startswith(_PREFIX):
            zone = _zone(fields.pop(0).removeprefix(_PREFIX), text)
        if len(fields) != 5:
            raise InvalidArgument(
                f"{text!r} is no schedule: it has {len(fields)} fields and not 5: minute, hour, "
                "day of month, month, day of week"
            )
        try:
            next(CronSim(" ".join(fields), _SOME_DAY))
        except (CronSimError, ValueError) as error:
            raise InvalidArgument(
                f"{text!r} is no schedule: {error}. Write it as in 'CRON_TZ=Europe/Berlin 30 9 * * 1-5'"
            ) from error
        except StopIteration:
            raise InvalidArgument(f"the time of schedule {text!r} never comes") from None
        return cls(text, " ".join(fields), zone)

    def next_after(self, moment: datetime) -> datetime:
        """The first time of the schedule that is later than `moment` (aware), in UTC."""
        local = moment.astimezone(self._zone)
        wall = local.replace(tzinfo=None, fold=0)
        if not self._repeats_through_the_day:
            return self._first(wall, 0, moment)
        found = self._first(wall, local.fold, moment)
        put_back = _offset(local) - _offset(local.replace(fold=1))
        if put_back > timedelta(0):
            # This is the first pass of an hour that comes twice: what was passed already comes again.
            found = min(found, self._first(wall - put_back, 1, moment))
        return found

    def next_allowed_after(
        self, moment: datetime, weekdays: frozenset[Weekday] | None = None
    ) -> datetime | None:
        """The first time later than `moment` (aware) that is on one of these days of the week, in UTC.

        The day is the one that the clock of the schedule's zone shows. None: there is no such time, as on
        Mondays for `0 9 * * SAT`.

        Args:
            weekdays: The days that are allowed; None: all.
        """
        if weekdays is None:
            return self.next_after(moment)
        return self._next_on(weekdays, moment) if _is_ever_on(self.text, weekdays) else None

    def _next_on(
        self, weekdays: frozenset[Weekday], moment: datetime, most_days: int | None = None
    ) -> datetime | None:
        """The same; None: it is on none of the first `most_days` days on which the schedule has a time."""
        for _ in count() if most_days is None else range(most_days):
            found = self.next_after(moment)
            local = found.astimezone(self._zone)
            if Weekday.of(local) in weekdays:
                return found
            tomorrow = datetime.combine(local.date() + _DAY, time(), self._zone).astimezone(UTC)
            moment = max(found, tomorrow - _RESOLUTION)
        return None

    @property
    def _repeats_through_the_day(self) -> bool:
        return any(part.startswith("*") for part in self._fields.split()[:2])

    def _first(self, wall: datetime, fold: int, moment: datetime) -> datetime:
        """The first time after `wall` on the zone's clock that is later than `moment` too."""
        # The library is given no zone: its own steps across changes of half an hour miss times.
        times = CronSim(self._fields, wall)
        while (found := self._in_utc(next(times), fold)) <= moment:
            continue
        return found

    def _in_utc(self, wall: datetime, fold: int) -> datetime:
        while True:
            found = wall.replace(tzinfo=self._zone, fold=fold).astimezone(UTC)
            if found.astimezone(self._zone).replace(tzinfo=None) == wall:
                return found
            wall += _MINUTE  # skipped on this zone's clock


@lru_cache(maxsize=1024)
def parse_schedule(text: str) -> Schedule:
    """Like `Schedule.parse`, and remembers."""
    return Schedule.parse(text)


@lru_cache(maxsize=1024)
def _is_ever_on(text: str, weekdays: frozenset[Weekday]) -> bool:
    """Whether a schedule ever has a time on these days of the week."""
    start = _SOME_DAY.replace(tzinfo=UTC)
    return parse_schedule(text)._next_on(weekdays, start, _DAYS_TRIED) is not None


def _zone(name: str, text: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError) as error:
        raise InvalidArgument(
            f"the time zone {name!r} of schedule {text!r} is not known on this host: use a name such as "
            "Europe/Berlin; if the host has no time zones at all, install its package tzdata"
        ) from error


def _offset(local: datetime) -> timedelta:
    offset = local.utcoffset()
    assert offset is not None
    return offset
