"""When a schedule is due: where summer time begins and ends, and when the clock is set."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from asyncsup import schedule

# Rules as the C library takes them, which need no zone files.
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"
LORD_HOWE = "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0"
"""Its clocks are changed by half an hour."""


def set_zone(rule: str | None) -> None:
    if rule is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = rule
    time.tzset()


@pytest.fixture(autouse=True)
def zone_of_this_process() -> Iterator[None]:
    before = os.environ.get("TZ")
    yield
    set_zone(before)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(zone: str, expression: str, begin: str, hours: float) -> list[str]:
    """All times in the hours after `begin` (in UTC), as the clock on the wall shows them."""
    set_zone(zone)
    at = utc(begin)
    end, found = at + timedelta(hours=hours), []
    while (then := schedule.next_time(expression, at.astimezone(schedule.LOCAL_ZONE))) and then <= end:
        assert then > at
        at = then
        found.append(at.astimezone(schedule.LOCAL_ZONE).strftime("%d %H:%M %z"))
    return found


@pytest.mark.parametrize(
    ("zone", "expression", "begin", "expected"),
    [
        # The clock goes from 2:00 to 3:00.
        (BERLIN, "30 2 * * *", "2026-03-28 12:00", ["29 03:00 +0200"]),
        (BERLIN, "0 3 * * *", "2026-03-28 12:00", ["29 03:00 +0200"]),
        (BERLIN, "0,30 2,3 * * *", "2026-03-28 12:00", ["29 03:00 +0200", "29 03:30 +0200"]),
        (BERLIN, "30 1 * * *", "2026-03-28 12:00", ["29 01:30 +0100"]),
        (BERLIN, "*/30 2 * * *", "2026-03-28 12:00", []),
        (NEW_YORK, "30 2 * * *", "2026-03-07 20:00", ["08 03:00 -0400"]),
        (NEW_YORK, "0 3 * * *", "2026-03-07 20:00", ["08 03:00 -0400"]),
        # From 2:00 to 2:30.
        (LORD_HOWE, "15 2 * * *", "2026-10-03 02:00", ["04 02:30 +1100"]),
        (LORD_HOWE, "30 2 * * *", "2026-10-03 02:00", ["04 02:30 +1100"]),
        (LORD_HOWE, "0 3 * * *", "2026-10-03 02:00", ["04 03:00 +1100"]),
    ],
)
def test_what_is_due_in_the_hour_that_is_skipped_is_due_once_at_the_change(
    zone: str, expression: str, begin: str, expected: list[str]
) -> None:
    assert times(zone, expression, begin, 20) == expected


@pytest.mark.parametrize(
    ("zone", "expression", "begin", "expected"),
    [
        # The clock goes from 3:00 to 2:00.
        (BERLIN, "30 2 * * *", "2026-10-24 12:00", ["25 02:30 +0200"]),
        (BERLIN, "0,30 2 * * *", "2026-10-24 12:00", ["25 02:00 +0200", "25 02:30 +0200"]),
        (BERLIN, "0 3 * * *", "2026-10-24 12:00", ["25 03:00 +0100"]),
        (BERLIN, "30 2 * * *", "2026-10-25 01:10", []),  # 2:10, for the second time
        # From 2:00 to 1:00.
        (NEW_YORK, "30 1 * * *", "2026-10-31 20:00", ["01 01:30 -0400"]),
        (NEW_YORK, "0 2 * * *", "2026-10-31 20:00", ["01 02:00 -0500"]),
        # From 2:00 to 1:30.
        (LORD_HOWE, "45 1 * * *", "2026-04-04 02:00", ["05 01:45 +1100"]),
        (LORD_HOWE, "15 1 * * *", "2026-04-04 02:00", ["05 01:15 +1100"]),
        (LORD_HOWE, "0 2 * * *", "2026-04-04 02:00", ["05 02:00 +1030"]),
    ],
)
def test_what_is_due_in_the_hour_that_comes_twice_is_due_the_first_time(
    zone: str, expression: str, begin: str, expected: list[str]
) -> None:
    assert times(zone, expression, begin, 20) == expected


@pytest.mark.parametrize(
    ("zone", "begin"),
    [
        (BERLIN, "2026-03-29 00:00"),
        (BERLIN, "2026-10-25 00:00"),
        (NEW_YORK, "2026-03-08 06:00"),
        (NEW_YORK, "2026-11-01 05:00"),
        (LORD_HOWE, "2026-10-03 14:30"),
        (LORD_HOWE, "2026-04-04 14:00"),
    ],
)
def test_an_asterisk_goes_by_the_time_that_passes(zone: str, begin: str) -> None:
    set_zone(zone)
    at = utc(begin)
    for _ in range(36):
        then = schedule.next_time("*/5 * * * *", at.astimezone(schedule.LOCAL_ZONE))
        assert then == at + timedelta(minutes=5)
        at = then


@pytest.mark.parametrize(
    ("zone", "moment", "expected"),
    [
        (BERLIN, "2026-10-25 00:30:00.250", "2026-10-25T02:30:00.250000+02:00"),
        (BERLIN, "2026-10-25 01:30:00.250", "2026-10-25T02:30:00.250000+01:00"),
        (BERLIN, "2026-03-29 01:00", "2026-03-29T03:00:00+02:00"),
        (LORD_HOWE, "2026-04-04 15:15", "2026-04-05T01:45:00+10:30"),
        ("XYZ3", "2026-07-01 12:00", "2026-07-01T09:00:00-03:00"),
        ("No/Such_Zone", "2026-07-01 12:00", "2026-07-01T12:00:00+00:00"),
    ],
)
def test_the_local_zone_is_what_the_c_library_makes_of_tz(zone: str, moment: str, expected: str) -> None:
    set_zone(zone)
    local = utc(moment).astimezone(schedule.LOCAL_ZONE)
    assert local.isoformat() == expected
    assert local.astimezone(UTC) == utc(moment)


class _EndedError(Exception):
    pass


class Clock:
    """A wall clock that is moved by who sleeps, and that somebody sets.

    Args:
        begin: in UTC.
        hours: how long it goes, whatever it shows.
        jumps: after how many hours it is set by how much.
    """

    def __init__(self, begin: str, hours: float, jumps: dict[float, timedelta] | None = None) -> None:
        self.shows = utc(begin)
        self.left = timedelta(hours=hours)
        self.jumps = [(self.left - timedelta(hours=after), by) for after, by in (jumps or {}).items()]
        self.sleeps = 0

    def now(self) -> datetime:
        return self.shows.astimezone(schedule.LOCAL_ZONE)

    async def sleep(self, seconds: float) -> None:
        if self.left <= timedelta(0):
            raise _EndedError
        self.sleeps += 1
        passed = timedelta(seconds=seconds, milliseconds=1)  # no timer is on time to the microsecond
        self.left -= passed
        self.shows += passed
        while self.jumps and self.left <= self.jumps[0][0]:
            self.shows += self.jumps.pop(0)[1]

    async def runs(self, expression: str) -> list[str]:
        """When something with this schedule is started, as the clock on the wall shows it then."""
        started: list[str] = []
        with pytest.raises(_EndedError):
            await schedule.keep(
                {"it": expression},
                lambda name: started.append(self.now().strftime("%d %H:%M")),
                now=self.now,
                sleep=self.sleep,
            )
        return started


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("expression", "begin", "expected"),
    [
        ("30 2 * * *", "2026-03-28 12:00", ["29 03:00"]),
        ("0 3 * * *", "2026-03-28 12:00", ["29 03:00"]),
        ("30 2 * * *", "2026-10-24 12:00", ["25 02:30"]),
        ("45 */1 * * *", "2026-10-24 22:15", [f"25 {hour:02}:45" for hour in (0, 1, 2, 2, *range(3, 19))]),
    ],
)
async def test_through_the_change_everything_is_started_once_and_nothing_spins(
    expression: str, begin: str, expected: list[str]
) -> None:
    set_zone(BERLIN)
    clock = Clock(begin, hours=20)
    assert await clock.runs(expression) == expected
    # A look a minute, and one for each time that is due.
    assert clock.sleeps <= 20 * 60 + 2 * len(expected) + 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("jumps", "expected"),
    [
        # Six hours ahead: what was missed is due once.
        ({0.75: timedelta(hours=6)}, ["10:20", "10:40", "16:46", "17:00", "17:20"]),
        # Back by a little: what has been is not due again.
        ({0.75: timedelta(minutes=-20)}, ["10:20", "10:40", "11:00"]),
        # Back by hours: it had been wrong, and counts from there.
        ({0.75: timedelta(hours=-6)}, ["10:20", "10:40", "05:00", "05:20"]),
        # Ahead, and put right at once.
        ({0.75: timedelta(hours=6), 0.8: timedelta(hours=-6)}, ["10:20", "10:40", "16:46", "11:00", "11:20"]),
    ],
)
async def test_a_clock_that_is_set_starts_nothing_many_times(
    jumps: dict[float, timedelta], expected: list[str]
) -> None:
    set_zone("UTC0")
    clock = Clock("2026-05-05 10:00:30", hours=1.4, jumps=jumps)
    assert [started[-5:] for started in await clock.runs("*/20 * * * *")] == expected
    assert clock.sleeps <= 2 * 84
