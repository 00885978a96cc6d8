"""Schedules: their times, those when clocks change, and texts that are none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, strategies as st

from snaploader.errors import InvalidArgument
from snaploader.workspace.schedule import (
    MAX_SCHEDULE_LENGTH,
    Schedule,
    Weekday,
    parse_weekdays,
    weekdays_text,
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def times(schedule: str, after: str, count: int) -> list[str]:
    """The next times after `after`, as the zone's clock shows them, with its offset."""
    parsed, found = Schedule.parse(schedule), [at(after)]
    zone = ZoneInfo(schedule.split()[0].removeprefix("CRON_TZ=")) if "CRON_TZ" in schedule else UTC
    for _ in range(count):
        found.append(parsed.next_after(found[-1]))
    return [f"{moment.astimezone(zone):%m-%d %H:%M %z}" for moment in found[1:]]


BERLIN = "CRON_TZ=Europe/Berlin"
LORD_HOWE = "CRON_TZ=Australia/Lord_Howe"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("2026-05-11T07:29:59.999999+00:00", "2026-05-11T07:30:00+00:00"),
        ("2026-05-11T07:30:00+00:00", "2026-05-12T07:30:00+00:00"),
        ("2026-05-11T07:30:00.000001+00:00", "2026-05-12T07:30:00+00:00"),
        ("2026-05-15T07:30:00+00:00", "2026-05-18T07:30:00+00:00"),
        ("2026-01-05T00:00:00+00:00", "2026-01-05T08:30:00+00:00"),
        ("2026-05-11T12:30:00+14:00", "2026-05-11T07:30:00+00:00"),
    ],
    ids=["just before", "at", "just after", "friday", "winter", "another zone"],
)
def test_the_next_time_is_later_than_the_moment_and_on_the_zones_clock(after, expected):
    found = Schedule.parse(f"{BERLIN} 30 9 * * 1-5").next_after(at(after))
    assert found == at(expected)
    assert found.tzinfo is UTC


def test_without_a_zone_the_schedule_is_in_utc():
    assert Schedule.parse("30 9 * * *").next_after(at("2026-07-01T09:00+00:00")) == at(
        "2026-07-01T09:30+00:00"
    )


CLOCK_CHANGES = {
    "a skipped time counts at the end of the gap": (
        f"{BERLIN} 30 2 * * *",
        "2026-03-28T02:00Z",
        ["03-29 03:00 +0200", "03-30 02:30 +0200"],
    ),
    "several skipped times count once": (
        f"{BERLIN} 0,20,40 2 * * *",
        "2026-03-28T23:00Z",
        ["03-29 03:00 +0200", "03-30 02:00 +0200"],
    ),
    "at the end of the gap itself": (
        f"{BERLIN} 0 3 * * *",
        "2026-03-28T12:00Z",
        ["03-29 03:00 +0200", "03-30 03:00 +0200"],
    ),
    "a time that comes twice counts at its first": (
        f"{BERLIN} 30 2 * * *",
        "2026-10-24T12:00Z",
        ["10-25 02:30 +0200", "10-26 02:30 +0100"],
    ),
    "seen from the hour that comes again": (
        f"{BERLIN} 45 2 * * *",
        "2026-10-25T01:10Z",
        ["10-26 02:45 +0100"],
    ),
    "each half hour goes on through the hour that comes again": (
        f"{BERLIN} */30 * * * *",
        "2026-10-24T23:59Z",
        [
            "10-25 02:00 +0200",
            "10-25 02:30 +0200",
            "10-25 02:00 +0100",
            "10-25 02:30 +0100",
            "10-25 03:00 +0100",
        ],
    ),
    "each hour goes on through the hour that comes again": (
        f"{BERLIN} 15 * * * *",
        "2026-10-24T23:59Z",
        ["10-25 02:15 +0200", "10-25 02:15 +0100", "10-25 03:15 +0100"],
    ),
    "each half hour of the hour that comes again": (
        f"{BERLIN} */30 2 * * *",
        "2026-10-25T00:30Z",
        ["10-25 02:00 +0100", "10-25 02:30 +0100", "10-26 02:00 +0100"],
    ),
    "each half hour across the gap": (
        f"{BERLIN} */30 * * * *",
        "2026-03-29T00:15Z",
        ["03-29 01:30 +0100", "03-29 03:00 +0200", "03-29 03:30 +0200"],
    ),
    "gap of half an hour": (
        f"{LORD_HOWE} 10 2 * * *",
        "2026-10-03T00:00Z",
        ["10-04 02:30 +1100", "10-05 02:10 +1100"],
    ),
    "half an hour that comes twice": (
        f"{LORD_HOWE} 45 1 * * *",
        "2026-04-04T00:00Z",
        ["04-05 01:45 +1100", "04-06 01:45 +1030"],
    ),
    "each quarter across half an hour that comes twice": (
        f"{LORD_HOWE} */15 1-2 * * *",
        "2026-04-04T14:29Z",
        [
            "04-05 01:30 +1100",
            "04-05 01:45 +1100",
            "04-05 01:30 +1030",
            "04-05 01:45 +1030",
            "04-05 02:00 +1030",
        ],
    ),
    "gap at midnight": (
        "CRON_TZ=Asia/Beirut 0 0 * * *",
        "2026-03-28T12:00Z",
        ["03-29 01:00 +0300", "03-30 00:00 +0300"],
    ),
    "far east": (
        "CRON_TZ=Pacific/Kiritimati 30 9 * * 1",
        "2026-05-10T12:00Z",
        ["05-11 09:30 +1400", "05-18 09:30 +1400"],
    ),
    "far east with quarters of an hour and a change": (
        "CRON_TZ=Pacific/Chatham 50 2 * * *",
        "2026-09-25T15:00Z",
        ["09-27 03:45 +1345", "09-28 02:50 +1345"],
    ),
    "a day that was skipped": (
        "CRON_TZ=Pacific/Apia 0 12 30 12 *",
        "2011-12-01T00:00Z",
        ["12-31 00:00 +1400", "12-30 12:00 +1400"],
    ),
    "zone with a half-hour offset": (
        "CRON_TZ=Asia/Kolkata 0 0 * * *",
        "2026-05-10T18:29Z",
        ["05-11 00:00 +0530"],
    ),
    "leap day": ("0 0 29 2 *", "2026-01-01T00:00Z", ["02-29 00:00 +0000", "02-29 00:00 +0000"]),
}


