"""Cron schedules in a time zone, such as `CRON_TZ=Europe/Berlin 30 9 * * 1-5`.

Five fields: minute, hour, day of month, month, day of week (0 and 7 are Sunday; names such as MON and JAN are
understood, and so are lists, ranges, steps, `L` and `MON#2`). As in Debian's cron, both day fields must match
when one of them begins with a star, else one suffices. Without `CRON_TZ=` the zone is UTC.

When clocks are put forward, a time that is skipped counts at the end of the gap. When they are put back, a
time that comes twice counts at its first; of a schedule whose minute or hour begins with a star, which
repeats through the day, it counts both times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from snaploader.errors import InvalidArgument

MAX_LENGTH = 256
"""Longest schedule, in characters."""

_PREFIX = "CRON_TZ="
_MINUTE = timedelta(minutes=1)
_SOME_DAY = datetime(2000, 1, 1)
"""From which a schedule must have a time within fifty years, or it has none at all."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times that come again and again. Immutable; make one with `parse`."""

    text: str
    """As it was given."""
    _fields: str = field(repr=False)
    _zone: tzinfo = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The schedule that `text` describes.

        Raises:
            InvalidArgument: it is no schedule, its time never comes, or its zone is not known on this host.
        """
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            raise InvalidArgument(f"a schedule is a text of at most {MAX_LENGTH} characters")
        zone, fields = _split(text)
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

    @property
    def _repeats_through_the_day(self) -> bool:
        return any(part.startswith("*") for part in self._fields.split()[:2])

    def _first(self, wall: datetime, fold: int, moment: datetime) -> datetime:
        """The first time after `wall` on the zone's clock that is later than `moment` too.

        The cron library is given the clock's time alone, without zone: its own steps across changes of half
        an hour miss times.
        """
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


def _split(text: str) -> tuple[tzinfo, list[str]]:
    fields = text.split()
    zone: tzinfo = UTC
    if fields and fields[0].startswith(_PREFIX):
        zone = _zone(fields.pop(0).removeprefix(_PREFIX), text)
    if len(fields) != 5:
        raise InvalidArgument(
            f"{text!r} is no schedule: it has {len(fields)} fields and not 5: minute, hour, day of month, "
            "month, day of week"
        )
    return zone, fields


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