@pytest.mark.parametrize(("schedule", "after", "expected"), CLOCK_CHANGES.values(), ids=CLOCK_CHANGES.keys())
def test_clock_changes(schedule, after, expected):
    assert times(schedule, after, len(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30 9 * *",
        "0 30 9 * * 1-5",
        "60 9 * * *",
        "30 24 * * *",
        "30 9 0 * *",
        "30 9 * 13 *",
        "30 9 * * 8",
        "@daily",
        "30 9 31 2 *",
        "*/0 9 * * *",
        "CRON_TZ= 30 9 * * *",
        "CRON_TZ=Europe/Berlin",
        "CRON_TZ=Mars/Base 30 9 * * *",
        "CRON_TZ=../../etc/passwd 30 9 * * *",
        "CRON_TZ=/etc/localtime 30 9 * * *",
        "CRON_TZ=Europe 30 9 * * *",
        "TZ=Europe/Berlin 30 9 * * *",
        "30 9 * * * " + "#" * MAX_SCHEDULE_LENGTH,
        "CRON_TZ=" + "x" * (MAX_SCHEDULE_LENGTH - 30) + " 30 9 * * *",
        "² 9 * * *",
        "30 9 * * 1\0",
    ],
)
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(InvalidArgument):
        Schedule.parse(text)


def test_a_time_that_never_comes_is_refused():
    with pytest.raises(InvalidArgument, match="never comes"):
        Schedule.parse("0 0 */31 * MON#2")


def test_what_is_no_text_is_refused():
    with pytest.raises(InvalidArgument, match="text"):
        Schedule.parse(None)  # type: ignore[arg-type]


def test_an_unknown_zone_is_named_with_what_to_do():
    with pytest.raises(InvalidArgument, match=r"'Mars/Base' .* use a name such as Europe/Berlin"):
        Schedule.parse("CRON_TZ=Mars/Base 30 9 * * *")


@given(st.text("0123456789*/,-LW#MONJA ", max_size=40))
def test_any_text_is_a_schedule_or_refused(text):
    try:
        schedule = Schedule.parse(text)
    except InvalidArgument:
        return
    assert schedule.next_after(at("2026-01-01T00:00Z")) > at("2026-01-01T00:00Z")


ZONES = ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/Havana", "Asia/Beirut", "Pacific/Chatham"]


@given(
    st.sampled_from(ZONES),
    st.sampled_from(
        ["30 1 * * *", "0,30 0,2,3 * * *", "*/20 * * * *", "15 * * * *", "*/30 0-3 * * *", "5 0 1 */3 *"]
    ),
    st.datetimes(datetime(2020, 1, 1), datetime(2036, 1, 1), timezones=st.just(UTC)),
)
def test_times_rise_and_none_lies_between_a_moment_and_its_next(zone, fields, start):
    schedule = Schedule.parse(f"CRON_TZ={zone} {fields}")
    found = [start]
    for _ in range(4):
        found.append(schedule.next_after(found[-1]))
    for earlier, later in pairwise(found):
        assert earlier < later
        middle = earlier + (later - earlier) / 2
        assert schedule.next_after(middle) == later
        assert schedule.next_after(later - timedelta(microseconds=1)) == later


@given(
    st.sampled_from(ZONES),
    st.sampled_from(range(2020, 2036)),
    st.integers(0, 366 * 24 * 4),
)
def test_a_schedule_of_each_quarter_of_an_hour_has_no_pause_in_any_zone(zone, year, quarters):
    schedule = Schedule.parse(f"CRON_TZ={zone} */15 * * * *")
    start = datetime(year, 1, 1, tzinfo=UTC) + quarters * timedelta(minutes=15)
    assert schedule.next_after(start) == start + timedelta(minutes=15)


WEEKDAYS = {
    "mon": "mon",
    "MON": "mon",
    " Monday , wed": "mon,wed",
    "wed,mon,mon": "mon,wed",
    "mon-fri": "mon,tue,wed,thu,fri",
    "sat-mon": "mon,sat,sun",
    "tue-tue": "tue",
    "mon-sun": "mon,tue,wed,thu,fri,sat,sun",
    "mon-tue,friday-sat": "mon,tue,fri,sat",
}


@pytest.mark.parametrize(("text", "expected"), WEEKDAYS.items())
def test_days_of_the_week_are_names_and_ranges(text, expected):
    days = parse_weekdays(text)
    assert weekdays_text(days) == expected
    assert parse_weekdays(expected) == parse_weekdays(expected.split(",")) == days


@pytest.mark.parametrize(
    "value", ["", ",", "noday", "mon-", "-fri", "mon-fri-sat", "1", 31, None, {}, [], [5]]
)
def test_what_names_no_days_of_the_week_is_refused(value):
    with pytest.raises(InvalidArgument, match="day"):
        parse_weekdays(value)


WORKDAYS = parse_weekdays("mon-fri")
ALLOWED = {
    "an allowed day": ("30 9 * * *", WORKDAYS, "2026-05-11T00:00Z", "2026-05-11T09:30Z"),
    "the weekend is passed over": ("30 9 * * *", WORKDAYS, "2026-05-15T09:30Z", "2026-05-18T09:30Z"),
    "all of a day that is not allowed": ("* * * * *", WORKDAYS, "2026-05-15T23:59Z", "2026-05-18T00:00Z"),
    "all days": ("30 9 * * *", None, "2026-05-15T09:30Z", "2026-05-16T09:30Z"),
    # 23:30 in UTC is Monday's in Berlin already.
    "the zone's day": (f"{BERLIN} 30 1 * * *", {Weekday.MON}, "2026-05-16T00:00Z", "2026-05-17T23:30Z"),
    "and not that of UTC": (f"{BERLIN} 30 1 * * *", {Weekday.SUN}, "2026-05-17T00:00Z", "2026-05-23T23:30Z"),
    "a day of the month": ("0 0 13 * *", {Weekday.FRI}, "2026-05-11T00:00Z", "2026-11-13T00:00Z"),
    "a day of the year": ("0 9 25 12 *", {Weekday.MON}, "2026-05-11T00:00Z", "2028-12-25T09:00Z"),
    "a leap day": ("0 0 29 2 *", {Weekday.MON}, "2026-05-11T00:00Z", "2044-02-29T00:00Z"),
    "never": ("0 9 * * SAT,SUN", WORKDAYS, "2026-05-11T00:00Z", None),
    "never, many times a day": ("* * * * SAT", {Weekday.SUN}, "2026-05-11T00:00Z", None),
}


@pytest.mark.parametrize(("text", "days", "after", "expected"), ALLOWED.values(), ids=ALLOWED.keys())
def test_the_next_allowed_time_is_on_an_allowed_day_of_the_schedules_zone(text, days, after, expected):
    allowed = None if days is None else frozenset(days)
    found = Schedule.parse(text).next_allowed_after(at(after), allowed)
    assert found == (None if expected is None else at(expected))


@given(
    st.sampled_from(ZONES),
    st.sampled_from(["30 1 * * *", "0,30 0,23 * * *", "*/20 * * * *", "0 0 * * *"]),
    st.frozensets(st.sampled_from(Weekday), min_size=1),
    st.datetimes(datetime(2020, 1, 1), datetime(2036, 1, 1), timezones=st.just(UTC)),
)
def test_no_allowed_time_is_passed_over(zone, fields, days, start):
    schedule = Schedule.parse(f"CRON_TZ={zone} {fields}")
    expected = schedule.next_after(start)
    while Weekday.of(expected.astimezone(ZoneInfo(zone))) not in days:
        expected = schedule.next_after(expected)
    assert schedule.next_allowed_after(start, days) == expected
